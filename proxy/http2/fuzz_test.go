package http2

import (
	"testing"

	xhttp2 "golang.org/x/net/http2"

	"github.com/narthex-id/narthex/proxy/http1"
)

// FuzzReceive: whatever a peer sends, in whatever pieces, is taken or refused
// without harm, and costs no more than the bounds say. What is sent in turn are
// whole frames.
func FuzzReceive(f *testing.F) {
	settings := appendHead(nil, 4, 0, 0, 0)
	hello := append([]byte(Preface), settings...)
	get := closeBlock(appendPair(appendPair(appendPair(appendPair(openBlock(nil), ":method", "GET"), ":scheme", "http"), ":path", "/"), ":authority", "x"), 0, 1, true)
	f.Add(hello, false, 3)
	f.Add(append(append([]byte(nil), hello...), get...), false, 1)
	f.Add(settings, true, 100)
	f.Add(append(append([]byte(nil), settings...), closeBlock(appendStatus(openBlock(nil), 200), 0, 1, false)...), true, 7)
	f.Fuzz(func(t *testing.T, sent []byte, client bool, piece int) {
		if len(sent) > 1<<20 {
			return
		}
		piece = max(1, piece)
		c := NewServer(Settings{MaxStreams: 4}, echo{t})
		if client {
			c = NewClient(Settings{}, echo{t})
			c.Reserve()
			r := &http1.Request{}
			if err := r.Assemble(&http1.Parts{Method: "POST", Scheme: "http", Authority: "x", Path: "/"}); err != nil {
				t.Fatal(err)
			}
			s, err := c.Request(r, &http1.Edit{}, "http", false, nobody{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Write([]byte("content"), true); err != nil {
				t.Fatal(err)
			}
		}
		var out []byte
		collect := func() {
			for b := c.Take(); b != nil; b = c.Take() {
				out = append(out, *b...)
				c.Sent(b)
				c.Pump()
			}
		}
		collect()
		taken := 0
		for end := 0; end < len(sent); {
			end = min(end+piece, len(sent))
			n, err := c.Receive(sent[taken:end])
			taken += n
			collect()
			if err != nil {
				break
			}
			if end-taken > frameHead+MaxFrame {
				t.Fatalf("%d bytes are left, which are more than a frame", end-taken)
			}
		}
		if c.recv < 0 || c.held < 0 || len(c.streams) > 4 {
			t.Fatalf("window %d, %d held, %d streams", c.recv, c.held, len(c.streams))
		}
		wholeFrames(t, out, client)
	})
}

// wholeFrames fails where what is sent are not frames, one after another.
func wholeFrames(t *testing.T, b []byte, client bool) {
	t.Helper()
	if client {
		b = b[len(Preface):]
	}
	for len(b) > 0 {
		if len(b) < frameHead {
			t.Fatalf("%d bytes are no head of a frame", len(b))
		}
		n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
		if n > MaxFrame || len(b) < frameHead+n || xhttp2.FrameType(b[3]) > xhttp2.FrameContinuation {
			t.Fatalf("a frame of kind %d and %d bytes, of %d", b[3], n, len(b))
		}
		b = b[frameHead+n:]
	}
}
