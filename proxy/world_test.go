package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// halted is one end of a handshake that reads what the other end sent first
// and does not go on before it is told to.
type halted struct {
	net.Conn
	once sync.Once
	read chan struct{} // closed: the other end has begun
	on   chan struct{} // closed by the test
}

func halt(c net.Conn) *halted {
	return &halted{Conn: c, read: make(chan struct{}), on: make(chan struct{})}
}

func (h *halted) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	h.once.Do(func() {
		close(h.read)
		<-h.on
	})
	return n, err
}

// word greets with a word that says who was reached.
func word(w string) func(net.Conn) {
	return func(c net.Conn) {
		_, _ = io.WriteString(c, w)
		_, _ = io.Copy(io.Discard, c)
	}
}

// reached returns what the target says at once, or an error.
func reached(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	b := make([]byte, 5)
	_, err := io.ReadFull(c, b)
	return string(b), err
}

// TestListenerChangesDuringHandshake: rules decide for the target they were
// written for, or for none.
func TestListenerChangesDuringHandshake(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	ids := identity.NewHeld("test")
	if err := ids.Set([]identity.SVID{{Certificate: ca.SVID("/orders")}, {Certificate: ca.SVID("/other")}}, testca.Bundles(ca)); err != nil {
		t.Fatal(err)
	}
	admin, public := serve(t, word("admin")), serve(t, word("open!"))
	for _, test := range []struct {
		name   string
		change func(c *Config)
		word   string // the target that answers
		reason string
	}{
		{"target and rules", func(c *Config) { c.Listeners[0].Targets, c.Policy = []string{public}, rulesOf(t, allowAll) }, "", "the listener's target changed while the handshake was going on"},
		{"target", func(c *Config) { c.Listeners[0].Targets = []string{public} }, "", "the listener's target changed while the handshake was going on"},
		{"identity", func(c *Config) {
			c.Listeners[0].Identity.SPIFFEID, c.Policy = spiffeid.RequireFromString("spiffe://example.org/other"), rulesOf(t, allowAll)
		}, "", "the listener's identity changed while the handshake was going on"},
		{"removed", func(c *Config) { c.Listeners[0].Name, c.Policy = "new", rulesOf(t, allowAll) }, "", "the listener was removed while the handshake was going on"},
		{"rules", func(c *Config) { c.Policy = rulesOf(t, allowAll) }, "admin", ""},
		{"a timeout", func(c *Config) { c.Listeners[0].Timeouts.Idle = time.Hour }, "", "policy: no rule allows it"},
	} {
		t.Run(test.name, func(t *testing.T) {
			in := inbound("orders", admin)
			in.Timeouts.Drain = time.Minute
			p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowWeb), Identities: ids})
			raw, err := net.Dial("tcp", p.addr("orders"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = raw.Close() }()
			h := halt(raw)
			c := tls.Client(h, clientConfig(ca.SVID("/evil")))
			var shaken sync.WaitGroup
			shaken.Go(func() { _ = c.Handshake() })
			<-h.read
			changed := p.config
			changed.Listeners = []Listener{in}
			test.change(&changed)
			if _, err := p.Apply(changed); err != nil {
				t.Fatal(err)
			}
			close(h.on)
			shaken.Wait()
			got, err := reached(c)
			_ = c.Close()
			if got = strings.Trim(got, "\x00"); got != test.word {
				t.Errorf("reached %q (%v), want %q", got, err, test.word)
			}
			if a := p.next(); test.reason != "" && (a.Reason != test.reason || a.Outcome != "failure") {
				t.Errorf("access record %+v\nwant reason %q", a, test.reason)
			}
		})
	}
}

