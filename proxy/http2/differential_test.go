package http2

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	xhttp2 "golang.org/x/net/http2"
)

// FuzzDifferential: what a client sends is taken or refused as net/http does it,
// with the same code and on the same stream or on none, but for what is said in
// stricter.
func FuzzDifferential(f *testing.F) {
	for op := range byte(len(ops)) {
		for variant := range byte(4) {
			f.Add([]byte{1, 1, 0, op, 1, variant, op, 3, variant})
			f.Add([]byte{0, 1, 0, op, 1, variant, 3, 1, variant, op, 1, 0})
		}
	}
	std := newStandard(f)
	f.Fuzz(func(t *testing.T, script []byte) {
		ours, frames := oursSays(compose(script) + raw(ping, 0, 0, mark))
		theirs := std.says(t, frames)
		if ours != theirs && !stricter(ours, theirs) {
			t.Fatalf("here %q, net/http %q:\n%s", ours, theirs, describe(frames))
		}
	})
}

// stricter reports whether a difference is meant.
func stricter(ours, theirs string) bool {
	whose, code, _ := strings.Cut(ours, ": ")
	theirWhose, theirCode, _ := strings.Cut(theirs, ": ")
	switch {
	case code == "COMPRESSION_ERROR": // net/http decodes nothing behind a bad field
		return theirCode == "PROTOCOL_ERROR"
	case theirs == "closed": // where a frame is too short for its padding, net/http says nothing
		return whose == "connection"
	case whose == theirWhose || code == "STREAM_CLOSED":
		return twoFaults[[2]string{code, theirCode}]
	}
	if code == "FRAME_SIZE_ERROR" && theirCode == code { // PRIORITY of a wrong length is an error of its stream (RFC 9113, section 6.3)
		return true
	}
	return whose == "connection" && code == theirCode // a stream that was never opened is not reset (RFC 9113, section 6.4)
}

// twoFaults are the codes of frames with which two things are wrong: which of
// them is told of is open.
var twoFaults = map[[2]string]bool{
	{"STREAM_CLOSED", "PROTOCOL_ERROR"}:    true, // a bad head, of a stream that has ended
	{"PROTOCOL_ERROR", "FRAME_SIZE_ERROR"}: true, // of the wrong stream, and of a wrong length
	{"FRAME_SIZE_ERROR", "PROTOCOL_ERROR"}: true,
}

// ops make frames of a stream and a variant.
var ops = [...]func(stream uint32, variant byte) string{
	func(s uint32, v byte) string { return head(s, endStream, request("GET", "/")...) },
	func(s uint32, v byte) string { return posted(s, "/") },
	func(s uint32, v byte) string { return raw(data, v&endStream, s, strings.Repeat("a", int(v>>1))) },
	func(s uint32, v byte) string { return reset(s, Code(v)) },
	func(s uint32, v byte) string {
		return update(s&^1*(uint32(v)&1)|s*(1-uint32(v)&1), [...]uint32{1, 0, 1 << 20, maxWindow}[v>>1&3])
	},
	func(s uint32, v byte) string {
		return raw(settings, v&ack, s&(uint32(v)>>7), [...]string{"", setting(uint16(v>>4), uint32(v)), setting(setInitialWindow, 1<<31), setting(setMaxFrame, 1), setting(setPush, 2), "abc", setting(setMaxFrame, 1<<20), setting(0xff, 1)}[v>>1&7])
	},
	func(s uint32, v byte) string { return raw(ping, v&ack, s&(uint32(v)>>1&1), "12345678"[:8-v>>2&1]) },
	func(s uint32, v byte) string { return raw(priority, 0, s, number(uint32(v))+"\x00"[:1-v>>3&1]) },
	func(s uint32, v byte) string {
		b := block(request("POST", "/")...)
		at := int(v) % len(b)
		return raw(headers, v&endStream, s, b[:at]) + raw(continuation, v>>1&endHeaders, s, b[at:])
	},
	func(s uint32, v byte) string { return head(s, v&endStream, "x", "y") },
	func(s uint32, v byte) string { return head(s, endStream, badHeads[int(v)%len(badHeads)]...) },
	func(s uint32, v byte) string { return raw(99, v, s, "what?") },
	func(s uint32, v byte) string { return raw(pushPromise, endHeaders, s, number(2)) },
	func(s uint32, v byte) string { return raw(data, padded|v&endStream, s, "\x03abcdef"[:v>>1&7]) },
	func(s uint32, v byte) string {
		return raw(headers, endHeaders|v&(prioritize|padded|endStream), s, "\x00\x00\x00\x00\x01\x07"[:v>>5%7]+block(request("GET", "/")...))
	},
	func(s uint32, v byte) string { return raw(headers, endHeaders|endStream, s, string([]byte{v, v >> 1})) },
}

