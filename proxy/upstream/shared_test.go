package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// multi is a connection with many requests at a time that a test lends.
type multi struct {
	keeper
	places int // at most

	mu   sync.Mutex // guards the following
	on   int        // requests
	most int        // of these, ever
}

func newMulti(l *Loan, places int) *multi {
	m := &multi{places: places, on: 1, most: 1}
	m.address = l.Address
	return m
}

func (m *multi) Join() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead.Load() || m.on >= m.places {
		return false
	}
	m.on++
	m.most = max(m.most, m.on)
	return true
}

func (m *multi) Idle() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.on == 0
}

// done ends a request.
func (m *multi) done() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.on--
}

func sharing(key any) Wish { return Wish{Timeout: 5 * time.Second, Key: key, Shares: true} }

// lendShared borrows a place on what is shared.
func lendShared(t *testing.T, g *Group, key any) (*Loan, *multi) {
	t.Helper()
	l, err := g.Borrow(t.Context(), sharing(key), nil)
	if err != nil {
		t.Fatal(err)
	}
	if l.Conn == nil || l.Target == "" || l.Address == "" {
		t.Errorf("loan %+v", l)
	}
	m, _ := l.Kept.(*multi)
	if m != nil && (m.address != l.Address || m.closed.Load() > 0) {
		t.Errorf("a connection to %s, closed %d times, is lent for %s", m.address, m.closed.Load(), l.Address)
	}
	return &l, m
}

// share borrows a fresh connection and shares it.
func share(t *testing.T, g *Group, key any, places int) (*Loan, *multi) {
	t.Helper()
	l, m := lendShared(t, g, key)
	if m != nil {
		t.Fatal("not a fresh connection")
	}
	m = newMulti(l, places)
	l.Share(m)
	l.Share(new(multi)) // twice is once
	return l, m
}

// finish ends a request, then its loan.
func finish(l *Loan, m *multi) {
	m.done()
	l.Return(m)
	l.Close() // is nothing
}

// queueShared has n borrowers that share wait, one after the other.
func queueShared(t *testing.T, g *Group, ctx context.Context, n int, w Wish) []chan waiter {
	t.Helper()
	all := make([]chan waiter, n)
	for i := range all {
		all[i] = make(chan waiter, 1)
		go func() {
			begin := time.Now()
			l, err := g.Borrow(ctx, w, nil)
			all[i] <- waiter{l, err, time.Since(begin)}
		}()
		synctest.Wait()
	}
	return all
}

// TestShare: one connection is lent for many requests at a time, is idle after
// them, and is closed once it is old.
func TestShare(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		first, m := share(t, g, nil, 3)
		second, other := lendShared(t, g, nil)
		third, _ := lendShared(t, g, nil)
		if other != m || third.Kept != Keeper(m) {
			t.Error("not the connection that is shared")
		}
		if idle, active := idleAndActive(g); idle != 0 || active != 3 || len(n.dialled()) != 1 {
			t.Errorf("%d idle, %d active, want 3 active on one", idle, active)
		}
		fourth, fresh := lendShared(t, g, nil)
		if fresh != nil {
			t.Error("a fourth place on a connection with three")
		}
		fourth.Close()
		finish(first, m)
		if again, other := lendShared(t, g, nil); other != m {
			t.Error("a place that was given back is not lent")
		} else {
			finish(again, m)
		}
		finish(second, m)
		time.Sleep(2 * time.Minute)
		if m.closed.Load() != 0 {
			t.Error("closed with a request on it")
		}
		finish(third, m)
		if idle, active := idleAndActive(g); idle != 1 || active != 0 {
			t.Errorf("%d idle, %d active, want one idle", idle, active)
		}
		time.Sleep(58 * time.Second)
		if m.closed.Load() != 0 {
			t.Error("closed before its time")
		}
		time.Sleep(3 * time.Second)
		if idle, _ := idleAndActive(g); idle != 0 || m.closed.Load() != 1 || s.sweeping.Load() {
			t.Errorf("%d idle, closed %d times, want once", idle, m.closed.Load())
		}
	})
}

// TestRequestOutlivesLoan: what the connection says of its requests counts, not
// the loans alone.
func TestRequestOutlivesLoan(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{IdleTimeout: 10 * time.Second}, a)
		l, m := share(t, g, nil, 3)
		l.Close()
		time.Sleep(time.Minute)
		if m.closed.Load() != 0 {
			t.Error("closed with a request on it")
		}
		m.done()
		time.Sleep(11 * time.Second)
		if m.closed.Load() != 1 {
			t.Error("not closed once it was idle")
		}
	})
}

