package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/proxy/identity"
)

// What services see of a request, and which are refused, is as over HTTP/1.1.
func TestHTTP2RequestsAreHeldToTheSame(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			names := make([]string, 0, len(r.Header))
			for name := range r.Header {
				names = append(names, name)
			}
			slices.Sort(names)
			_, _ = fmt.Fprintf(w, "%s %s %s ids=%s cookies=%s xff=%s names=%s", r.Method, r.Host, r.URL.RequestURI(), r.Header["X-Spiffe-Id"], r.Header["Cookie"], r.Header.Get("X-Forwarded-For"), names)
		}), speaking(protocol))
		f := framedClient(t, p.addr("web"), ca)
		stream := uint32(1)
		for _, test := range []struct {
			method, path string
			fields       []string
			status       string
			has          []string
			hasNot       string
		}{
			{"GET", "/v1/a?b=../c", []string{"x-spiffe-id:spiffe://example.org/admin", "x_spiffe_id:spiffe://example.org/admin"}, "200", []string{"GET x /v1/a?b=../c", "ids=[spiffe://example.org/web]"}, "admin"},
			{"GET", "/v1/a", []string{"cookie:a=1", "cookie:b=2"}, "200", []string{"cookies=[a=1; b=2]"}, ""},
			{"GET", "/v1/a", []string{"x-forwarded-for:10.0.0.1"}, "200", []string{"xff="}, "10.0.0.1"},
			{"HEAD", "/v1/a", nil, "200", nil, ""},
			{"DELETE", "/v1/a", nil, "403", nil, ""},
			{"TRACE", "/v1/a", nil, "405", nil, ""},
			{"GET", "/v2/a", nil, "403", nil, ""},
			{"GET", "/v1/../v1/a", nil, "400", nil, ""},
			{"GET", "/v1/%2e%2e/a", nil, "400", nil, ""},
			{"GET", "/v1%2fa", nil, "400", nil, ""},
			{"GET", "//v1/a", nil, "400", nil, ""},
			{"GET", "v1/a", nil, "400", nil, ""},
			{"GET", "*", nil, "400", nil, ""},
			{"OPTIONS", "*", nil, "403", nil, ""},
			{"GET", "/v1/a", []string{"host:y"}, "400", nil, ""},
			{"GET", "/v1/z", slices.Repeat([]string{"x-big:" + strings.Repeat("x", 8<<10)}, 9), "431", nil, ""},
			{"GET", "/v1/fine", nil, "200", nil, ""},
		} {
			f.asks(stream, true, test.method, test.path, test.fields...)
			a := f.answer(stream)
			if a.status != test.status {
				t.Errorf("%s %s %.40q: %+v, want %s", test.method, test.path, test.fields, a, test.status)
			}
			for _, has := range test.has {
				if !strings.Contains(a.body, has) {
					t.Errorf("%s %s %q: %s", test.method, test.path, test.fields, a.body)
				}
			}
			if test.hasNot != "" && strings.Contains(a.body, test.hasNot) {
				t.Errorf("%s %s %q: %s", test.method, test.path, test.fields, a.body)
			}
			if r := p.next(); r.Action != "request" || r.Protocol != "h2" || r.From != "spiffe://example.org/web" || (r.Outcome == "success") != (test.status == "200") || r.HTTP != nil && fmt.Sprint(r.HTTP.Status) != test.status {
				t.Errorf("%s %s: record %+v %+v", test.method, test.path, r, r.HTTP)
			}
			stream += 2
		}
		if n := p.metric("narthex_http_requests_total", "web", "200", "allow"); n != 5 {
			t.Errorf("%v requests counted", n)
		}
		f.sends(stream, false, ":method:CONNECT", ":authority:x:443")
		if a := f.answer(stream); a.status != "501" {
			t.Errorf("CONNECT: %+v", a)
		}
	})
}

