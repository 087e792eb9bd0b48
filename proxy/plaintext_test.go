package proxy

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

const allowPlain = allowAll + `
  - {id: plain, effect: allow, at: inbound, from: [unauthenticated], to: ["spiffe://example.org/orders"]}
`

// permissive is an inbound listener that takes plaintext too.
func permissive(name, target string) Listener {
	l := inbound(name, target)
	l.Mode = ModePermissive
	return l
}

// dialPlain opens a connection that the test closes.
func dialPlain(t testing.TB, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// set changes a running proxy's listeners.
func (r *running) set(rules string, listeners ...Listener) Applied {
	r.t.Helper()
	for i := range listeners {
		if listeners[i].Timeouts.Drain == 0 {
			listeners[i].Timeouts.Drain = 50 * time.Millisecond
		}
	}
	r.config.Listeners = listeners
	return r.apply(rules)
}

// greet speaks first, as SMTP, SSH and MySQL do.
func greet(c net.Conn) {
	_, _ = io.WriteString(c, "220 hello\r\n")
	echo(c)
}

func TestPermissive(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	path := t.TempDir() + "/in.sock"
	tcp, unixes := permissive("orders", serve(t, echo)), permissive("unix", serve(t, echo))
	unixes.Bind = "unix:" + path
	p := run(t, Config{Listeners: []Listener{tcp, unixes}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca)})
	for network, addr := range map[string]string{"tcp": p.addr("orders"), "unix": path} {
		c, err := net.Dial(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		say(t, c, "G")
		say(t, c, "ET / HTTP/1.1")
		p.until("the status names it", func() bool {
			return slices.ContainsFunc(p.Status().Listeners[0].Connections, func(c telemetry.ConnectionStatus) bool { return c.From == "unauthenticated" }) || network == "unix"
		})
		_ = c.Close()
		a := p.next()
		if !a.Plaintext || a.From != "unauthenticated" || a.To != "spiffe://example.org/orders" || a.Rule != "plain" || a.Decision != "allow" || a.TLSVersion != "" || a.Outcome != "success" || a.BytesIn != 14 {
			t.Errorf("%s: access record %+v", network, a)
		}
	}
	secure := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, secure, "hello")
	_ = secure.Close()
	if a := p.next(); a.Plaintext || a.From != "spiffe://example.org/web" || a.TLSVersion != "1.3" {
		t.Errorf("access record %+v", a)
	}
	status := p.Status().Listeners[0]
	if status.Mode != "permissive" || status.Unauthenticated != 1 || len(status.Sources) != 1 || status.Sources[0].Source != "127.0.0.1" || status.Sources[0].Connections != 1 {
		t.Errorf("status: %+v", status)
	}
	if got := p.Status().Listeners[1].Sources; len(got) != 1 || got[0].Source != "unix" {
		t.Errorf("sources over a unix socket: %+v", got)
	}
	if got := p.metric("narthex_connections_unauthenticated_total", "orders"); got != 1 {
		t.Errorf("counted %v", got)
	}
}

// TestServerSpeaksFirst: a client that waits to be greeted is, also over TLS.
func TestServerSpeaksFirst(t *testing.T) {
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{permissive("orders", serve(t, greet))}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca)})
	for name, c := range map[string]net.Conn{"plaintext": dialPlain(t, p.addr("orders")), "tls": dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))} {
		greeting := make([]byte, 11)
		if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != "220 hello\r\n" {
			t.Errorf("%s: greeted by %q, %v", name, greeting, err)
		}
		say(t, c, "EHLO")
	}
}

