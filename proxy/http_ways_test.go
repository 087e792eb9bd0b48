package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

func says(word string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, word) }
}

// Requests of one connection go to different targets, each in its own time.
func TestRoutesOfRequests(t *testing.T) {
	t.Parallel()
	slow := origin(t, func(w http.ResponseWriter, r *http.Request) {
		wait := 400 * time.Millisecond
		if r.URL.Path == "/v1/late" {
			wait = patience
		}
		select {
		case <-r.Context().Done():
		case <-time.After(wait):
		}
		_, _ = io.WriteString(w, "slow")
	})
	path, err := policy.ParsePath("/v1/reports/{id}")
	if err != nil {
		t.Fatal(err)
	}
	host, err := policy.ParseHost("*.admin.example")
	if err != nil {
		t.Fatal(err)
	}
	quick := path
	p, ca := web(t, origin(t, says("rest")), func(c *Config) {
		c.Listeners[0].Timeouts.Response = patience
		c.Listeners[0].Routes = []Route{
			{Hosts: []policy.Host{host}, Targets: []string{origin(t, says("admin"))}},
			{Paths: []policy.Path{quick}, Targets: []string{slow}},
			{Paths: mustPaths(t, "/v1/late"), Targets: []string{slow}, Response: 50 * time.Millisecond},
		}
	})
	b := p.browser(ca)
	for _, test := range []struct {
		path, host string
		status     int
		word       string
	}{
		{"/v1/a", "x", 200, "rest"},
		{"/v1/a", "eu.admin.example", 200, "admin"},
		{"/v1/reports/7", "x", 200, "slow"},
		{"/v1/reports/7/b", "x", 200, "rest"},
		{"/v1/late", "x", 504, ""},
		{"/v1/a", "x", 200, "rest"},
	} {
		b.send("GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", test.path, test.host)
		if resp, body := b.response("GET"); resp.StatusCode != test.status || test.status == 200 && body != test.word {
			t.Errorf("%s of %s: %d %q, want %d %q", test.path, test.host, resp.StatusCode, body, test.status, test.word)
		}
	}
}

func mustPaths(t *testing.T, texts ...string) (paths []policy.Path) {
	t.Helper()
	for _, text := range texts {
		p, err := policy.ParsePath(text)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	return paths
}

// The next request goes to the target of its moment.
func TestTargetOfTheMoment(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, says("old")))
	b := p.browser(ca)
	if _, body := b.get("/v1/a"); body != "old" {
		t.Fatal(body)
	}
	c := p.config
	c.Listeners = []Listener{webListener("web", origin(t, says("new")))}
	c.Listeners[0].Bind = p.config.Listeners[0].Bind
	if _, err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	if _, body := b.get("/v1/a"); body != "new" {
		t.Errorf("after the change: %q", body)
	}
}

// Another protocol is another listener: what is open drains.
func TestProtocolChanges(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, says("hi")), func(c *Config) { c.Listeners[0].Timeouts.Drain = patience })
	b := p.browser(ca)
	b.get("/v1/a")
	c := p.config
	c.Listeners = []Listener{inbound("web", p.config.Listeners[0].Targets[0])}
	applied, err := p.Apply(c)
	if err != nil || len(applied.Added) != 1 || len(applied.Removed) != 1 {
		t.Fatalf("%+v, %v", applied, err)
	}
	b.ended()
}

// Plaintext on a permissive listener is decided as unauthenticated, request by
// request, and tells the service of nobody.
func TestRequestsInPlaintext(t *testing.T) {
	t.Parallel()
	p, _ := web(t, origin(t, echoes), func(c *Config) {
		c.Listeners[0].Mode = ModePermissive
		c.Policy = rulesOf(t, webReads+"  - {id: plain, effect: allow, from: [unauthenticated], http: {methods: [GET], paths: [/v1/public]}}\n")
	})
	b := browse(t, dialPlain(t, p.addr("web")))
	b.send("GET /v1/public HTTP/1.1\r\nHost: x\r\nX-Spiffe-ID: spiffe://example.org/web\r\n\r\n")
	if resp, body := b.response("GET"); resp.StatusCode != 200 || body != "GET /v1/public  " {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
	if status, _ := b.get("/v1/a"); status != 403 {
		t.Errorf("status %d", status)
	}
}

// An audit lets requests pass that the rules refuse, and says so.
func TestAuditOfRequests(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), func(c *Config) { c.Listeners[0].Enforcement = Audit })
	b := p.browser(ca)
	if status, _ := b.get("/v2/a"); status != 200 {
		t.Errorf("status %d", status)
	}
	if a := p.next(); a.Decision != "would_deny" || a.WouldDeny == "" || a.Outcome != "success" {
		t.Errorf("record %+v", a)
	}
	if n := p.metric("narthex_http_requests_total", "web", "200", "would_deny"); n != 1 {
		t.Errorf("%v counted", n)
	}
}

