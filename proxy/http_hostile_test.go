package proxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"
)

// TestHeldBodyIsNoRequest: the body of a request whose retry finds nobody is not read as another request.
func TestHeldBodyIsNoRequest(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_ = l.Close() // nobody is there for the retry
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_ = c.Close()
	}()
	var got atomic.Value
	live := origin(t, func(w http.ResponseWriter, r *http.Request) {
		got.Store(r.URL.Path)
		_, _ = io.WriteString(w, "SMUGGLED")
	})
	p, ca := web(t, l.Addr().String(), func(c *Config) {
		c.Listeners[0].Routes = []Route{{Paths: mustPaths(t, "/v1/smuggled"), Targets: []string{live}}}
	})
	b := p.browser(ca)
	inner := "GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
	b.send("PUT /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(inner), inner)
	resp, _ := b.response("PUT")
	t.Log("first answer", resp.StatusCode)
	_ = b.SetReadDeadline(time.Now().Add(2 * time.Second))
	if resp, err := http.ReadResponse(b.r, nil); err == nil { //nolint:bodyclose // its connection is closed
		body, _ := io.ReadAll(resp.Body)
		t.Errorf("a second answer to one request: %d %q; the service was asked for %v", resp.StatusCode, body, got.Load())
	}
}

// TestEveryWaitEnds: a wait that was late once ends the next time as well.
func TestEveryWaitEnds(t *testing.T) {
	p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(2 * patience):
		}
	}), func(c *Config) { c.Listeners[0].Timeouts.Response = 200 * time.Millisecond })
	b := p.browser(ca)
	for n := range 2 {
		if status, _ := b.get("/v1/a"); status != 504 {
			t.Errorf("request %d: %d", n, status)
		}
	}
}

func switches(word string) func(net.Conn) {
	return func(c net.Conn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: %s\r\n\r\n", word)
		_, _ = io.Copy(c, r)
	}
}

// TestUpgradeEndsWithItsToken: a connection that changed its protocol ends with the token that it began with.
func TestUpgradeEndsWithItsToken(t *testing.T) {
	ca := testca.New(t, "example.org")
	self := identity.JWT{Subject: spiffeid.RequireFromString("spiffe://example.org/web"), NotAfter: time.Now().Add(6 * time.Second)}
	ids := &tokens{Source: source(t, ca.SVID("/orders"), ca), good: map[string]identity.JWT{"a.b.self": self}}
	l := webListener("web", serve(t, switches("websocket")))
	l.HTTP.JWT = &JWT{Audience: []string{"orders"}, Required: true}
	p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webReads), Identities: ids})
	b := p.browser(ca)
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a.b.self\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
	if resp, err := http.ReadResponse(b.r, nil); err != nil || resp.StatusCode != 101 { //nolint:bodyclose // its connection is closed
		t.Fatal(resp, err)
	}
	if _, err := b.r.ReadByte(); err == nil || time.Now().Before(self.NotAfter) {
		t.Errorf("ended by %v, %v before its token", err, time.Until(self.NotAfter))
	}
	p.next() // of the request
	if a := p.next(); a.Closed != "expiry" {
		t.Errorf("record %+v", a)
	}
}

func plainOut(t *testing.T, target string, change ...func(*Config)) (*running, *testca.Authority) {
	t.Helper()
	ca := testca.New(t, "example.org")
	l := outbound(t, "web", target, "spiffe://example.org/inventory")
	l.HTTP = &HTTP{}
	c := Config{Listeners: []Listener{l}, Policy: rulesOf(t, "version: 1\nrules: [{id: out, effect: allow, from: [\"spiffe://example.org/orders\"]}]\n"), Identities: source(t, ca.SVID("/orders"), ca)}
	for _, f := range change {
		f(&c)
	}
	return run(t, c), ca
}

func (r *running) active() (n int) {
	for _, s := range r.world.Load().listeners {
		list, _ := s.endpoints()
		for _, e := range list {
			n += e.Active
		}
	}
	return n
}

