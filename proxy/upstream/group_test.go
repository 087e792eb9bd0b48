package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errRefused = &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}

// network is a network in memory: which addresses take connections, which
// refuse them and which never answer, and what names resolve to.
type network struct {
	mu      sync.Mutex // guards the following
	down    map[string]error
	dials   []string
	names   map[string][]string
	broken  error // of every lookup
	lookups int
	meters  Meters
}

// errSilent is the state of an address that never answers.
var errSilent = errors.New("silent")

func newNetwork() *network {
	return &network{down: map[string]error{}, names: map[string][]string{}, meters: noMeters("")}
}

func (n *network) set(t *testing.T) *Set {
	s := NewSet(Options{Resolver: n, Dial: n.dial, Meters: func(string) Meters { return n.meters }})
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func (n *network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	n.dials = append(n.dials, address)
	err := n.down[address]
	n.mu.Unlock()
	switch {
	case errors.Is(err, errSilent):
		<-ctx.Done()
		return nil, ctx.Err()
	case err != nil:
		return nil, err
	}
	return nothing{}, nil
}

// nothing is a connection that is only closed.
type nothing struct{ net.Conn }

func (nothing) Close() error { return nil }

// LookupNetIP implements Resolver.
func (n *network) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lookups++
	if n.broken != nil {
		return nil, n.broken
	}
	ips, ok := n.names[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	var out []netip.Addr
	for _, ip := range ips {
		out = append(out, netip.MustParseAddr(ip))
	}
	return out, nil
}

func (n *network) resolve(host string, ips ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.names[host] = ips
	if ips == nil {
		delete(n.names, host)
	}
}

func (n *network) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.broken = err
}

func (n *network) is(address string, state error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down[address] = state
}

// dialled returns the addresses that were dialled since it was last asked.
func (n *network) dialled() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.dials
	n.dials = nil
	return d
}

func take(t *testing.T, s *Set, settings Settings, targets ...string) *Group {
	t.Helper()
	g, err := s.Take("orders", targets, settings)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// connect dials once, says that it was good, and leaves the connection open.
func connect(t *testing.T, g *Group) Chosen {
	t.Helper()
	c, err := g.Dial(t.Context(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.Succeeded()
	return c
}

func many(t *testing.T, g *Group, n int) map[string]int {
	t.Helper()
	got := map[string]int{}
	for range n {
		c := connect(t, g)
		got[c.Address]++
		c.Close()
	}
	return got
}

const a, b, c3 = "10.0.0.1:80", "10.0.0.2:80", "unix:/run/c.sock"

func TestRoundRobin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{}, a, b, c3)
		if got, want := many(t, g, 30), (map[string]int{a: 10, b: 10, c3: 10}); !equal(got, want) {
			t.Errorf("connections %v, want %v", got, want)
		}
		n.is(b, errRefused)
		if got, want := many(t, g, 100), (map[string]int{a: 50, c3: 50}); got[b] != 0 || got[a] < 48 || got[c3] < 48 {
			t.Errorf("connections %v, want about %v", got, want)
		}
	})
}

func equal(a, b map[string]int) bool { return fmt.Sprint(a) == fmt.Sprint(b) }

func TestLeastConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Balance: LeastConnections}, a, b, c3)
		open := map[string][]Chosen{}
		for range 9 {
			c := connect(t, g)
			open[c.Address] = append(open[c.Address], c)
		}
		for _, address := range []string{a, b, c3} {
			if len(open[address]) != 3 {
				t.Errorf("%d connections to %s, want 3", len(open[address]), address)
			}
		}
		for i := range open[b] {
			open[b][i].Close()
			open[b][i].Close() // twice is once
		}
		for range 3 {
			if c := connect(t, g); c.Address != b {
				t.Errorf("connection to %s, want one to %s, which has the fewest", c.Address, b)
			}
		}
	})
}

