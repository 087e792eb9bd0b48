package proxy

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/proxy/policy"
)

func (s *shares) count() (peers, conns int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.live {
		conns += n
	}
	return len(s.live), conns
}

func TestMaxPerIdentity(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxPerIdentity = 2
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	web, batch := clientConfig(ca.SVID("/web")), clientConfig(ca.SVID("/batch"))
	open := func(cc *tls.Config) *tls.Conn {
		t.Helper()
		c := dialTLS(t, p.addr("orders"), cc)
		say(t, c, "hello")
		return c
	}
	const limited = "spiffe://example.org/web has as many live connections here as max_connections_per_identity allows, 2"
	first, second := open(web), open(web)
	wantRefused(t, p, web, limited)
	wantRefused(t, p, clientConfig(ca.SVID("/web")), limited) // another SVID of the same identity
	open(batch)
	if got := p.metric("narthex_connections_total", "orders", "limited"); got != 2 {
		t.Errorf("%v limited, want 2", got)
	}
	_ = first.Close()
	p.next()
	third := open(web)

	in.MaxPerIdentity = 1
	p.set(allowAll, in)
	say(t, second, "it stays")
	say(t, third, "it too")
	_ = second.Close()
	p.next()
	wantRefused(t, p, web, "max_connections_per_identity allows, 1")
	in.MaxPerIdentity = 0
	p.set(allowAll, in)
	open(web)
	if peers, conns := p.world.Load().named("orders").shares.count(); peers != 2 || conns != 3 {
		t.Errorf("%d peers with %d connections are counted", peers, conns)
	}
	in.MaxPerIdentity = 3
	p.set(allowAll, in)
	open(web) // those from before the limit count
	wantRefused(t, p, web, "max_connections_per_identity allows, 3")
}

// TestMaxPerSource: plaintext counts by where it comes from.
func TestMaxPerSource(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	in.MaxPerIdentity = 1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca)})
	from := func(ip string) net.Conn {
		t.Helper()
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}).Dial("tcp", p.addr("orders"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
		return c
	}
	first := from("127.0.0.2")
	say(t, first, "hello")
	say(t, from("127.0.0.3"), "hello")
	say(t, dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web"))), "no plaintext")
	c := from("127.0.0.2")
	_, _ = io.WriteString(c, "hello")
	gone(t, c)
	if a := p.next(); a.Reason != "127.0.0.2 has as many live connections here as max_connections_per_identity allows, 1" || a.Decision != "" || !a.Plaintext {
		t.Errorf("access record %+v", a)
	}
	_ = first.Close()
	p.next()
	say(t, from("127.0.0.2"), "again")
}

func TestWhoIs(t *testing.T) {
	for from, want := range map[string]string{
		"10.1.2.3": "10.1.2.3", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64", "fe80::1%eth0": "fe80::/64", "": "plaintext over a unix socket",
	} {
		var c conn
		c.request.From.Unauthenticated = true
		if from != "" {
			c.request.Source = netip.AddrPortFrom(netip.MustParseAddr(from), 5000)
		}
		if got := c.whoIs().String(); got != want {
			t.Errorf("%s counts as %s, want %s", from, got, want)
		}
	}
}

// TestSharesAreExact: however many come at once, as many get in as may.
func TestSharesAreExact(t *testing.T) {
	var s shares
	var in atomic.Int64
	var all sync.WaitGroup
	w := who{from: netip.MustParsePrefix("10.0.0.1/32")}
	for range 8 {
		all.Go(func() {
			for range 5000 {
				if !s.take(w, 3) {
					continue
				}
				if n := in.Add(1); n > 3 {
					t.Errorf("%d at once", n)
				}
				in.Add(-1)
				s.give(w)
			}
		})
	}
	all.Wait()
	if peers, conns := s.count(); peers != 0 || conns != 0 {
		t.Errorf("%d peers with %d connections are left", peers, conns)
	}
}

// TestSharesComeBack: whatever a connection ends by, its share is given back,
// while settings and rules change under it.
func TestSharesComeBack(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	in.MaxPerIdentity, in.Timeouts.Handshake = 2, 200*time.Millisecond
	down := in
	down.Name, down.Targets = "down", []string{"127.0.0.1:1"}
	p := run(t, Config{Listeners: []Listener{in, down}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca), Log: hclog.NewNullLogger()})
	addrs := []string{p.addr("orders"), p.addr("down")}
	web, nobody := clientConfig(ca.SVID("/web")), clientConfig()
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var served atomic.Int64
	for n := range 6 {
		clients.Go(func() {
			for i := n; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				raw, err := net.Dial("tcp", addrs[i%2])
				if err != nil {
					continue // it was reset before this end knew of it
				}
				_ = raw.SetDeadline(time.Now().Add(patience))
				c := raw
				switch i % 5 {
				case 0:
					c = tls.Client(raw, nobody)
				case 1, 2:
					c = tls.Client(raw, web)
				}
				if trySay(c, "hello") == nil {
					served.Add(1)
				}
				if i%3 == 0 {
					abort(raw)
				}
				_ = c.Close()
			}
		})
	}
	for round := range 30 {
		before := served.Load()
		in.MaxPerIdentity, down.MaxPerIdentity = 1+round%3, round%2
		p.set([]string{allowPlain, denyAll, allowAll}[round%3], in, down)
		p.until("the rules let somebody through", func() bool { return round%3 == 1 || served.Load() > before })
		l := p.world.Load().named("orders")
		if peers, conns := l.shares.count(); peers > 2 || conns > 6 {
			t.Fatalf("%d peers with %d connections, with at most 3 for each", peers, conns)
		}
	}
	close(stop)
	clients.Wait()
	for _, name := range []string{"orders", "down"} {
		l := p.world.Load().named(name)
		p.until("all shares of "+name+" are given back", func() bool { peers, conns := l.shares.count(); return peers == 0 && conns == 0 })
	}
	p.until("all places are given back", func() bool { p.slots.mu.Lock(); defer p.slots.mu.Unlock(); return p.slots.taken == 0 })
}

