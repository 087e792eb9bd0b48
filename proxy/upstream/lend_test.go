package upstream

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// keeper is a connection that a test lends.
type keeper struct {
	address string
	dead    atomic.Bool
	closed  atomic.Int32
}

func (k *keeper) Alive() bool  { return !k.dead.Load() && k.closed.Load() == 0 }
func (k *keeper) Close() error { k.closed.Add(1); return nil }

// moment is a key.
type moment struct{ _ int }

// borrow borrows once, and returns what the loan is with.
func borrow(t *testing.T, g *Group, key any, tried *Tried) (*Loan, *keeper) {
	t.Helper()
	l, err := g.Borrow(t.Context(), Wish{Timeout: 5 * time.Second, Key: key}, tried)
	if err != nil {
		t.Fatal(err)
	}
	if l.Conn == nil || l.Target == "" || l.Address == "" {
		t.Errorf("loan %+v", l)
	}
	if l.Kept == nil {
		return &l, &keeper{address: l.Address}
	}
	k := l.Kept.(*keeper)
	if k.address != l.Address || k.closed.Load() > 0 {
		t.Errorf("a connection to %s, closed %d times, is lent for %s", k.address, k.closed.Load(), l.Address)
	}
	return &l, k
}

// lay has n connections lie idle under a key, the first on top.
func lay(t *testing.T, g *Group, key any, n int) []*keeper {
	t.Helper()
	loans, keepers := make([]*Loan, n), make([]*keeper, n)
	for i := range n {
		loans[i], keepers[i] = borrow(t, g, key, nil)
	}
	for i := range slices.Backward(loans) {
		loans[i].Return(keepers[i])
		loans[i].Return(keepers[i]) // twice is once
		loans[i].Close()
	}
	return keepers
}

func states(keepers []*keeper) (open int) {
	for _, k := range keepers {
		if k.closed.Load() == 0 {
			open++
		}
	}
	return open
}

func idleAndActive(g *Group) (idle, active int) {
	list, _ := g.Status(100)
	for _, e := range list {
		idle += e.Idle
		active += e.Active
	}
	return idle, active
}

// TestLendAgain: the connection that was returned last is lent first, dead ones
// not at all, and one that was closed is no longer there.
func TestLendAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		kept := lay(t, g, nil, 3)
		if idle, active := idleAndActive(g); idle != 3 || active != 0 || len(n.dialled()) != 3 {
			t.Errorf("%d idle, %d active, want 3 and none", idle, active)
		}
		first, k := borrow(t, g, nil, nil)
		if k != kept[0] {
			t.Error("not the one that was returned last")
		}
		kept[1].dead.Store(true)
		if second, k := borrow(t, g, nil, nil); k != kept[2] || kept[1].closed.Load() != 1 {
			t.Error("not the first that lives")
		} else {
			second.Close()
		}
		if third, _ := borrow(t, g, nil, nil); third.Kept != nil {
			t.Error("a fourth connection from somewhere")
		}
		first.Return(kept[0])
		if idle, active := idleAndActive(g); idle != 1 || active != 1 {
			t.Errorf("%d idle, %d active, want one and one", idle, active)
		}
	})
}

// TestKeys: what was made for one identity is never lent to another one.
func TestKeys(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g, other := take(t, s, Settings{}, a), take(t, s, Settings{}, a)
		old, young := new(moment), new(moment)
		olds := lay(t, g, old, 3)
		theirs := lay(t, other, old, 1)
		l, k := borrow(t, g, young, nil)
		if l.Kept != nil || states(olds) != 0 || states(theirs) != 1 {
			t.Errorf("%v is lent; %d old ones are open, %d of another group", l.Kept, states(olds), states(theirs))
		}
		l.Return(k)
		late, lateKeeper := borrow(t, g, young, nil)
		lay(t, g, old, 1)
		g.Forget(young)
		if idle, _ := idleAndActive(g); idle != 1 { // the other group's
			t.Errorf("%d idle, want one", idle)
		}
		late.Return(lateKeeper)
		l, _ = borrow(t, g, old, nil)
		if l.Kept != nil || lateKeeper.closed.Load() > 0 {
			t.Error("who borrows under an old key has the young one closed, or is lent it")
		}
		oldKeeper := &keeper{address: a}
		if l.Return(oldKeeper); oldKeeper.closed.Load() != 1 {
			t.Error("kept under a key that was forgotten")
		}
		if l, _ = borrow(t, g, young, nil); l.Kept != lateKeeper {
			t.Error("what stays is not lent")
		}
	})
}

