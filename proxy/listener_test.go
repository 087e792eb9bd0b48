package proxy

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

func TestConfigurationsThatCannotBe(t *testing.T) {
	ca := testca.New(t, "example.org")
	ids := source(t, ca.SVID("/orders"), ca)
	good := inbound("orders", "127.0.0.1:1")
	with := func(edit func(*Listener)) []Listener {
		l := good
		edit(&l)
		return []Listener{l}
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Close() }()
	dir := t.TempDir()
	file := dir + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name      string
		listeners []Listener
		want      string
	}{
		{"no name", with(func(l *Listener) { l.Name = "" }), "a listener has no name"},
		{"two of a name", []Listener{good, good}, "listener orders: two listeners have this name"},
		{"no bind", with(func(l *Listener) { l.Bind = "" }), "listener orders: bind: is missing: want host:port or unix:/path"},
		{"no port", with(func(l *Listener) { l.Bind = "localhost" }), `listener orders: bind: "localhost": want host:port or unix:/path`},
		{"no target", with(func(l *Listener) { l.Targets = nil }), "listener orders: target: is missing"},
		{"relative", with(func(l *Listener) { l.Targets = []string{"unix:app.sock"} }), "unix:app.sock: the path must be absolute"},
		{"too long", with(func(l *Listener) { l.Bind = "unix:/" + strings.Repeat("x", 107) }), "the path has 108 bytes, a unix socket's can have 107"},
		{"outbound without expect", with(func(l *Listener) { l.Direction = policy.Outbound }), "an outbound listener needs expect"},
		{"inbound with expect", with(func(l *Listener) { l.Expect = make([]policy.Pattern, 1) }), "expect is for outbound listeners"},
		{"negative limit", with(func(l *Listener) { l.MaxConnections = -1 }), "limits cannot be negative"},
		{"negative timeout", with(func(l *Listener) { l.Timeouts.Connect = -1 }), "timeouts cannot be negative"},
		{"unknown version", with(func(l *Listener) { l.HTTP = &HTTP{Versions: []string{"h2", "http/2"}} }), `http: versions: "http/2" is none that is served: want h2 or http/1.1`},
		{"version twice", with(func(l *Listener) { l.HTTP = &HTTP{Versions: []string{"h2", "h2"}} }), "http: versions: h2 is in the list twice"},
		{"a protocol of others", with(func(l *Listener) { l.HTTP, l.ALPN = &HTTP{}, []string{"h2", "http/1.1", "http/1.0", "mqtt"} }), `alpn: "mqtt" is not among the versions of HTTP that are spoken: h2, http/1.1`},
		{"a protocol that is not spoken", with(func(l *Listener) {
			l.HTTP, l.Routes = &HTTP{Versions: []string{"h2"}}, []Route{{ALPN: []string{"h2", "http/1.0"}, Targets: l.Targets}}
		}), `alpn: "http/1.0" is not among the versions of HTTP that are spoken: h2`},
		{"an offer of requests", with(func(l *Listener) {
			l.HTTP, l.Direction, l.ALPN = &HTTP{}, policy.Outbound, []string{"h2"}
		}), "alpn: outbound, what an HTTP listener offers follows from its upstream's protocol"},
		{"negative streams", with(func(l *Listener) { l.HTTP = &HTTP{MaxStreams: -1} }), "http: max_streams: -1 is out of bounds: want 1 to 1000, or 0 for 250"},
		{"too many streams", with(func(l *Listener) { l.HTTP = &HTTP{MaxStreams: 1001} }), "http: max_streams: 1001 is out of bounds"},
		{"no protocol", with(func(l *Listener) { l.HTTP, l.UpstreamProtocol = &HTTP{}, 3 }), "upstream: protocol 3 is not one"},
		{"protocol of bytes", with(func(l *Listener) { l.UpstreamProtocol = ProtocolHTTP2 }), "upstream: protocol h2 is for HTTP listeners"},
		{"gRPC health of bytes", with(func(l *Listener) { l.Upstream.Health = upstream.Health{Interval: 1, GRPC: true} }), "upstream: health by a path or gRPC is for HTTP listeners"},
		{"outbound gRPC health", with(func(l *Listener) {
			l.HTTP, l.Direction, l.Upstream.Health = &HTTP{}, policy.Outbound, upstream.Health{Interval: 1, GRPC: true}
		}), "upstream: health by a path or gRPC is for inbound listeners"},
		{"direction", with(func(l *Listener) { l.Direction = 7 }), "direction 7 is neither"},
		{"one bind twice", []Listener{{Name: "a", Bind: "127.0.0.1:9", Targets: []string{"127.0.0.1:1"}}, {Name: "b", Bind: "127.0.0.1:9", Targets: []string{"127.0.0.1:1"}}}, "bind 127.0.0.1:9 is taken by listener a"},
		{"taken", with(func(l *Listener) { l.Bind = busy.Addr().String() }), "another program listens there; stop it, or give the listener another bind: listen tcp"},
		{"a file", with(func(l *Listener) { l.Bind = "unix:" + file }), "the file is there and is no socket"},
		{"no directory", with(func(l *Listener) { l.Bind = "unix:" + dir + "/none/x.sock" }), "there is no directory " + dir + "/none; make it, or name another path"},
		{"no such address", with(func(l *Listener) { l.Bind = "192.0.2.1:1" }), "this host has no such address"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := New(Config{Listeners: test.listeners, Identities: ids})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v\nwant %s", err, test.want)
			}
		})
	}
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "no source of identities") {
		t.Errorf("without identities: %v", err)
	}
}

