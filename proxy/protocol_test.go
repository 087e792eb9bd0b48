package proxy

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/forwarded"
)

// TestProtocolWords: h2c and h2 are one protocol, whose word depends on the
// direction.
func TestProtocolWords(t *testing.T) {
	t.Parallel()
	for word, want := range map[string]Protocol{"auto": ProtocolAuto, "http1": ProtocolHTTP1, "h2": ProtocolHTTP2, "h2c": ProtocolHTTP2} {
		var p Protocol
		if err := p.UnmarshalText([]byte(word)); err != nil || p != want {
			t.Errorf("%s: %v, %v", word, p, err)
		}
		if word != "h2c" && want.String() != word {
			t.Errorf("%s is printed as %s", word, want)
		}
	}
	var p Protocol
	if err := p.UnmarshalText([]byte("http2")); err == nil || err.Error() != `"http2": want auto, http1, h2c or h2` {
		t.Errorf("%v", err)
	}
}

// TestVersionsByDefault: an HTTP listener of which nothing is said takes HTTP/2
// and HTTP/1.1, and what is said stays as it is.
func TestVersionsByDefault(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		given    HTTP
		versions []string
		streams  int
	}{
		{HTTP{}, []string{"h2", "http/1.1"}, 250},
		{HTTP{Versions: []string{"http/1.1"}, MaxStreams: 1}, []string{"http/1.1"}, 1},
		{HTTP{Versions: []string{"http/1.1", "h2"}, MaxStreams: 1000}, []string{"http/1.1", "h2"}, 1000},
	} {
		if err := test.given.check(true); err != nil {
			t.Errorf("%+v: %v", test.given, err)
		}
		got := test.given.withDefaults()
		if !slices.Equal(got.Versions, test.versions) || got.MaxStreams != test.streams {
			t.Errorf("%+v became %+v", test.given, got)
		}
		if len(test.given.Versions) > 0 && &got.Versions[0] == &test.given.Versions[0] {
			t.Errorf("%+v: the settings share their list with the caller", test.given)
		}
	}
}

// TestVersionNotSpoken: who offers only what the listener does not speak is
// refused in TLS, and the record says what it speaks.
func TestVersionNotSpoken(t *testing.T) {
	t.Parallel()
	const want = "this listener serves http/1.1, http/1.0 (`alpn`, or else `http.versions`); one with protocol: tcp carries others"
	for _, offer := range []string{protocolH2, "mqtt"} {
		t.Run(offer, func(t *testing.T) {
			t.Parallel()
			p, ca := web(t, origin(t, echoes), func(c *Config) { c.Listeners[0].HTTP.Versions = []string{protocolHTTP} })
			config := clientConfig(ca.SVID("/web"))
			config.NextProtos = []string{offer}
			if c, err := tls.Dial("tcp", p.addr("web"), config); err == nil {
				_ = c.Close()
				t.Error("served")
			}
			if r := p.next(); !strings.Contains(r.Reason, want) {
				t.Errorf("record %q", r.Reason)
			}
		})
	}
}

// TestAnotherProtocolIsAnotherTarget: requests that are being served go on for the
// drain timeout, and those that come go by the new one.
func TestAnotherProtocolIsAnotherTarget(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		came := make(chan string, 2)
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "part")
			_ = http.NewResponseController(w).Flush()
			came <- r.Proto
			<-r.Context().Done()
		}), speaking(protocol), func(c *Config) { c.Listeners[0].Timeouts.Drain = 300 * time.Millisecond })
		f := framedClient(t, p.addr("web"), ca)
		ask := func(stream uint32) string {
			t.Helper()
			f.asks(stream, true, "GET", "/v1/a")
			f.content(stream)
			return <-came
		}
		before := ask(1)
		c := p.config
		c.Listeners = slices.Clone(c.Listeners)
		speaking(map[Protocol]Protocol{ProtocolHTTP1: ProtocolHTTP2, ProtocolHTTP2: ProtocolHTTP1}[protocol])(&c)
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
		if after := ask(3); after == before {
			t.Errorf("the service is still spoken to in %s", after)
		}
		if a := f.answer(1); !a.wasReset {
			t.Errorf("what was begun in %s: %+v", before, a)
		}
		if r := p.next(); r.Closed != "drain" || r.Reason != "its listener speaks another protocol to its target" {
			t.Errorf("record %+v", r)
		}
	})
}

// TestReloadOnTheWay: what a listener says of HTTP changes while a request's far
// end is reached. That refuses it only where it was read or told of otherwise.
func TestReloadOnTheWay(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		change func(*HTTP)
		status int
	}{
		{"of connections", func(h *HTTP) { h.Versions, h.MaxStreams = []string{protocolHTTP}, 7 }, 200},
		{"of retries", func(h *HTTP) { h.Retries = -1 }, 200},
		{"what services are told", func(h *HTTP) { h.Forwarded.Origin = forwarded.Untouched }, 503},
		{"the largest body", func(h *HTTP) { h.MaxBody = 1 }, 503},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ca := testca.New(t, "example.org")
			ends := make(chan *halted, 1)
			service := &tls.Config{Certificates: []tls.Certificate{ca.SVID("/inventory")}, ClientAuth: tls.RequireAnyClientCert}
			l := outbound(t, "web", serve(t, func(raw net.Conn) {
				h := halt(raw)
				ends <- h
				c := tls.Server(h, service)
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
				}
			}), "spiffe://example.org/inventory")
			l.HTTP = &HTTP{}
			p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, strings.ReplaceAll(webReads, "/web", "/orders")), Identities: source(t, ca.SVID("/orders"), ca)})
			b := browse(t, dialPlain(t, p.addr("web")))
			b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
			far := <-ends
			<-far.read
			c := p.config
			l.HTTP = &HTTP{}
			test.change(l.HTTP)
			c.Listeners = []Listener{l}
			_, err := p.Apply(c)
			close(far.on)
			if err != nil {
				t.Fatal(err)
			}
			if resp, _ := b.response("GET"); resp.StatusCode != test.status {
				t.Errorf("%s, for %q", resp.Status, p.next().Reason)
			}
		})
	}
}
