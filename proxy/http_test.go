package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/forwarded"
)

const webReads = `version: 1
rules:
  - {id: reads, effect: allow, from: ["spiffe://example.org/web"], http: {methods: [GET, HEAD, POST, PUT], paths: ["/v1/**"]}}
`

// origin serves HTTP/1.1 and, with prior knowledge, HTTP/2 on loopback and
// returns its address.
func origin(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func webListener(name, target string) Listener {
	l := inbound(name, target)
	l.HTTP = &HTTP{Forwarded: forwarded.Settings{IdentityHeader: "x-spiffe-id"}}
	return l
}

// web is a proxy with one HTTP listener in front of a target.
func web(t testing.TB, target string, change ...func(*Config)) (*running, *testca.Authority) {
	t.Helper()
	ca := testca.New(t, "example.org")
	c := Config{Listeners: []Listener{webListener("web", target)}, Policy: rulesOf(t, webReads), Identities: source(t, ca.SVID("/orders"), ca)}
	for _, f := range change {
		f(&c)
	}
	return run(t, c), ca
}

// browser is a client of HTTP/1.1 that writes what it is told.
type browser struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func browse(t testing.TB, c net.Conn) *browser {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &browser{t, c, bufio.NewReader(c)}
}

func (p *running) browser(ca *testca.Authority) *browser {
	return browse(p.t, dialTLS(p.t, p.addr("web"), clientConfig(ca.SVID("/web"))))
}

func (b *browser) send(format string, args ...any) {
	b.t.Helper()
	if _, err := fmt.Fprintf(b, format, args...); err != nil {
		b.t.Fatal(err)
	}
}

// head is the head of a response.
type head struct {
	StatusCode       int
	Status           string
	Header           http.Header
	TransferEncoding []string
	Close            bool
}

// response reads a response to a request of that method, with its body.
func (b *browser) response(method string) (head, string) {
	b.t.Helper()
	if err := b.SetDeadline(time.Now().Add(patience)); err != nil {
		b.t.Fatal(err)
	}
	resp, err := http.ReadResponse(b.r, &http.Request{Method: method})
	if err != nil {
		b.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		b.t.Fatalf("read the body of %s: %v", resp.Status, err)
	}
	return head{resp.StatusCode, resp.Status, resp.Header, resp.TransferEncoding, resp.Close}, string(body)
}

// get asks for a path and returns the status and body.
func (b *browser) get(path string) (int, string) {
	b.t.Helper()
	b.send("GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
	resp, body := b.response("GET")
	return resp.StatusCode, body
}

// ended fails unless the connection is at its end in good order.
func (b *browser) ended() {
	b.t.Helper()
	if n, err := b.r.ReadByte(); err != io.EOF {
		b.t.Errorf("want the end of the connection, have %q, %v", n, err)
	}
}

func echoes(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL.Path, strings.Join(r.Header["X-Spiffe-Id"], "|"), body)
}

func TestRequests(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes))
	b := p.browser(ca)
	for _, test := range []struct {
		request string
		status  int
		body    string
	}{
		{"GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n", 200, "GET /v1/a spiffe://example.org/web "},
		{"GET /v1/b HTTP/1.1\r\nHost: x\r\nX_Spiffe_ID: spiffe://example.org/admin\r\n\r\n", 200, "GET /v1/b spiffe://example.org/web "},
		{"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 200, "POST /v1/c spiffe://example.org/web hello"},
		{"POST /v1/d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200, "POST /v1/d spiffe://example.org/web hello"},
		{"HEAD /v1/e HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""},
		{"DELETE /v1/f HTTP/1.1\r\nHost: x\r\n\r\n", 403, ""},
		{"TRACE /v1/f HTTP/1.1\r\nHost: x\r\n\r\n", 405, ""},
		{"GET /v2/f HTTP/1.1\r\nHost: x\r\n\r\n", 403, ""},
		{"GET /v1/g HTTP/1.1\r\nHost: x\r\n\r\n", 200, "GET /v1/g spiffe://example.org/web "},
	} {
		b.send("%s", test.request)
		method, _, _ := strings.Cut(test.request, " ")
		resp, body := b.response(method)
		if resp.StatusCode != test.status || test.status == 200 && body != test.body {
			t.Errorf("%q: %d %q, want %d %q", test.request, resp.StatusCode, body, test.status, test.body)
		}
		a := p.next()
		if a.Action != "request" || a.HTTP == nil || a.HTTP.Status != test.status || a.HTTP.Method != method {
			t.Errorf("%q: access record %+v, %+v", test.request, a, a.HTTP)
		}
	}
	b.send("GET /../v1 HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := b.response("GET"); resp.StatusCode != 400 || !resp.Close {
		t.Errorf("status %d, close %v", resp.StatusCode, resp.Close)
	}
	b.ended()
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes))
	b := p.browser(ca)
	var all strings.Builder
	for n := range 50 {
		fmt.Fprintf(&all, "POST /v1/%d HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", n)
	}
	b.send("%s", all.String())
	for n := range 50 {
		if _, body := b.response("POST"); body != fmt.Sprintf("POST /v1/%d spiffe://example.org/web abc", n) {
			t.Fatalf("answer %d: %q", n, body)
		}
	}
}