// TestBindRefused: the tests may run as root, who is refused nothing.
func TestBindRefused(t *testing.T) {
	denied := &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", syscall.EACCES)}
	for bind, want := range map[string]string{
		"0.0.0.0:443":        "bind 0.0.0.0:443: not allowed; give the listener a port above 1023, or this process the capability CAP_NET_BIND_SERVICE: ",
		"unix:/run/x/a.sock": "bind unix:/run/x/a.sock: not allowed; let the user this process runs as write to /run/x, or name another path: ",
	} {
		if err := explainBind(bind, denied); !errors.Is(err, syscall.EACCES) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
}

func TestUnixSocket(t *testing.T) {
	ca := testca.New(t, "example.org")
	path := t.TempDir() + "/in.sock"
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = stale.Close()

	in := inbound("orders", serve(t, echo))
	in.Bind = "unix:" + path
	c := Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)}
	p := run(t, c)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "another process serves it") {
		t.Errorf("a live socket: %v", err)
	}
	p.next() // the probe of the second one
	changed := p.config
	l := in
	l.UnixMode = 0o600
	changed.Listeners = []Listener{l}
	if _, err := p.Apply(changed); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("changed mode %v, %v", info.Mode(), err)
	}
	p.stop()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestCloseBeforeRun(t *testing.T) {
	ca := testca.New(t, "example.org")
	p, err := New(Config{Listeners: []Listener{inbound("orders", "127.0.0.1:1")}, Identities: source(t, ca.SVID("/orders"), ca)})
	if err != nil {
		t.Fatal(err)
	}
	addr := p.Addr("orders").String()
	p.Close()
	if _, err := net.Dial("tcp", addr); err == nil {
		t.Error("the socket is still open")
	}
	if err := p.Run(context.Background()); !errors.Is(err, ErrStopped) {
		t.Errorf("Run after Close: %v", err)
	}
}

// exhausted is a listener whose Accept fails as it does without free file
// descriptors, the given number of times.
type exhausted struct {
	net.Listener
	left atomic.Int64
}

func (e *exhausted) Accept() (net.Conn, error) {
	if e.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return e.Listener.Accept()
}