// Rates are of requests, and end no connection.
func TestRateOfRequests(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), func(c *Config) {
		c.Policy = rulesOf(t, webReads+"limits:\n  - {id: slowly, from: [\"spiffe://example.org/web\"], rps: 0.01, burst: 3}\n")
	})
	b := p.browser(ca)
	for n := range 5 {
		b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, _ := b.response("GET")
		if want := map[bool]int{true: 200, false: 429}[n < 3]; resp.StatusCode != want || want == 429 && resp.Header.Get("Retry-After") != "100" {
			t.Errorf("request %d: %d, retry-after %q", n, resp.StatusCode, resp.Header.Get("Retry-After"))
		}
		if a := p.next(); n >= 3 && a.Limit != "slowly" {
			t.Errorf("record %+v", a)
		}
	}
}

// A peer that is revoked gets no answer any more, and nothing it had begun goes
// on.
func TestRevokedBetweenRequests(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes))
	b := p.browser(ca)
	b.get("/v1/a")
	if applied := p.apply(webReads + "revoked: [\"spiffe://example.org/web\"]\n"); applied.Closed != 1 {
		t.Errorf("%+v", applied)
	}
	if _, err := b.r.ReadByte(); err == nil {
		t.Error("goes on")
	}
}

// What no endpoint has answered goes to another one; what may have been carried
// out does not.
func TestRequestsSentAgain(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	hangsUp := serve(t, func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			asked.Add(1)
		}
	})
	p, ca := web(t, hangsUp, func(c *Config) { c.Listeners[0].Targets = []string{hangsUp, origin(t, says("hi"))} })
	b := p.browser(ca)
	for range 4 {
		if status, body := b.get("/v1/a"); status != 200 || body != "hi" {
			t.Errorf("GET: %d %q", status, body)
		}
	}
	if asked.Load() == 0 {
		t.Error("nobody asked the endpoint that hangs up")
	}
	statuses := map[int]int{}
	for range 4 {
		b.send("POST /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na")
		resp, _ := b.response("POST")
		statuses[resp.StatusCode]++
	}
	if statuses[502] == 0 {
		t.Errorf("POST: %v; it may have been carried out", statuses)
	}
}

// A service that closes its idle connections costs no request.
func TestStaleConnections(t *testing.T) {
	t.Parallel()
	p, ca := web(t, serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") // and closes, without a word of it
		}
	}))
	b := p.browser(ca)
	for range 20 {
		if status, body := b.get("/v1/a"); status != 200 || body != "hi" {
			t.Fatalf("%d %q", status, body)
		}
	}
}

func TestLargestBody(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), func(c *Config) { c.Listeners[0].HTTP.MaxBody = 10 })
	for _, request := range []string{
		"POST /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\nabcdefghijk",
		"POST /v1/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nabcdefgh\r\n8\r\nabcdefgh\r\n0\r\n\r\n",
	} {
		b := p.browser(ca)
		b.send("%s", request)
		if resp, _ := b.response("POST"); resp.StatusCode != 413 || !resp.Close {
			t.Errorf("%q: %d, close %v", request, resp.StatusCode, resp.Close)
		}
		b.ended()
	}
}

// tokens is a source of identities that knows tokens.
type tokens struct {
	identity.Source
	good map[string]identity.JWT
	away atomic.Bool
}

func (s *tokens) FollowJWT()            {}
func (s *tokens) JWTProblem() error     { return nil }
func (s *tokens) JWTGeneration() uint64 { return 1 }

func (s *tokens) ValidateJWT(token string, _ []string, _ time.Time) (identity.JWT, error) {
	switch {
	case s.away.Load():
		return identity.JWT{}, &identity.JWTError{Result: "unavailable", Err: errors.New("no bundles")}
	case !strings.Contains(token, "."):
		return identity.JWT{}, &identity.JWTError{Result: "malformed", Err: errors.New("no JWT")}
	}
	if j, ok := s.good[token]; ok {
		return j, nil
	}
	return identity.JWT{}, &identity.JWTError{Result: "expired", Err: errors.New("it expired")}
}

func (s *tokens) RecheckJWT(identity.JWT) error {
	if s.away.Load() {
		return errors.New("its authority is gone")
	}
	return nil
}

func (s *tokens) FetchJWT(_ context.Context, subject spiffeid.ID, audience string) (string, error) {
	if s.away.Load() {
		return "", errors.New("the agent is away")
	}
	return "token-of-" + subject.Path()[1:] + "-for-" + audience, nil
}

