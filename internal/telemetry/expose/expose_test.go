package expose

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves cfg until the test ends and returns the server.
func start(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s
}

// answer is what a request came back with.
type answer struct {
	code   int
	header http.Header
	body   string
}

// ask sends one request on a connection of its own.
func ask(t *testing.T, addr net.Addr, method, path, host string) answer {
	t.Helper()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, addr.Network(), addr.String())
		},
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}

func get(t *testing.T, addr net.Addr, path string) answer {
	t.Helper()
	return ask(t, addr, http.MethodGet, path, "localhost")
}

func parseMetrics(t *testing.T, text string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("the page is no Prometheus text: %v\n%s", err, text)
	}
	return families
}

func proxyMetrics() *telemetry.Metrics {
	m := telemetry.NewMetrics()
	m.Counter("narthex_connections_total", "Connections.", "listener", "result").With("in", "ok").Add(7)
	m.Gauge("narthex_connections_active", "Live connections.", "listener").With(`quote " back \ line` + "\n").Set(2)
	h := m.Histogram("narthex_tls_handshake_duration_seconds", "Handshakes.", []float64{.1, 1}, "listener").With("in")
	h.Observe(.05)
	h.Observe(.5)
	h.Observe(5)
	return m
}

func TestMetrics(t *testing.T) {
	s := start(t, Config{
		Listen: "127.0.0.1:0", Process: "proxy", Metrics: proxyMetrics(),
		Status: func() telemetry.Status { return telemetry.Status{Version: "v1.2.3"} },
	})
	got := get(t, s.Addr(), "/metrics")
	if got.code != http.StatusOK {
		t.Fatalf("%d: %s", got.code, got.body)
	}
	families := parseMetrics(t, got.body)
	if f := families["narthex_connections_total"]; f.GetType() != dto.MetricType_COUNTER || f.Metric[0].Counter.GetValue() != 7 {
		t.Errorf("counter: %v", f)
	}
	if f := families["narthex_connections_active"]; f.Metric[0].Gauge.GetValue() != 2 || f.Metric[0].Label[0].GetValue() != `quote " back \ line`+"\n" {
		t.Errorf("gauge: %v", f)
	}
	h := families["narthex_tls_handshake_duration_seconds"].Metric[0].Histogram
	if h.GetSampleCount() != 3 || h.GetSampleSum() != 5.55 || len(h.Bucket) != 3 || h.Bucket[1].GetCumulativeCount() != 2 {
		t.Errorf("histogram: %v", h)
	}
	if labels := labelsOf(families["narthex_build_info"].Metric[0]); !strings.Contains(labels, "version\xffv1.2.3") || !strings.Contains(labels, "go\xffgo1") {
		t.Errorf("build info: %q", labels)
	}
	if labels := labelsOf(families["process_open_fds"].Metric[0]); labels != "process\xffproxy" {
		t.Errorf("process metrics have labels %q", labels)
	}
	problems, err := promlint.New(strings.NewReader(got.body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "narthex_") {
			t.Errorf("promlint: %s: %s", p.Metric, p.Text)
		}
	}
}

// halves serves an agent on a private socket and a proxy that merges it.
func halves(t *testing.T, agent Config) (*Server, func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	agent.Process, agent.Private = "agent", l
	a, err := Listen(agent)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx) }()
	end := func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve the agent: %v", err)
		}
		done <- nil
	}
	t.Cleanup(end)
	return start(t, Config{
		Listen: "127.0.0.1:0", Health: "127.0.0.1:0", Process: "proxy", Metrics: proxyMetrics(),
		Status: func() telemetry.Status {
			return telemetry.Status{Version: "v1", Proxy: &telemetry.ProxyStatus{Source: "workload_api"}}
		},
		Ready: func() error { return nil },
		Other: &Remote{Process: "agent", Socket: socket},
	}), end
}

