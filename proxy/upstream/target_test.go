package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// bubble runs a test on a network in memory, in time that passes by itself.
func bubble(t *testing.T, test func(t *testing.T, n *network, s *Set)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.set(t)
		defer s.Close()
		test(t, n, s)
	})
}

// TestResolve: a name's addresses are followed, both families, and what is
// known of those that stay is kept.
func TestResolve(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		n.resolve("shop", "10.1.0.2", "10.1.0.1", "2001:db8::1", "::ffff:10.1.0.1")
		g := take(t, s, Settings{Ejection: Ejection{After: 1, For: time.Hour}}, "shop:80")
		if got := many(t, g, 6); got["10.1.0.1:80"] != 2 || got["10.1.0.2:80"] != 2 || got["[2001:db8::1]:80"] != 2 {
			t.Errorf("connections %v", got)
		}
		n.is("10.1.0.1:80", errRefused)
		many(t, g, 3)
		open := connect(t, g)
		n.resolve("shop", "10.1.0.1", "10.1.0.9")
		time.Sleep(6 * time.Second)
		if got := many(t, g, 6); got["10.1.0.9:80"] != 6 {
			t.Errorf("connections after other addresses: %v, want those to the new one, and the ejected one left out", got)
		}
		if n.meters.Endpoints.Value() != 2 || n.meters.Healthy.Value() != 1 {
			t.Errorf("meters: %v endpoints, %v healthy", n.meters.Endpoints.Value(), n.meters.Healthy.Value())
		}
		open.Close()
		n.mu.Lock()
		before := n.lookups
		n.mu.Unlock()
		time.Sleep(time.Minute)
		n.mu.Lock()
		defer n.mu.Unlock()
		if more := n.lookups - before; more < 11 || more > 14 {
			t.Errorf("%d lookups in a minute, want one each 5 s", more)
		}
	})
}

// TestNoLookups: literal addresses need none.
func TestNoLookups(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, a, c3, "[::1]:80", "[fe80::1%lo]:80")
		many(t, g, 8)
		time.Sleep(time.Minute)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.lookups != 0 {
			t.Errorf("%d lookups", n.lookups)
		}
	})
}

// TestResolverFails: the last good answer is used for as long as DNS fails,
// and for a while when it says that there is no such name.
func TestResolverFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		n.resolve("shop", "10.1.0.1")
		g := take(t, s, Settings{}, "shop:80")
		many(t, g, 1)
		n.fail(errors.New("server misbehaving"))
		time.Sleep(24 * time.Hour)
		many(t, g, 1)
		list, _ := g.Status(10)
		if !list[0].Healthy || list[0].Problem != "address may be old: server misbehaving" || n.meters.LookupFailures.Value() < 15_000 {
			t.Errorf("status %+v, %d failures", list, n.meters.LookupFailures.Value())
		}
		n.fail(nil)
		n.resolve("shop")
		time.Sleep(goneFor - 10*time.Second)
		many(t, g, 1)
		n.resolve("shop", "10.1.0.1")
		time.Sleep(10 * time.Second)
		n.resolve("shop")
		time.Sleep(goneFor - 10*time.Second) // it counts from anew
		many(t, g, 1)
		time.Sleep(20 * time.Second)
		if _, err := g.Dial(t.Context(), time.Second); err == nil || !strings.Contains(err.Error(), "lookup shop: no such host") {
			t.Errorf("error %v", err)
		}
		if list, _ := g.Status(10); len(list) != 1 || list[0].Healthy || list[0].Address != "" || n.meters.Endpoints.Value() != 0 {
			t.Errorf("status %+v", list)
		}
		n.resolve("shop", "10.1.0.3")
		time.Sleep(2 * time.Second)
		if got := many(t, g, 1); got["10.1.0.3:80"] != 1 { // a connection asks for the lookup
			t.Errorf("connections %v", got)
		}
	})
}

// slow is a resolver that answers after a while.
type slow struct {
	*network
	after time.Duration
}

func (s slow) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	select {
	case <-time.After(s.after):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return s.network.LookupNetIP(ctx, network, host)
}