// TestSilentFirst: an endpoint that never answers leaves time for the others,
// and is ejected.
func TestSilentFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		n.is(a, errSilent)
		g := take(t, s, Settings{Ejection: Ejection{After: 2}}, a, b)
		for i := range 3 {
			begin := time.Now()
			c := connect(t, g)
			if took := time.Since(begin); c.Address != b || took > 2600*time.Millisecond || i == 1 && took != 0 {
				t.Errorf("connection %d: to %s in %s", i, c.Address, took)
			}
		}
		if got := many(t, g, 10); got[b] != 10 || slices.Contains(n.dialled()[5:], a) {
			t.Errorf("the errSilent endpoint is still dialled: %v", got)
		}
		n.is(b, errSilent)
		begin := time.Now()
		_, err := g.Dial(t.Context(), 5*time.Second)
		if err == nil || !strings.Contains(err.Error(), "none of 2 endpoints took the connection: dial 10.0.0.2:80: no answer within") {
			t.Errorf("error %v", err)
		}
		if took := time.Since(begin); took != 5*time.Second {
			t.Errorf("failed after %s, want the connect timeout", took)
		}
		n.is(a, nil)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		n.is(a, errSilent)
		begin = time.Now()
		if _, err := g.Dial(ctx, 5*time.Second); !errors.Is(err, context.Canceled) || time.Since(begin) != time.Second {
			t.Errorf("cancelled: %v after %s", err, time.Since(begin))
		}
	})
}

// TestEjection: failures in a row eject, for longer each time; one connection
// tries before the others follow, and a success makes all well.
func TestEjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Ejection: Ejection{After: 3, For: 10 * time.Second}}, a, b)
		n.is(a, errRefused)
		many(t, g, 20)
		if got := n.dialled(); count(got, a) != 3 {
			t.Errorf("%d dials of the endpoint that is down, want 3", count(got, a))
		}
		if h := n.meters.Healthy.Value(); h != 1 || n.meters.Ejections.Value() != 1 || n.meters.ConnectFailures.Value() != 3 || n.meters.Endpoints.Value() != 2 {
			t.Errorf("meters: healthy %v, ejections %d", h, n.meters.Ejections.Value())
		}
		list, _ := g.Status(10)
		if list[0].Healthy || list[0].Problem != "ejected: dial tcp: connection refused" || list[0].EjectedUntil.IsZero() || list[0].Failed != 3 || !list[1].Healthy {
			t.Errorf("status %+v", list)
		}
		for _, pause := range []time.Duration{10, 20, 40, 80, 100, 100} {
			time.Sleep(pause * time.Second * 99 / 100)
			many(t, g, 4)
			if got := n.dialled(); count(got, a) != 0 {
				t.Errorf("tried before %d s are over", pause)
			}
			time.Sleep(pause*time.Second/100 + pause*time.Second/10)
			many(t, g, 4)
			if got := n.dialled(); count(got, a) != 1 {
				t.Errorf("%d trials after %d s, want one", count(got, a), pause)
			}
		}
		time.Sleep(111 * time.Second)
		n.is(a, nil)
		if got := many(t, g, 10); got[a] != 5 || n.meters.Healthy.Value() != 2 {
			t.Errorf("after it came back: %v", got)
		}
	})
}

// TestOneTrial: while a connection tries an ejected endpoint, the others keep
// away from it.
func TestOneTrial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Second}}, a, b)
		n.is(a, errRefused)
		many(t, g, 2)
		n.is(a, nil)
		time.Sleep(2 * time.Second)
		trial, others := Chosen{}, map[string]int{}
		for range 10 { // none says yet how it went
			c, err := g.Dial(t.Context(), time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if c.trial {
				trial = c
			}
			others[c.Address]++
		}
		if others[a] != 1 || trial.Address != a {
			t.Fatalf("connections while one tries: %v", others)
		}
		trial.Failed(errRefused) // as a handshake does
		trial.Close()
		if got := many(t, g, 4); got[b] != 4 {
			t.Errorf("connections after a failed trial: %v", got)
		}
		time.Sleep(3 * time.Second)
		c, _ := g.Dial(t.Context(), time.Second)
		if c.Address != a {
			c, _ = g.Dial(t.Context(), time.Second)
		}
		c.Close() // nobody can say how it went: the next one tries
		if got := many(t, g, 10); got[a] != 5 {
			t.Errorf("connections after a trial without a result: %v", got)
		}
	})
}

