package proxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// modern is a client of HTTP/2 over mTLS.
func modern(t testing.TB, ca *testca.Authority) *http.Client {
	t.Helper()
	var all http.Protocols
	all.SetHTTP2(true)
	return clientOf(t, &http.Transport{TLSClientConfig: clientConfig(ca.SVID("/web")), Protocols: &all})
}

// knowing is one that has prior knowledge of us.
func knowing(t testing.TB) *http.Client {
	t.Helper()
	var all http.Protocols
	all.SetUnencryptedHTTP2(true)
	return clientOf(t, &http.Transport{Protocols: &all})
}

func clientOf(t testing.TB, transport *http.Transport) *http.Client {
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// spokenAs is how net/http calls the protocol that a service is spoken to in.
func spokenAs(p Protocol) string {
	if p == ProtocolHTTP2 {
		return "HTTP/2.0"
	}
	return "HTTP/1.1"
}

// speaking has the listener speak the protocol with its target.
func speaking(p Protocol) func(*Config) {
	return func(c *Config) { c.Listeners[0].UpstreamProtocol = p }
}

func describes(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("trailer", "x-sum")
	w.Header().Set("x-proto", r.Proto)
	_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL.RequestURI(), strings.Join(r.Header["X-Spiffe-Id"], "|"), body)
	w.Header().Set("x-sum", fmt.Sprint(len(body)))
}

func TestHTTP2(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		p, ca := web(t, origin(t, describes), speaking(protocol))
		client := modern(t, ca)
		for _, size := range []int{0, 5, 3000, 100_000, 5 << 20} {
			body := strings.Repeat("x", size)
			asks(t, client, "https://"+p.addr("web"), "/v1/a?b=c", body, spokenAs(protocol))
		}
	})
}

// TestHealthIsAskedAsRequestsAre: a check of a path speaks what requests do.
func TestHealthIsAskedAsRequestsAre(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		asked := make(chan string, 1)
		web(t, origin(t, func(_ http.ResponseWriter, r *http.Request) { asked <- r.Proto + " " + r.RequestURI }), speaking(protocol), func(c *Config) {
			c.Listeners[0].Upstream.Health = upstream.Health{Interval: time.Hour, Path: "/healthz"}
		})
		if got, want := <-asked, spokenAs(protocol)+" /healthz"; got != want {
			t.Errorf("asked %s, want %s", got, want)
		}
	})
}

func asks(t testing.TB, client *http.Client, base, path, body, proto string) {
	t.Helper()
	if err := tryAsks(client, base, path, body, proto); err != nil {
		t.Fatal(err)
	}
}

func tryAsks(client *http.Client, base, path, body, proto string) error {
	req, err := http.NewRequest(http.MethodPost, base+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if want := "POST " + path + " spiffe://example.org/web " + body; resp.StatusCode != 200 || string(got) != want {
		return fmt.Errorf("%d bytes: %s, %d bytes: %.200s", len(body), resp.Status, len(got), got)
	}
	if resp.ProtoMajor == 1 && resp.ContentLength >= 0 {
		return nil // which leaves no place for trailers
	}
	if resp.Header.Get("x-proto") != proto || resp.Trailer.Get("x-sum") != fmt.Sprint(len(body)) {
		return fmt.Errorf("by %s, trailers %v", resp.Header.Get("x-proto"), resp.Trailer)
	}
	return nil
}

func TestHTTP2AtOnce(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		p, ca := web(t, origin(t, describes), speaking(protocol))
		client := modern(t, ca)
		var all sync.WaitGroup
		for n := range 50 {
			all.Go(func() {
				for m := range 20 {
					if err := tryAsks(client, "https://"+p.addr("web"), "/v1/a", strings.Repeat("x", n*m*37), spokenAs(protocol)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
	})
}

func TestHTTP2Refused(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, describes), speaking(ProtocolAuto))
	client := modern(t, ca)
	resp, err := client.Get("https://" + p.addr("web") + "/v2/a")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != 403 || !strings.HasPrefix(string(got), "403 Forbidden\nrequest ") {
		t.Errorf("%s %q %v", resp.Status, got, err)
	}
	asks(t, client, "https://"+p.addr("web"), "/v1/a", "x", "HTTP/1.1")
}

// TestHTTP1ToHTTP2: clients of HTTP/1.1 in front of a service that is spoken to
// in HTTP/2.
func TestHTTP1ToHTTP2(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, describes), speaking(ProtocolHTTP2))
	client := clientOf(t, &http.Transport{TLSClientConfig: clientConfig(ca.SVID("/web"))})
	for _, size := range []int{0, 5, 3000, 100_000, 5 << 20} {
		asks(t, client, "https://"+p.addr("web"), "/v1/a", strings.Repeat("x", size), "HTTP/2.0")
	}
	b := p.browser(ca)
	for _, test := range []struct {
		request string
		status  int
		body    string
	}{
		{"GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n", 200, "GET /v1/a spiffe://example.org/web "},
		{"HEAD /v1/a HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""},
		{"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 200, "POST /v1/c spiffe://example.org/web hello"},
		{"POST /v1/d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n", 200, "POST /v1/d spiffe://example.org/web hello"},
		{"GET /v2/a HTTP/1.1\r\nHost: x\r\n\r\n", 403, ""},
		{"GET /v1/e HTTP/1.1\r\nHost: x\r\n\r\n", 200, "GET /v1/e spiffe://example.org/web "},
	} {
		b.send("%s", test.request)
		method, _, _ := strings.Cut(test.request, " ")
		resp, body := b.response(method)
		if resp.StatusCode != test.status || test.status == 200 && body != test.body {
			t.Errorf("%q: %s %q", test.request, resp.Status, body)
		}
	}
}

// TestHTTP2Alone: in plaintext, too, a listener that speaks HTTP/2 alone
// serves nobody in HTTP/1.1.
func TestHTTP2Alone(t *testing.T) {
	t.Parallel()
	_, ca := web(t, origin(t, describes))
	l := outbound(t, "out", "127.0.0.1:1", "spiffe://example.org/orders")
	l.HTTP = &HTTP{Versions: []string{protocolH2}}
	out := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webReads), Identities: source(t, ca.SVID("/web"), ca)})
	f := framedOn(t, dialPlain(t, out.addr("out")))
	if _, err := io.WriteString(f.Conn, "GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if last := f.ends(); last == nil || last.ErrCode != http2.ErrCodeProtocol {
		t.Errorf("told %v", last)
	}
}

// TestHTTP2EndToEnd: a client of HTTP/2 in plaintext, two proxies, and a service
// of either version.
func TestHTTP2EndToEnd(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		p, ca := web(t, origin(t, describes), speaking(protocol))
		l := outbound(t, "out", p.addr("web"), "spiffe://example.org/orders")
		l.HTTP = &HTTP{Versions: []string{protocolH2}}
		out := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webReads), Identities: source(t, ca.SVID("/web"), ca)})
		client := knowing(t)
		var all sync.WaitGroup
		for n := range 20 {
			all.Go(func() {
				for m := range 10 {
					if err := tryAsks(client, "http://"+out.addr("out"), "/v1/a", strings.Repeat("x", n*m*137), spokenAs(protocol)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
	})
}
