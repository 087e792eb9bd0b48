package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/policy"
)

func TestPolicyChangeClosesOnlyViolators(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Drain = time.Hour
	keep, drain := in, in
	keep.Name, keep.OnPolicyChange = "keeps", ActionKeep
	drain.Name, drain.OnPolicyChange = "drains", ActionDrain
	p := run(t, Config{Listeners: []Listener{in, keep, drain}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	open := func(listener, who string) net.Conn {
		c := dialTLS(t, p.addr(listener), clientConfig(ca.SVID(who)))
		say(t, c, "hello")
		return c
	}
	web, batch := open("orders", "/web"), open("orders", "/batch")
	kept, drained := open("keeps", "/batch"), open("drains", "/batch")

	applied := p.apply(allowWeb)
	if applied.Asked != 4 || applied.Closed != 1 || applied.Kept != 2 || applied.NowRefused != 3 || applied.Generation != 2 {
		t.Errorf("applied %+v", applied)
	}
	gone(t, batch)
	if a := p.next(); a.Closed != "policy" || a.Decision != "deny" || a.Generation != 2 || a.Outcome != "failure" || a.From != "spiffe://example.org/batch" || a.Reason != "policy: no rule allows it" {
		t.Errorf("access record %+v", a)
	}
	for _, c := range []net.Conn{web, kept, drained} {
		say(t, c, "still there")
	}
	if got := p.metric("narthex_connections_closed_total", "orders", "policy"); got != 1 {
		t.Errorf("closed by policy: %v", got)
	}

	// Revoked closes whatever the listener does about other refusals.
	p.apply(allowWeb + `revoked: ["spiffe://example.org/batch"]` + "\n")
	gone(t, kept)
	gone(t, drained)
	for range 2 {
		if a := p.next(); a.Closed != "revoked" || a.Reason != "policy: the identity it comes from is revoked" {
			t.Errorf("access record %+v", a)
		}
	}
	say(t, web, "and still")
}

func TestDrainAfterPolicyChange(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.OnPolicyChange, in.Timeouts.Drain = ActionDrain, 50*time.Millisecond
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	say(t, c, "hello")
	p.apply(allowWeb)
	gone(t, c)
	if a := p.next(); a.Closed != "policy" {
		t.Errorf("access record %+v", a)
	}
}

// TestRegistrationRace opens connections while the policy flips between
// allowing and denying, and ends on denying: none may be left that was
// decided by a policy that is no longer in force.
func TestRegistrationRace(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	addr := p.addr("orders")
	var clients sync.WaitGroup
	var served atomic.Int64
	flipping := make(chan struct{})
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-flipping:
					return
				default:
				}
				c, err := tls.Dial("tcp", addr, cc)
				if err != nil {
					continue // denied before the handshake was through at this end
				}
				_ = c.SetDeadline(time.Now().Add(patience))
				if trySay(c, "hello") == nil {
					served.Add(1)
					_, _ = c.Read(make([]byte, 1)) // until a denying policy ends it
				}
				_ = c.Close()
			}
		})
	}
	yes, no := rulesOf(t, allowAll), rulesOf(t, denyAll)
	c := p.config
	// Every client must be served by the allowing policy and then ended by
	// the denying one, again and again: one that slipped through would read
	// until its deadline.
	for round := 0; round < 50 || served.Load() < 20; round++ {
		for _, c.Policy = range []*policy.Policy{yes, no} {
			if _, err := p.Apply(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	begin := time.Now()
	close(flipping)
	clients.Wait()
	if wait := time.Since(begin); wait > patience/2 {
		t.Errorf("a connection outlived the policy that allowed it: it took %s to end", wait)
	}
	for _, c := range p.table.of(nil) {
		c.mu.Lock()
		if c.closing == nil && c.phase == copying {
			t.Errorf("connection of generation %d lives under %d", c.decision.Generation, p.world.Load().generation)
		}
		c.mu.Unlock()
	}
}

// TestNoWindowBeforeDecision holds a connection exactly between registering
// and deciding while the policy changes.
func TestNoWindowBeforeDecision(t *testing.T) {
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	held := p.world.Load().named("orders")
	session, err := held.session(held.settings())
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	defer func() { _ = theirs.Close() }()
	c := newConn(held, halfPipe{ours}, held.settings())
	c.request.Listener = "orders"
	p.table.add(c, time.Time{})
	defer p.table.remove(c)
	web := ca.SVID("/web")
	id := spiffeid.RequireFromURI(web.Leaf.URIs[0])
	if c.standing, err = session.trust.Stand(id, []*x509.Certificate{web.Leaf}, time.Now()); err != nil {
		t.Fatal(err)
	}
	c.setEnds(session.identity, policy.PeerOf(id, web.Leaf))
	if applied := p.apply(denyAll); applied.Asked != 0 {
		t.Errorf("an undecided connection was asked: %+v", applied)
	}
	if err := c.decide(); err == nil || !strings.Contains(err.Error(), "policy: denied by a rule (nobody)") {
		t.Errorf("decided by the policy that was in force when it registered: %v", err)
	}
}

type halfPipe struct{ net.Conn }

func (halfPipe) CloseWrite() error { return nil }

func TestResumptionDoesNotSkipThePolicy(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			ca := testca.New(t, "example.org")
			ids := source(t, ca.SVID("/orders"), ca)
			p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: ids})
			cc := clientConfig(ca.SVID("/web"))
			cc.MaxVersion, cc.ServerName, cc.ClientSessionCache = version, "orders", tls.NewLRUClientSessionCache(8)
			for range 2 {
				c := dialTLS(t, p.addr("orders"), cc)
				say(t, c, "hello")
				if c.ConnectionState().DidResume {
					t.Fatal("a session was resumed: there should be no tickets")
				}
				_ = c.Close()
				p.next()
			}
			p.apply(denyAll)
			wantRefused(t, p, cc, "policy: denied by a rule (nobody)")
			p.apply(allowAll)
			other := testca.New(t, "example.org")
			give(t, ids, other.SVID("/orders"), other)
			wantRefused(t, p, cc, "not signed by an authority in the bundle of example.org")
		})
	}
}