func TestTokensOfClients(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	other := identity.JWT{Subject: spiffeid.RequireFromString("spiffe://example.org/alice"), NotAfter: time.Now().Add(time.Hour)}
	bob := identity.JWT{Subject: spiffeid.RequireFromString("spiffe://example.org/bob"), NotAfter: time.Now().Add(time.Hour)}
	self := identity.JWT{Subject: spiffeid.RequireFromString("spiffe://example.org/web"), NotAfter: time.Now().Add(time.Hour)}
	ids := &tokens{Source: source(t, ca.SVID("/orders"), ca), good: map[string]identity.JWT{"a.b.self": self, "a.b.alice": other, "a.b.bob": bob}}
	l := webListener("web", origin(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("Authorization"))
	}))
	for _, required := range []bool{false, true} {
		l.HTTP = &HTTP{JWT: &JWT{Audience: []string{"orders"}, Required: required}}
		p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webReads+`  - id: for-alice
    effect: allow
    from: ["spiffe://example.org/web"]
    http: {paths: ["/for/**"], subjects: ["spiffe://example.org/alice"]}
`), Identities: ids})
		b := p.browser(ca)
		for token, want := range map[string]int{"": 401, "a.b.self": 403, "a.b.alice": 200, "a.b.bob": 403} {
			b.send("GET /for/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", token)
			if resp, _ := b.response("GET"); resp.StatusCode != want {
				t.Errorf("for the subject of %q: %d, want %d", token, resp.StatusCode, want)
			}
		}
		for _, test := range []struct {
			fields            string
			status, mandatory int
			says              string
		}{
			{"", 200, 401, "Bearer"},
			{"Authorization: Bearer a.b.self\r\n", 200, 200, ""},
			{"authorization: bearer  a.b.self\r\n", 200, 200, ""},
			{"Authorization: Bearer a.b.alice\r\n", 403, 403, ""}, // no rule of that path lets web speak for alice
			{"Authorization: Bearer a.b.old\r\n", 401, 401, `Bearer error="invalid_token"`},
			{"Authorization: Bearer opaque\r\n", 200, 401, `Bearer error="invalid_token"`},
			{"Authorization: Basic YTpi\r\n", 200, 401, "Bearer"},
			{"Authorization: Bearer a.b.self\r\nauthorization: Bearer a.b.old\r\n", 400, 400, ""},
		} {
			b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n%s\r\n", test.fields)
			resp, _ := b.response("GET")
			want := test.status
			if required {
				want = test.mandatory
			}
			if resp.StatusCode != want || want == 401 && resp.Header.Get("Www-Authenticate") != test.says {
				t.Errorf("required %v, %q: %d %q, want %d", required, test.fields, resp.StatusCode, resp.Header.Get("Www-Authenticate"), want)
			}
		}
		ids.away.Store(true)
		b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a.b.self\r\n\r\n")
		if resp, _ := b.response("GET"); resp.StatusCode != 503 {
			t.Errorf("without bundles: %d", resp.StatusCode)
		}
		ids.away.Store(false)
	}
}

func TestTokensNeedASource(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	l := webListener("web", "127.0.0.1:1")
	l.HTTP = &HTTP{JWT: &JWT{Audience: []string{"orders"}}}
	if _, err := New(Config{Listeners: []Listener{l}, Identities: source(t, ca.SVID("/orders"), ca)}); err == nil || !strings.Contains(err.Error(), "knows no JWT-SVIDs") {
		t.Errorf("%v", err)
	}
}

// Outbound, our own token goes with requests that have none of their own.
func TestTokensAttached(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprint(w, strings.Join(r.Header["Authorization"], "|"))
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.SVID("/inventory")}, ClientAuth: tls.RequireAnyClientCert}
	server.StartTLS()
	t.Cleanup(server.Close)
	l := outbound(t, "web", strings.TrimPrefix(server.URL, "https://"), "spiffe://example.org/inventory")
	l.HTTP = &HTTP{JWT: &JWT{Audience: []string{"inventory"}}, Forwarded: forwarded.Settings{Origin: forwarded.Untouched}}
	ids := &tokens{Source: source(t, ca.SVID("/orders"), ca)}
	p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, "version: 1\nrules: [{id: out, effect: allow, from: [\"spiffe://example.org/orders\"]}]\n"), Identities: ids})
	b := browse(t, dialPlain(t, p.addr("web")))
	for range 2 {
		if _, body := b.get("/v1/a"); body != "Bearer token-of-orders-for-inventory" {
			t.Errorf("attached %q", body)
		}
	}
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nAuthorization: Basic YTpi\r\n\r\n")
	if _, body := b.response("GET"); body != "Basic YTpi" {
		t.Errorf("its own: %q", body)
	}
	ids.away.Store(true)
	if status, _ := b.get("/v1/a"); status != 503 {
		t.Errorf("without a token: %d", status)
	}
}