// TestMaxConnectionsOfAll: a bound over all listeners, under which the silent
// of any listener make room.
func TestMaxConnectionsOfAll(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	other := in
	other.Name = "other"
	c := Config{Listeners: []Listener{in, other}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca), MaxConnections: 2}
	p := run(t, c)
	cc := clientConfig(ca.SVID("/web"))
	live := dialTLS(t, p.addr("orders"), cc)
	say(t, live, "hello")
	silent := dialPlain(t, p.addr("other"))
	p.until("it is accepted", func() bool { return p.Status().Listeners[1].Active == 1 })
	second := dialTLS(t, p.addr("orders"), cc)
	say(t, second, "in its place")
	gone(t, silent)
	if a := p.next(); a.Listener != "other" || !strings.HasPrefix(a.Reason, "we waited for its TLS handshake") {
		t.Errorf("access record %+v", a)
	}

	waiting := dialPlain(t, p.addr("other"))
	p.until("it waits", func() bool { p.slots.mu.Lock(); defer p.slots.mu.Unlock(); return p.slots.waiting.Len() == 1 })
	p.config.MaxConnections = 3
	p.apply(allowAll)
	say(t, tls.Client(waiting, cc), "let in")
	if got := p.Status(); got.MaxConnections != 3 {
		t.Errorf("status: %+v", got)
	}
	p.config.MaxConnections = 1
	p.apply(allowAll)
	say(t, live, "it stays")
	say(t, second, "it too")
	p.config.MaxConnections = -1
	if _, err := p.Apply(p.config); err == nil || !strings.Contains(err.Error(), "cannot be negative") {
		t.Error(err)
	}
}

// TestMaxPerIdentityOutbound: outbound, the peer is who was reached.
func TestMaxPerIdentityOutbound(t *testing.T) {
	ca := testca.New(t, "example.org")
	config := &tls.Config{Certificates: []tls.Certificate{ca.SVID("/inventory")}, ClientAuth: tls.RequireAnyClientCert}
	out := outbound(t, "out", serve(t, func(c net.Conn) { echo(tls.Server(c, config)) }), "spiffe://example.org/inventory")
	out.MaxPerIdentity = 1
	p := run(t, Config{Listeners: []Listener{out}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	say(t, dialPlain(t, p.addr("out")), "hello")
	c := dialPlain(t, p.addr("out"))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the caller got %v, want a reset", err)
	}
	if a := p.next(); a.Reason != "spiffe://example.org/inventory has as many live connections here as max_connections_per_identity allows, 1" || a.Direction != policy.Outbound.String() {
		t.Errorf("access record %+v", a)
	}
}
