package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/internal/testca"
)

// framer is a client of HTTP/2 that sends the frames it is told to.
type framer struct {
	t testing.TB
	*http2.Framer
	c net.Conn
}

func (p *running) framer(ca *testca.Authority) *framer {
	p.t.Helper()
	config := clientConfig(ca.SVID("/web"))
	config.NextProtos = []string{"h2"}
	c := dialTLS(p.t, p.addr("web"), config)
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		p.t.Fatal(err)
	}
	f := &framer{p.t, http2.NewFramer(c, c), c}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		p.t.Fatal(err)
	}
	if err := f.WriteSettings(); err != nil {
		p.t.Fatal(err)
	}
	return f
}

// ask opens a stream with these fields.
func (f *framer) ask(stream uint32, ended bool, fields ...string) {
	f.t.Helper()
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for i := 0; i < len(fields); i += 2 {
		if err := e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			f.t.Fatal(err)
		}
	}
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: ended}); err != nil {
		f.t.Fatal(err)
	}
}

// next reads the next frame of a stream, past those of the connection.
func (f *framer) next(stream uint32) http2.Frame {
	f.t.Helper()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			f.t.Fatal(err)
		}
		if frame.Header().StreamID == stream && frame.Header().Type != http2.FrameWindowUpdate {
			return frame
		}
	}
}

// status reads the head of a response.
func (f *framer) status(stream uint32) string {
	f.t.Helper()
	head, ok := f.next(stream).(*http2.MetaHeadersFrame)
	if !ok {
		f.t.Fatal("the stream was not answered")
	}
	return head.PseudoValue("status")
}

// TestExtendedConnect: a WebSocket over HTTP/2 comes to a service of HTTP/1.1 as
// one of its own (RFC 8441). What hides requests is refused, and so is an answer
// that a client would take for the change.
func TestExtendedConnect(t *testing.T) {
	t.Parallel()
	service := serve(t, func(c net.Conn) {
		defer c.Close()
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.URL.Path == "/v1/plain" {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			return
		}
		key := req.Header.Get("Sec-Websocket-Key")
		_, _ = fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Accept: x\r\nX-Key: %d\r\n\r\n", req.Header.Get("Upgrade"), len(key))
		_, _ = io.Copy(c, r)
	})
	p, ca := web(t, service, speaking(ProtocolAuto))
	f := p.framer(ca)
	connect := func(stream uint32, path, protocol string) {
		f.ask(stream, false, ":method", "CONNECT", ":protocol", protocol, ":scheme", "https", ":path", path, ":authority", "x")
	}
	connect(1, "/v1/chat", "websocket")
	head, ok := f.next(1).(*http2.MetaHeadersFrame)
	if !ok || head.PseudoValue("status") != "200" {
		t.Fatalf("%v", head)
	}
	for _, field := range head.RegularFields() {
		if field.Name == "sec-websocket-accept" || field.Name == "upgrade" || field.Name == "x-key" && field.Value != "24" {
			t.Errorf("field %v", field)
		}
	}
	for _, said := range []string{"hello", "again"} {
		if err := f.WriteData(1, false, []byte(said)); err != nil {
			t.Fatal(err)
		}
		if data, ok := f.next(1).(*http2.DataFrame); !ok || string(data.Data()) != said {
			t.Fatalf("%v", data)
		}
	}
	connect(3, "/v2/chat", "websocket")
	if got := f.status(3); got != "403" {
		t.Errorf("refused by the rules: %s", got)
	}
	connect(5, "/v1/chat", "h2c")
	if got := f.status(5); got != "501" {
		t.Errorf("h2c: %s", got)
	}
	connect(7, "/v1/plain", "websocket")
	if got := f.status(7); got != "502" {
		t.Errorf("a service that does not change: %s", got)
	}
}

// TestStreamEndsWithItsRules: a stream that is not allowed any more ends, and its
// connection goes on with those that are.
func TestStreamEndsWithItsRules(t *testing.T) {
	t.Parallel()
	for _, protocol := range []Protocol{ProtocolHTTP1, ProtocolHTTP2} {
		t.Run(protocol.String(), func(t *testing.T) {
			t.Parallel()
			gone := make(chan struct{}, 1)
			p, ca := web(t, modernOrigin(t, func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(http.StatusOK)
				_ = http.NewResponseController(w).Flush()
				if r.URL.Path == "/v1/ends" {
					<-r.Context().Done()
					gone <- struct{}{}
				}
			}), speaking(protocol))
			f := p.framer(ca)
			get := func(stream uint32, path string) {
				f.ask(stream, true, ":method", "GET", ":scheme", "https", ":path", path, ":authority", "x")
				if got := f.status(stream); got != "200" {
					t.Fatalf("%s: %s", path, got)
				}
			}
			get(1, "/v1/ends")
			p.apply(`version: 1
rules:
  - {id: fewer, effect: allow, from: ["spiffe://example.org/web"], http: {paths: ["/v1/other"]}}
`)
			reset, ok := f.next(1).(*http2.RSTStreamFrame)
			if !ok || reset.ErrCode != http2.ErrCodeCancel {
				t.Errorf("%v", reset)
			}
			<-gone
			get(3, "/v1/other")
		})
	}
}