func TestMerge(t *testing.T) {
	m := telemetry.NewMetrics()
	m.Gauge("narthex_entries", "Entries.").With().Set(3)
	m.Counter("narthex_connections_total", "Connections.", "listener", "result").With("in", "ok").Add(1000)    // the proxy's stands
	m.Counter("narthex_connections_total", "Connections.", "listener", "result").With("agent", "ok").Add(1)    // is added
	m.Gauge("narthex_tls_handshake_duration_seconds", "Another type under a name of the proxy.").With().Set(1) // is left out
	s, end := halves(t, Config{
		Metrics: m,
		Status: func() telemetry.Status {
			return telemetry.Status{Version: "v1", TrustDomain: "example.org", Agent: &telemetry.AgentStatus{ID: "spiffe://example.org/spire/agent/x", Entries: 3}}
		},
		Ready: func() error { return errors.New("not synced yet\nserver spire:8081 unreachable") },
	})

	families := parseMetrics(t, get(t, s.Addr(), "/metrics").body)
	if f := families["narthex_entries"]; f == nil || f.Metric[0].Gauge.GetValue() != 3 {
		t.Errorf("the agent's metric: %v", f)
	}
	if f := families["narthex_connections_total"]; len(f.Metric) != 2 || f.Metric[1].Counter.GetValue() != 7 {
		t.Errorf("a metric of both: %v", f)
	}
	if f := families["narthex_tls_handshake_duration_seconds"]; f.GetType() != dto.MetricType_HISTOGRAM || len(f.Metric) != 1 {
		t.Errorf("a name in two types: %v", f)
	}
	if f := families["narthex_build_info"]; len(f.Metric) != 1 {
		t.Errorf("build info of two equal halves: %v", f)
	}
	if f := families["go_goroutines"]; len(f.Metric) != 2 || labelsOf(f.Metric[0]) != "process\xffagent" || labelsOf(f.Metric[1]) != "process\xffproxy" {
		t.Errorf("runtime metrics: %v", f)
	}

	var st telemetry.Status
	if err := json.Unmarshal([]byte(get(t, s.Addr(), "/api/v1/status").body), &st); err != nil {
		t.Fatal(err)
	}
	if st.Agent == nil || st.Agent.Entries != 3 || st.Proxy == nil || st.TrustDomain != "example.org" {
		t.Errorf("status: %+v", st)
	}
	for _, addr := range []net.Addr{s.Addr(), s.HealthAddr()} {
		if got := get(t, addr, "/readyz"); got.code != http.StatusServiceUnavailable || got.body != "agent: not synced yet\nagent: server spire:8081 unreachable\n" {
			t.Errorf("readiness: %d %q", got.code, got.body)
		}
	}

	end()
	families = parseMetrics(t, get(t, s.Addr(), "/metrics").body)
	if families["narthex_entries"] != nil || len(families["go_goroutines"].Metric) != 1 || families["narthex_connections_total"] == nil {
		t.Errorf("metrics while the agent is away: %v", families)
	}
	st = telemetry.Status{}
	if err := json.Unmarshal([]byte(get(t, s.Addr(), "/api/v1/status").body), &st); err != nil {
		t.Fatal(err)
	}
	if st.Agent == nil || !strings.Contains(st.Agent.Problem, "the agent does not answer") || st.Proxy == nil {
		t.Errorf("status while the agent is away: %+v", st.Agent)
	}
	if got := get(t, s.Addr(), "/readyz"); got.code != http.StatusServiceUnavailable || !strings.HasPrefix(got.body, "agent: the agent does not answer: ") {
		t.Errorf("readiness while the agent is away: %d %q", got.code, got.body)
	}
	if got := get(t, s.Addr(), "/livez"); got.code != http.StatusOK || got.body != "ok\n" {
		t.Errorf("liveness is one's own: %d %q", got.code, got.body)
	}
	if got := get(t, s.Addr(), "/"); got.code != http.StatusOK || !strings.Contains(got.body, "the agent does not answer") {
		t.Errorf("page while the agent is away: %d", got.code)
	}
}

// TestMergeNonsense has the other half answer with what is no answer.
func TestMergeNonsense(t *testing.T) {
	for name, body := range map[string]string{
		"no text":  "\x00\xff{{{",
		"endless":  strings.Repeat("x 1\n", maxRemote/4+1),
		"cut off":  "# TYPE narthex_entries gauge\nnarthex_entries",
		"empty":    "",
		"too deep": strings.Repeat("[", 100_000),
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "agent.sock")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })}
			done := make(chan error, 1)
			go func() { done <- srv.Serve(l) }()
			t.Cleanup(func() { _ = srv.Close(); <-done })
			s := start(t, Config{Listen: "127.0.0.1:0", Process: "proxy", Metrics: proxyMetrics(), Other: &Remote{Process: "agent", Socket: socket}})
			if f := parseMetrics(t, get(t, s.Addr(), "/metrics").body); f["narthex_connections_total"] == nil {
				t.Error("our own metrics are gone")
			}
			if got := get(t, s.Addr(), "/"); got.code != http.StatusOK || !strings.Contains(got.body, "of the agent") && !strings.Contains(got.body, "the agent answered") {
				t.Errorf("page: %d %s", got.code, got.body)
			}
		})
	}
}

