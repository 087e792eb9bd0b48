package proxy

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/testca"
)

// crowd is a client and a service of HTTP/2 that allocate nothing, so that what
// is counted is the proxy's.
type crowd struct {
	t    testing.TB
	c    net.Conn
	r    *bufio.Reader
	head []byte // of a request
	out  []byte
}

// crowdOf starts a proxy towards a service that speaks p, and asks it once.
func crowdOf(t testing.TB, p Protocol) *crowd {
	t.Helper()
	ca := testca.New(t, "example.org")
	access, err := telemetry.NewAccessLog(io.Discard, "json", nil)
	if err != nil {
		t.Fatal(err)
	}
	c := Config{
		Listeners: []Listener{webListener("web", serve(t, answersAtOnce(p)))}, Identities: source(t, ca.SVID("/orders"), ca),
		Access: access, Policy: rulesOf(t, webReads),
	}
	speaking(p)(&c)
	proxy, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = proxy.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); _ = access.Close() })
	f := framedClient(t, proxy.Addr("web").String(), ca, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
	f.must(f.SetDeadline(time.Time{})) // a benchmark takes as long as it does
	f.must(f.WriteWindowUpdate(0, 1<<30))
	fields := []string{":method:GET", ":scheme:https", ":authority:orders.example.org", ":path:/v1/items/7", "user-agent:test", "accept:*/*"}
	f.sends(1, true, fields...)
	if a := f.answer(1); a.status != "200" || a.body != "hello" {
		t.Fatalf("%+v", a)
	}
	block := f.block(fields...) // which names what is in the table by now
	head := binary.BigEndian.AppendUint32(nil, uint32(len(block))<<8|uint32(http2.FrameHeaders))
	head = append(head, byte(http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream), 0, 0, 0, 0)
	return &crowd{t: t, c: f.Conn, r: bufio.NewReaderSize(f.Conn, 64<<10), head: append(head, block...)}
}

// ask asks n times at once, on the streams that follow the given one, and waits for
// the answers.
func (c *crowd) ask(stream uint32, n int) {
	c.out = c.out[:0]
	for i := range n {
		at := len(c.out)
		c.out = append(c.out, c.head...)
		binary.BigEndian.PutUint32(c.out[at+5:], stream+2*uint32(i+1))
	}
	if _, err := c.c.Write(c.out); err != nil {
		c.t.Fatal(err)
	}
	for n > 0 {
		kind, flags, _, err := nextFrame(c.r)
		if err != nil || kind == http2.FrameRSTStream || kind == http2.FrameGoAway {
			c.t.Fatal(kind, err)
		}
		if kind == http2.FrameData && flags.Has(http2.FlagDataEndStream) {
			n--
		}
	}
}

// nextFrame passes over a frame.
func nextFrame(r *bufio.Reader) (kind http2.FrameType, flags http2.Flags, stream uint32, err error) {
	head, err := r.Peek(9)
	if err != nil {
		return 0, 0, 0, err
	}
	size := binary.BigEndian.Uint32(head) >> 8
	kind, flags, stream = http2.FrameType(head[3]), http2.Flags(head[4]), binary.BigEndian.Uint32(head[5:])
	_, err = r.Discard(9 + int(size))
	return kind, flags, stream, err
}

// answersAtOnce answers every request with 5 bytes.
func answersAtOnce(p Protocol) func(net.Conn) {
	if p == ProtocolHTTP1 {
		return func(c net.Conn) {
			response := []byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/plain\r\n\r\nhello")
			buf := make([]byte, 4096)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				if _, err := c.Write(response); err != nil {
					return
				}
			}
		}
	}
	return func(c net.Conn) {
		r := bufio.NewReaderSize(c, 64<<10)
		if _, err := r.Discard(len(http2.ClientPreface)); err != nil {
			return
		}
		out := []byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x00\x00\x04\x01\x00\x00\x00\x00") // SETTINGS, and of theirs
		block := "\x88" + "\x0f\x10\x0atext/plain"
		answer := "\x00\x00" + string(rune(len(block))) + "\x01\x04\x00\x00\x00\x00" + block + "\x00\x00\x05\x00\x01\x00\x00\x00\x00hello"
		for {
			if r.Buffered() == 0 {
				if _, err := c.Write(out); err != nil {
					return
				}
				out = out[:0]
			}
			kind, _, stream, err := nextFrame(r)
			if err != nil {
				return
			}
			if kind == http2.FrameHeaders {
				at := len(out)
				out = append(out, answer...)
				binary.BigEndian.PutUint32(out[at+5:], stream)
				binary.BigEndian.PutUint32(out[at+9+len(block)+5:], stream)
			}
		}
	}
}

// A warm request over HTTP/2 allocates its two streams and its passage, and
// little else, whatever its fields.
func TestStreamAllocations(t *testing.T) {
	for p, most := range map[Protocol]float64{ProtocolHTTP1: 8, ProtocolHTTP2: 9} {
		t.Run(p.String(), func(t *testing.T) {
			const atOnce = 20
			c := crowdOf(t, p)
			stream := uint32(1)
			once := func() {
				c.ask(stream, atOnce)
				stream += 2 * atOnce
			}
			for range 20 {
				once()
			}
			if n := testing.AllocsPerRun(50, once) / atOnce; n > most && !raceEnabled {
				t.Errorf("%v allocations a request, want %v at most", n, most)
			}
		})
	}
}