// What follows a refused request with a body is never served.
func TestNothingAfterARefusedBody(t *testing.T) {
	t.Parallel()
	var served sync.Map
	p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) { served.Store(r.URL.Path, true) }))
	b := p.browser(ca)
	b.send("POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\nGET /v1/smuggled HTTP/1.1\r\n\r\n")
	if resp, _ := b.response("POST"); resp.StatusCode != 403 || !resp.Close {
		t.Errorf("status %d, close %v", resp.StatusCode, resp.Close)
	}
	b.ended()
	if _, ok := served.Load("/v1/smuggled"); ok {
		t.Error("the body was served as a request")
	}
}

// Bodies of every size go both ways whole, whatever their framing.
func TestBodies(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/counted" {
			w.Header().Set("Content-Length", r.Header.Get("X-Length"))
		}
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	}))
	b := p.browser(ca)
	for _, size := range []int{0, 1, 1000, 4000, 16 << 10, 64 << 10, 1 << 20, 5 << 20} {
		body := make([]byte, size)
		_, _ = rand.Read(body)
		for _, path := range []string{"/v1/counted", "/v1/chunked"} {
			for _, chunked := range []bool{false, true} {
				var sending sync.WaitGroup
				sending.Go(func() {
					req, _ := http.NewRequest("POST", "http://x"+path, io.MultiReader(bytes.NewReader(body)))
					req.Header.Set("X-Length", fmt.Sprint(size))
					if !chunked {
						req.ContentLength = int64(size)
						if size == 0 {
							req.Body = http.NoBody
						}
					}
					if err := req.Write(b); err != nil {
						t.Error(err)
					}
				})
				resp, got := b.response("POST")
				sending.Wait()
				if resp.StatusCode != 200 || got != string(body) {
					t.Fatalf("%d bytes to %s, chunked %v: %s, %d bytes", size, path, chunked, resp.Status, len(got))
				}
			}
		}
	}
}

func TestContinueAndEarlyHints(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		echoes(w, r)
	}))
	b := p.browser(ca)
	b.send("POST /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
	if resp, _ := b.response("POST"); resp.StatusCode != 103 || resp.Header.Get("Link") == "" {
		t.Fatalf("first %s", resp.Status)
	}
	if resp, _ := b.response("POST"); resp.StatusCode != 100 {
		t.Fatalf("then %s", resp.Status)
	}
	b.send("hello")
	if resp, body := b.response("POST"); resp.StatusCode != 200 || body != "POST /v1/a spiffe://example.org/web hello" {
		t.Fatalf("%s %q", resp.Status, body)
	}
	if status, _ := b.get("/v1/b"); status != 103 {
		t.Errorf("after it: %d", status)
	}
	if resp, _ := b.response("GET"); resp.StatusCode != 200 {
		t.Errorf("after it: %s", resp.Status)
	}
}

// A client of HTTP/1.0 gets no chunks, and its connection closes unless it
// asked for another end.
func TestOldClients(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			_, _ = io.WriteString(w, "part ")
			w.(http.Flusher).Flush()
		}
	}))
	b := p.browser(ca)
	b.send("GET /v1/a HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
	resp, body := b.response("GET")
	if resp.StatusCode != 200 || body != "part part part " || len(resp.TransferEncoding) > 0 {
		t.Errorf("%s %v %q", resp.Status, resp.TransferEncoding, body)
	}
	b.ended()
}

// An upgraded connection is bytes both ways, is parked, and is asked again by
// the request that began it.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	target := serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\nhi ")
		_, _ = io.Copy(c, r)
	})
	p, ca := web(t, target)
	b := p.browser(ca)
	b.send("GET /v1/chat HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\nearly ")
	resp, err := http.ReadResponse(b.r, nil) //nolint:bodyclose // of 101 there is none
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "chat" {
		t.Fatalf("%v %v", resp, err)
	}
	read := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(b.r, got); err != nil || string(got) != want {
			t.Fatalf("read %q, %v, want %q", got, err, want)
		}
	}
	read("hi early ")
	p.allParked()
	b.send("more")
	read("more")
	if a := p.next(); a.HTTP == nil || a.HTTP.Status != 101 {
		t.Errorf("record %+v", a)
	}
	if applied := p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1)); applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	if _, err := b.r.ReadByte(); err == nil || err == io.EOF {
		t.Errorf("after the change: %v", err)
	}
	if a := p.next(); a.Action != "connection" || a.Closed != "policy" {
		t.Errorf("record %+v", a)
	}
}