func TestHost(t *testing.T) {
	all := start(t, Config{Listen: "127.0.0.1:0", Health: ":0"})
	named := start(t, Config{Listen: "localhost:0"})
	v6, err := Listen(Config{Listen: "[::1]:0"})
	if err == nil {
		err = v6.Close()
	}
	if err != nil {
		t.Logf("no IPv6 here: %v", err)
	}
	sock := start(t, Config{Listen: "unix:" + filepath.Join(t.TempDir(), "s.sock")})
	tests := []struct {
		name string
		addr net.Addr
		host string
		code int
	}{
		{"name", all.Addr(), "localhost", 200},
		{"name and port", all.Addr(), "localhost:9901", 200},
		{"capitals", all.Addr(), "LOCALHOST", 200},
		{"final dot", all.Addr(), "localhost.", 200},
		{"address", all.Addr(), "127.0.0.1", 200},
		{"another loopback address", all.Addr(), "127.8.9.1:80", 200},
		{"IPv6", all.Addr(), "[::1]:9901", 200},
		{"IPv6 without port", all.Addr(), "[::1]", 200},
		{"mapped IPv4", all.Addr(), "[::ffff:127.0.0.1]", 200},
		{"foreign name", all.Addr(), "evil.example", 421},
		{"foreign name and port", all.Addr(), "evil.example:9901", 421},
		{"prefix", all.Addr(), "localhost.evil.example", 421},
		{"suffix", all.Addr(), "evil-localhost", 421},
		{"subdomain", all.Addr(), "evil.localhost", 421},
		{"address in a name", all.Addr(), "127.0.0.1.evil.example", 421},
		{"foreign address", all.Addr(), "10.0.0.1", 421},
		{"any address", all.Addr(), "0.0.0.0", 421},
		{"decimal address", all.Addr(), "2130706433", 421},
		{"health by loopback", loopback(all.HealthAddr()), "evil.example", 421},
		{"named listener", named.Addr(), "localhost", 200},
		{"named listener, foreign", named.Addr(), "evil.example", 421},
		{"socket", sock.Addr(), "anything.example", 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ask(t, tt.addr, http.MethodGet, "/livez", tt.host)
			if got.code != tt.code {
				t.Errorf("host %q: %d %q, want %d", tt.host, got.code, got.body, tt.code)
			}
			if got.code == 421 && !strings.Contains(got.body, "localhost") {
				t.Errorf("the refusal helps nobody: %q", got.body)
			}
		})
	}
}

// loopback returns a wildcard address as it is reached from here.
func loopback(a net.Addr) net.Addr {
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: a.(*net.TCPAddr).Port}
}

func TestRoutes(t *testing.T) {
	s := start(t, Config{Listen: "127.0.0.1:0", Health: "127.0.0.1:0", Process: "agent", Live: func() error { return errors.New("stuck") }})
	tests := []struct {
		method, path string
		health       bool
		code         int
		body         string
	}{
		{"GET", "/livez", false, 503, "agent: stuck\n"},
		{"HEAD", "/livez", true, 503, ""},
		{"GET", "/readyz", true, 200, "ok\n"},
		{"GET", "/metrics", true, 404, "404 page not found\n"},
		{"GET", "/", true, 404, "404 page not found\n"},
		{"GET", "/api/v1/status", true, 404, "404 page not found\n"},
		{"GET", "/nothing", false, 404, "404 page not found\n"},
		{"GET", "/debug/pprof/", false, 404, "404 page not found\n"},
		{"POST", "/", false, 405, "only GET and HEAD are answered here\n"},
		{"PUT", "/metrics", false, 405, "only GET and HEAD are answered here\n"},
		{"DELETE", "/livez", true, 405, "only GET and HEAD are answered here\n"},
		{"OPTIONS", "/metrics", false, 405, "only GET and HEAD are answered here\n"},
		{"HEAD", "/", false, 200, ""},
		{"HEAD", "/metrics", false, 200, ""},
	}
	for _, tt := range tests {
		addr := s.Addr()
		if tt.health {
			addr = s.HealthAddr()
		}
		got := ask(t, addr, tt.method, tt.path, "localhost")
		if got.code != tt.code || got.body != tt.body {
			t.Errorf("%s %s: %d %q, want %d %q", tt.method, tt.path, got.code, got.body, tt.code, tt.body)
		}
		for header, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY", "Cache-Control": "no-store",
		} {
			if got.header.Get(header) != want {
				t.Errorf("%s %s: %s is %q, want %q", tt.method, tt.path, header, got.header.Get(header), want)
			}
		}
		if csp := got.header.Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'none'; ") || !strings.Contains(csp, "frame-ancestors 'none'") {
			t.Errorf("%s %s: policy %q", tt.method, tt.path, csp)
		}
	}
}