// TestOneDials: of many who come at once one dials, and when its connection is
// full one more does.
func TestOneDials(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		n.resolve("shop", "10.1.0.1")
		s.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			time.Sleep(100 * time.Millisecond)
			return n.dial(ctx, network, address)
		}
		g := take(t, s, Settings{Balance: LeastRequests}, a, "shop:80")
		synctest.Wait()
		var all sync.WaitGroup
		var mu sync.Mutex
		made := map[*multi]int{}
		begin := time.Now()
		for range 100 {
			all.Go(func() {
				l, m := lendShared(t, g, nil)
				if m == nil {
					time.Sleep(100 * time.Millisecond) // shakes hands
					m = newMulti(l, 20)
					l.Share(m)
				}
				mu.Lock()
				defer mu.Unlock()
				made[m]++
			})
		}
		all.Wait()
		took := time.Since(begin)
		if len(made) != 6 || len(n.dialled()) != 6 || took != 600*time.Millisecond {
			t.Errorf("%d connections after %s, want 3 for each of two endpoints, one after the other", len(made), took)
		}
	})
}

// TestMakingEnds: what becomes of those who wait for a connection.
func TestMakingEnds(t *testing.T) {
	refused := errors.New("handshake: not whom we expect")
	for _, c := range []struct {
		name  string
		end   func(l *Loan)
		dials int    // more, at once
		now   int    // served at once, of three
		err   string // of these
	}{
		{"shared", func(l *Loan) { l.Share(newMulti(l, 9)) }, 0, 3, ""},
		{"shared with few places", func(l *Loan) { l.Share(newMulti(l, 2)) }, 1, 2, ""},
		{"failed", func(l *Loan) { l.Failed(refused) }, 0, 3, a + ": " + refused.Error()},
		{"failed and closed", func(l *Loan) { l.Failed(refused); l.Close() }, 0, 3, refused.Error()},
		{"closed", func(l *Loan) { l.Close() }, 1, 1, ""},
		{"alone", func(l *Loan) { l.Alone() }, 3, 3, ""},
		{"alone and returned", func(l *Loan) { l.Alone(); synctest.Wait(); l.Return(&keeper{address: a}) }, 3, 3, ""},
		{"returned", func(l *Loan) { l.Return(&keeper{address: a}) }, 2, 3, ""},
		{"shared when it may not be", func(l *Loan) { l.group.Forget(new(moment)); l.Share(newMulti(l, 9)) }, 3, 3, ""},
		{"shared by one that is ejected", func(l *Loan) { l.endpoint.failure(refused); l.Share(newMulti(l, 9)) }, 3, 3, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Hour}}, a)
				if c.name[:4] == "fail" {
					g = take(t, s, Settings{Ejection: Ejection{After: -1}}, a)
				}
				l, _ := lendShared(t, g, nil)
				waiting := queueShared(t, g, t.Context(), 3, sharing(nil))
				if who, _ := served(t, waiting); who != nil || len(n.dialled()) != 1 {
					t.Fatalf("%v do not wait", who)
				}
				c.end(l)
				who, w := served(t, waiting)
				if len(who) != c.now || len(n.dialled()) != c.dials {
					t.Fatalf("%d are served, want %d after %d dials", len(who), c.now, c.dials)
				}
				if c.err == "" && w.err != nil || c.err != "" && (w.err == nil || !strings.Contains(w.err.Error(), c.err) || !errors.Is(w.err, ErrDown)) {
					t.Errorf("error %v, want %q", w.err, c.err)
				}
				if len(g.targets[0].addresses()[0].shelf.making) > 1 {
					t.Error("something is still waited for")
				}
			})
		})
	}
}