// compose makes frames of three bytes each: what, of which stream, and how.
func compose(script []byte) string {
	var frames strings.Builder
	for i := 0; i+3 <= len(script) && i < 3*64; i += 3 {
		frames.WriteString(ops[int(script[i])%len(ops)](uint32(script[i+1]%8), script[i+2]))
	}
	return frames.String()
}

// badHeads are those that both refuse. Here so are fields of one connection, te of
// other than trailers, two lengths, and a length of other content than there is.
var badHeads = [][]string{
	request("GET", "/", "X-A", "b"), request("GET", "/", "x", "a\nb"),
	append([]string{"x", "y"}, request("GET", "/")...), append([]string{":x", "y"}, request("GET", "/")...), request("GET", "/")[2:], request("GET", ""),
	append([]string{":path", "/"}, request("GET", "/")...), request("CONNECT", "/"),
	{":method", "CONNECT"},
	append([]string{":protocol", "websocket"}, request("GET", "/")...),
	nil,
}

// verdict is what a peer is told first of what it sent: that a stream is reset,
// or the connection over, or else nothing.
func verdict(f xhttp2.Frame) string {
	switch f := f.(type) {
	case *xhttp2.RSTStreamFrame:
		return fmt.Sprintf("stream %d: %s", f.StreamID, Code(f.ErrCode))
	case *xhttp2.GoAwayFrame:
		if f.ErrCode != xhttp2.ErrCodeNo {
			return "connection: " + Code(f.ErrCode).String()
		}
	}
	return ""
}

// mark is PING behind all that is sent: its acknowledgement says that all was
// taken.
const mark = "the mark"

// oursSays returns our verdict, and the frames up to that which it is of: what
// net/http is told of those behind it may overtake what it says.
func oursSays(frames string) (says, upTo string) {
	d := newDiary()
	d.conn = NewServer(Settings{}, d)
	_, _ = d.conn.Receive([]byte(clientsOwn))
	for at := 0; at < len(frames); {
		n := frameHead + int(uint32Of([]byte(frames[at:]))>>8)
		_, _ = d.conn.Receive([]byte(frames[at : at+n]))
		at += n
		out := d.conn.Take()
		if out == nil {
			continue
		}
		framer := xhttp2.NewFramer(nil, strings.NewReader(string(*out)))
		for f, err := framer.ReadFrame(); err == nil; f, err = framer.ReadFrame() {
			if says := verdict(f); says != "" {
				return says, frames[:at]
			}
		}
		d.conn.Sent(out)
	}
	return "", frames
}

// standard is net/http's server, which answers nothing.
type standard struct{ conns chan net.Conn }

func newStandard(f *testing.F) *standard {
	s := &standard{conns: make(chan net.Conn)}
	server := &http.Server{
		Handler:   http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }),
		Protocols: new(http.Protocols), ErrorLog: hclog.NewNullLogger().StandardLogger(nil),
	}
	server.Protocols.SetUnencryptedHTTP2(true)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(s) })
	f.Cleanup(func() {
		server.Close()
		serving.Wait()
	})
	return s
}

// Accept and the others make it a net.Listener.
func (s *standard) Accept() (net.Conn, error) {
	c, ok := <-s.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (s *standard) Close() error   { close(s.conns); return nil }
func (s *standard) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// says returns the verdict of net/http.
func (s *standard) says(t *testing.T, frames string) string {
	t.Helper()
	end, other := net.Pipe()
	s.conns <- other
	var writing sync.WaitGroup
	writing.Go(func() { _, _ = io.WriteString(end, clientsOwn+frames+raw(ping, 0, 0, mark)) })
	defer writing.Wait()
	defer end.Close()
	framer := xhttp2.NewFramer(nil, end)
	for {
		f, err := framer.ReadFrame()
		switch {
		case errors.Is(err, io.EOF):
			return "closed"
		case err != nil:
			t.Fatal(err)
		}
		if says := verdict(f); says != "" {
			return says
		}
		if p, ok := f.(*xhttp2.PingFrame); ok && string(p.Data[:]) == mark {
			return ""
		}
	}
}

// describe says what frames are.
func describe(frames string) string {
	var s strings.Builder
	framer := xhttp2.NewFramer(nil, strings.NewReader(frames))
	framer.AllowIllegalReads = true
	for b := frames; len(b) >= frameHead; {
		n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
		fmt.Fprintf(&s, "%s flags %x of %d: %q\n", xhttp2.FrameType(b[3]), b[4], uint32Of([]byte(b[5:9])), b[frameHead:frameHead+n])
		b = b[frameHead+n:]
	}
	return s.String()
}