func TestPage(t *testing.T) {
	const evil = `<script>alert(1)</script>" onload="x`
	now := time.Now()
	s := start(t, Config{Listen: "127.0.0.1:0", Status: func() telemetry.Status {
		return telemetry.Status{
			Version: evil, TrustDomain: evil, Started: now,
			Agent: &telemetry.AgentStatus{ID: evil, Server: evil, Problem: evil, ExpiresAt: now.Add(90 * time.Minute), Identities: []telemetry.Identity{
				{SPIFFEID: evil, Hint: evil, Serial: evil, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour)},
				{SPIFFEID: "spiffe://example.org/late", NotBefore: now.Add(-time.Hour), NotAfter: now.Add(-time.Second)},
			}},
			Proxy: &telemetry.ProxyStatus{
				Policy: telemetry.PolicyStatus{Files: []string{evil}, Decisions: []telemetry.RuleDecision{{Listener: evil, Rule: evil, Decision: evil}}},
				Listeners: []telemetry.ListenerStatus{{
					Name: evil, Direction: evil, Bind: evil, Targets: []string{evil}, SPIFFEID: evil, Problem: evil,
					Routes:      []telemetry.RouteStatus{{SNI: []string{evil}, ALPN: []string{evil}, Targets: []string{evil}}},
					Endpoints:   []telemetry.EndpointStatus{{Target: evil, Address: evil, Problem: evil}, {Target: "one.example:1", Address: "192.0.2.1:1", Problem: "refused"}},
					Connections: []telemetry.ConnectionStatus{{From: evil, To: evil, Source: evil, Rule: evil, Since: now}},
				}},
			},
		}
	}})
	got := get(t, s.Addr(), "/")
	if got.code != http.StatusOK || got.header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("%d %s", got.code, got.header.Get("Content-Type"))
	}
	if strings.Contains(got.body, "<script>") || strings.Contains(got.body, `" onload="`) {
		t.Error("a name became markup")
	}
	if n := strings.Count(got.body, "&lt;script&gt;alert(1)&lt;/script&gt;"); n < 20 {
		t.Errorf("names are shown %d times only", n)
	}
	for _, want := range []string{"1 h 29 min", "expired", `value="0.500"`, "identity spiffe://example.org/late", "endpoint one.example:1 (192.0.2.1:1) is not healthy: refused"} {
		if !strings.Contains(got.body, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	if regexp.MustCompile(`(?i)\son[a-z]+="|javascript:|style=|(src|href)="[^/]`).MatchString(got.body) {
		t.Error("the page has what its policy forbids")
	}
	for _, cell := range regexp.MustCompile(`<td\b[^>]*>`).FindAllString(got.body, -1) {
		if !strings.Contains(cell, `data-label="`) { // by which a narrow screen names it
			t.Errorf("cell %s does not name its column", cell)
		}
	}
	style := regexp.MustCompile(`(?s)<style>(.*)</style>`).FindStringSubmatch(got.body)
	if style == nil {
		t.Fatal("no style")
	}
	sum := sha256.Sum256([]byte(style[1]))
	if hash := "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(got.header.Get("Content-Security-Policy"), hash) {
		t.Errorf("the policy %q does not know the style %s", got.header.Get("Content-Security-Policy"), hash)
	}
	if js := get(t, s.Addr(), "/status.js"); js.code != 200 || js.header.Get("Content-Type") != "text/javascript; charset=utf-8" {
		t.Errorf("script: %d %s", js.code, js.header.Get("Content-Type"))
	}
}