// TestExpectChangesDuringHandshake is the same where we are the client.
func TestExpectChangesDuringHandshake(t *testing.T) {
	ca := testca.New(t, "example.org")
	accepted := make(chan *halted, 1)
	config := clientConfig(ca.SVID("/inventory"))
	config.ClientAuth = tls.RequireAnyClientCert
	addr := serve(t, func(c net.Conn) {
		h := halt(c)
		accepted <- h
		_, _ = io.Copy(io.Discard, tls.Server(h, config))
	})
	p := run(t, Config{
		Listeners: []Listener{outbound(t, "out", addr, "spiffe://example.org/inventory")}, Policy: rulesOf(t, allowAll),
		Identities: source(t, ca.SVID("/web"), ca),
	})
	c, err := net.Dial("tcp", p.addr("out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	h := <-accepted
	<-h.read
	changed := p.config
	changed.Listeners = []Listener{outbound(t, "out", addr, "spiffe://example.org/*")}
	if _, err := p.Apply(changed); err != nil {
		t.Fatal(err)
	}
	close(h.on)
	if a := p.next(); a.Reason != "the listener's expect changed while the handshake was going on" || a.Outcome != "failure" {
		t.Errorf("access record %+v", a)
	}
}

// TestSVIDTakenBackDuringHandshake: it is not used for a new connection.
func TestSVIDTakenBackDuringHandshake(t *testing.T) {
	ca := testca.New(t, "example.org")
	for name, test := range map[string]struct {
		change func(*identity.Held)
		reason string
	}{
		"taken back": {func(s *identity.Held) { s.Withdraw(errors.New("the entry was deleted")) }, "our own SVID spiffe://example.org/orders went while the handshake was going on: no identity: the entry was deleted"},
		"another":    {func(s *identity.Held) { give(t, s, ca.SVID("/other"), ca) }, "our own SVID spiffe://example.org/orders went while the handshake was going on: the listener presents spiffe://example.org/other by now"},
		"renewed":    {func(s *identity.Held) { give(t, s, ca.SVID("/orders"), ca) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			ids := source(t, ca.SVID("/orders"), ca)
			p := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, word("hello")))}, Policy: rulesOf(t, allowAll), Identities: ids})
			raw, err := net.Dial("tcp", p.addr("orders"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = raw.Close() }()
			h := halt(raw)
			c := tls.Client(h, clientConfig(ca.SVID("/web")))
			var shaken sync.WaitGroup
			shaken.Go(func() { _ = c.Handshake() })
			<-h.read
			test.change(ids)
			close(h.on)
			shaken.Wait()
			_, err = reached(c)
			_ = c.Close()
			if a := p.next(); (err == nil) != (test.reason == "") || (err != nil && a.Reason != test.reason) {
				t.Errorf("%v, access record %+v\nwant reason %q", err, a, test.reason)
			}
		})
	}
}

// probing is a source whose leases run a probe when they are given back,
// which is in the midst of an Apply that changes an identity.
type probing struct {
	*identity.Held
	probe func()
}

func (p *probing) Own(ctx context.Context, pick identity.Pick) (identity.Lease, error) {
	lease, err := p.Held.Own(ctx, pick)
	return &probingLease{lease, p}, err
}

type probingLease struct {
	identity.Lease
	source *probing
}

func (l *probingLease) Close() {
	if probe := l.source.probe; probe != nil {
		l.source.probe = nil
		probe()
	}
}

// TestRulesAndTargetsComeAtOnce: in the midst of a change nobody is decided
// by the old rules for a new target.
func TestRulesAndTargetsComeAtOnce(t *testing.T) {
	ca := testca.New(t, "example.org")
	ids := &probing{Held: identity.NewHeld("test")}
	if err := ids.Set([]identity.SVID{{Certificate: ca.SVID("/orders")}, {Certificate: ca.SVID("/other")}}, testca.Bundles(ca)); err != nil {
		t.Fatal(err)
	}
	in := inbound("orders", serve(t, word("open!")))
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: ids})
	addr, cc := p.addr("orders"), clientConfig(ca.SVID("/evil"))
	got, err := reached(dialTLS(t, addr, clientConfig(ca.SVID("/web")))) // it runs
	if err != nil {
		t.Fatal(err)
	}
	ids.probe = func() {
		var c net.Conn
		if c, err = tls.Dial("tcp", addr, cc); err == nil {
			got, err = reached(c)
			_ = c.Close()
		}
	}
	changed := p.config
	in.Targets, in.Identity.SPIFFEID = []string{serve(t, word("admin"))}, spiffeid.RequireFromString("spiffe://example.org/other")
	changed.Listeners, changed.Policy = []Listener{in}, rulesOf(t, allowWeb)
	if _, err := p.Apply(changed); err != nil {
		t.Fatal(err)
	}
	if ids.probe != nil || err == nil {
		t.Errorf("a client that only the old rules allow reached %q", got)
	}
	if a := p.next(); a.Generation != 2 || a.Reason != "policy: no rule allows it" {
		t.Errorf("access record %+v", a)
	}
}

