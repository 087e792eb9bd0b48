package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds how long a test waits for what must happen.
const patience = time.Minute

// recorder receives what an access log writes.
type recorder struct {
	t       testing.TB
	records chan telemetry.Access
	begun   []byte // of a line whose end is still to come
}

func (r *recorder) Write(b []byte) (int, error) {
	for line := range bytes.Lines(b) {
		line = append(r.begun, line...)
		r.begun = nil
		if !bytes.HasSuffix(line, []byte("\n")) {
			r.begun = line
			break
		}
		var a telemetry.Access
		if err := a.UnmarshalJSON(line); err != nil {
			r.t.Errorf("access log line %q: %v", line, err)
			continue
		}
		r.records <- a
	}
	return len(b), nil
}

// next returns the next access record.
func (r *recorder) next() telemetry.Access {
	r.t.Helper()
	select {
	case a := <-r.records:
		return a
	case <-time.After(patience):
		r.t.Fatal("no access record")
		panic("unreachable")
	}
}

// testLog shows the product's log when a test fails.
func testLog(t testing.TB) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Output: logWriter{t}, Level: hclog.Debug})
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// lines collects log lines.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), what)
}

// running is a proxy under test.
type running struct {
	*Proxy
	*recorder
	t       testing.TB
	metrics *telemetry.Metrics
	config  Config
	stop    func() // cancels Run and waits for it
}

// run starts a proxy that is stopped when the test ends.
func run(t testing.TB, c Config) *running {
	t.Helper()
	r := &running{recorder: &recorder{t: t, records: make(chan telemetry.Access, 20_000)}, t: t, metrics: telemetry.NewMetrics()}
	access, err := telemetry.NewAccessLog(r.recorder, "json", nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Access, c.Metrics = access, r.metrics
	if c.Log == nil {
		c.Log = testLog(t)
	}
	for i := range c.Listeners {
		if c.Listeners[i].Timeouts.Drain == 0 {
			c.Listeners[i].Timeouts.Drain = 50 * time.Millisecond
		}
	}
	r.config = c
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	r.Proxy = p
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("Run: %v", err)
				}
			case <-time.After(patience):
				t.Error("Run does not end")
			}
			if err := access.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(r.stop)
	return r
}

// apply changes the policy of a running proxy.
func (r *running) apply(rules string) Applied {
	r.t.Helper()
	c := r.config
	c.Policy = rulesOf(r.t, rules)
	applied, err := r.Apply(c)
	if err != nil {
		r.t.Fatal(err)
	}
	return applied
}

// metric returns the value of a counter or gauge by its label values.
func (r *running) metric(name string, labels ...string) float64 {
	var value float64
	r.metrics.Each(func(s telemetry.Sample) {
		if s.Name == name && strings.Join(s.LabelValues, ",") == strings.Join(labels, ",") {
			value = s.Value
		}
	})
	return value
}

