package upstream

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// taken returns how many of n retries are allowed.
func taken(b *Budget, n int) (got int) {
	for range n {
		if b.TakeRetry() {
			got++
		}
	}
	return got
}

// TestBudget: retries are a share of the requests of the last ten seconds or so
// and a few more.
func TestBudget(t *testing.T) {
	for _, c := range []struct {
		name             string
		percent          int
		second           int // requests in each
		seconds          int
		least, most      int // retries at once after that
		leastNow, mostIn int // retries in the second after that
	}{
		{"at first", 20, 0, 0, 30, 30, 2, 3},
		{"idle for long", 20, 0, 3600, 30, 30, 2, 3},
		{"few", 20, 5, 100, 39, 40, 2, 5},
		{"many", 20, 1000, 100, 2000, 2030, 3, 210},
		{"many for a second", 20, 1000, 1, 215, 230, 3, 210},
		{"all", 100, 100, 100, 1000, 1030, 3, 110},
		{"none", -1, 100, 100, 0, 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				g := take(t, s, Settings{RetryPercent: c.percent}, a)
				for range c.seconds {
					for range c.second {
						g.Budget.Request()
					}
					time.Sleep(time.Second)
				}
				if c.seconds == 3600 && g.Budget.requests.Load() != 0 {
					t.Error("requests from nowhere")
				}
				if got := taken(&g.Budget, 10000); got < c.least || got > c.most {
					t.Errorf("%d retries at once, want %d to %d", got, c.least, c.most)
				}
				for range c.second {
					g.Budget.Request()
				}
				time.Sleep(time.Second)
				if got := taken(&g.Budget, 10000); got < c.leastNow || got > c.mostIn {
					t.Errorf("%d retries a second later, want %d to %d", got, c.leastNow, c.mostIn)
				}
			})
		})
	}
}

// TestBudgetFades: what requests have allowed is no longer worth anything a
// minute later.
func TestBudgetFades(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		for range 10000 {
			g.Budget.Request()
		}
		taken(&g.Budget, 1)
		time.Sleep(2 * time.Minute)
		if got := taken(&g.Budget, 10000); got != 30 {
			t.Errorf("%d retries, want 30", got)
		}
	})
}

func TestBudgetTogether(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		var got atomic.Int64
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range 100 {
					g.Budget.Request()
					got.Add(int64(taken(&g.Budget, 2)))
				}
			})
		}
		all.Wait()
		if got := got.Load(); got < 185 || got > 190 {
			t.Errorf("%d retries of 800 requests, want 160 and 30", got)
		}
		if n.meters.Retries.Value() != uint64(got.Load()) {
			t.Errorf("the meter says %d, want %d", n.meters.Retries.Value(), got.Load())
		}
	})
}

func BenchmarkBudget(bench *testing.B) {
	s := NewSet(Options{})
	defer s.Close()
	g, err := s.Take("orders", []string{a}, Settings{})
	if err != nil {
		bench.Fatal(err)
	}
	for bench.Loop() {
		g.Budget.Request()
	}
}
