package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

// outlived returns a connection that goes on although the rules in force
// refuse it, or nil.
func (p *Proxy) outlived() *conn {
	w := p.world.Load()
	for _, c := range p.table.of(nil) {
		c.mu.Lock()
		left := c.closing == nil && c.phase != opening && c.decision.Generation != w.generation
		c.mu.Unlock()
		if left {
			return c
		}
	}
	return nil
}

// TestThousandsOfFlips: while clients come in TLS and plaintext without pause,
// the rules flip thousands of times. After each change nobody lives whom it
// was not asked about, each that ends is counted and recorded once, and when
// the last rules refuse everybody, everybody is gone.
func TestThousandsOfFlips(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{permissive("orders", serve(t, echo))}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca), Log: hclog.NewNullLogger()})
	addr, cc := p.addr("orders"), clientConfig(ca.SVID("/web"))
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var served [2]atomic.Int64
	for n := range 6 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				raw, err := net.Dial("tcp", addr)
				if err != nil {
					continue // reset before this end knew of it
				}
				_ = raw.SetDeadline(time.Now().Add(patience))
				c := raw
				if n%2 == 0 {
					c = tls.Client(raw, cc)
				}
				if trySay(c, "hello") == nil {
					served[n%2].Add(1)
					_, _ = c.Read(make([]byte, 1)) // until rules that refuse it end it
				}
				_ = raw.Close()
			}
		})
	}
	const flips = 2000
	yes, no := rulesOf(t, allowPlain), rulesOf(t, "version: 1\nrules: [{id: nobody, effect: deny}]\n")
	c := p.config
	for round := range flips / 2 {
		for _, c.Policy = range []*policy.Policy{yes, no} {
			if _, err := p.Apply(c); err != nil {
				t.Fatal(err)
			}
			if left := p.outlived(); left != nil {
				t.Fatalf("round %d: a connection of generation %d was not asked under %d", round, left.decision.Generation, p.world.Load().generation)
			}
			if who := &served[round/50%2]; c.Policy == yes && round%50 == 0 { // now and then long enough for somebody
				before := who.Load()
				p.until("the rules let somebody through", func() bool { return who.Load() > before })
			}
		}
	}
	begin := time.Now()
	close(stop)
	clients.Wait()
	if wait := time.Since(begin); wait > patience/2 {
		t.Errorf("a connection outlived the rules that allowed it: it took %s to end", wait)
	}
	p.until("all are gone", func() bool { return p.Status().Listeners[0].Active == 0 })
	p.stop()
	t.Logf("%d served over TLS, %d in plaintext", served[0].Load(), served[1].Load())

	byReason, records := map[string]float64{}, map[string]float64{}
	for range len(p.records) {
		a := <-p.records
		records[a.Closed]++
	}
	var closed float64
	for _, reason := range telemetry.CloseReasons {
		byReason[reason] = p.metric("narthex_connections_closed_total", "orders", reason)
		closed += byReason[reason]
		if byReason[reason] != records[reason] {
			t.Errorf("%v were closed by %s, %v records say so", byReason[reason], reason, records[reason])
		}
	}
	if allowed := p.metric("narthex_connections_total", "orders", "allowed"); closed != allowed || byReason["policy"] == 0 {
		t.Errorf("%v were allowed and %v ended: %v", allowed, closed, byReason)
	}
}

// TestEachEndIsCounted: whatever a live connection ends by has its reason, in
// its record and in the metric.
func TestEachEndIsCounted(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	for reason, end := range map[string]func(*running, Listener, net.Conn){
		"policy": func(p *running, _ Listener, _ net.Conn) { p.apply(denyAll) },
		"revoked": func(p *running, _ Listener, _ net.Conn) {
			p.apply(allowAll + "revoked: [\"spiffe://example.org/web\"]\n")
		},
		"expiry": func(p *running, in Listener, _ net.Conn) {
			in.MaxAge = time.Millisecond
			p.set(allowAll, in)
		},
		"drain": func(p *running, _ Listener, _ net.Conn) { p.set(allowAll) },
		"peer":  func(_ *running, _ Listener, c net.Conn) { _ = c.Close() },
	} {
		t.Run(reason, func(t *testing.T) {
			in := inbound("orders", serve(t, echo))
			in.Timeouts.Drain = -1
			p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
			c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
			say(t, c, "hello")
			end(p, in, c)
			if a := p.next(); a.Closed != reason || a.Reason == "" {
				t.Errorf("access record %+v", a)
			}
			for _, other := range telemetry.CloseReasons {
				want := 0.0
				if other == reason {
					want = 1
				}
				if got := p.metric("narthex_connections_closed_total", "orders", other); got != want {
					t.Errorf("%v are counted as ended by %s, want %v", got, other, want)
				}
			}
		})
	}
}

// TestMaxAgeReachesThoseThatLive: a max_age that is set, or made shorter,
// counts for connections that are older, and one that is lifted for none.
func TestMaxAgeReachesThoseThatLive(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	in.MaxAge, in.Timeouts.Idle = time.Hour, -1 // nothing else that would be looked after
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca)})
	for _, dial := range []func() net.Conn{
		func() net.Conn { return dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web"))) },
		func() net.Conn { return dialPlain(t, p.addr("orders")) },
	} {
		in.MaxAge = 0
		p.set(allowPlain, in)
		c := dial()
		say(t, c, "hello")
		in.MaxAge = time.Millisecond
		p.set(allowPlain, in)
		gone(t, c)
		if a := p.next(); a.Closed != "expiry" || a.Reason != "older than max_age 1ms" || a.Outcome != "success" {
			t.Errorf("access record %+v", a)
		}
	}
}

// TestDrainIsTakenBack: rules that allow it again end the drain of a
// connection that others began, and on_policy_change: keep comes to an end
// with a change to close.
func TestDrainIsTakenBack(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.OnPolicyChange, in.Timeouts.Drain = ActionDrain, time.Hour
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "hello")
	draining := func() bool {
		conn := p.table.of(nil)[0]
		conn.mu.Lock()
		defer conn.mu.Unlock()
		return !conn.deadlines[endPolicy].at.IsZero()
	}
	p.apply(denyAll)
	if !draining() {
		t.Error("it does not drain")
	}
	p.apply(allowAll)
	if draining() {
		t.Error("it drains although it is allowed again")
	}
	in.OnPolicyChange = ActionKeep
	p.set(denyAll, in)
	say(t, c, "kept")
	in.OnPolicyChange = ActionClose
	p.set(denyAll, in)
	gone(t, c)
	if a := p.next(); a.Closed != "policy" || a.Decision != "deny" {
		t.Errorf("access record %+v", a)
	}
}

// TestExpiryReachesThoseThatLive: connections that were kept past their peer's
// end go when on_peer_expiry becomes close.
func TestExpiryReachesThoseThatLive(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Idle, in.OnPeerExpiry = -1, ActionKeep
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	end := expiry()
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web", func(c *x509.Certificate) { c.NotAfter = end })))
	say(t, c, "hello")
	<-time.After(time.Until(end.Add(10 * time.Millisecond)))
	say(t, c, "kept")
	in.OnPeerExpiry = ActionClose
	if applied := p.set(allowAll, in); applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	gone(t, c)
	if a := p.next(); a.Closed != "expiry" || !strings.HasPrefix(a.Reason, "the peer's SVID expired at ") {
		t.Errorf("access record %+v", a)
	}
}