func TestAcceptSurvivesExhaustion(t *testing.T) {
	ca := testca.New(t, "example.org")
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &exhausted{Listener: inner}
	l.left.Store(5)
	in := inbound("orders", serve(t, echo))
	in.Socket = l
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	say(t, dialTLS(t, inner.Addr().String(), clientConfig(ca.SVID("/web"))), "hello")
	if got := p.Status().Listeners[0]; got.Problem != "" || l.left.Load() >= 0 {
		t.Errorf("after recovery: problem %q, %d errors left", got.Problem, l.left.Load())
	}
}

func TestApplyListeners(t *testing.T) {
	ca := testca.New(t, "example.org")
	target := serve(t, echo)
	other := serve(t, func(c net.Conn) { _, _ = c.Write([]byte("other")) })
	stays, goes, moves := inbound("stays", target), inbound("goes", target), inbound("moves", target)
	p := run(t, Config{Listeners: []Listener{stays, goes, moves}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	addrs := map[string]string{}
	conns := map[string]net.Conn{}
	for _, name := range []string{"stays", "goes", "moves"} {
		addrs[name] = p.addr(name)
		c := dialTLS(t, addrs[name], cc)
		say(t, c, "hello")
		conns[name] = c
	}

	// All or nothing: one address that cannot be had leaves all as it was.
	bad := p.config
	bad.Listeners = []Listener{inbound("new", target), {Name: "bad", Bind: addrs["stays"], Targets: []string{target}}}
	bad.Policy = rulesOf(t, denyAll)
	if _, err := p.Apply(bad); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Fatalf("a taken address: %v", err)
	}
	for _, c := range conns {
		say(t, c, "as before")
	}

	good := p.config
	moves.Targets, moves.Timeouts.Drain = []string{other}, time.Second
	stays.Timeouts.Drain = p.config.Listeners[0].Timeouts.Drain
	good.Listeners = []Listener{stays, moves, inbound("new", target)}
	applied, err := p.Apply(good)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(applied.Added, ",") != "new" || strings.Join(applied.Changed, ",") != "moves" || strings.Join(applied.Removed, ",") != "goes" || applied.Generation != 1 {
		t.Errorf("applied %+v", applied)
	}
	gone(t, conns["goes"]) // after its drain time
	if a := p.next(); a.Closed != "drain" || a.Reason != "its listener was removed" {
		t.Errorf("access record %+v", a)
	}
	if _, err := net.Dial("tcp", addrs["goes"]); err == nil {
		t.Error("the removed listener still accepts")
	}
	say(t, conns["stays"], "untouched")
	say(t, conns["moves"], "goes on to the old target")
	if p.addr("stays") != addrs["stays"] || p.addr("moves") != addrs["moves"] {
		t.Error("an unchanged bind was bound again")
	}
	buf := make([]byte, 5)
	if _, err := dialTLS(t, addrs["moves"], cc).Read(buf); err != nil || string(buf) != "other" {
		t.Errorf("the changed target: %q, %v", buf, err)
	}
	say(t, dialTLS(t, p.addr("new"), cc), "hello")
}

// TestRenamedListenerKeepsItsSocket: clients that connect while a listener is
// renamed are not refused.
func TestRenamedListenerKeepsItsSocket(t *testing.T) {
	ca := testca.New(t, "example.org")
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bind := probe.Addr().String()
	_ = probe.Close()
	l := inbound("old", serve(t, echo))
	l.Bind = bind
	p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	old := dialTLS(t, bind, cc)
	say(t, old, "hello")
	stop := make(chan struct{})
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := net.Dial("tcp", bind)
			if err != nil {
				failed <- err
				return
			}
			_ = c.Close()
		}
	}()
	c := p.config
	for _, name := range []string{"a", "b", "c"} {
		l.Name = name
		c.Listeners = []Listener{l}
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
		say(t, dialTLS(t, bind, cc), "hello "+name)
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("refused meanwhile: %v", err)
	}
}