// TestIdleEnds: idle connections are closed once they are old, or dead, or too
// many, or of no use any more.
func TestIdleEnds(t *testing.T) {
	settings := Settings{MaxIdle: 3, IdleTimeout: 20 * time.Second, Ejection: Ejection{After: 1, For: time.Hour}}
	for _, c := range []struct {
		name     string
		settings Settings
		end      func(n *network, s *Set, g *Group, kept []*keeper)
		open     int
	}{
		{"young", settings, func(*network, *Set, *Group, []*keeper) { time.Sleep(18 * time.Second) }, 3},
		{"old", settings, func(*network, *Set, *Group, []*keeper) { time.Sleep(20 * time.Second) }, 0},
		{"dead", settings, func(_ *network, _ *Set, _ *Group, kept []*keeper) {
			kept[1].dead.Store(true)
			time.Sleep(7 * time.Second)
		}, 2},
		{"ejected", settings, func(n *network, _ *Set, g *Group, _ []*keeper) {
			l, _ := g.Borrow(context.Background(), Wish{Timeout: time.Second}, nil) // takes one away
			l.Failed(errRefused)
			l.Return(l.Kept)
		}, 0},
		{"ejected elsewhere", settings, func(n *network, _ *Set, g *Group, _ []*keeper) {
			l, _ := g.Dial(context.Background(), time.Second)
			l.Failed(errRefused)
			l.Close()
		}, 0},
		{"fails checks", Settings{Health: Health{Interval: time.Second}}, func(n *network, _ *Set, _ *Group, _ []*keeper) {
			n.is("10.1.0.1:80", errRefused)
			time.Sleep(5 * time.Second)
		}, 0},
		{"address is gone", settings, func(n *network, _ *Set, _ *Group, _ []*keeper) {
			n.resolve("shop", "10.1.0.2")
			time.Sleep(6 * time.Second)
		}, 0},
		{"group is released", settings, func(_ *network, _ *Set, g *Group, _ []*keeper) { g.Release() }, 0},
		{"set is closed", settings, func(_ *network, s *Set, _ *Group, _ []*keeper) { s.Close() }, 0},
		{"another key", settings, func(_ *network, _ *Set, g *Group, _ []*keeper) {
			l, _ := g.Borrow(context.Background(), Wish{Timeout: time.Second, Key: new(moment)}, nil)
			l.Close()
		}, 0},
		{"none kept", Settings{MaxIdle: -1}, func(*network, *Set, *Group, []*keeper) {}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				n.resolve("shop", "10.1.0.1")
				g := take(t, s, c.settings, "shop:80")
				kept := lay(t, g, nil, 4)
				if c.settings.MaxIdle == 3 && (kept[3].closed.Load() != 1 || states(kept) != 3) {
					t.Errorf("%d of 4 are kept, want 3 and not the oldest", states(kept))
				}
				c.end(n, s, g, kept)
				synctest.Wait()
				if got := states(kept); got != c.open {
					t.Errorf("%d are open, want %d", got, c.open)
				}
			})
		})
	}
}

// TestTried: a retry goes to another endpoint while a healthy one is there, and
// where it cannot it does without idle connections.
func TestTried(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Hour}}, a, b, c3, "10.0.0.4:80", "10.0.0.5:80", "10.0.0.6:80")
		n.is(b, errRefused)
		lay(t, g, nil, 18)
		var tried Tried
		seen := map[string]int{}
		for range 5 {
			l, _ := borrow(t, g, nil, &tried)
			if seen[l.Address]++; l.Kept == nil {
				t.Errorf("%s: not an idle one", l.Address)
			}
			l.Close()
		}
		if len(seen) != 5 || seen[b] != 0 {
			t.Errorf("went to %v, want each but the one that is ejected", seen)
		}
		if l, _ := borrow(t, g, nil, &tried); l.Address == b || l.Kept != nil {
			t.Errorf("the sixth went to %s with %v, want a fresh one to one that is healthy", l.Address, l.Kept)
		}
	})
}

// TestLeastRequests: idle connections weigh with least_connections alone.
func TestLeastRequests(t *testing.T) {
	for balance, want := range map[Balance]string{LeastRequests: a, LeastConnections: b} {
		bubble(t, func(t *testing.T, n *network, s *Set) {
			g := take(t, s, Settings{Balance: balance}, a, b)
			var loans [4]*Loan
			var keepers [4]*keeper
			for i := range loans {
				loans[i], keepers[i] = borrow(t, g, nil, nil)
			}
			for i := range loans {
				if loans[i].Address == a {
					loans[i].Return(keepers[i]) // two idle, none active
				} else if i < 2 {
					loans[i].Close() // one active
				}
			}
			if l, _ := borrow(t, g, nil, nil); l.Address != want {
				t.Errorf("%s: lent one to %s, want %s", balance, l.Address, want)
			}
		})
	}
}