// chat takes an upgrade to WebSocket over HTTP/1.1 and says back what it is told.
func chat(t *testing.T) string {
	return serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.Header.Get("Upgrade") != "websocket" || req.Header.Get("Sec-Websocket-Key") == "" {
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\nSec-WebSocket-Protocol: chat\r\n\r\nhi ")
		_, _ = io.Copy(c, r)
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
	})
}

// WebSocket over HTTP/2 (RFC 8441), to services of either version.
func TestWebSocketOverHTTP2(t *testing.T) {
	t.Parallel()
	target := map[Protocol]func() string{
		ProtocolHTTP1: func() string { return chat(t) },
		ProtocolHTTP2: func() string {
			return framedService(t, func(f *framed) {
				head := f.request()
				if head == nil || head.PseudoValue("protocol") != "websocket" {
					return
				}
				f.sends(head.StreamID, false, ":status:200", "sec-websocket-protocol:chat")
				_ = f.WriteData(head.StreamID, false, []byte("hi "))
				for {
					frame, err := f.next()
					if err != nil {
						return
					}
					if d, ok := frame.(*http2.DataFrame); ok {
						_ = f.WriteData(head.StreamID, d.StreamEnded(), d.Data())
					}
				}
			})
		},
	}
	both(t, func(t *testing.T, protocol Protocol) {
		p, ca := web(t, target[protocol](), speaking(protocol), func(c *Config) { c.Listeners[0].HTTP.MaxBody = 5 })
		f := framedClient(t, p.addr("web"), ca)
		f.sends(1, false, ":method:CONNECT", ":protocol:websocket", ":scheme:https", ":authority:x", ":path:/v1/chat")
		if got := f.content(1); got != "hi " {
			t.Errorf("first %q", got)
		}
		for _, text := range []string{"hello", "and more"} {
			f.must(f.WriteData(1, false, []byte(text)))
			if got := f.content(1); got != text {
				t.Errorf("echo of %q is %q", text, got)
			}
		}
		f.sends(3, false, ":method:CONNECT", ":protocol:websocket", ":scheme:https", ":authority:x", ":path:/v2/chat")
		if a := f.answer(3); a.status != "403" {
			t.Errorf("against the rules: %+v", a)
		}
		p.next()
		f.must(f.WriteData(1, true, nil))
		if a := f.answer(1); a.wasReset {
			t.Errorf("the end: %+v", a)
		}
		if r := p.next(); r.HTTP.Status != 200 || r.Outcome != "success" || r.BytesIn != 13 || r.BytesOut != 16 {
			t.Errorf("record %+v %+v", r, r.HTTP)
		}
	})
	t.Run("refused by a service of HTTP/1.1", func(t *testing.T) {
		t.Parallel()
		p, ca := web(t, origin(t, echoes), speaking(ProtocolAuto))
		f := framedClient(t, p.addr("web"), ca)
		f.sends(1, false, ":method:CONNECT", ":protocol:websocket", ":scheme:https", ":authority:x", ":path:/v1/chat")
		if a := f.answer(1); a.status != "502" { // a 200 would be the change
			t.Errorf("%+v", a)
		}
	})
	t.Run("to what hides requests", func(t *testing.T) {
		t.Parallel()
		p, ca := web(t, chat(t), speaking(ProtocolAuto))
		f := framedClient(t, p.addr("web"), ca)
		f.sends(1, false, ":method:CONNECT", ":protocol:h2c", ":scheme:https", ":authority:x", ":path:/v1/chat")
		if a := f.answer(1); a.status != "501" {
			t.Errorf("%+v", a)
		}
	})
	t.Run("unknown to a service of HTTP/2", func(t *testing.T) {
		t.Parallel()
		p, ca := web(t, origin(t, echoes), speaking(ProtocolHTTP2))
		f := framedClient(t, p.addr("web"), ca)
		f.sends(1, false, ":method:CONNECT", ":protocol:websocket", ":scheme:https", ":authority:x", ":path:/v1/chat")
		if a := f.answer(1); a.status != "501" {
			t.Errorf("%+v", a)
		}
	})
}