// TestLoansComeBack: a handshake that fails costs an endpoint no more than one loan, and gives that back.
func TestLoansComeBack(t *testing.T) {
	ca := testca.New(t, "example.org")
	config := clientConfig(ca.SVID("/other"))
	config.ClientAuth = tls.RequireAnyClientCert
	addr := serve(t, func(c net.Conn) { _ = tls.Server(c, config).Handshake(); _, _ = io.Copy(io.Discard, c) })
	p, _ := plainOut(t, addr, func(c *Config) { c.Identities = source(t, ca.SVID("/orders"), ca) })
	for range 4 {
		b := browse(t, dialPlain(t, p.addr("web")))
		status, _ := b.get("/v1/a")
		if status != 502 {
			t.Error(status)
		}
		_ = b.Close()
	}
	p.until("no loan is out", func() bool { return len(p.table.of(nil)) == 0 && p.active() == 0 })
}

// TestSlowFarEnd: a far end that is slow in TLS costs the client an answer, not its connection.
func TestSlowFarEnd(t *testing.T) {
	addr := serve(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	p, _ := plainOut(t, addr, func(c *Config) { c.Listeners[0].Timeouts.Handshake = 300 * time.Millisecond })
	b := browse(t, dialPlain(t, p.addr("web")))
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(b.r, nil) //nolint:bodyclose // its connection is closed
	if err != nil {
		t.Fatalf("want 502 or 504, have %v", err)
	}
	t.Log(resp.StatusCode)
}

// TestFailedHandshakeLeavesTheClient: a handshake that failed ends nothing of the client later.
func TestFailedHandshakeLeavesTheClient(t *testing.T) {
	ca := testca.New(t, "example.org")
	config := clientConfig(ca.SVID("/other"))
	config.ClientAuth = tls.RequireAnyClientCert
	addr := serve(t, func(c net.Conn) { _ = tls.Server(c, config).Handshake(); _, _ = io.Copy(io.Discard, c) })
	p, _ := plainOut(t, addr, func(c *Config) {
		c.Identities = source(t, ca.SVID("/orders"), ca)
		c.Listeners[0].Timeouts.Handshake = time.Second
	})
	b := browse(t, dialPlain(t, p.addr("web")))
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := b.response("GET"); resp.StatusCode != 502 || resp.Close {
		t.Fatal(resp)
	}
	for _, c := range p.table.of(nil) {
		c.mu.Lock()
		if end := c.deadlines[endHandshake].at; !end.IsZero() {
			t.Errorf("the client is to be ended at %s for it", end)
		}
		c.mu.Unlock()
	}
	if status, _ := b.get("/v1/a"); status != 502 {
		t.Errorf("the second request of a kept connection: %d", status)
	}
}

// TestCutResponseIsNotWhole: a response over TLS that the network cut off does not pass for whole.
func TestCutResponseIsNotWhole(t *testing.T) {
	ca := testca.New(t, "example.org")
	config := clientConfig(ca.SVID("/inventory"))
	config.ClientAuth = tls.RequireAnyClientCert
	addr := serve(t, func(raw net.Conn) {
		c := tls.Server(raw, config)
		if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nhalf of it")
		_ = raw.Close() // no close_notify
	})
	p, _ := plainOut(t, addr, func(c *Config) { c.Identities = source(t, ca.SVID("/orders"), ca) })
	b := browse(t, dialPlain(t, p.addr("web")))
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
	all, err := io.ReadAll(b.r)
	a := p.next()
	if err == nil || a.Outcome == "success" {
		t.Errorf("read %q, %v; record: %s %q", all, err, a.Outcome, a.Reason)
	}
}

// TestAnswerWithinAnUpload: a service may answer while the client sends what it was asked for.
func TestAnswerWithinAnUpload(t *testing.T) {
	addr := serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		_, _ = io.ReadFull(r, make([]byte, 2000))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		_, _ = io.Copy(io.Discard, r)
	})
	p, ca := web(t, addr)
	b := p.browser(ca)
	b.send("POST /v1/a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
	go func() {
		for range 3000 {
			if _, err := io.WriteString(b, "5\r\nhello\r\n"); err != nil {
				return
			}
		}
	}()
	for range 2 {
		if _, err := http.ReadResponse(b.r, nil); err != nil { //nolint:bodyclose // its connection is closed
			t.Log(err)
			return
		}
	}
}