// TestDialFailsForAll: who waits for a dial shares its error, and goes to
// another endpoint; who dialled and went away did not speak for others.
func TestDialFailsForAll(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		n.is(a, errSilent)
		ctx, cancel := context.WithCancel(t.Context())
		gone := queueShared(t, g, ctx, 1, sharing(nil))
		waiting := queueShared(t, g, t.Context(), 3, sharing(nil))
		cancel()
		if _, w := served(t, gone); w == nil || !errors.Is(w.err, context.Canceled) || len(n.dialled()) != 2 {
			t.Fatalf("who went away: %+v", w)
		}
		time.Sleep(6 * time.Second)
		for range 3 {
			if _, w := served(t, waiting); w != nil && (!errors.Is(w.err, ErrTimeout) || w.took != 5*time.Second) {
				t.Errorf("who waited: %+v", w)
			}
		}
		if list, _ := g.Status(1); len(n.dialled()) != 0 || list[0].Failed != 1 || list[0].Active != 0 {
			t.Errorf("dialled again, or %d failures and %d active", list[0].Failed, list[0].Active)
		}
		two := take(t, s, Settings{}, a, b)
		n.is(a, errRefused)
		n.is(b, nil)
		if l, _ := lendShared(t, two, nil); l.Address != b {
			t.Errorf("lent one to %s", l.Address)
		}
	})
}

// TestWaitsNoLonger than its own time, nor than a dial would have taken where
// there is another endpoint.
func TestWaitsNoLonger(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		l, _ := lendShared(t, g, nil)
		short := queueShared(t, g, t.Context(), 1, Wish{Timeout: time.Second, Shares: true})
		ctx, cancel := context.WithCancel(t.Context())
		leaves := queueShared(t, g, ctx, 1, sharing(nil))
		cancel()
		if _, w := served(t, leaves); w == nil || !errors.Is(w.err, context.Canceled) {
			t.Errorf("cancelled: %+v", w)
		}
		time.Sleep(time.Second)
		if _, w := served(t, short); w == nil || !errors.Is(w.err, ErrTimeout) || w.took != time.Second {
			t.Errorf("time is over: %+v", w)
		}
		list, _ := g.Status(1)
		if list[0].Failed != 0 || list[0].Active != 1 {
			t.Errorf("%d failures, %d active", list[0].Failed, list[0].Active)
		}
		l.Close()

		two := take(t, s, Settings{}, a, b)
		l, _ = lendShared(t, two, nil)
		_, _ = share(t, two, nil, 9)
		other := queueShared(t, two, t.Context(), 1, Wish{Timeout: 9 * time.Second, Shares: true})
		time.Sleep(5 * time.Second)
		if _, w := served(t, other); w == nil || w.err != nil || w.loan.Address == l.Address || w.took != 4500*time.Millisecond {
			t.Errorf("with another endpoint: %+v", w)
		}
	})
}

// TestAloneForAMinute: who knows that a far end takes one request at a time does
// not wait for others, for a while and under that key.
func TestAloneForAMinute(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g, key := take(t, s, Settings{}, a), new(moment)
		l, _ := lendShared(t, g, nil)
		l.Alone()
		for _, c := range []struct {
			pause  time.Duration
			key    any
			served int
		}{{0, nil, 2}, {0, key, 1}, {59 * time.Second, nil, 2}, {time.Second, nil, 1}} {
			time.Sleep(c.pause)
			ctx, cancel := context.WithCancel(t.Context())
			waiting := queueShared(t, g, ctx, 2, sharing(c.key))
			if who, w := served(t, waiting); len(who) != c.served {
				t.Errorf("after %s: %d do not wait, want %d", c.pause, len(who), c.served)
			} else if cancel(); c.served == 1 {
				served(t, waiting)
				w.loan.Close()
			}
			cancel()
		}
		shelf := &g.targets[0].addresses()[0].shelf
		l.Alone()
		if g.Forget(key); len(shelf.marks) != 0 {
			t.Error("a key that was forgotten is still known")
		}
	})
}