// An idle client's connection is parked; it is asked again when rules change,
// and closed once no request of it can pass.
func TestIdleClients(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes))
	b := p.browser(ca)
	for range 3 {
		if status, _ := b.get("/v1/a"); status != 200 {
			t.Fatalf("status %d", status)
		}
		p.next()
		p.allParked()
	}
	if applied := p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1)); applied.Asked != 1 || applied.Closed != 0 {
		t.Errorf("applied %+v", applied)
	}
	if status, _ := b.get("/v1/a"); status != 403 {
		t.Errorf("by the new rules: %d", status)
	}
	if status, _ := b.get("/v2/a"); status != 200 {
		t.Errorf("by the new rules: %d", status)
	}
	if applied := p.apply(strings.Replace(webReads, "/web", "/other", 1)); applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	if _, err := b.r.ReadByte(); err == nil {
		t.Error("a connection goes on of which no request can pass")
	}
}

// A request that is being served is asked again.
func TestRequestAskedAgain(t *testing.T) {
	t.Parallel()
	begun, gone := make(chan struct{}), make(chan struct{})
	p, ca := web(t, origin(t, func(_ http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
		close(gone)
	}))
	b := p.browser(ca)
	b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun
	if applied := p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1)); applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	<-gone
	if _, err := b.r.ReadByte(); err == nil {
		t.Error("goes on")
	}
}

// Clients lose no request while the proxy drains: those that are served are
// answered, and told to come no more.
func TestDrainOfRequests(t *testing.T) {
	t.Parallel()
	begun, on := make(chan struct{}), make(chan struct{})
	p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/slow" {
			close(begun)
			<-on
		}
		echoes(w, r)
	}), func(c *Config) { c.Listeners[0].Timeouts.Drain = 10 * time.Second })
	slow, idle, silent := p.browser(ca), p.browser(ca), p.browser(ca)
	for _, b := range []*browser{idle, silent} {
		if status, _ := b.get("/v1/a"); status != 200 {
			t.Fatal(status)
		}
	}
	slow.send("GET /v1/slow HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun
	var stopping sync.WaitGroup
	stopping.Go(p.stop)
	p.until("every connection drains", func() bool {
		for _, c := range p.table.of(nil) {
			c.mu.Lock()
			d, _ := c.http.(*downstream)
			c.mu.Unlock()
			if d == nil || !d.draining.Load() {
				return false
			}
		}
		return p.Draining()
	})
	idle.send("GET /v1/b HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := idle.response("GET"); resp.StatusCode != 200 || !resp.Close {
		t.Errorf("while it drains: %s, close %v", resp.Status, resp.Close)
	}
	idle.ended()
	close(on)
	if resp, _ := slow.response("GET"); resp.StatusCode != 200 || !resp.Close {
		t.Errorf("while it drains: %s, close %v", resp.Status, resp.Close)
	}
	slow.ended()
	silent.ended()
	stopping.Wait()
}

// Outbound, the caller speaks plain HTTP, and the request goes to who proved
// that it is expected.
func TestOutboundRequests(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s from %s", r.URL.Path, r.TLS.PeerCertificates[0].URIs[0])
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.SVID("/inventory")}, ClientAuth: tls.RequireAnyClientCert}
	server.StartTLS()
	t.Cleanup(server.Close)
	l := outbound(t, "web", strings.TrimPrefix(server.URL, "https://"), "spiffe://example.org/inventory")
	l.HTTP = &HTTP{Forwarded: forwarded.Settings{IdentityHeader: "x-spiffe-id"}}
	p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, `version: 1
rules:
  - {id: out, effect: allow, from: ["spiffe://example.org/orders"], to: ["spiffe://example.org/inventory"], at: outbound, http: {paths: ["/v1/**"]}}
`), Identities: source(t, ca.SVID("/orders"), ca)})
	b := browse(t, dialPlain(t, p.addr("web")))
	for range 3 {
		if status, body := b.get("/v1/a"); status != 200 || body != "/v1/a from spiffe://example.org/orders" {
			t.Errorf("%d %q", status, body)
		}
		if a := p.next(); a.From != "spiffe://example.org/orders" || a.To != "spiffe://example.org/inventory" || a.Rule != "out" || a.HTTP.Status != 200 || a.TLSVersion != "1.3" || a.Protocol != "http/1.1" {
			t.Errorf("record %+v", a)
		}
		if status, _ := b.get("/v2/a"); status != 403 {
			t.Errorf("refused path: %d", status)
		}
		p.next()
		p.allParked()
	}
	if n := p.metric("narthex_tls_handshakes_total", "web", "ok"); n != 1 {
		t.Errorf("%v handshakes for six requests", n)
	}
}

