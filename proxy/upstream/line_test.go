package upstream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// waiter borrows in the background and tells of it.
type waiter struct {
	loan Loan
	err  error
	took time.Duration
}

// queue has n borrowers wait, one after the other, and returns where they tell.
func queue(t *testing.T, g *Group, key any, n int, timeout time.Duration) []chan waiter {
	t.Helper()
	all := make([]chan waiter, n)
	for i := range all {
		all[i] = make(chan waiter, 1)
		go func() {
			begin := time.Now()
			l, err := g.Borrow(t.Context(), Wish{Timeout: timeout, Key: key}, nil)
			all[i] <- waiter{l, err, time.Since(begin)}
		}()
		synctest.Wait()
	}
	return all
}

// served returns which of the borrowers have told, since it was last asked.
func served(t *testing.T, all []chan waiter) (who []int, last *waiter) {
	t.Helper()
	synctest.Wait()
	for i := range all {
		select {
		case w := <-all[i]:
			who, last = append(who, i), &w
		default:
		}
	}
	return who, last
}

// TestWaitForRoom: who finds no room waits, and is served in the order in which
// they came, whatever ends the loan before; too many do not wait at all.
func TestWaitForRoom(t *testing.T) {
	for name, settings := range map[string]Settings{
		"requests":    {MaxRequests: 2, MaxPending: 5},
		"connections": {MaxConnections: 2, MaxRequests: 9, MaxPending: 5},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				g := take(t, s, settings, a)
				first, k := borrow(t, g, nil, nil)
				second, _ := borrow(t, g, nil, nil)
				waiting := queue(t, g, nil, 5, time.Minute)
				begin := time.Now()
				if _, err := g.Borrow(t.Context(), Wish{Timeout: time.Minute}, nil); !errors.Is(err, ErrFull) || time.Since(begin) != 0 {
					t.Errorf("one too many: %v after %s", err, time.Since(begin))
				}
				if who, _ := served(t, waiting); who != nil {
					t.Fatalf("%v have no room, and were served", who)
				}
				first.Return(k)
				who, w := served(t, waiting)
				if !slices.Equal(who, []int{0}) || w.loan.Kept != k {
					t.Fatalf("after a return %v are served, want the first, with that connection", who)
				}
				third := w.loan
				second.Close()
				if who, w = served(t, waiting); !slices.Equal(who, []int{1}) || w.loan.Kept != nil {
					t.Fatalf("after a close %v are served, want the second, with a fresh connection", who)
				}
				third.Failed(errRefused)
				third.Close()
				w.loan.Close()
				if who, w = served(t, waiting); !slices.Equal(who, []int{2, 3}) {
					t.Fatalf("after two closes %v are served, want two", who)
				}
				w.loan.Close()
				if who, _ = served(t, waiting); !slices.Equal(who, []int{4}) || g.line.waiting.Load() != 0 || g.targets[0].waiting.Load() != 0 || len(g.targets[0].crowd) != 0 {
					t.Fatalf("at last %v are served, and somebody waits still", who)
				}
			})
		})
	}
}

// TestWaitEnds: with the time, or with the context.
func TestWaitEnds(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{MaxRequests: 1}, a)
		l, _ := borrow(t, g, nil, nil)
		short, long := queue(t, g, nil, 1, time.Second), queue(t, g, nil, 1, time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := g.Borrow(ctx, Wish{Timeout: time.Minute}, nil); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrFull) {
			t.Errorf("cancelled: %v", err)
		}
		if _, w := served(t, short); w == nil || !errors.Is(w.err, ErrFull) || w.took != time.Second {
			t.Errorf("time is over: %+v", w)
		}
		l.Close()
		if _, w := served(t, long); w == nil || w.err != nil || w.took != time.Second {
			t.Errorf("who waited behind those: %+v", w)
		}
	})
}

// TestWaitForWhatChanges: who waits looks again when addresses or what is
// healthy change, and does not use an endpoint that is not healthy for want of
// room at one that is.
func TestWaitForWhatChanges(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		n.resolve("shop", "10.1.0.1")
		g := take(t, s, Settings{MaxRequests: 1, Ejection: Ejection{After: 1, For: time.Hour}}, "shop:80", a)
		n.is(a, errRefused)
		synctest.Wait() // the name is looked up
		l, _ := borrow(t, g, nil, nil)
		second := queue(t, g, nil, 1, time.Minute) // tries a, which ejects it, and waits
		third := queue(t, g, nil, 1, time.Minute)
		n.dialled()
		if who, _ := served(t, third); who != nil || g.line.waiting.Load() != 2 {
			t.Fatalf("%d wait, want 2", g.line.waiting.Load())
		}
		n.resolve("shop", "10.1.0.1", "10.1.0.2", "10.1.0.3")
		time.Sleep(6 * time.Second)
		for _, waiting := range [][]chan waiter{second, third} {
			if _, w := served(t, waiting); w == nil || w.err != nil || w.loan.Address == a || w.loan.Address == l.Address {
				t.Errorf("with new addresses: %+v", w)
			}
		}
		fourth := queue(t, g, nil, 1, time.Minute)
		n.is(a, nil)
		list, _ := g.Status(9)
		for i := range list[:3] {
			g.targets[0].addresses()[i].failure(errRefused) // none is healthy
		}
		if _, w := served(t, fourth); w == nil || w.loan.Address != a {
			t.Errorf("with none healthy: %+v, want a loan of %s", w, a)
		}
	})
}