// TestSharedEnds: nobody joins what may not be lent any more, and it is closed
// when the last loan ended.
func TestSharedEnds(t *testing.T) {
	for name, end := range map[string]func(n *network, s *Set, g *Group, m *multi){
		"release": func(_ *network, _ *Set, g *Group, _ *multi) { g.Release() },
		"forget":  func(_ *network, _ *Set, g *Group, _ *multi) { g.Forget(new(moment)) },
		"eject":   func(_ *network, _ *Set, g *Group, _ *multi) { g.targets[0].addresses()[0].failure(errRefused) },
		"check":   func(_ *network, _ *Set, g *Group, _ *multi) { g.targets[0].addresses()[0].checked(errRefused) },
		"gone": func(n *network, _ *Set, g *Group, _ *multi) {
			n.resolve("shop", "10.1.0.2")
			time.Sleep(6 * time.Second)
		},
		"close": func(_ *network, s *Set, _ *Group, _ *multi) { s.Close() },
		"dead":  func(_ *network, _ *Set, _ *Group, m *multi) { m.dead.Store(true) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				n.resolve("shop", "10.1.0.1")
				g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Hour}, Health: Health{UnhealthyAfter: 1}}, "shop:80")
				synctest.Wait()
				first, m := share(t, g, nil, 9)
				second, _ := lendShared(t, g, nil)
				e := g.targets[0].addresses()[0]
				end(n, s, g, m)
				if third, other := lendShared(t, g, nil); other != nil {
					t.Error("somebody joined it")
				} else {
					third.Close()
				}
				first.Succeeded()
				e.shelf.mu.Lock()
				lies := len(e.shelf.shared)
				e.shelf.mu.Unlock()
				if lies != 0 || m.closed.Load() != 0 || e.conns.Load() != 1 {
					t.Errorf("%d on the shelf, closed %d times, %d connections", lies, m.closed.Load(), e.conns.Load())
				}
				finish(first, m)
				finish(second, m)
				if m.closed.Load() != 1 || e.conns.Load() != 0 || e.active.Load() != 0 || e.shelf.size.Load() != 0 {
					t.Errorf("closed %d times, %d connections, %d active", m.closed.Load(), e.conns.Load(), e.active.Load())
				}
			})
		})
	}
}

// TestIdleSharedEnds: one without loans ends like any that is idle.
func TestIdleSharedEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		idle int // Settings.MaxIdle
		end  func(t *testing.T, g *Group, m *multi)
		open int32
	}{
		{"young", 0, func(*testing.T, *Group, *multi) {}, 1},
		{"dead, and looked at", 0, func(_ *testing.T, _ *Group, m *multi) { m.dead.Store(true); time.Sleep(6 * time.Second) }, 0},
		{"dead, and wanted", 0, func(t *testing.T, g *Group, m *multi) {
			m.dead.Store(true)
			l, _ := lendShared(t, g, nil)
			l.Close()
		}, 0},
		{"forgotten", 0, func(_ *testing.T, g *Group, _ *multi) { g.Forget(new(moment)) }, 0},
		{"released", 0, func(_ *testing.T, g *Group, _ *multi) { g.Release() }, 0},
		{"none kept", -1, func(*testing.T, *Group, *multi) {}, 0},
		{"too many", 2, func(t *testing.T, g *Group, _ *multi) { time.Sleep(2 * time.Second); lay(t, g, nil, 2) }, 0},
		{"others are older", 2, func(t *testing.T, g *Group, m *multi) {
			lay(t, g, nil, 1)
			time.Sleep(2 * time.Second)
			l, _ := lendShared(t, g, nil)
			finish(l, m)
			lay(t, g, new(moment), 1)
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *network, s *Set) {
				g := take(t, s, Settings{MaxIdle: c.idle}, a)
				l, m := share(t, g, nil, 9)
				finish(l, m)
				c.end(t, g, m)
				if open := 1 - m.closed.Load(); open != c.open {
					t.Errorf("%d open, want %d", open, c.open)
				}
			})
		})
	}
}

// TestKindsApart: who shares and who does not are not lent each other's.
func TestKindsApart(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		own := lay(t, g, nil, 1)
		l, m := lendShared(t, g, nil)
		if m != nil || l.Kept != nil {
			t.Error("who shares is lent what was made for one request at a time")
		}
		l.Alone()
		single := &keeper{address: a}
		l.Return(single)
		if l, k := borrow(t, g, nil, nil); k != own[0] {
			t.Error("who does not share is lent what was offered more")
		} else {
			l.Return(k)
		}
		l, _ = lendShared(t, g, nil)
		if l.Kept != Keeper(single) || states(own) != 1 {
			t.Error("a far end with one request at a time is connected to for each")
		}
		_, m = share(t, g, nil, 9)
		for range 2 {
			if l, k := borrow(t, g, nil, nil); l.Kept == nil && k == nil || l.Kept == Keeper(m) {
				t.Error("who does not share is lent what is shared")
			}
		}
		if _, other := lendShared(t, g, new(moment)); other != nil || m.closed.Load() != 0 {
			t.Error("lent under another key, or closed for it")
		}
	})
}