// TestPermissiveFallsBackToNothing: who speaks TLS and fails there is refused,
// and so is a beginning of TLS that stays one; neither reaches the target.
func TestPermissiveFallsBackToNothing(t *testing.T) {
	t.Parallel()
	ca, stranger := testca.New(t, "example.org"), testca.New(t, "evil.example")
	in := permissive("orders", serve(t, func(c net.Conn) { t.Error("the target was reached") }))
	hurried := in
	hurried.Name, hurried.Timeouts.Handshake = "hurried", 200*time.Millisecond
	p := run(t, Config{Listeners: []Listener{in, hurried}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca)})
	wantRefused(t, p, clientConfig(), "the client sent no certificate")
	wantRefused(t, p, clientConfig(stranger.SVID("/web")), "no bundle for trust domain evil.example")
	for _, bytes := range []string{"\x16", "\x16\x03", "\x16\x03\x01\x02\x00", "\x16\x03\x01\x02\x00\x01"} {
		c := dialPlain(t, p.addr("hurried"))
		if _, err := io.WriteString(c, bytes); err != nil {
			t.Fatal(err)
		}
		gone(t, c)
		if a := p.next(); a.Reason != "the client sent no TLS hello within 200ms" || a.Plaintext {
			t.Errorf("%x: access record %+v", bytes, a)
		}
	}
	for _, bytes := range []string{"", "\x16", "\x16\x03\x01\x02\x00\x01\x00"} { // health probes, and those who gave up
		c := dialPlain(t, p.addr("orders"))
		if _, err := io.WriteString(c, bytes); err != nil {
			t.Fatal(err)
		}
		_ = c.(*net.TCPConn).CloseWrite()
		gone(t, c)
		if a := p.next(); a.Reason != "the peer closed the connection during the handshake" || a.Plaintext {
			t.Errorf("%x and the end: access record %+v", bytes, a)
		}
	}
	if got := p.Status().Listeners[0]; got.Unauthenticated != 0 {
		t.Errorf("%d of them count as plaintext", got.Unauthenticated)
	}
}

// TestSlowHello: a hello whose first byte is in time may be as slow as on a
// strict listener.
func TestSlowHello(t *testing.T) {
	ca := testca.New(t, "example.org")
	p := run(t, Config{Listeners: []Listener{permissive("orders", serve(t, echo))}, Policy: rulesOf(t, allowPlain), Identities: source(t, ca.SVID("/orders"), ca)})
	raw := dialPlain(t, p.addr("orders"))
	c := tls.Client(&stutter{Conn: raw}, clientConfig(ca.SVID("/web")))
	say(t, c, "in pieces")
}

// stutter holds its first message back after the first byte, for longer than a
// silent client is waited for.
type stutter struct {
	net.Conn
	begun bool
}

func (s *stutter) Write(b []byte) (int, error) {
	if s.begun {
		return s.Conn.Write(b)
	}
	s.begun = true
	if n, err := s.Conn.Write(b[:1]); err != nil {
		return n, err
	}
	<-time.After(plaintextAfter + 50*time.Millisecond)
	n, err := s.Conn.Write(b[1:])
	return n + 1, err
}

func TestPlaintextIsDecided(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	refused := func(reason string) {
		t.Helper()
		c := dialPlain(t, p.addr("orders"))
		_, _ = io.WriteString(c, "hello")
		if _, err := c.Read(make([]byte, 1)); !isReset(err) {
			t.Errorf("the client got %v, want a reset", err)
		}
		if a := p.next(); a.Reason != reason || !a.Plaintext || a.From != "unauthenticated" || a.Outcome != "failure" {
			t.Errorf("access record %+v\nwant reason %q", a, reason)
		}
	}
	refused("policy: no rule allows it")

	p.apply(allowPlain)
	c := dialPlain(t, p.addr("orders"))
	say(t, c, "hello")
	p.apply(allowPlain + `  - {id: closed, effect: deny, from: [unauthenticated]}` + "\n")
	gone(t, c)
	if a := p.next(); a.Closed != "policy" || a.Reason != "policy: denied by a rule (closed)" || a.Decision != "deny" {
		t.Errorf("access record %+v", a)
	}
	refused("policy: denied by a rule (closed)")

	// Strict ends what is plaintext, whatever on_policy_change says, and
	// nothing else.
	in.OnPolicyChange, in.Enforcement = ActionKeep, Audit
	p.set(allowPlain, in)
	c, secure := dialPlain(t, p.addr("orders")), dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "hello")
	say(t, secure, "hello")
	in.Mode = ModeStrict
	if applied := p.set(allowPlain, in); applied.Asked != 2 || applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	gone(t, c)
	if a := p.next(); a.Closed != "policy" || a.Reason != "plaintext: the listener's mode is strict by now" {
		t.Errorf("access record %+v", a)
	}
	say(t, secure, "still there")
	c = dialPlain(t, p.addr("orders"))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
	_, _ = io.ReadAll(c)
	if a := p.next(); a.Reason != "not a TLS client: it speaks plain HTTP; this port speaks TLS" || a.Plaintext {
		t.Errorf("access record %+v", a)
	}
}