// TestTargetsComeAndGo: a connection stays as long as the target it came to is
// one of its listener's.
func TestTargetsComeAndGo(t *testing.T) {
	ca := testca.New(t, "example.org")
	first, second := serve(t, echo), serve(t, echo)
	in := inbound("orders", "")
	in.Timeouts.Drain = -1
	in.Targets = []string{"127.0.0.1:1", first} // nobody serves port 1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	point := func(targets ...string) {
		t.Helper()
		c := p.config
		in.Targets = targets
		c.Listeners = []Listener{in}
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
	}
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "past a target that is down")
	if got := p.Status().Listeners[0].Targets; !slices.Equal(got, in.Targets) {
		t.Errorf("the status names the targets %v", got)
	}
	point(second, first)
	say(t, c, "its target is still there")
	point(second)
	if a := p.next(); a.Closed != "drain" || a.Destination != first || a.Reason != "its listener has another target, "+second {
		t.Errorf("access record %+v", a)
	}
}

// TestTargetChanges: a connection stays with its target, for as long as those
// of a removed listener may, or until the target is its listener's again.
func TestTargetChanges(t *testing.T) {
	ca := testca.New(t, "example.org")
	first, second := serve(t, echo), serve(t, word("other"))
	in := inbound("orders", first)
	in.Timeouts.Drain = time.Hour
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	point := func(target string, drain time.Duration) {
		t.Helper()
		c := p.config
		in.Targets, in.Timeouts.Drain = []string{target}, drain
		c.Listeners = []Listener{in}
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
	}
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "hello")
	point(second, time.Hour)
	say(t, c, "to the old target")
	point(first, 10*time.Millisecond)
	if conn := p.table.of(nil)[0]; !conn.deadlines[endMoved].at.IsZero() {
		t.Error("the target is the old one again, and the connection still drains")
	}
	point(second, 10*time.Millisecond)
	gone(t, c)
	if a := p.next(); a.Closed != "drain" || a.Reason != "its listener has another target, "+second || a.Outcome != "success" {
		t.Errorf("access record %+v", a)
	}
}

// TestDrainAtOnce: a negative drain time is none, not the default.
func TestDrainAtOnce(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Drain, in.OnPolicyChange = -1, ActionDrain
	removed, stopped := in, in
	removed.Name, stopped.Name = "removed", "stopped"
	p := run(t, Config{Listeners: []Listener{in, removed, stopped}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	refused := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	gone1 := dialTLS(t, p.addr("removed"), clientConfig(ca.SVID("/web")))
	last := dialTLS(t, p.addr("stopped"), clientConfig(ca.SVID("/web")))
	for _, c := range []net.Conn{refused, gone1, last} {
		say(t, c, "hello")
	}
	c := p.config
	c.Listeners, c.Policy = []Listener{in, stopped}, rulesOf(t, allowWeb)
	if _, err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	gone(t, refused)
	gone(t, gone1)
	say(t, last, "still there")
	p.stop()
	gone(t, last)
}

// TestChangesWhileDialling: what is on its way to the target and may not be
// any more does not arrive, whatever on_policy_change says of those that live.
func TestChangesWhileDialling(t *testing.T) {
	ca := testca.New(t, "example.org")
	for _, action := range []Action{ActionClose, ActionDrain, ActionKeep} {
		for name, change := range map[string]func(*Config){
			"policy: denied by a rule (nobody)":            func(c *Config) { c.Policy = rulesOf(t, denyAll) },
			"its listener has another target, 127.0.0.1:1": func(c *Config) { c.Listeners[0].Targets = []string{"127.0.0.1:1"} },
		} {
			t.Run(action.String()+"/"+name, func(t *testing.T) {
				in := inbound("orders", "127.0.0.1:9")
				in.OnPolicyChange, in.Timeouts.Drain = action, time.Minute
				p := run(t, Config{Identities: source(t, ca.SVID("/orders"), ca), Policy: rulesOf(t, allowAll)})
				dialling, arrive := make(chan struct{}), make(chan struct{})
				p.upstreams.Dial = func(context.Context, string, string) (net.Conn, error) {
					close(dialling)
					<-arrive
					ours, theirs := net.Pipe()
					t.Cleanup(func() { _ = ours.Close(); _ = theirs.Close() })
					return halfPipe{ours}, nil
				}
				c := p.config
				c.Listeners = []Listener{in}
				if _, err := p.Apply(c); err != nil {
					t.Fatal(err)
				}
				client := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
				<-dialling
				c.Listeners = []Listener{in}
				change(&c)
				if _, err := p.Apply(c); err != nil {
					t.Fatal(err)
				}
				close(arrive)
				gone(t, client)
				if a := p.next(); a.Reason != name || a.Outcome != "failure" {
					t.Errorf("access record %+v", a)
				}
			})
		}
	}
}