// TestSharedLimits: requests are counted, and a shared connection once.
func TestSharedLimits(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{MaxRequests: 4, MaxConnections: 1}, a)
		e := g.targets[0].addresses()[0]
		first, m := share(t, g, nil, 3)
		second, _ := lendShared(t, g, nil)
		third, _ := lendShared(t, g, nil)
		if e.conns.Load() != 1 || e.active.Load() != 3 {
			t.Errorf("%d connections, %d active, want one and 3", e.conns.Load(), e.active.Load())
		}
		waiting := queueShared(t, g, t.Context(), 2, sharing(nil)) // no place, and no room for a connection
		if who, _ := served(t, waiting); who != nil || g.line.waiting.Load() != 2 {
			t.Fatalf("%v are served, want none", who)
		}
		finish(first, m)
		who, w := served(t, waiting)
		if !slices.Equal(who, []int{0}) || w.loan.Kept != Keeper(m) {
			t.Fatalf("%v are served, want the first, on what is shared", who)
		}
		m.places = 9
		finish(second, m) // and again
		if who, _ = served(t, waiting); !slices.Equal(who, []int{1}) {
			t.Fatalf("%v are served, want the second", who)
		}
		_, _ = lendShared(t, g, nil)
		if waiting = queueShared(t, g, t.Context(), 1, sharing(nil)); g.line.waiting.Load() != 1 {
			t.Fatal("a fifth of four requests")
		}
		finish(third, m)
		if who, _ = served(t, waiting); len(who) != 1 || len(n.dialled()) != 1 {
			t.Error("the fifth is not served after one ended")
		}
	})
}

// TestSharedMakesWay: an idle one goes for a connection that is needed, and a
// busy one is waited for.
func TestSharedMakesWay(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{MaxConnections: 1}, a)
		l, m := share(t, g, nil, 9)
		waiting := queue(t, g, nil, 1, time.Minute)
		if who, _ := served(t, waiting); who != nil {
			t.Fatal("a second connection")
		}
		finish(l, m)
		if _, w := served(t, waiting); w == nil || w.loan.Kept != nil || m.closed.Load() != 1 {
			t.Fatalf("%+v, and the idle one was closed %d times", w, m.closed.Load())
		}
	})
}

// TestPlaceWhileMaking: who waits for one more connection is served by the first
// place on another one.
func TestPlaceWhileMaking(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a)
		first, m := share(t, g, nil, 2)
		second, _ := lendShared(t, g, nil)
		maker, _ := lendShared(t, g, nil)
		waiting := queueShared(t, g, t.Context(), 3, sharing(nil))
		m.done()
		m.done()
		first.Close()
		second.Close()
		if who, w := served(t, waiting); len(who) != 2 || w.loan.Kept != Keeper(m) {
			t.Errorf("%v are served, want two", who)
		}
		maker.Share(newMulti(maker, 2))
		if who, _ := served(t, waiting); len(who) != 1 || len(n.dialled()) != 2 {
			t.Errorf("%v are served, want the third", who)
		}
	})
}

// TestRetryJoins: a retry may join what is shared, with any endpoint but the
// first preferred.
func TestRetryJoins(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a, b)
		_, _ = share(t, g, nil, 9)
		_, _ = share(t, g, nil, 9)
		var tried Tried
		seen := map[string]int{}
		for range 3 {
			l, err := g.Borrow(t.Context(), sharing(nil), &tried)
			if err != nil || l.Kept == nil {
				t.Fatalf("%v, with %v", err, l.Kept)
			}
			seen[l.Address]++
		}
		if len(seen) != 2 || len(n.dialled()) != 2 {
			t.Errorf("went to %v", seen)
		}
	})
}

// TestJoin: a place is had at once, or not at all, and then it is the turn of the
// same endpoint.
func TestJoin(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{MaxRequests: 3}, a, b)
		wish := Wish{Shares: true}
		if _, ok := g.Join(wish, nil); ok || len(n.dialled()) != 0 {
			t.Fatal("joined where nothing is shared")
		}
		toA, m := share(t, g, nil, 2)
		for range 2 { // b is not connected to, and not gone by
			if l, ok := g.Join(wish, nil); ok {
				t.Fatalf("joined %s out of turn", l.Address)
			}
		}
		toB, other := share(t, g, nil, 9)
		if toA.Address == toB.Address {
			t.Fatalf("%s twice", toA.Address)
		}
		var tried Tried
		l, ok := g.Join(wish, &tried)
		if !ok || l.Kept != Keeper(m) || tried.count != 1 {
			t.Fatalf("%t, with %v, %d tried", ok, l.Kept, tried.count)
		}
		again, ok := g.Join(wish, &tried)
		if !ok || again.Kept != Keeper(other) {
			t.Errorf("%t, with %v, want the endpoint that was not tried", ok, again.Kept)
		}
		if _, ok := g.Join(wish, nil); ok {
			t.Error("joined one that is full")
		}
		finish(&l, m)
		finish(&again, other)
		if _, active := idleAndActive(g); active != 2 {
			t.Errorf("%d active, want two", active)
		}
	})
}