func TestListenErrors(t *testing.T) {
	dir := t.TempDir()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	live, err := net.Listen("unix", filepath.Join(dir, "live.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	tests := []struct {
		cfg  Config
		is   error
		want string
	}{
		{
			Config{Listen: busy.Addr().String()},
			syscall.EADDRINUSE,
			fmt.Sprintf("listen on telemetry.listen %s: another program listens there; stop it, or give telemetry.listen another address (port 0 takes a free one)", busy.Addr()),
		},
		{
			Config{Listen: "127.0.0.1:0", Health: busy.Addr().String()},
			syscall.EADDRINUSE,
			fmt.Sprintf("listen on telemetry.health %s: another program listens there", busy.Addr()),
		},
		{Config{Listen: "unix:" + live.Addr().String()}, syscall.EADDRINUSE, "another program listens there"},
		{Config{Listen: "192.0.2.1:0"}, syscall.EADDRNOTAVAIL, "listen on telemetry.listen 192.0.2.1:0: this host has no such address; change telemetry.listen"},
		{Config{Listen: "unix:" + filepath.Join(dir, "none", "s.sock")}, os.ErrNotExist, "listen on telemetry.listen unix:"},
	}
	for _, tt := range tests {
		s, err := Listen(tt.cfg)
		if err == nil {
			t.Errorf("%+v: listens", tt.cfg)
			_ = s.Close()
			continue
		}
		if !errors.Is(err, tt.is) || !strings.HasPrefix(err.Error(), "listen on telemetry.") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %q, want %q", err, tt.want)
		}
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	s := start(t, Config{Listen: "unix:" + path})
	if got := get(t, s.Addr(), "/livez"); got.body != "ok\n" {
		t.Errorf("got %q", got.body)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// TestServeEnds has clients that hold their connections while the server is
// told to end.
func TestServeEnds(t *testing.T) {
	s, err := Listen(Config{Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel(errors.New("told to end"))
	if err := <-done; err != nil {
		t.Errorf("an end that was asked for is no error: %v", err)
	}
	if _, err := net.Dial("tcp", s.Addr().String()); err == nil {
		t.Error("still listens")
	}
}

func TestServeTellsWhatBroke(t *testing.T) {
	s, err := Listen(Config{Listen: "127.0.0.1:0", Health: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.faces[0].listener.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(context.Background()); err == nil || !strings.Contains(err.Error(), "serve telemetry on 127.0.0.1:") {
		t.Errorf("got %v", err)
	}
}

func TestHeadersAreBounded(t *testing.T) {
	s := start(t, Config{Listen: "127.0.0.1:0"})
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The server may answer and close before it was sent all of this.
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\nX: "+strings.Repeat("x", 2*maxHeader)+"\r\n\r\n")
	head := make([]byte, 12)
	if _, err := io.ReadFull(c, head); err == nil && string(head) != "HTTP/1.1 431" {
		t.Errorf("got %q", head)
	}
}

func TestInheritedSocket(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, Config{Listen: "narthex.test:80", Socket: l})
	if s.Addr().String() != l.Addr().String() {
		t.Errorf("listens on %s, want %s", s.Addr(), l.Addr())
	}
	for host, code := range map[string]int{"narthex.test": 200, "localhost": 200, "evil.example": 421} {
		if got := ask(t, s.Addr(), http.MethodGet, "/readyz", host); got.code != code {
			t.Errorf("host %s: %d, want %d", host, got.code, code)
		}
	}
}

// TestHealthConnectionsAreForOneRequest: whoever keeps connections to the
// probes' port would keep the probes out.
func TestHealthConnectionsAreForOneRequest(t *testing.T) {
	s := start(t, Config{Listen: "127.0.0.1:0", Health: "127.0.0.1:0", Process: "proxy"})
	for name, want := range map[string]bool{s.HealthAddr().String(): true, s.Addr().String(): false} {
		resp, err := http.Get("http://" + name + "/livez")
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.Close != want {
			t.Errorf("%s closes the connection after a request: %t, want %t", name, resp.Close, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}
