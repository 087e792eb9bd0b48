package proxy

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/http1"
)

// handshake is that of the example in RFC 6455, section 1.3, whose key has this
// accept.
const (
	handshake = "GET /v1/chat HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	accept    = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
)

// chatService is a service of HTTP/2 that takes extended CONNECT, greets, says
// back what it is told, with the end, and tells how streams ended. It ends its
// own side early on "bye", resets on "die", says only how much came from
// "swallow" on, and gives no more room from "wait" on.
func chatService(t *testing.T, heads chan<- *http2.MetaHeadersFrame, ends chan<- string) string {
	return framedService(t, func(f *framed) {
		swallowed, waits := -1, false
		for {
			frame, err := f.next()
			if err != nil {
				return
			}
			stream := frame.Header().StreamID
			switch frame := frame.(type) {
			case *http2.MetaHeadersFrame:
				if heads != nil {
					heads <- frame
				}
				f.sends(stream, false, ":status:200", "sec-websocket-protocol:chat", "sec-websocket-accept:x", "content-type:text/plain")
				_ = f.WriteData(stream, false, []byte("hi "))
			case *http2.DataFrame:
				n := len(frame.Data())
				switch text := string(frame.Data()); {
				case text == "bye":
					_ = f.WriteData(stream, true, []byte("bye"))
				case text == "die":
					_ = f.WriteRSTStream(stream, http2.ErrCodeInternal)
				case text == "swallow", text == "wait":
					swallowed, waits = 0, text == "wait"
					_ = f.WriteData(stream, false, []byte("ok"))
				case swallowed >= 0:
					if swallowed += n; frame.StreamEnded() {
						_ = f.WriteData(stream, true, fmt.Append(nil, swallowed))
					}
				default:
					_ = f.WriteData(stream, frame.StreamEnded(), frame.Data())
				}
				if n > 0 && !waits {
					_ = f.WriteWindowUpdate(0, uint32(n))
					_ = f.WriteWindowUpdate(stream, uint32(n))
				}
				if frame.StreamEnded() {
					ends <- "ended"
				}
			case *http2.RSTStreamFrame:
				ends <- frame.ErrCode.String()
			}
		}
	})
}

// changes has the client change its protocol to WebSocket.
func changes(t *testing.T, p *running, ca *testca.Authority, early string) *browser {
	t.Helper()
	b := p.browser(ca)
	b.send("%s%s", handshake, early)
	resp, err := http.ReadResponse(b.r, nil) //nolint:bodyclose // of 101 there is none
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v %v", resp, err)
	}
	want := http.Header{"Connection": {"upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Accept": {accept}, "Sec-Websocket-Protocol": {"chat"}, "Content-Type": {"text/plain"}}
	if fmt.Sprint(resp.Header) != fmt.Sprint(want) {
		t.Fatalf("fields %v, want %v", resp.Header, want)
	}
	b.reads("hi " + early)
	return b
}

func (b *browser) reads(want string) {
	b.t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(b.r, got); err != nil || string(got) != want {
		b.t.Fatalf("read %q, %v, want %q", got, err, want)
	}
}

// WebSocket over HTTP/1.1 to a service of HTTP/2 is bytes both ways, is parked,
// and is asked again by the request that began it.
func TestWebSocketToHTTP2(t *testing.T) {
	t.Parallel()
	heads, ends := make(chan *http2.MetaHeadersFrame, 1), make(chan string, 1)
	p, ca := web(t, chatService(t, heads, ends), speaking(ProtocolHTTP2), func(c *Config) { c.Listeners[0].HTTP.MaxBody = 5 })
	b := changes(t, p, ca, "early ")
	head := <-heads
	for name, want := range map[string]string{"method": "CONNECT", "protocol": "websocket", "scheme": "http", "authority": "x", "path": "/v1/chat"} {
		if got := head.PseudoValue(name); got != want {
			t.Errorf(":%s is %q, want %q", name, got, want)
		}
	}
	names := ""
	for _, f := range head.RegularFields() {
		names += " " + f.Name
	}
	if !strings.Contains(names, "sec-websocket-version") || !strings.Contains(names, "x-spiffe-id") || strings.Contains(names, "sec-websocket-key") || strings.Contains(names, "upgrade") || head.StreamEnded() {
		t.Errorf("the service was sent%s, ended %t", names, head.StreamEnded())
	}
	if a := p.next(); a.HTTP == nil || a.HTTP.Status != 101 || a.Outcome != "success" {
		t.Errorf("record %+v", a)
	}
	p.allParked()
	b.send("more")
	b.reads("more")
	p.allParked()
	if applied := p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1)); applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	if _, err := b.r.ReadByte(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("after the change: %v", err)
	}
	if end := <-ends; end != http2.ErrCodeCancel.String() {
		t.Errorf("the service saw %s", end)
	}
	if a := p.next(); a.Action != "connection" || a.Closed != "policy" || a.Destination == "" {
		t.Errorf("record %+v", a)
	}
	p.until("the loan is given back", func() bool { return p.active() == 0 })
}