// TestTrialThatLives: the connection that brought an endpoint back may live for
// days, and keeps it from being tried no second time.
func TestTrialThatLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Second}}, a, b)
		for range 2 {
			n.is(a, errRefused)
			many(t, g, 2)
			n.is(a, nil)
			time.Sleep(2 * time.Second)
			for range 2 {
				lives := connect(t, g)
				defer lives.Close()
			}
			if got := many(t, g, 10); got[a] != 5 {
				t.Errorf("connections after a trial that went well: %v", got)
			}
		}
	})
}

// TestAllEjected: where none is healthy, all are tried.
func TestAllEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Hour}}, a, b)
		n.is(a, errRefused)
		n.is(b, errRefused)
		for range 3 {
			if _, err := g.Dial(t.Context(), time.Second); err == nil || !errors.Is(err, syscall.ECONNREFUSED) && !strings.Contains(err.Error(), "none of 2") {
				t.Errorf("error %v", err)
			}
			if got := n.dialled(); len(got) != 2 {
				t.Errorf("dialled %v, want both", got)
			}
		}
		n.is(b, nil)
		if got := many(t, g, 10); got[b] != 10 {
			t.Errorf("connections %v", got)
		}
		if n.meters.Healthy.Value() != 1 || n.meters.Ejections.Value() != 2 {
			t.Errorf("healthy %v after %d ejections", n.meters.Healthy.Value(), n.meters.Ejections.Value())
		}
	})
}

// TestOurFault: what fails for want of files here ejects nobody.
func TestOurFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Ejection: Ejection{After: 1}}, a)
		n.is(a, &net.OpError{Op: "dial", Err: syscall.EMFILE})
		if _, err := g.Dial(t.Context(), time.Second); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("error %v", err)
		}
		if list, _ := g.Status(1); !list[0].Healthy || list[0].Failed != 0 {
			t.Errorf("status %+v", list)
		}
	})
}

// TestActiveHealth: checks take an endpoint out and bring it back, and end
// with the group.
func TestActiveHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		g := take(t, s, Settings{Health: Health{Interval: 10 * time.Second, UnhealthyAfter: 2, HealthyAfter: 3}}, a, b)
		time.Sleep(time.Minute)
		checks := n.dialled()
		if got := count(checks, a); got < 5 || got > 7 {
			t.Errorf("%d checks in a minute, want one each 10 s", got)
		}
		n.is(a, errSilent)
		time.Sleep(35 * time.Second)
		list, _ := g.Status(10)
		if list[0].Healthy || list[0].Problem != "health check: no answer within 2s" || !list[1].Healthy || n.meters.Healthy.Value() != 1 {
			t.Errorf("status %+v", list)
		}
		n.dialled()
		if got := many(t, g, 10); got[b] != 10 {
			t.Errorf("connections while a fails its checks: %v", got)
		}
		n.is(a, nil)
		time.Sleep(15 * time.Second) // two at most: they come each 10 s, by a tenth sooner or later
		if got := many(t, g, 2); got[b] != 2 {
			t.Errorf("connections after too few good checks: %v", got)
		}
		time.Sleep(25 * time.Second)
		if got := many(t, g, 10); got[a] != 5 {
			t.Errorf("connections after enough good checks: %v", got)
		}
		n.is(a, errSilent)
		n.is(b, errSilent)
		time.Sleep(time.Minute)
		n.is(b, nil)
		if got := many(t, g, 4); got[b] != 4 {
			t.Errorf("with all of them unhealthy: %v", got)
		}
		g.Release()
		g.Release() // twice is once
		synctest.Wait()
		n.dialled()
		time.Sleep(time.Minute)
		if got := n.dialled(); len(got) != 0 {
			t.Errorf("checked after its release: %v", got)
		}
	})
}