// wantRefused dials the listener orders and expects the refusal in the access
// log.
func wantRefused(t *testing.T, p *running, cc *tls.Config, reason string) {
	t.Helper()
	c, err := tls.Dial("tcp", p.addr("orders"), cc)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(patience))
		gone(t, c)
		_ = c.Close()
	}
	if a := p.next(); a.Outcome != "failure" || !strings.Contains(a.Reason, reason) {
		t.Errorf("access record %+v, want reason %q", a, reason)
	}
}

func TestRotationKeepsConnections(t *testing.T) {
	ca, next := testca.New(t, "example.org"), testca.New(t, "example.org")
	ids := source(t, ca.SVID("/orders"), ca)
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: ids})
	old := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, old, "hello")

	fresh := next.SVID("/orders")
	give(t, ids, fresh, ca, next) // a new authority is prepared and used
	c := dialTLS(t, p.addr("orders"), clientConfig(next.SVID("/web")))
	say(t, c, "hello")
	if got := c.ConnectionState().PeerCertificates[0]; !got.Equal(fresh.Leaf) {
		t.Error("a new connection was not shown the new SVID")
	}
	say(t, old, "still there")

	give(t, ids, next.SVID("/orders"), next) // the old authority is withdrawn before its time
	gone(t, old)
	a := p.next()
	if a.Closed != "revoked" || !strings.Contains(a.Reason, "does not stand under the new bundle") {
		t.Errorf("access record %+v", a)
	}
	say(t, c, "still there")
	give(t, ids, next.SVID("/orders")) // the whole domain is
	gone(t, c)
	if a := p.next(); a.Closed != "revoked" || !strings.Contains(a.Reason, "trust domain example.org is no longer trusted") {
		t.Errorf("access record %+v", a)
	}
}