// TestPlaintextWithoutUs: rules speak of whom it goes to, so that without an
// SVID nobody is let in.
func TestPlaintextWithoutUs(t *testing.T) {
	ca := testca.New(t, "example.org")
	ids := source(t, ca.SVID("/orders"), ca)
	p := run(t, Config{Listeners: []Listener{permissive("orders", serve(t, echo))}, Policy: rulesOf(t, allowPlain), Identities: ids})
	ids.Withdraw(fmt.Errorf("the entry was deleted"))
	c := dialPlain(t, p.addr("orders"))
	_, _ = io.WriteString(c, "hello")
	gone(t, c)
	if a := p.next(); a.Reason != "cannot present an identity: no identity: the entry was deleted" || !a.Plaintext {
		t.Errorf("access record %+v", a)
	}
}

// TestTurnsStrictMeanwhile: plaintext that began on a permissive listener is
// refused when the listener is strict before it is decided.
func TestTurnsStrictMeanwhile(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	ids := &probing{Held: identity.NewHeld("test")}
	if err := ids.Set([]identity.SVID{{Certificate: ca.SVID("/orders")}}, testca.Bundles(ca)); err != nil {
		t.Fatal(err)
	}
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowPlain), Identities: ids})
	c := dialPlain(t, p.addr("orders"))
	p.until("it is accepted", func() bool { return p.Status().Listeners[0].Active == 1 })
	in.Mode = ModeStrict
	p.set(allowPlain, in)
	gone(t, c)
	if a := p.next(); a.Reason != "plaintext: the listener's mode is strict by now" || !a.Plaintext || a.Outcome != "failure" {
		t.Errorf("access record %+v", a)
	}
}

func isReset(err error) bool {
	return err != nil && (strings.Contains(err.Error(), syscall.ECONNRESET.Error()) || strings.Contains(err.Error(), syscall.EPIPE.Error()))
}

func TestOpenListenersAreSaid(t *testing.T) {
	ca := testca.New(t, "example.org")
	log := &lines{}
	in := inbound("orders", serve(t, echo))
	p := run(t, Config{
		Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca),
		Log: hclog.New(&hclog.LoggerOptions{Output: log}),
	})
	in.Mode = ModePermissive
	p.set(allowAll, in)
	in.Enforcement = Audit
	p.set(allowAll, in)
	in.MaxAge = time.Hour
	p.set(allowAll, in)
	p.stop()
	if log.count("listener is permissive") != 1 || log.count("listener only audits") != 1 {
		t.Errorf("want each said once:\n%s", log.text.String())
	}
}

func TestModesThatCannotBe(t *testing.T) {
	ca := testca.New(t, "example.org")
	out := outbound(t, "out", "127.0.0.1:1", "spiffe://example.org/web")
	out.Mode = ModePermissive
	_, err := New(Config{Listeners: []Listener{out}, Identities: source(t, ca.SVID("/orders"), ca)})
	if err == nil || !strings.Contains(err.Error(), "listener out: mode permissive is for inbound listeners") {
		t.Error(err)
	}
	var m Mode
	var e Enforcement
	if err := m.UnmarshalText([]byte("lax")); err == nil || err.Error() != `"lax": want strict or permissive` {
		t.Error(err)
	}
	if err := e.UnmarshalText([]byte("log")); err == nil || err.Error() != `"log": want enforce or audit` {
		t.Error(err)
	}
	for _, word := range []string{"strict", "permissive"} {
		if err := m.UnmarshalText([]byte(word)); err != nil || m.String() != word {
			t.Error(word, m, err)
		}
	}
	for _, word := range []string{"enforce", "audit"} {
		if err := e.UnmarshalText([]byte(word)); err != nil || e.String() != word {
			t.Error(word, e, err)
		}
	}
}