// How each side may leave.
func TestWebSocketToHTTP2Ends(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		leaves func(b *browser)
		end    string // of the stream, as the service sees it
		closed string
	}{
		{"the client, half", func(b *browser) {
			if err := b.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				b.t.Error(err)
			}
			b.ended()
		}, "ended", "peer"},
		{"the service, half", func(b *browser) {
			b.send("bye")
			b.reads("bye")
			if _, err := b.r.ReadByte(); !errors.Is(err, io.EOF) {
				b.t.Errorf("after its end: %v", err)
			}
			_ = b.Close()
		}, "ended", "peer"},
		{"the client, broken off", func(b *browser) {
			raw := b.Conn.(interface{ NetConn() net.Conn }).NetConn()
			_ = raw.(*net.TCPConn).SetLinger(0)
			_ = raw.Close()
		}, http2.ErrCodeCancel.String(), "peer"},
		{"the service, broken off", func(b *browser) {
			b.send("die")
			if _, err := b.r.ReadByte(); err == nil || errors.Is(err, io.EOF) {
				b.t.Errorf("after the reset: %v", err)
			}
		}, "", "peer"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ends := make(chan string, 1)
			p, ca := web(t, chatService(t, nil, ends), speaking(ProtocolHTTP2))
			b := changes(t, p, ca, "")
			p.next()
			p.allParked()
			test.leaves(b)
			if test.end != "" {
				if end := <-ends; end != test.end {
					t.Errorf("the service saw %s, want %s", end, test.end)
				}
			}
			if a := p.next(); a.Action != "connection" || a.Closed != test.closed {
				t.Errorf("record %+v", a)
			}
			p.until("the loan is given back", func() bool { return p.active() == 0 })
		})
	}
}

// More than windows have room for comes whole, both ways.
func TestWebSocketToHTTP2CarriesMuch(t *testing.T) {
	t.Parallel()
	ends := make(chan string, 1)
	p, ca := web(t, chatService(t, nil, ends), speaking(ProtocolHTTP2))
	b := changes(t, p, ca, "")
	piece := strings.Repeat("0123456789abcde", 2000)
	for range 20 {
		b.send("%s", piece)
		b.reads(piece)
	}
	b.send("swallow")
	b.reads("ok")
	for range 50 {
		b.send("%s", piece)
	}
	if err := b.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(b.r); err != nil || string(got) != fmt.Sprint(50*len(piece)) {
		t.Errorf("the service got %s, %v", got, err)
	}
	p.next()
	if a, carried := p.next(), uint64(70*len(piece)); a.BytesIn < carried || a.BytesOut < uint64(20*len(piece)) {
		t.Errorf("record %+v", a)
	}
}

// One whose service takes nothing ends with the rules all the same.
func TestWebSocketToHTTP2TakesNothing(t *testing.T) {
	t.Parallel()
	ends := make(chan string, 1)
	p, ca := web(t, chatService(t, nil, ends), speaking(ProtocolHTTP2))
	b := changes(t, p, ca, "")
	b.send("wait")
	b.reads("ok")
	b.send("%s", strings.Repeat("x", 100<<10)) // more than a window
	p.next()
	if applied := p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1)); applied.Closed != 1 {
		t.Errorf("applied %+v", applied)
	}
	if end := <-ends; end != http2.ErrCodeCancel.String() {
		t.Errorf("the service saw %s", end)
	}
	if a := p.next(); a.Closed != "policy" {
		t.Errorf("record %+v", a)
	}
}

// One that may be no longer goes on while it drains.
func TestWebSocketToHTTP2Drains(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, closed string
		change       func(p *running)
	}{
		{"rules", "policy", func(p *running) { p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1)) }},
		{"target", "drain", func(p *running) {
			c := p.config
			c.Listeners = slices.Clone(c.Listeners)
			c.Listeners[0].Targets = []string{origin(p.t, echoes)}
			if _, err := p.Apply(c); err != nil {
				p.t.Error(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ends := make(chan string, 1)
			p, ca := web(t, chatService(t, nil, ends), speaking(ProtocolHTTP2), func(c *Config) {
				c.Listeners[0].OnPolicyChange, c.Listeners[0].Timeouts.Drain = ActionDrain, time.Second
			})
			b := changes(t, p, ca, "")
			p.next()
			began := time.Now()
			test.change(p)
			b.send("still")
			b.reads("still")
			if _, err := b.r.ReadByte(); err == nil || errors.Is(err, io.EOF) || time.Since(began) < time.Second {
				t.Errorf("after %s: %v", time.Since(began), err)
			}
			if end := <-ends; end != http2.ErrCodeCancel.String() {
				t.Errorf("the service saw %s", end)
			}
			if a := p.next(); a.Closed != test.closed {
				t.Errorf("record %+v", a)
			}
		})
	}
}