// mayfly is a source to which every token ends soon.
type mayfly struct{ spoken }

func (mayfly) ValidateJWT(token string, a []string, now time.Time) (identity.JWT, error) {
	j, err := spoken{}.ValidateJWT(token, a, now)
	j.NotAfter = now.Add(time.Second)
	return j, err
}

// What ends a stream, and what its connection.
func TestStreamsAndTheirConnection(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		begun, gone := make(chan struct{}, 2), make(chan struct{}, 2)
		service := origin(t, trickles(begun, gone))
		p, ca := web(t, service, speaking(protocol), func(c *Config) {
			held, _ := c.Identities.(*identity.Held)
			c.Identities = mayfly{spoken{held}}
			c.Listeners[0].HTTP.JWT = &JWT{Audience: []string{"orders"}}
			c.Listeners[0].Timeouts.Drain = 300 * time.Millisecond
		})
		ask := func(f *framed, stream uint32, fields ...string) {
			t.Helper()
			f.asks(stream, true, "GET", "/v1/a", fields...)
			<-begun
			f.content(stream)
		}
		f := framedClient(t, p.addr("web"), ca)
		ask(f, 1, "authorization:Bearer /web")
		ask(f, 3)
		if a := f.answer(1); !a.wasReset {
			t.Errorf("its token is over: %+v", a)
		}
		<-gone
		if r := p.next(); r.Closed != "expiry" || !strings.Contains(r.Reason, "/web expired") {
			t.Errorf("record %+v", r)
		}
		c := p.config
		c.Listeners = slices.Clone(c.Listeners)
		c.Listeners[0].Targets = []string{origin(t, echoes)}
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
		f.asks(5, true, "GET", "/v1/b")
		if a := f.answer(5); a.status != "200" {
			t.Errorf("to the new target: %+v", a)
		}
		p.next()
		if a := f.answer(3); !a.wasReset {
			t.Errorf("its target is gone: %+v", a)
		}
		<-gone
		if r := p.next(); r.Closed != "drain" || !strings.Contains(r.Reason, "another target") {
			t.Errorf("record %+v", r)
		}
		p.config = c
		p.apply(webReads + "revoked: [\"spiffe://example.org/web\"]\n")
		if _, err := f.next(); err == nil {
			t.Error("the connection of who is revoked goes on")
		}
	})
}

// Rules that change while the service is dialled are the ones that count.
func TestStreamDecidedAnewBeforeItsService(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		asked := make(chan string, 2)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		held := make(chan struct{})
		serveOn(t, l, func(c net.Conn) {
			b := make([]byte, 100)
			n, _ := c.Read(b)
			asked <- string(b[:n])
			<-held
		})
		p, ca := web(t, l.Addr().String(), speaking(protocol), func(c *Config) { c.Listeners[0].Upstream.MaxRequests = 1 })
		f := framedClient(t, p.addr("web"), ca)
		f.asks(1, true, "GET", "/v1/first")
		<-asked
		f.asks(3, true, "GET", "/v1/second")
		p.until("both are there", func() bool {
			n := 0
			for _, c := range p.table.of(nil) {
				c.mu.Lock()
				for q := range c.questions {
					if q.request.HTTP != nil {
						n++
					}
				}
				c.mu.Unlock()
			}
			return n == 2
		})
		p.apply(strings.Replace(webReads, "/v1/**", "/v1/first", 1))
		if a := f.answer(3); a.status != "403" {
			t.Errorf("%+v", a)
		}
		if r := p.next(); r.HTTP.Path != "/v1/second" || r.Closed != "policy" {
			t.Errorf("record %+v %+v", r, r.HTTP)
		}
		close(held)
		select {
		case got := <-asked:
			t.Errorf("the service was sent %q", got)
		default:
		}
	})
}