// TestJoinIsNoOvertaking: who waits in line comes first.
func TestJoinIsNoOvertaking(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{MaxRequests: 1}, a)
		first, m := share(t, g, nil, 9)
		waiting := queueShared(t, g, t.Context(), 1, sharing(nil))
		finish(first, m)
		if _, ok := g.Join(Wish{Shares: true}, nil); ok {
			t.Error("joined before who waits")
		}
		if who, _ := served(t, waiting); len(who) != 1 {
			t.Errorf("%v are served, want the one that waits", who)
		}
	})
}

// TestWaitingIsNotTrying: an endpoint whose connection was waited for, and that
// was then given up, was not lent to the request.
func TestWaitingIsNotTrying(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{Balance: LeastRequests, Ejection: Ejection{After: 1, For: time.Hour}}, a, b)
		n.is(b, errRefused)
		l, _ := lendShared(t, g, nil) // of a; b is ejected on the way, or later
		var tried Tried
		got := make(chan waiter, 1)
		g.targets[1].addresses()[0].failure(errRefused)
		go func() {
			l, err := g.Borrow(t.Context(), sharing(nil), &tried)
			got <- waiter{loan: l, err: err}
		}()
		synctest.Wait()
		n.is(b, nil)
		g.targets[1].addresses()[0].succeeded()
		l.endpoint.failure(errRefused)
		l.Close()
		if w := <-got; w.err != nil || w.loan.Address != b || tried.count != 1 || !tried.has(w.loan.endpoint) {
			t.Errorf("%+v, with %d tried", w, tried.count)
		}
	})
}

// TestShareTogether: many borrow, share, fail, forget and end at once.
func TestShareTogether(t *testing.T) {
	for _, settings := range []Settings{
		{MaxIdle: 2, MaxConnections: 3, MaxRequests: 20, Ejection: Ejection{After: 3, For: time.Millisecond}},
		{Balance: LeastConnections},
	} {
		n := newNetwork()
		s := n.set(t)
		n.resolve("shop", "10.0.1.1", "10.0.1.2")
		g := take(t, s, settings, a, b, "shop:80")
		keys := []*moment{new(moment), new(moment)}
		var made sync.Map
		var all sync.WaitGroup
		for i := range 16 {
			all.Go(func() {
				for j := range 150 {
					useOnce(t, g, keys[j/10%2], i+j, &made)
					if j == 100 {
						g.Forget(keys[j/10%2])
					}
				}
			})
		}
		all.Wait()
		for _, e := range s.endpoints() {
			if e.conns.Load() != 0 || e.active.Load() != 0 || len(e.shelf.making) != 0 || int(e.shelf.size.Load()) != len(e.shelf.idle)+len(e.shelf.shared) {
				t.Errorf("%s: %d connections, %d active, %d being made, %d idle", e.name, e.conns.Load(), e.active.Load(), len(e.shelf.making), e.shelf.size.Load())
			}
		}
		s.Close()
		made.Range(func(k, _ any) bool {
			if n := k.(interface{ times() int32 }).times(); n != 1 {
				t.Errorf("a %T was closed %d times", k, n)
			}
			return true
		})
	}
}

func (k *keeper) times() int32 { return k.closed.Load() }

