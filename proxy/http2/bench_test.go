package http2

import (
	"fmt"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/http1"
)

// typical is a request as browsers and services send it, behind one that has
// filled the table.
var typical = request("POST", "/v1/orders/4711?expand=items", "user-agent", "Go-http-client/2.0", "accept", "application/json", "content-type", "application/json",
	"authorization", "Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6IjEifQ.e30.c2lnbmF0dXJl", "traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")

var answered = []http1.Field{{Name: "content-type", Value: "application/json"}, {Name: "x-request-id", Value: "0af76519-16cd-43dd-8448-eb211c80319c"}}

// answering answers every request at once.
type answering struct{ nobody }

func (answering) Settled() {}
func (answering) Leaving() {}
func (a answering) Opened(s *Stream, _ *http1.Parts, _ bool) {
	s.Attend(a)
	_ = s.Answer(200, answered, false)
	_, _ = s.Write([]byte(`{"items":1}`), true)
}

// numbered gives the frames of b, which are of one stream, another one.
func numbered(b []byte, stream uint32) {
	for len(b) > 0 {
		n := frameHead + int(uint32Of(b)>>8)
		append32(b[:5], stream)
		b = b[n:]
	}
}

// BenchmarkRequest is a request with content, and its answer.
func BenchmarkRequest(b *testing.B) {
	for _, indexed := range []bool{false, true} {
		b.Run(fmt.Sprintf("indexed=%t", indexed), func(b *testing.B) {
			c := NewServer(Settings{}, answering{})
			_, _ = c.Receive([]byte(clientsOwn))
			in := []byte(head(1, 0, typical...) + lastContent(1, `{"items":1}`))
			if indexed {
				in = indexedRequest(b, c)
			}
			stream := uint32(3)
			b.ReportAllocs()
			b.SetBytes(int64(len(in)))
			for b.Loop() {
				numbered(in, stream)
				stream += 2
				if n, err := c.Receive(in); n != len(in) || err != nil {
					b.Fatal(n, err)
				}
				c.Sent(c.Take())
				c.renew()
			}
		})
	}
}

// renew gives back the places of streams that are over, and what was sent of the
// windows.
func (c *Conn) renew() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held, c.send = len(c.streams), 1<<30
	for _, s := range c.streams {
		s.send = 1 << 30
	}
}

// indexedRequest has the table filled, and returns a request that names it.
func indexedRequest(b *testing.B, c *Conn) []byte {
	b.Helper()
	var first, then []byte
	for i := 0; i < len(typical); i += 2 {
		first = appendString(appendString(append(first, 0x40), typical[i]), typical[i+1])
		then = appendIndexed(then, staticSize+len(typical)/2-i/2)
	}
	in := raw(headers, endHeaders, 1, string(first)) + lastContent(1, `{"items":1}`)
	if _, err := c.Receive([]byte(in)); err != nil {
		b.Fatal(err)
	}
	return []byte(raw(headers, endHeaders, 3, string(then)) + lastContent(3, `{"items":1}`))
}

// BenchmarkData is content, in and out again.
func BenchmarkData(b *testing.B) {
	for _, size := range []int{100, MaxFrame} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			c := NewServer(Settings{}, echo{})
			grown := update(0, 1<<30) + raw(settings, 0, 0, setting(setInitialWindow, 1<<30))
			_, _ = c.Receive([]byte(clientsOwn + grown + posted(1, "/")))
			in := []byte(content(1, strings.Repeat("a", size)))
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				if _, err := c.Receive(in); err != nil {
					b.Fatal(err)
				}
				c.Sent(c.Take())
				c.renew()
			}
		})
	}
}

// BenchmarkBomb is a head of 64 KiB that names a large field of the table as
// often as it can.
func BenchmarkBomb(b *testing.B) {
	d := newDecoder()
	_ = d.read([]byte("\x40\x01x"+string(appendString(nil, strings.Repeat("a", 4000)))), false, false, true)
	bomb := []byte(strings.Repeat("\xbe", MaxBlock))
	b.ReportAllocs()
	for b.Loop() {
		if err := d.read(bomb, false, false, true); err != nil || !d.large {
			b.Fatal(err, d.large)
		}
	}
}

// BenchmarkPings is control frames, which are answered.
func BenchmarkPings(b *testing.B) {
	c := NewServer(Settings{}, answering{})
	_, _ = c.Receive([]byte(clientsOwn + posted(1, "/")))
	in := []byte(strings.Repeat(raw(ping, 0, 0, "12345678"), 100))
	b.ReportAllocs()
	for b.Loop() {
		c.patience = newPatience(MaxStreams)
		if _, err := c.Receive(in); err != nil {
			b.Fatal(err)
		}
		c.Sent(c.Take())
	}
}