// TestNoHiddenProtocols: no request passes in a protocol that nobody looks into.
func TestNoHiddenProtocols(t *testing.T) {
	got := make(chan string, 1)
	p, ca := web(t, serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.Header.Get("Upgrade") != "h2c" || req.Header.Get("Http2-Settings") == "" {
			got <- ""
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
		b := make([]byte, 24)
		_, _ = io.ReadFull(r, b)
		got <- string(b)
	}))
	b := p.browser(ca)
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	if preface := <-got; preface != "" {
		t.Errorf("the service got an HTTP/2 connection: %q", preface)
	}
}

// hooked runs a hook in the midst of a validation.
type hooked struct {
	*tokens
	once sync.Once
	hook func()
}

func (h *hooked) ValidateJWT(token string, audience []string, now time.Time) (identity.JWT, error) {
	if h.hook != nil {
		h.once.Do(h.hook)
	}
	if audience[0] != "old" {
		return identity.JWT{}, &identity.JWTError{Result: "audience", Err: fmt.Errorf("it is for others")}
	}
	return h.tokens.ValidateJWT(token, audience, now)
}

// TestProofOfTheMoment: a request that was looked at under old settings is looked at again.
func TestProofOfTheMoment(t *testing.T) {
	ca := testca.New(t, "example.org")
	self := identity.JWT{Subject: spiffeid.RequireFromString("spiffe://example.org/web"), NotAfter: time.Now().Add(time.Hour)}
	ids := &hooked{tokens: &tokens{Source: source(t, ca.SVID("/orders"), ca), good: map[string]identity.JWT{"a.b.self": self}}}
	l := webListener("web", origin(t, says("old")))
	l.HTTP.JWT = &JWT{Audience: []string{"old"}, Required: true}
	var p *running
	started := make(chan struct{})
	ids.hook = func() {
		<-started
		c := p.config
		n := webListener("web", origin(t, echoes))
		n.HTTP.JWT = &JWT{Audience: []string{"new"}, Required: true}
		n.HTTP.Forwarded.IdentityHeader = "x-peer"
		n.HTTP.MaxBody = 10
		c.Listeners = []Listener{n}
		if _, err := p.Apply(c); err != nil {
			t.Error(err)
		}
	}
	p = run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webReads), Identities: ids})
	close(started)
	b := p.browser(ca)
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a.b.self\r\n\r\n")
	if resp, body := b.response("GET"); resp.StatusCode == 200 && body != "old" {
		t.Errorf("the new target served a request with a token for the old audience: %q", body)
	}
}

// TestOddSpellings: names that CGI takes for ours do not pass.
func TestOddSpellings(t *testing.T) {
	p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
		for name, v := range r.Header {
			if strings.Contains(v[0], "admin") {
				_, _ = fmt.Fprintf(w, "%s ", name)
			}
		}
	}))
	b := p.browser(ca)
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nX.Spiffe.Id: admin\r\nX~Spiffe~Id: admin\r\nX-Spiffe'Id: admin\r\n\r\n")
	if _, body := b.response("GET"); body != "" {
		t.Errorf("passed on: %s", body)
	}
}

// TestBearerBehindATab: a token is one whatever white space is before it.
func TestBearerBehindATab(t *testing.T) {
	ca := testca.New(t, "example.org")
	ids := &tokens{Source: source(t, ca.SVID("/orders"), ca)}
	l := webListener("web", origin(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Header.Get("Authorization")) }))
	l.HTTP.JWT = &JWT{Audience: []string{"orders"}}
	p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webReads), Identities: ids})
	b := p.browser(ca)
	for _, sep := range []string{" ", "\t", " \t"} {
		b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer%sa.b.old\r\n\r\n", sep)
		if resp, body := b.response("GET"); resp.StatusCode != 401 {
			t.Errorf("%q: %d, the service got %q", sep, resp.StatusCode, body)
		}
	}
}
