package proxy

import (
	"bytes"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/internal/testca"
)

// framed is one end of HTTP/2 that sends the frames that it is told to.
type framed struct {
	t testing.TB
	net.Conn
	*http2.Framer
	head    bytes.Buffer
	encoder *hpack.Encoder
}

func framedOn(t testing.TB, c net.Conn) *framed {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Error(err)
	}
	f := &framed{t: t, Conn: c, Framer: http2.NewFramer(c, c)}
	f.encoder = hpack.NewEncoder(&f.head)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	return f
}

func (f *framed) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// framedClient is a client of HTTP/2 over mTLS.
func framedClient(t testing.TB, addr string, ca *testca.Authority, with ...http2.Setting) *framed {
	t.Helper()
	config := clientConfig(ca.SVID("/web"))
	config.NextProtos = []string{protocolH2}
	f := framedOn(t, dialTLS(t, addr, config))
	_, err := f.Write([]byte(http2.ClientPreface))
	f.must(err)
	f.must(f.WriteSettings(with...))
	return f
}

// Write writes bytes past the framer.
func (f *framed) Write(b []byte) (int, error) { return f.Conn.Write(b) }

// block encodes a head.
func (f *framed) block(fields ...string) []byte {
	f.head.Reset()
	for _, field := range fields {
		at := 1 + strings.Index(field[1:], ":")
		f.must(f.encoder.WriteField(hpack.HeaderField{Name: field[:at], Value: field[at+1:]}))
	}
	return f.head.Bytes()
}

// sends sends a head.
func (f *framed) sends(stream uint32, ended bool, fields ...string) {
	f.t.Helper()
	const most = 16 << 10
	block := f.block(fields...)
	n := min(len(block), most)
	f.must(f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block[:n], EndHeaders: n == len(block), EndStream: ended}))
	for block = block[n:]; len(block) > 0; block = block[n:] {
		n = min(len(block), most)
		f.must(f.WriteContinuation(stream, n == len(block), block[:n]))
	}
}

// asks sends a request.
func (f *framed) asks(stream uint32, ended bool, method, path string, fields ...string) {
	f.t.Helper()
	f.sends(stream, ended, append([]string{":method:" + method, ":scheme:https", ":authority:x", ":path:" + path}, fields...)...)
}

// next returns the next frame that is not about the connection's windows and
// settings.
func (f *framed) next() (http2.Frame, error) {
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				f.must(f.WriteSettingsAck())
			}
		case *http2.WindowUpdateFrame, *http2.PingFrame:
		default:
			return frame, nil
		}
	}
}

// answer is what came on a stream until it ended.
type framedAnswer struct {
	status, body string
	trailers     map[string]string
	reset        http2.ErrCode
	wasReset     bool
	goAways      []uint32
}

// answer reads what comes on a stream until it has ended.
func (f *framed) answer(stream uint32) (a framedAnswer) {
	f.t.Helper()
	a.trailers = map[string]string{}
	for {
		frame, err := f.next()
		f.must(err)
		if g, ok := frame.(*http2.GoAwayFrame); ok {
			a.goAways = append(a.goAways, g.LastStreamID)
			continue
		}
		if frame.Header().StreamID != stream {
			continue
		}
		ended := false
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			if s := frame.PseudoValue("status"); s != "" {
				a.status = strings.TrimLeft(a.status+" "+s, " ")
			}
			for _, field := range frame.RegularFields() {
				a.trailers[field.Name] = field.Value
			}
			ended = frame.StreamEnded()
		case *http2.DataFrame:
			a.body += string(frame.Data())
			ended = frame.StreamEnded()
		case *http2.RSTStreamFrame:
			a.reset, a.wasReset = frame.ErrCode, true
			return a
		}
		if ended {
			return a
		}
	}
}

// content waits for content on a stream.
func (f *framed) content(stream uint32) string {
	f.t.Helper()
	for {
		frame, err := f.next()
		f.must(err)
		if d, ok := frame.(*http2.DataFrame); ok && d.StreamID == stream {
			return string(d.Data())
		}
	}
}

// framedService serves HTTP/2 with frames on loopback: handle is told of each
// connection once its preface was read.
func framedService(t testing.TB, handle func(*framed)) string {
	t.Helper()
	return serve(t, func(c net.Conn) {
		f := framedOn(t, c)
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := c.Read(preface); err != nil {
			return
		}
		if f.WriteSettings(http2.Setting{ID: http2.SettingEnableConnectProtocol, Val: 1}) == nil {
			handle(f)
		}
	})
}

// request waits for the head of a request, and returns it; nil where the
// connection ends.
func (f *framed) request() *http2.MetaHeadersFrame {
	for {
		frame, err := f.next()
		if err != nil {
			return nil
		}
		if head, ok := frame.(*http2.MetaHeadersFrame); ok {
			return head
		}
	}
}