func TestExpectChanges(t *testing.T) {
	ca := testca.New(t, "example.org")
	server := run(t, Config{Listeners: []Listener{inbound("inventory", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/inventory"), ca)})
	out := outbound(t, "out", server.addr("inventory"), "spiffe://example.org/inventory")
	p := run(t, Config{Listeners: []Listener{out}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	conn, err := net.Dial("tcp", p.addr("out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	say(t, conn, "hello")
	c := p.config
	c.Listeners = []Listener{outbound(t, "out", out.Targets[0], "spiffe://example.org/orders")}
	applied, err := p.Apply(c)
	if err != nil || applied.Closed != 1 || applied.Generation != 1 {
		t.Errorf("applied %+v, %v", applied, err)
	}
	gone(t, conn)
	if a := p.next(); a.Closed != "policy" || a.Reason != "spiffe://example.org/inventory is not who `expect` names: spiffe://example.org/orders" {
		t.Errorf("access record %+v", a)
	}
}

func TestIdentityPicked(t *testing.T) {
	ca := testca.New(t, "example.org")
	ids := identity.NewHeld("test")
	if err := ids.Set([]identity.SVID{{Certificate: ca.SVID("/first")}, {Certificate: ca.SVID("/second"), Hint: "internal"}}, testca.Bundles(ca)); err != nil {
		t.Fatal(err)
	}
	a, b := inbound("default", serve(t, echo)), inbound("hinted", serve(t, echo))
	b.Identity.Hint = "internal"
	missing := inbound("missing", "127.0.0.1:1")
	missing.Identity.Hint = "none"
	p := run(t, Config{Listeners: []Listener{a, b, missing}, Policy: rulesOf(t, allowAll), Identities: ids})
	cc := clientConfig(ca.SVID("/web"))
	for name, want := range map[string]string{"default": "spiffe://example.org/first", "hinted": "spiffe://example.org/second"} {
		c := dialTLS(t, p.addr(name), cc)
		if got := c.ConnectionState().PeerCertificates[0].URIs[0].String(); got != want {
			t.Errorf("%s presents %s, want %s", name, got, want)
		}
	}
	if got := p.Status().Listeners[2].Problem; !strings.Contains(got, `none of them is hint "none"`) {
		t.Errorf("problem %q", got)
	}
	// The pick changes at run time: the socket stays, the SVID is another.
	c := p.config
	a.Identity.SPIFFEID = spiffeid.RequireFromString("spiffe://example.org/second")
	c.Listeners = []Listener{a, b, missing}
	addr := p.addr("default")
	if _, err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	if got := dialTLS(t, addr, cc).ConnectionState().PeerCertificates[0].URIs[0].String(); got != "spiffe://example.org/second" {
		t.Errorf("after the change it presents %s", got)
	}
}

func TestRulesBeyondTheBoundCountAsOther(t *testing.T) {
	i := newInstruments(nil)
	for n := range maxRules + 10 {
		i.decided("orders", strings.Repeat("r", n+1), allowed).Inc()
	}
	i.decided("orders", "r", allowed).Inc()
	counts := i.decisionCounts()
	if len(counts) != maxRules+1 {
		t.Errorf("%d counters, want %d", len(counts), maxRules+1)
	}
	for _, c := range counts {
		if want := map[string]uint64{"other": 10, "r": 2}[c.Rule]; want != 0 && c.Count != want {
			t.Errorf("%s: %d, want %d", c.Rule, c.Count, want)
		}
	}
}

func TestActionText(t *testing.T) {
	for _, a := range []Action{ActionClose, ActionDrain, ActionKeep} {
		var got Action
		if err := got.UnmarshalText([]byte(a.String())); err != nil || got != a {
			t.Errorf("%s: %v, %v", a, got, err)
		}
	}
	if err := new(Action).UnmarshalText(nil); err == nil {
		t.Error("an empty action was taken")
	}
}