// TestIdleMakeWay: where connections are bounded, an idle one of another key or
// group goes for one that is needed.
func TestIdleMakeWay(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		settings := Settings{MaxConnections: 3}
		g, other := take(t, s, settings, a), take(t, s, settings, a)
		theirs := lay(t, other, nil, 2)
		first, k := borrow(t, g, nil, nil)
		if states(theirs) != 2 {
			t.Errorf("%d are open, want both: there is room for one more", states(theirs))
		}
		_, _ = borrow(t, g, nil, nil)
		if states(theirs) != 1 || theirs[1].closed.Load() != 1 {
			t.Errorf("%d are open, want the younger", states(theirs))
		}
		first.Return(k)
		if l, _ := borrow(t, g, nil, nil); l.Kept != k || states(theirs) != 1 {
			t.Error("what was returned is not lent, or others had to go for it")
		}
	})
}

// TestLineTogether: nobody is forgotten in the line, and no endpoint has more
// loans than it may.
func TestLineTogether(t *testing.T) {
	n := newNetwork()
	s := n.set(t)
	settings := Settings{MaxRequests: 2, MaxPending: 1000}
	g, other := take(t, s, settings, a, b), take(t, s, settings, b, c3)
	var all sync.WaitGroup
	for i := range 32 {
		group := []*Group{g, other}[i%2]
		all.Go(func() {
			for j := range 100 {
				ctx, cancel := context.WithCancel(t.Context())
				if j%7 == 0 {
					cancel()
				}
				l, err := group.Borrow(ctx, Wish{Timeout: time.Minute}, nil)
				cancel()
				if j%7 == 0 && errors.Is(err, context.Canceled) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if active := l.endpoint.active.Load(); active > 2 {
					t.Errorf("%d loans of %s", active, l.Address)
				}
				if j%3 == 0 {
					l.Close()
				} else {
					l.Return(&keeper{address: l.Address})
				}
			}
		})
	}
	all.Wait()
	for _, group := range []*Group{g, other} {
		if _, active := idleAndActive(group); active != 0 || group.line.waiting.Load() != 0 {
			t.Errorf("%d active, %d waiting", active, group.line.waiting.Load())
		}
	}
}

// TestStatusEjects: answers that say that the service is not there are failures
// where that is wanted, and others are successes.
func TestStatusEjects(t *testing.T) {
	for on, codes := range map[bool]map[string][]int{
		true:  {a: {502, 503, 504}, b: {503, 502, 500, 504, 503, 200, 502}},
		false: {b: {502, 503, 504, 503}},
	} {
		bubble(t, func(t *testing.T, n *network, s *Set) {
			for ejected, list := range codes {
				g := take(t, s, Settings{Ejection: Ejection{After: 3, For: time.Hour, On5xx: on}}, a)
				for _, code := range list {
					l, k := borrow(t, g, nil, nil)
					l.Status(code)
					l.Return(k)
				}
				e, _ := g.Status(1)
				if e[0].Healthy == (ejected == a) || e[0].Failed != 0 {
					t.Errorf("on %t, after %v: %+v", on, list, e[0])
				}
				if want := "ejected: answered with status 504"; ejected == a && (e[0].Problem != want || e[0].Idle != 0) {
					t.Errorf("problem %q with %d idle, want %q", e[0].Problem, e[0].Idle, want)
				}
				g.Release()
			}
			if n.meters.ConnectFailures.Value() != 0 {
				t.Error("an answer counts as a failed connect")
			}
		})
	}
}

// TestMeters: how many are idle is known a second later.
func TestMeters(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{IdleTimeout: 10 * time.Second}, a, b)
		lay(t, g, nil, 5)
		for _, want := range []float64{5, 0} {
			time.Sleep(time.Second + time.Millisecond)
			if got := n.meters.Idle.Value(); got != want {
				t.Errorf("%v idle, want %v", got, want)
			}
			time.Sleep(10 * time.Second)
		}
		if s.sweeping.Load() {
			t.Error("there is a sweeper and nothing to sweep")
		}
	})
}

func ExampleGroup_Borrow() {
	set := NewSet(Options{Dial: newNetwork().dial})
	defer set.Close()
	group, err := set.Take("orders", []string{"10.0.0.1:8080"}, Settings{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer group.Release()
	for range 2 {
		group.Budget.Request()
		var tried Tried
		loan, err := group.Borrow(context.Background(), Wish{Timeout: time.Second}, &tried)
		if err != nil {
			fmt.Println(err)
			return
		}
		k := loan.Kept
		if k == nil {
			k = &keeper{address: loan.Address} // made of loan.Conn
		}
		fmt.Println("fresh:", loan.Kept == nil)
		loan.Status(200)
		loan.Return(k)
	}
	// Output:
	// fresh: true
	// fresh: false
}