// TestWithdrawnDomainWhateverBecameOfUs: that our own identity was taken back
// or is another one now does not keep a peer whose trust domain is withdrawn.
func TestWithdrawnDomainWhateverBecameOfUs(t *testing.T) {
	t.Parallel()
	for _, us := range []string{"the same", "taken back", "another"} {
		t.Run(us, func(t *testing.T) {
			ca, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
			first, second := identity.SVID{Certificate: ca.SVID("/first")}, identity.SVID{Certificate: ca.SVID("/second")}
			ids := identity.NewHeld("test")
			if err := ids.Set([]identity.SVID{first, second}, testca.Bundles(ca, partner)); err != nil {
				t.Fatal(err)
			}
			p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, `
version: 1
rules:
  - {id: partner, effect: allow, from: ["spiffe://partner.example/**"], to: ["spiffe://example.org/**"]}
`), Identities: ids})
			c := dialTLS(t, p.addr("orders"), clientConfig(partner.SVID("/web")))
			say(t, c, "hello")
			left := []identity.SVID{first, second}
			switch us {
			case "taken back":
				ids.Withdraw(fmt.Errorf("the entry was deleted"))
				left = left[1:]
			case "another":
				changed := p.config
				changed.Listeners = []Listener{p.config.Listeners[0]}
				changed.Listeners[0].Identity.SPIFFEID = spiffeid.RequireFromString("spiffe://example.org/second")
				if _, err := p.Apply(changed); err != nil {
					t.Fatal(err)
				}
			}
			say(t, c, "still there")
			if err := ids.Set(left, testca.Bundles(ca)); err != nil {
				t.Fatal(err)
			}
			gone(t, c)
			if a := p.next(); a.Closed != "revoked" || !strings.Contains(a.Reason, "trust domain partner.example is no longer trusted") {
				t.Errorf("access record %+v", a)
			}
		})
	}
}

// expiry is when an SVID ends that is to end while the test waits: late enough
// for all that has to come before, of a busy machine too.
func expiry() time.Time { return time.Now().Add(6 * time.Second).Truncate(time.Second) }

func TestOwnIdentityLost(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	end := expiry()
	ids := source(t, ca.SVID("/orders", func(c *x509.Certificate) { c.NotAfter = end }), ca)
	p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: ids})
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "hello")
	ids.Withdraw(fmt.Errorf("the entry was deleted"))
	wantRefused(t, p, clientConfig(ca.SVID("/web")), "cannot present an identity: no identity: the entry was deleted")
	say(t, c, "what was presented is good until it expires")
	gone(t, c)
	if time.Now().Before(end) {
		t.Error("closed before our SVID expired")
	}
	if a := p.next(); a.Closed != "expiry" || !strings.Contains(a.Reason, "our own SVID spiffe://example.org/orders expired") {
		t.Errorf("access record %+v", a)
	}
}

// TestOwnIdentityLostAndKept: a connection that on_policy_change keeps beyond
// the end of our own SVID is looked after like any other.
func TestOwnIdentityLostAndKept(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	end := time.Now().Add(time.Second).Truncate(time.Second).Add(time.Second)
	ids := source(t, ca.SVID("/orders", func(c *x509.Certificate) { c.NotAfter = end }), ca)
	in := inbound("orders", serve(t, echo))
	in.OnPolicyChange, in.Timeouts.Idle = ActionKeep, 3*time.Second
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: ids})
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "hello")
	ids.Withdraw(errors.New("the entry was deleted"))
	<-time.After(time.Until(end.Add(10 * time.Millisecond)))
	say(t, c, "kept")
	gone(t, c)
	if a := p.next(); a.Reason != "idle for 3s" {
		t.Errorf("access record %+v", a)
	}
}