// TestSources: what is counted is bounded, never too low, and too high by no
// more than it says; the busiest are there, whatever else comes.
func TestSources(t *testing.T) {
	var s sources
	now := time.Unix(1, 0)
	busy := netip.MustParseAddr("10.0.0.1")
	for n := range 10_000 {
		s.add(netip.AddrFrom4([4]byte{192, 168, byte(n >> 8), byte(n)}), now)
		if n%50 == 0 {
			s.add(busy, now)
		}
	}
	total, most := s.top()
	if total != 10_200 || len(s.count) != maxSources || len(most) != shownSources {
		t.Errorf("%d in all, %d kept, %d shown", total, len(s.count), len(most))
	}
	if first := most[0]; first.Source != "10.0.0.1" || first.Connections < 200 || first.Connections-first.AtMostOver > 200 || !first.Last.Equal(now) {
		t.Errorf("the busiest: %+v", first)
	}
	var sum uint64
	for _, c := range s.count {
		sum += c.seen
	}
	if sum != total {
		t.Errorf("the counts add up to %d of %d", sum, total)
	}
}

func FuzzSpeech(f *testing.F) {
	for _, b := range []string{"\x16\x03\x01\x02\x00\x01", "\x16\x03", "GET / ", "SSH-2.", "\x16\x03\x01\x02\x00\x02", "\x15\x03\x01\x00\x02\x01", "\x80\x2e\x01"} {
		f.Add([]byte(b))
	}
	hello := []byte{22, 3, 0, 0, 0, 1}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		b = b[:min(len(b), headOfHello)]
		like := slices.Clone(b)
		for _, at := range []int{2, 3, 4} { // the minor version and the length may be any
			if at < len(b) {
				like[at] = hello[at]
			}
		}
		want := saysPlaintext
		switch {
		case bytes.Equal(like, hello):
			want = saysTLS
		case bytes.HasPrefix(hello, like):
			want = maybeTLS
		}
		if got := speechOf(b); got != want {
			t.Errorf("%x: %v, want %v", b, got, want)
		}
	})
}

// TestLateLook: who has spoken by the time we look is judged by what it said,
// though the time to speak is over.
func TestLateLook(t *testing.T) {
	t.Parallel()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "l")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for said, want := range map[string]bool{string(clientHello(t)): false, "GET / HTTP/1.1\r\n": true, "": true} {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(client, said); err != nil {
			t.Fatal(err)
		}
		down, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		sock, err := down.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if got := newConn(nil, down, &settings{}).speaksPlaintext(sock, 0); got != want {
			t.Errorf("%.20q: plaintext is %v, want %v", said, got, want)
		}
		_, _ = client.Close(), down.Close()
	}
}

