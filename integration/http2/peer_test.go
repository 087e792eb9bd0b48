//go:build integration

package http2_test

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/narthex-id/narthex/integration/internal/mesh"
)

// peer is a client that writes its frames itself, whether they are good or not.
// They go out when flush is called, or as they are many.
type peer struct {
	net.Conn
	*http2.Framer
	out   *bufio.Writer
	block bytes.Buffer
	coder *hpack.Encoder
	next  uint32        // stream
	ended chan struct{} // closed once nothing more is read

	mu    sync.Mutex // guards the following
	seen  ending
	codes map[http2.ErrCode]int // of streams that were reset
	begun map[string]int        // responses, by their status
}

// ending is how a connection was ended by who serves it.
type ending struct {
	goaway bool
	code   http2.ErrCode // of that
	silent bool          // it is still open
}

func (e ending) String() string {
	switch {
	case e.silent:
		return "nothing"
	case e.goaway:
		return "GOAWAY " + e.code.String()
	}
	return "the end"
}

// newPeer connects one to where callers come. Nothing is sent yet.
func newPeer(t *testing.T, r *route) *peer {
	t.Helper()
	p, err := connect(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func connect(r *route) (*peer, error) {
	c, err := dial(r.address, r.own)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	p := &peer{Conn: c, out: bufio.NewWriterSize(c, 16<<10), next: 1, ended: make(chan struct{}), codes: map[http2.ErrCode]int{}, begun: map[string]int{}}
	p.Framer = http2.NewFramer(p.out, c)
	p.AllowIllegalWrites = true
	p.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
	p.coder = hpack.NewEncoder(&p.block)
	return p, nil
}

// handshake begins as a client does, and reads from then on.
func (p *peer) handshake(t *testing.T, settings ...http2.Setting) {
	t.Helper()
	if err := p.hello(settings...); err != nil {
		t.Fatal(err)
	}
	go p.read()
}

func (p *peer) hello(settings ...http2.Setting) error {
	if _, err := p.out.WriteString(http2.ClientPreface); err != nil {
		return err
	}
	if err := p.WriteSettings(settings...); err != nil {
		return err
	}
	return p.out.Flush()
}

// read notes what comes until the connection ends.
func (p *peer) read() {
	defer close(p.ended)
	for {
		f, err := p.ReadFrame()
		if err != nil {
			return
		}
		p.mu.Lock()
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			p.seen = ending{goaway: true, code: f.ErrCode}
		case *http2.RSTStreamFrame:
			p.codes[f.ErrCode]++
		case *http2.MetaHeadersFrame:
			p.begun[f.PseudoValue("status")]++
		}
		p.mu.Unlock()
	}
}

// end waits until the connection has ended, and tells how.
func (p *peer) end(within time.Duration) ending {
	select {
	case <-p.ended:
	case <-time.After(within):
		return ending{silent: true}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen
}

// told is what streams were told so far.
func (p *peer) told() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("responses %v, resets %v", p.begun, p.codes)
}

// encode returns the block of a GET with further fields.
func (p *peer) encode(path string, fields ...hpack.HeaderField) []byte {
	p.block.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "a.example"}, {Name: ":path", Value: path},
	}, fields...) {
		_ = p.coder.WriteField(f) // into memory
	}
	return p.block.Bytes()
}

// ask opens a stream with a GET and returns it.
func (p *peer) ask(path string, ended bool, fields ...hpack.HeaderField) (stream uint32, err error) {
	stream = p.next
	p.next += 2
	return stream, p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: p.encode(path, fields...), EndHeaders: true, EndStream: ended})
}

// askLarge does so with fields of so many bytes together.
func (p *peer) askLarge(path string, size int) error {
	var fields []hpack.HeaderField
	for i := 0; size > 0; i++ {
		n := min(size, mesh.FieldSize)
		fields = append(fields, hpack.HeaderField{Name: fmt.Sprint("x-large-", i), Value: strings.Repeat("y", n)})
		size -= n
	}
	block, stream := p.encode(path, fields...), p.next
	p.next += 2
	const most = 16 << 10 // of a frame (RFC 9113, section 4.2)
	n := min(len(block), most)
	err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block[:n], EndHeaders: n == len(block), EndStream: true})
	for err == nil && n < len(block) {
		part := block[n:min(len(block), n+most)]
		n += len(part)
		err = p.WriteContinuation(stream, n == len(block), part)
	}
	if err == nil {
		err = p.out.Flush()
	}
	return err
}

// repeat does something so many times, or until the connection breaks.
func (p *peer) repeat(times int, do func() error) error {
	for range times {
		if err := do(); err != nil {
			return err
		}
	}
	return p.out.Flush()
}