func TestPeerExpiry(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Drain = time.Millisecond
	closes, drains, aged := in, in, in
	closes.Name, closes.OnPeerExpiry = "closes", ActionClose
	drains.Name, drains.OnPeerExpiry = "drains", ActionDrain
	aged.Name, aged.MaxAge = "aged", 3*time.Second
	p := run(t, Config{Listeners: []Listener{in, closes, drains, aged}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	old := dialTLS(t, p.addr("aged"), clientConfig(ca.SVID("/web")))
	gone(t, old)
	if a := p.next(); a.Closed != "expiry" || a.Reason != "older than max_age 3s" {
		t.Errorf("access record %+v", a)
	}
	cc := clientConfig(ca.SVID("/web", func(c *x509.Certificate) { c.NotAfter = expiry() }))
	kept, closed, drained := dialTLS(t, p.addr("orders"), cc), dialTLS(t, p.addr("closes"), cc), dialTLS(t, p.addr("drains"), cc)
	for _, c := range []net.Conn{kept, closed, drained} {
		say(t, c, "hello")
	}
	for _, c := range []net.Conn{closed, drained} {
		gone(t, c)
		if a := p.next(); a.Closed != "expiry" || !strings.Contains(a.Reason, "the peer's SVID expired") || a.Outcome != "success" {
			t.Errorf("access record %+v", a)
		}
	}
	say(t, kept, "tcp keeps a connection past its peer's expiry")
}

func TestTimeouts(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Handshake, in.Timeouts.Idle = 50*time.Millisecond, 50*time.Millisecond
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})

	silent, err := net.Dial("tcp", p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	if _, err := io.ReadAll(silent); err == nil {
		t.Log("closed in good order")
	}
	if a := p.next(); a.Reason != "the client sent no TLS hello within 50ms" || a.Outcome != "failure" {
		t.Errorf("access record %+v", a)
	}
	if got := p.metric("narthex_tls_handshakes_total", "orders", "timeout"); got != 1 {
		t.Errorf("handshakes timed out: %v", got)
	}

	slow := in
	slow.Timeouts.Handshake, slow.Timeouts.Idle = 0, 2*time.Second // in which the client has to say something
	c := p.config
	c.Listeners = []Listener{slow}
	if _, err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	idle := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, idle, "hello")
	gone(t, idle)
	if a := p.next(); a.Reason != "idle for 2s" || a.Closed != "peer" {
		t.Errorf("access record %+v", a)
	}
}

// Rules hold for connections that drain too, which can take as long as the
// drain time: who is revoked meanwhile is closed.
func TestRulesWhileDraining(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Drain = time.Hour
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowWeb), Identities: source(t, ca.SVID("/orders"), ca)})
	conn := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, conn, "hello")
	stopped := make(chan struct{})
	go func() { defer close(stopped); p.stop() }()
	c := p.table.of(nil)[0]
	for tick := time.Tick(time.Millisecond); ; <-tick { // until it drains
		c.mu.Lock()
		drains := !c.deadlines[endDrain].at.IsZero()
		c.mu.Unlock()
		if drains {
			break
		}
	}
	say(t, conn, "still here")
	if a := p.apply(allowAll); a.Asked != 1 || a.Closed != 0 {
		t.Errorf("other rules that allow it: %+v", a)
	}
	say(t, conn, "still here")
	if a := p.apply(denyAll); a.Asked != 1 || a.Closed != 1 {
		t.Errorf("rules that refuse it: %+v", a)
	}
	gone(t, conn)
	if a := p.next(); a.Closed != "policy" {
		t.Errorf("closed by %q (%s)", a.Closed, a.Reason)
	}
	<-stopped
}

// TestEndedBeforeIdentified: who drains connections may still have one in the
// list that was refused meanwhile, before anybody knew whose it was.
func TestEndedBeforeIdentified(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{inbound("in", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	l := p.world.Load().named("in")
	s := l.settings()
	c := newConn(l, nil, s)
	c.phase, c.index = finished, -1
	c.endBy(endDrain, time.Now(), closing{"drain", "its listener was removed"})
	c.tick(time.Now())
	if c.closing != nil {
		t.Errorf("ended a second time: %+v", c.closing)
	}
}