// What cannot be changed to is answered, and the connection goes on.
func TestUpgradeToHTTP2Refused(t *testing.T) {
	t.Parallel()
	takes := func(t *testing.T) string {
		return framedService(t, func(f *framed) {
			for {
				frame, err := f.next()
				if err != nil {
					return
				}
				head, ok := frame.(*http2.MetaHeadersFrame)
				if !ok {
					if _, reset := frame.(*http2.RSTStreamFrame); reset {
						t.Errorf("%v, though it was answered", frame)
					}
					continue
				}
				status := ":status:403"
				if head.PseudoValue("method") == "GET" {
					status = ":status:200"
				}
				f.sends(head.StreamID, true, status, "x-protocol:"+head.PseudoValue("protocol"))
			}
		})
	}
	takesNone := func(t *testing.T) string { return origin(t, echoes) }
	for _, test := range []struct {
		name, head string
		status     int
		reason     string
		service    func(*testing.T) string
	}{
		{"by the service", handshake, 403, "", takes},
		{"by the service, another protocol", strings.Replace(handshake, "WebSocket\r\n", "chat\r\n", 1), 403, "", takes},
		{"by a service that takes none", handshake, 501, "set upstream.protocol to http1", takesNone},
		{"with a version", strings.Replace(handshake, "WebSocket\r\n", "chat/2\r\n", 1), 501, "a protocol without a version", takes},
		{"by another method", strings.Replace(handshake, "GET", "HEAD", 1), 501, "want GET", takes},
		{"no key", strings.Replace(handshake, "Sec-WebSocket-Key", "X", 1), 400, "one Sec-WebSocket-Key", takes},
		{"a short key", strings.Replace(handshake, "dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25j", 1), 400, "one Sec-WebSocket-Key", takes},
		{"two keys", strings.Replace(handshake, "\r\n\r\n", "\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 1), 400, "one Sec-WebSocket-Key", takes},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p, ca := web(t, test.service(t), speaking(ProtocolHTTP2))
			b := p.browser(ca)
			b.send("%s", test.head)
			if resp, _ := b.response(strings.Fields(test.head)[0]); resp.StatusCode != test.status {
				t.Errorf("%+v, want %d", resp, test.status)
			}
			if a := p.next(); !strings.Contains(a.Reason, test.reason) || (a.Reason == "") != (test.reason == "") {
				t.Errorf("record %+v", a)
			}
			if status, _ := b.get("/v1/a"); status != 200 {
				t.Errorf("after it: %d", status)
			}
		})
	}
}

// FuzzAccept: whatever a client sends for a key is answered with 20 bytes, or is
// none of 16, and several are none at all.
func FuzzAccept(f *testing.F) {
	for _, key := range []string{"dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25j", "", "====", "dGhlIHNhbXBsZSBub25jZR=="} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		field := http1.Field{Name: "sec-websocket-key", Value: key}
		got := acceptOf([]http1.Field{{Name: "x"}, field})
		nonce, err := base64.StdEncoding.DecodeString(key)
		if good := err == nil && len(nonce) == 16; (got != "") != good {
			t.Errorf("%q is answered with %q", key, got)
		}
		if sum, err := base64.StdEncoding.DecodeString(got); got != "" && (err != nil || len(sum) != 20) {
			t.Errorf("%q is answered with %q", key, got)
		}
		if got := acceptOf([]http1.Field{field, field}); got != "" {
			t.Errorf("two are answered with %q", got)
		}
	})
}

// A service that does not answer, and rules that change meanwhile.
func TestWebSocketToHTTP2Unanswered(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 2)
	p, ca := web(t, framedService(t, func(f *framed) {
		for f.request() != nil {
			asked <- struct{}{}
		}
	}), speaking(ProtocolHTTP2), func(c *Config) { c.Listeners[0].Timeouts.Response = 100 * time.Millisecond })
	b := p.browser(ca)
	b.send("%s", handshake)
	if resp, _ := b.response("GET"); resp.StatusCode != 504 {
		t.Errorf("%+v", resp)
	}
	<-asked
	p.next()
	p.config.Listeners[0].Timeouts.Response = 0
	if _, err := p.Apply(p.config); err != nil {
		t.Fatal(err)
	}
	b.send("%s", handshake)
	<-asked
	p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1))
	if _, err := b.r.ReadByte(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("after the change: %v", err)
	}
	if a := p.next(); a.Closed != "policy" {
		t.Errorf("record %+v", a)
	}
}