// TestAudit: what rules refuse passes and is counted, once for each outcome;
// what an audit does not lift is refused as ever.
func TestAudit(t *testing.T) {
	t.Parallel()
	ca, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
	log := &lines{}
	in := permissive("orders", serve(t, echo))
	in.Enforcement = Audit
	ids := source(t, ca.SVID("/orders"), ca, partner)
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowWeb), Identities: ids, Log: hclog.New(&hclog.LoggerOptions{Output: log})})
	count := func(rule, decision string) float64 {
		return p.metric("narthex_policy_decisions_total", "orders", rule, decision)
	}
	web, batch := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web"))), dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	plain := dialPlain(t, p.addr("orders"))
	for _, c := range []net.Conn{web, batch, plain} {
		say(t, c, "hello")
	}
	if got := count("", "would_deny"); got != 2 {
		t.Errorf("%v would be denied, want 2", got)
	}
	if status := p.Status().Listeners[0]; status.Enforcement != "audit" || status.WouldDeny != 2 || status.Connections[1].WouldDeny != "policy: no rule allows it" || status.Connections[0].WouldDeny != "" {
		t.Errorf("status: %+v", status)
	}

	// Rules that refuse everybody, twice, change the outcome of one.
	const twice = denyAll + "groups: {g: [\"spiffe://a/b\"]}\n"
	for _, rules := range []string{denyAll, twice} {
		if applied := p.apply(rules); applied.Asked != 3 || applied.Closed != 0 {
			t.Errorf("applied %+v", applied)
		}
	}
	if got := count("nobody", "would_deny"); got != 1 {
		t.Errorf("%v would be denied by the new rules, want the one that was allowed", got)
	}
	p.apply(allowWeb)
	if got := count("web", "allow"); got != 2 { // at first, and again
		t.Errorf("%v allowed, want 2", got)
	}

	// `revoked`, the limits of an audit and the end of it.
	p.apply(allowWeb + `revoked: ["spiffe://example.org/batch"]` + "\n")
	gone(t, batch)
	if a := p.next(); a.Closed != "revoked" || a.Decision != "deny" || a.WouldDeny != "" {
		t.Errorf("access record %+v", a)
	}
	p.apply(allowWeb)
	wantRefused(t, p, clientConfig(testca.New(t, "evil.example").SVID("/web")), "no bundle for trust domain evil.example")
	wantRefused(t, p, clientConfig(testca.New(t, "example.org").SVID("/web")), "not signed by an authority in the bundle")
	foreign := dialTLS(t, p.addr("orders"), clientConfig(partner.SVID("/web")))
	say(t, foreign, "hello")
	give(t, ids, ca.SVID("/orders"), ca)
	gone(t, foreign)
	if a := p.next(); a.Closed != "revoked" || !strings.Contains(a.Reason, "trust domain partner.example is no longer trusted") {
		t.Errorf("access record %+v", a)
	}
	kept := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/batch")))
	say(t, kept, "hello")
	_ = kept.Close()
	if a := p.next(); a.Decision != "would_deny" || a.WouldDeny != "policy: no rule allows it" || a.Reason != "ended by the client" || a.Outcome != "success" {
		t.Errorf("access record %+v", a)
	}
	in.Enforcement = Enforce
	p.set(allowWeb, in)
	gone(t, plain)
	if a := p.next(); a.Closed != "policy" || a.Decision != "deny" || a.WouldDeny != "" || !a.Plaintext {
		t.Errorf("access record %+v", a)
	}
	say(t, web, "still there")
	p.stop()
	if log.count("passes in an audit only: the rules refuse it") < 3 {
		t.Errorf("the log does not say what would be refused:\n%s", log.text.String())
	}
}

// TestAuditWithoutPolicy: where there is no policy, nothing passes.
func TestAuditWithoutPolicy(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := permissive("orders", serve(t, echo))
	in.Enforcement = Audit
	p := run(t, Config{Listeners: []Listener{in}, Identities: source(t, ca.SVID("/orders"), ca)})
	wantRefused(t, p, clientConfig(ca.SVID("/web")), "policy: no policy is loaded")
}

// TestAuditOutbound: the rules are audited, `expect` is enforced.
func TestAuditOutbound(t *testing.T) {
	ca := testca.New(t, "example.org")
	server := func(path string) string {
		config := &tls.Config{Certificates: []tls.Certificate{ca.SVID(path)}, ClientAuth: tls.RequireAnyClientCert}
		return serve(t, func(c net.Conn) { echo(tls.Server(c, config)) })
	}
	right, wrong := outbound(t, "right", server("/inventory"), "spiffe://example.org/inventory"), outbound(t, "wrong", server("/other"), "spiffe://example.org/inventory")
	right.Enforcement, wrong.Enforcement = Audit, Audit
	p := run(t, Config{Listeners: []Listener{right, wrong}, Policy: rulesOf(t, denyAll), Identities: source(t, ca.SVID("/web"), ca)})
	c := dialPlain(t, p.addr("right"))
	say(t, c, "hello")
	_ = c.Close()
	if a := p.next(); a.Decision != "would_deny" || a.Rule != "nobody" || a.Plaintext {
		t.Errorf("access record %+v", a)
	}
	if refused, err := net.Dial("tcp", p.addr("wrong")); err == nil { // or the reset was there first
		_ = refused.SetDeadline(time.Now().Add(patience))
		gone(t, refused)
		_ = refused.Close()
	}
	if a := p.next(); !strings.Contains(a.Reason, "valid, but not who `expect` names") {
		t.Errorf("access record %+v", a)
	}
	right.Expect = []policy.Pattern{patternOf(t, "spiffe://example.org/another")}
	c = dialPlain(t, p.addr("right"))
	say(t, c, "hello")
	p.set(denyAll, right, wrong)
	gone(t, c)
	if a := p.next(); a.Closed != "policy" || !strings.Contains(a.Reason, "is not who `expect` names") {
		t.Errorf("access record %+v", a)
	}
}