// TestFirstLookup: who comes before the first answer waits for it within the
// connect timeout, and all of them for the same.
func TestFirstLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		n.resolve("shop", "10.1.0.1")
		s := NewSet(Options{Resolver: slow{n, 3 * time.Second}, Dial: n.dial})
		defer s.Close()
		s.Start()
		g := take(t, s, Settings{}, "shop:80")
		errs := make(chan error, 10)
		for i := range 10 {
			go func() {
				c, err := g.Dial(t.Context(), time.Duration(1+i)*time.Second)
				c.Close()
				errs <- err
			}()
		}
		failed := 0
		for range 10 {
			if err := <-errs; err != nil {
				failed++
				if !strings.Contains(err.Error(), "look up shop: no answer within") {
					t.Error(err)
				}
			}
		}
		if failed > 3 || n.lookups != 1 {
			t.Errorf("%d failed, %d lookups", failed, n.lookups)
		}
		begin := time.Now()
		both := take(t, s, Settings{}, "gone:80", a)
		if c := connect(t, both); c.Address != a || time.Since(begin) != 0 {
			t.Errorf("a name without addresses holds up the other target: %s", time.Since(begin))
		}
		both.Release()
		if _, err := both.Dial(t.Context(), time.Second); err != nil {
			t.Error(err)
		}
	})
}

// TestCrowd: the addresses of a name are bounded.
func TestCrowd(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		var ips []string
		for i := range 200 {
			ips = append(ips, fmt.Sprintf("10.2.0.%d", i))
		}
		n.resolve("crowd", ips...)
		g := take(t, s, Settings{}, "crowd:80")
		if got := many(t, g, 200); len(got) != maxAddresses {
			t.Errorf("%d addresses, want %d", len(got), maxAddresses)
		}
		if list, more := g.Status(10); len(list) != 10 || !more {
			t.Errorf("%d endpoints in the status, more: %v", len(list), more)
		}
	})
}

// TestReleasedName: a group that is given back before its name resolved fails
// its connections at once.
func TestReleasedName(t *testing.T) {
	bubble(t, func(t *testing.T, n *network, s *Set) {
		g := take(t, s, Settings{}, "nowhere:80")
		if _, err := g.Dial(t.Context(), time.Second); err == nil {
			t.Error("connected to nowhere")
		}
		g.Release()
		synctest.Wait()
		n.resolve("nowhere", "10.3.0.1")
		begin := time.Now()
		if _, err := g.Dial(t.Context(), time.Minute); err == nil || time.Since(begin) != 0 {
			t.Errorf("error %v after %s", err, time.Since(begin))
		}
	})
}

// TestRealSockets: a tcp and a unix target, one of them a name, and none.
func TestRealSockets(t *testing.T) {
	s := NewSet(Options{})
	s.Start()
	defer s.Close()
	tcp := accept(t, "tcp", "127.0.0.1:0")
	sock := accept(t, "unix", t.TempDir()+"/s")
	_, port, _ := net.SplitHostPort(tcp)
	g := take(t, s, Settings{Health: Health{Interval: 100 * time.Millisecond}}, tcp, unixPrefix+sock, "localhost:"+port)
	for range 6 {
		c := connect(t, g)
		_ = c.Conn.Close()
		c.Close()
	}
	nobody := take(t, s, Settings{}, "127.0.0.1:1", "unix:/nowhere/s")
	_, err := nobody.Dial(t.Context(), 5*time.Second)
	const want = "none of 2 endpoints took the connection: dial tcp 127.0.0.1:1: connect: connection refused; dial unix /nowhere/s: connect: no such file or directory"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

// TestFullBacklog: a unix socket whose backlog is full is waited for.
func TestFullBacklog(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	shrink(t, l.(*net.UnixListener))
	s := NewSet(Options{})
	defer s.Close()
	g := take(t, s, Settings{Ejection: Ejection{After: -1}}, unixPrefix+l.Addr().String())
	var open []Chosen
	for {
		c, err := g.Dial(t.Context(), 100*time.Millisecond)
		if err != nil {
			if !strings.Contains(err.Error(), "its backlog is full") {
				t.Fatal(err)
			}
			break
		}
		open = append(open, c)
	}
	done := make(chan error)
	go func() {
		c, err := g.Dial(t.Context(), 10*time.Second)
		if err == nil {
			_ = c.Conn.Close()
		}
		done <- err
	}()
	for range open {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	if err := <-done; err != nil {
		t.Errorf("after the backlog had room: %v", err)
	}
	for _, c := range open {
		_ = c.Conn.Close()
	}
}