// useOnce borrows once and does one of many things with it.
func useOnce(t *testing.T, g *Group, key *moment, n int, made *sync.Map) {
	w := Wish{Timeout: 20 * time.Second, Key: key, Shares: n%4 != 0}
	l, err := g.Borrow(t.Context(), w, nil)
	if err != nil {
		if !strings.Contains(err.Error(), "handshake") {
			t.Error(err)
		}
		return
	}
	if most := l.endpoint.limits.connections; most > 0 && l.endpoint.conns.Load() > int64(most) {
		t.Errorf("%d connections to %s", l.endpoint.conns.Load(), l.Address)
	}
	m, _ := l.Kept.(*multi)
	switch {
	case m != nil:
		m.dead.Store(n%50 == 0 || m.dead.Load())
		finish(&l, m)
	case l.Kept != nil:
		l.Return(l.Kept)
	case n%9 == 1:
		l.Failed(errors.New("handshake"))
		l.Close()
	case w.Shares && n%9 != 2:
		m = newMulti(&l, 5)
		made.Store(m, true)
		l.Succeeded()
		l.Share(m)
		finish(&l, m)
	default:
		k := &keeper{address: l.Address}
		made.Store(k, true)
		if n%18 == 2 {
			l.Alone()
		}
		l.Return(k)
	}
}

// TestSharedAtTheEnd: what is shared or ended in the moment in which it cannot
// be lent any more is closed all the same, once.
func TestSharedAtTheEnd(t *testing.T) {
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
				l, _ := lendShared(t, g, nil)
				m := newMulti(l, 9)
				var both sync.WaitGroup
				both.Go(func() { l.Share(m); finish(l, m) })
				both.Go(func() { end(s, g) })
				both.Wait()
				if n := m.closed.Load(); n != 1 {
					t.Fatalf("closed %d times", n)
				}
				s.Close()
			}
		})
	}
}

// warm returns a group whose endpoints each have a shared connection.
func warm(t testing.TB, settings Settings, targets int) (*Group, *moment) {
	g, _ := benchmarkGroup(t, settings, targets)
	key := new(moment)
	for range targets {
		l, err := g.Borrow(context.Background(), sharing(key), nil)
		if err != nil {
			t.Fatal(err)
		}
		m := newMulti(&l, 100)
		l.Share(m) // its own loan goes on, so that all are chosen
	}
	return g, key
}

func joinOnce(t testing.TB, g *Group, key *moment) {
	var tried Tried
	l, err := g.Borrow(context.Background(), sharing(key), &tried)
	if err != nil {
		t.Fatal(err)
	}
	m, ok := l.Kept.(*multi)
	if !ok {
		t.Fatal("not what is shared")
	}
	l.Succeeded()
	m.done()
	l.Close()
}

func joinAtOnce(t testing.TB, g *Group, key *moment) {
	var tried Tried
	l, ok := g.Join(Wish{Key: key, Shares: true}, &tried)
	if !ok {
		t.Fatal("no place")
	}
	l.Succeeded()
	l.Kept.(*multi).done()
	l.Close()
}

// TestSharingAllocates nothing once connections are there.
func TestSharingAllocates(t *testing.T) {
	for _, targets := range []int{1, 16} {
		for _, settings := range []Settings{{}, {Balance: LeastConnections, MaxConnections: 100, MaxRequests: 1000}} {
			g, key := warm(t, settings, targets)
			if n := testing.AllocsPerRun(1000, func() { joinOnce(t, g, key); joinAtOnce(t, g, key) }); n != 0 {
				t.Errorf("%d targets: %v allocations a loan, want none", targets, n)
			}
		}
	}
}

func BenchmarkJoin(bench *testing.B) {
	for _, targets := range []int{1, 16} {
		bench.Run(fmt.Sprint(targets), func(bench *testing.B) {
			g, key := warm(bench, Settings{Balance: LeastRequests, MaxRequests: 100}, targets)
			bench.ReportAllocs()
			for bench.Loop() {
				joinAtOnce(bench, g, key)
			}
		})
	}
}

// TestSharedGrows: who waits for a place is served once there are more, though
// nobody has given one back.
func TestSharedGrows(t *testing.T) {
	for name, settings := range map[string]Settings{
		"in the line":               {MaxConnections: 1},
		"for one more that is made": {},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, _ *network, s *Set) {
				g := take(t, s, settings, a)
				l, _ := lendShared(t, g, nil)
				grows, m := l.Grows(), newMulti(l, 1)
				grows() // before it is shared
				l.Share(m)
				if settings.MaxConnections == 0 {
					_, _ = lendShared(t, g, nil)
				}
				waiting := queueShared(t, g, t.Context(), 3, sharing(nil))
				if who, _ := served(t, waiting); who != nil {
					t.Fatalf("%v are served, want none", who)
				}
				m.places = 3
				grows()
				if who, w := served(t, waiting); len(who) != 2 || w.loan.Kept != Keeper(m) {
					t.Errorf("%v are served, want two", who)
				}
			})
		})
	}
}