// TestKept: what is known of a target survives a reload, and ends with its
// last user.
func TestKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		settings := Settings{Ejection: Ejection{After: 1, For: time.Hour}}
		first := take(t, s, settings, a, b)
		n.is(a, errRefused)
		many(t, first, 4)
		next := take(t, s, settings, "10.0.0.3:80", b, a)
		first.Release()
		n.dialled()
		many(t, next, 10)
		if got := n.dialled(); count(got, a) != 0 {
			t.Errorf("an ejected endpoint is dialled after a reload: %v", got)
		}
		spoken := settings
		spoken.Protocol = "h2"
		other := take(t, s, spoken, a)
		if list, _ := other.Status(1); !list[0].Healthy || list[0].Failed != 0 {
			t.Errorf("what is spoken to in another protocol is not another target: %+v", list)
		}
		other.Release()
		next.Release()
		fresh := take(t, s, settings, a)
		if list, _ := fresh.Status(1); !list[0].Healthy || list[0].Failed != 0 {
			t.Errorf("after its last user left: %+v", list)
		}
		if _, err := next.Dial(t.Context(), time.Second); err != nil { // one that began before the reload
			t.Errorf("a connection that a released group makes: %v", err)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	n := newNetwork()
	s := n.set(t)
	n.is(a, errRefused)
	n.resolve("shop", "10.0.1.1", "10.0.1.2")
	g := take(t, s, Settings{Balance: LeastConnections, Ejection: Ejection{After: 2, For: time.Millisecond}}, a, b, "shop:80")
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for range 200 {
				c, err := g.Dial(t.Context(), time.Second)
				if err != nil {
					t.Error(err)
					return
				}
				if i%2 == 0 {
					c.Succeeded()
				} else {
					c.Failed(errRefused)
				}
				c.Close()
				_, _ = g.Status(100)
			}
		})
	}
	all.Wait()
	for _, t2 := range g.targets {
		for _, e := range t2.addresses() {
			if e.active.Load() != 0 || e.trying.Load() {
				t.Errorf("%s: %d connections are left", e.name, e.active.Load())
			}
		}
	}
}

func count(list []string, what string) int {
	n := 0
	for _, s := range list {
		if s == what {
			n++
		}
	}
	return n
}

func TestRefusedSettings(t *testing.T) {
	s := NewSet(Options{})
	defer s.Close()
	for _, bad := range []struct {
		targets  []string
		settings Settings
	}{
		{nil, Settings{}},
		{[]string{"nowhere"}, Settings{}},
		{[]string{"host:"}, Settings{}},
		{[]string{"host:0"}, Settings{}},
		{[]string{"host:http"}, Settings{}},
		{[]string{"host:65536"}, Settings{}},
		{[]string{":80"}, Settings{}},
		{[]string{"unix:"}, Settings{}},
		{[]string{a}, Settings{Balance: 3}},
		{[]string{a}, Settings{Health: Health{Interval: -1}}},
		{[]string{a}, Settings{Ejection: Ejection{For: -1}}},
	} {
		if _, err := s.Take("x", bad.targets, bad.settings); err == nil {
			t.Errorf("%v %+v is taken", bad.targets, bad.settings)
		}
	}
	var balance Balance
	if err := balance.UnmarshalText([]byte("least_connections")); err != nil || balance.String() != "least_connections" {
		t.Errorf("%v, %v", balance, err)
	}
	if balance.UnmarshalText([]byte("random")) == nil {
		t.Error("random is a balance")
	}
}