func TestBorrowErrors(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g, gone := take(t, s, Settings{}, a, b), take(t, s, Settings{}, "nowhere:80")
		n.is(a, errRefused)
		n.is(b, errSilent)
		if _, err := g.Borrow(t.Context(), Wish{Timeout: time.Second}, nil); !errors.Is(err, ErrDown) {
			t.Errorf("refused and silent: %v", err)
		}
		n.is(a, errSilent)
		if _, err := g.Borrow(t.Context(), Wish{Timeout: time.Second}, nil); !errors.Is(err, ErrTimeout) || errors.Is(err, ErrDown) {
			t.Errorf("silent: %v", err)
		}
		if _, err := gone.Borrow(t.Context(), Wish{Timeout: time.Second}, nil); !errors.Is(err, ErrDown) {
			t.Errorf("no such name: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := g.Borrow(ctx, Wish{Timeout: time.Second}, nil); !errors.Is(err, context.Canceled) || errors.Is(err, ErrDown) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

// TestLendTogether: many borrow, return, fail and forget at once.
func TestLendTogether(t *testing.T) {
	n := newNetwork()
	s := n.set(t)
	n.resolve("shop", "10.0.1.1", "10.0.1.2")
	g := take(t, s, Settings{MaxIdle: 4, MaxConnections: 3, Ejection: Ejection{After: 2, For: time.Millisecond}}, a, b, "shop:80")
	keys := []*moment{new(moment), new(moment)}
	var made sync.Map
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for j := range 200 {
				key := keys[j/10%2]
				l, err := g.Borrow(t.Context(), Wish{Timeout: 10 * time.Second, Key: key}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				k, _ := l.Kept.(*keeper)
				if k == nil {
					k = &keeper{address: l.Address}
					made.Store(k, true)
				}
				if active := l.endpoint.active.Load(); active > 3 {
					t.Errorf("%d loans of one endpoint", active)
				}
				switch (i + j) % 8 {
				case 0:
					l.Failed(errRefused)
					fallthrough
				case 1:
					_ = k.Close()
					l.Close()
				default:
					l.Succeeded()
					k.dead.Store(j%5 == 0)
					l.Return(k)
				}
				if j == 100 {
					g.Forget(key)
				}
				_, _ = g.Status(100)
			}
		})
	}
	all.Wait()
	if idle, active := idleAndActive(g); active != 0 || idle > 4*3 {
		t.Errorf("%d idle, %d active", idle, active)
	}
	s.Close()
	made.Range(func(k, _ any) bool {
		if n := k.(*keeper).closed.Load(); n != 1 {
			t.Errorf("a connection was closed %d times", n)
		}
		return true
	})
}

// TestReturnedAtTheEnd: what is returned in the moment in which it cannot be
// kept any more is closed all the same.
func TestReturnedAtTheEnd(t *testing.T) {
	for name, end := range map[string]func(s *Set, g *Group){
		"release": func(_ *Set, g *Group) { g.Release() },
		"forget":  func(_ *Set, g *Group) { g.Forget(new(moment)) },
		"eject":   func(_ *Set, g *Group) { g.targets[0].addresses()[0].failure(errRefused) },
		"gone":    func(_ *Set, g *Group) { g.targets[0].replace(nil) },
		"close":   func(s *Set, _ *Group) { s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			for range 100 {
				s := newNetwork().set(t)
				g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Hour}}, a)
				l, k := borrow(t, g, nil, nil)
				var both sync.WaitGroup
				both.Go(func() { l.Return(k) })
				both.Go(func() { end(s, g) })
				both.Wait()
				if n := k.closed.Load(); n != 1 {
					t.Fatalf("closed %d times", n)
				}
				s.Close()
			}
		})
	}
}

func BenchmarkBorrow(bench *testing.B) {
	for name, targets := range map[string]int{"1": 1, "16": 16} {
		for _, balance := range []Balance{RoundRobin, LeastRequests} {
			bench.Run(balance.String()+"/"+name, func(bench *testing.B) {
				g, key := benchmarkGroup(bench, Settings{Balance: balance, MaxRequests: 100}, targets)
				bench.ReportAllocs()
				for bench.Loop() {
					lendOnce(bench, g, key)
				}
			})
		}
	}
}

func benchmarkGroup(t testing.TB, settings Settings, targets int) (*Group, *moment) {
	n := newNetwork()
	s := NewSet(Options{Resolver: n, Dial: n.dial})
	s.Start()
	t.Cleanup(s.Close)
	var addresses []string
	for i := range targets {
		addresses = append(addresses, "10.0.0."+string(rune('1'+i%9))+":"+string(rune('1'+i/9)))
	}
	g, err := s.Take("orders", addresses, settings)
	if err != nil {
		t.Fatal(err)
	}
	key := new(moment)
	for range 2 * targets {
		lendOnce(t, g, key)
	}
	return g, key
}

func lendOnce(t testing.TB, g *Group, key *moment) {
	var tried Tried
	l, err := g.Borrow(context.Background(), Wish{Timeout: time.Second, Key: key}, &tried)
	if err != nil {
		t.Fatal(err)
	}
	k := l.Kept
	if k == nil {
		k = new(keeper)
	}
	l.Succeeded()
	l.Return(k)
}

// TestLendingAllocates nothing once connections are there.
func TestLendingAllocates(t *testing.T) {
	for _, targets := range []int{1, 16} {
		g, key := benchmarkGroup(t, Settings{Balance: LeastConnections, MaxConnections: 100}, targets)
		if n := testing.AllocsPerRun(1000, func() { lendOnce(t, g, key) }); n != 0 {
			t.Errorf("%d targets: %v allocations a loan, want none", targets, n)
		}
	}
}