func rulesOf(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse("test.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const allowWeb = `
version: 1
rules:
  - {id: web, effect: allow, from: ["spiffe://example.org/web"], to: ["spiffe://example.org/**"]}
`

const allowAll = `
version: 1
rules:
  - {id: all, effect: allow, from: ["spiffe://example.org/**"], to: ["spiffe://example.org/**"]}
`

const denyAll = `
version: 1
rules:
  - {id: nobody, effect: deny, from: ["spiffe://example.org/**"], to: ["spiffe://example.org/**"]}
`

// serve accepts on loopback and runs handle on each connection until the
// test ends.
func serve(t testing.TB, handle func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, handle)
	return l.Addr().String()
}

func serveOn(t testing.TB, l net.Listener, handle func(net.Conn)) {
	var wg sync.WaitGroup
	var mu sync.Mutex // guards conns
	conns := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			wg.Go(func() {
				handle(c)
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func echo(c net.Conn) {
	_, _ = io.Copy(c, c)
	_ = c.(interface{ CloseWrite() error }).CloseWrite()
}

// clientConfig is a client that presents cert and believes everybody.
func clientConfig(cert ...tls.Certificate) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, Certificates: cert}
}

func dialTLS(t testing.TB, addr string, c *tls.Config) *tls.Conn {
	t.Helper()
	conn, err := (&tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: c}).Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn.(*tls.Conn)
}

// say writes text and expects it to come back.
func say(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if err := trySay(c, text); err != nil {
		t.Fatal(err)
	}
}

func trySay(c net.Conn, text string) error {
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != text {
		return fmt.Errorf("echo of %q is %q", text, buf)
	}
	return nil
}

// gone expects that the far end ends the connection and nothing more comes.
func gone(t testing.TB, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	var timeout net.Error
	if err == nil || (errors.As(err, &timeout) && timeout.Timeout()) {
		t.Fatalf("connection is still open: read %d, %v", n, err)
	}
}

func inbound(name, target string) Listener {
	return Listener{Name: name, Direction: policy.Inbound, Bind: "127.0.0.1:0", Targets: []string{target}}
}

func outbound(t testing.TB, name, target string, expect ...string) Listener {
	t.Helper()
	l := Listener{Name: name, Direction: policy.Outbound, Bind: "127.0.0.1:0", Targets: []string{target}}
	for _, e := range expect {
		l.Expect = append(l.Expect, patternOf(t, e))
	}
	return l
}

func patternOf(t testing.TB, text string) policy.Pattern {
	t.Helper()
	p, err := policy.ParsePattern(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (r *running) addr(name string) string { return r.Addr(name).String() }

func TestInbound(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			ca := testca.New(t, "example.org")
			p := run(t, Config{
				Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowWeb),
				Identities: source(t, ca.SVID("/orders"), ca),
			})
			cert := ca.SVID("/web")
			cc := clientConfig(cert)
			cc.MaxVersion = version
			c := dialTLS(t, p.addr("orders"), cc)
			say(t, c, "hello")
			if got := p.Status().Listeners[0]; got.Active != 1 || len(got.Connections) != 1 || got.Connections[0].Rule != "web" {
				t.Errorf("status: %+v", got)
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
				t.Errorf("after half-close: %q, %v", rest, err)
			}
			a := p.next()
			want := telemetry.Access{
				Time: a.Time, Duration: a.Duration, Source: a.Source, Destination: a.Destination, Cipher: a.Cipher,
				Port: c.RemoteAddr().(*net.TCPAddr).AddrPort().Port(), Action: "connection", Outcome: "success", Reason: "ended by the client", Closed: "peer",
				Listener: "orders", Direction: "inbound", From: "spiffe://example.org/web", To: "spiffe://example.org/orders",
				Serial: cert.Leaf.SerialNumber.Text(16), Decision: "allow", Rule: "web", Generation: 1,
				BytesIn: 5, BytesOut: 5, TLSVersion: map[uint16]string{tls.VersionTLS12: "1.2", tls.VersionTLS13: "1.3"}[version],
			}
			if fmt.Sprintf("%+v", a) != fmt.Sprintf("%+v", want) || a.Source != c.LocalAddr().String() || a.Cipher == "" {
				t.Errorf("access record\n got %+v\nwant %+v", a, want)
			}
			for name, want := range map[string]float64{
				"narthex_tls_handshakes_total orders,ok": 1, "narthex_connections_total orders,allowed": 1,
				"narthex_connections_closed_total orders,peer": 1, "narthex_bytes_total orders,in": 5, "narthex_bytes_total orders,out": 5,
				"narthex_policy_decisions_total orders,web,allow": 1, "narthex_connections_active orders": 0, "narthex_policy_generation ": 1,
			} {
				metric, labels, _ := strings.Cut(name, " ")
				if got := p.metric(metric, labels); got != want {
					t.Errorf("%s{%s} = %v, want %v", metric, labels, got, want)
				}
			}
		})
	}
}

func TestTwoProxiesEndToEnd(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	app, err := net.Listen("unix", dir+"/app.sock")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, app, echo)
	server := run(t, Config{
		Listeners: []Listener{inbound("inventory", "unix:"+dir+"/app.sock")}, Policy: rulesOf(t, allowWeb),
		Identities: source(t, ca.SVID("/inventory"), ca),
	})
	out := outbound(t, "to-inventory", server.addr("inventory"), "spiffe://example.org/inventory")
	out.Bind = "unix:" + dir + "/out.sock"
	client := run(t, Config{
		Listeners: []Listener{out}, Policy: rulesOf(t, allowWeb), Identities: source(t, ca.SVID("/web"), ca),
	})
	c, err := net.DialTimeout("unix", dir+"/out.sock", patience)
	if err != nil {
		t.Fatal(err)
	}
	say(t, c, "ping")
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB: all buffer sizes
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.WriteString(c, big); err != nil {
			t.Error(err)
		}
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	back, err := io.ReadAll(c)
	wg.Wait()
	if err != nil || string(back) != big {
		t.Errorf("bulk: %d bytes of %d came back, %v", len(back), len(big), err)
	}
	_ = c.Close()
	for _, r := range []telemetry.Access{server.next(), client.next()} {
		if r.From != "spiffe://example.org/web" || r.To != "spiffe://example.org/inventory" || r.Outcome != "success" || r.BytesIn != uint64(4+len(big)) || r.BytesOut != r.BytesIn {
			t.Errorf("access record %+v", r)
		}
	}
}

func TestShutdownDrains(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.Timeouts.Drain = 100 * time.Millisecond
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowWeb), Identities: source(t, ca.SVID("/orders"), ca)})
	c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
	say(t, c, "hello")
	if s := p.Status().Listeners[0]; p.Draining() || s.Problem != "" {
		t.Errorf("while it serves: draining %v, status %+v", p.Draining(), s)
	}
	p.stop()
	gone(t, c)
	if s := p.Status().Listeners[0]; !p.Draining() || s.Problem != "draining" {
		t.Errorf("after the end was asked for: draining %v, status %+v", p.Draining(), s)
	}
	if a := p.next(); a.Closed != "drain" || a.Reason != "the proxy is shutting down" || a.Outcome != "success" {
		t.Errorf("access record %+v", a)
	}
	if _, err := p.Apply(p.config); !errors.Is(err, ErrStopped) {
		t.Errorf("Apply after the end: %v", err)
	}
}

// TestAppliedIsLogged holds what a person reads of a reload.
func TestAppliedIsLogged(t *testing.T) {
	ca := testca.New(t, "example.org")
	log := &lines{}
	p := run(t, Config{
		Listeners: []Listener{inbound("a", "127.0.0.1:1")}, Policy: rulesOf(t, allowWeb),
		Identities: source(t, ca.SVID("/orders"), ca), Log: hclog.New(&hclog.LoggerOptions{Output: log}),
	})
	c := p.config
	for _, step := range []struct {
		change func()
		want   string
	}{
		{func() { c.Listeners = append(c.Listeners, inbound("b", "127.0.0.1:1")) }, "listeners changed: added=b connections_asked=0 connections_refused=0 connections_closed=0\n"},
		{func() { c.Policy = rulesOf(t, allowAll) }, "rules changed: 1 added, 0 changed, 1 removed: generation=2 rules=1 rules_added=all rules_removed=web connections_asked=0 connections_refused=0 connections_closed=0\n"},
		{func() { c.Policy, c.Listeners = rulesOf(t, allowWeb), c.Listeners[:1] }, "rules and listeners changed: rules 1 added, 0 changed, 1 removed: generation=3 rules=1 removed=b rules_added=web rules_removed=all connections_asked=0 connections_refused=0 connections_closed=0\n"},
		{func() {}, "configuration is as it was: connections_asked=0 connections_refused=0 connections_closed=0\n"},
		{func() { c.Policy = rulesOf(t, denyAll) }, "no rule allows anything: every connection will be refused: generation=4 rules=1 files=test.yaml\n"},
		{func() {
			c.Listeners = slices.Clone(c.Listeners)
			c.Listeners[0].Enforcement, c.Policy = Audit, rulesOf(t, denyAll)
		}, "no rule allows anything: every connection will be refused, but on listeners that only audit: generation=5 rules=1 files=test.yaml\n"},
	} {
		step.change()
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
		if log.count(step.want) != 1 {
			t.Errorf("want once %q in\n%s", step.want, log.text.String())
		}
	}
	if n := log.count("no rule allows anything"); n != 2 || log.count("configuration in force: generation=1 rules=1 added=a\n") != 1 {
		t.Errorf("log:\n%s", log.text.String())
	}
}