// A head or a body that does not come ends the request, in words where the
// client may still read them.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), func(c *Config) {
		c.Listeners[0].Timeouts.Head, c.Listeners[0].Timeouts.Stall = 300*time.Millisecond, 300*time.Millisecond
	})
	silent := p.browser(ca)
	silent.ended()
	head := p.browser(ca)
	head.send("GET /v1/a HTTP/1.1\r\nHo")
	if resp, _ := head.response("GET"); resp.StatusCode != 408 {
		t.Errorf("head: %s", resp.Status)
	}
	head.ended()
	body := p.browser(ca)
	body.send("POST /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
	if resp, _ := body.response("POST"); resp.StatusCode != 408 {
		t.Errorf("body: %s", resp.Status)
	}
	body.ended()
}

// What a service does wrong is said in a status, or breaks the response off
// where it has begun.
func TestBadServices(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, answer string
		status       int
		cut          bool
	}{
		{"nothing", "", 502, false},
		{"no HTTP", "hello\r\n\r\n", 502, false},
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 502, false},
		{"cut short", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", 200, true},
		{"bad chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n", 200, true},
		{"another protocol", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n", 502, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, ca := web(t, serve(t, func(c net.Conn) {
				_, _ = http.ReadRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, test.answer)
			}))
			b := p.browser(ca)
			b.send("POST /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
			resp, err := http.ReadResponse(b.r, nil) //nolint:bodyclose // the connection is closed
			if err != nil || resp.StatusCode != test.status {
				t.Fatalf("%v %v", resp, err)
			}
			if _, err := io.ReadAll(resp.Body); (err != nil) != test.cut {
				t.Errorf("body: %v", err)
			}
			if a := p.next(); a.Outcome != "failure" || a.Reason == "" {
				t.Errorf("record %+v", a)
			}
		})
	}
}

// A warm request allocates nothing, but for what crypto/tls does for each
// record that it reads.
func TestRequestAllocations(t *testing.T) {
	response := []byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/plain\r\n\r\nhello")
	target := serve(t, func(c net.Conn) {
		buf := make([]byte, 4096)
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
			if _, err := c.Write(response); err != nil {
				return
			}
		}
	})
	for _, test := range []struct {
		name string
		most float64
	}{{"plaintext", 0.1}, {"mTLS", 2.1}} { // of those two the test's client makes one
		t.Run(test.name, func(t *testing.T) {
			ca := testca.New(t, "example.org")
			access, err := telemetry.NewAccessLog(io.Discard, "json", nil)
			if err != nil {
				t.Fatal(err)
			}
			l := webListener("web", target)
			l.Mode = ModePermissive
			p, err := New(Config{
				Listeners: []Listener{l}, Identities: source(t, ca.SVID("/orders"), ca), Access: access,
				Policy: rulesOf(t, webReads+"  - {id: plain, effect: allow, from: [unauthenticated], http: {methods: [GET], paths: [\"/v1/**\"]}}\n"),
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = p.Run(ctx) })
			t.Cleanup(func() { cancel(); running.Wait(); _ = access.Close() })
			var c net.Conn
			if test.name == "mTLS" {
				c = dialTLS(t, p.Addr("web").String(), clientConfig(ca.SVID("/web")))
			} else {
				c = dialPlain(t, p.Addr("web").String())
			}
			request := []byte("GET /v1/items/7 HTTP/1.1\r\nHost: orders.example.org\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n")
			buf := make([]byte, 4096)
			once := func() {
				if _, err := c.Write(request); err != nil {
					t.Fatal(err)
				}
				if n, err := c.Read(buf); err != nil || !bytes.HasSuffix(buf[:n], []byte("hello")) {
					t.Fatal(string(buf[:n]), err)
				}
			}
			for range 100 {
				once()
			}
			if n := testing.AllocsPerRun(2000, once); n > test.most && !raceEnabled {
				t.Errorf("%v allocations a request", n)
			}
			_ = c.Close()
		})
	}
}
