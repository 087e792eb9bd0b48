package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// This file moves bytes. A connection is two streams, one for each direction.
// A stream has a goroutine while there is something to move and for a moment
// after; one that fell silent is parked (park.go) and costs neither goroutine
// nor buffer.

// end is one end of a connection as the streams see it: *net.TCPConn,
// *net.UnixConn and *secured all are.
type end interface {
	net.Conn
	CloseWrite() error
}

// The sizes of buffers. A stream takes one when bytes are there to be read and
// gives it back when they are written, so that nothing is held by who waits.
// It starts with the smallest, takes the next when a read filled the one it
// had, and goes back when reads have become small. Each is a little larger
// than the payload it is for: what TLS adds to every record fits beside it. The
// last is for what is not whole before the largest read: a frame of HTTP/2.
var bufferSizes = [...]int{4 << 10, 17 << 10, 66 << 10, 84 << 10}

// largeClass is the class of the largest read, and of what is to leave in one
// write.
const largeClass = 2

// payloads are the most bytes a plaintext read asks for at once: the second
// fills one TLS record, the third four.
var payloads = [...]int{4 << 10, maxPlaintext, 4 * maxPlaintext}

// maxPlaintext is the most a TLS record carries (RFC 8446 §5.1).
const maxPlaintext = 16 << 10

var bufferPools [len(bufferSizes)]sync.Pool

func takeBuffer(class int) *[]byte {
	if b, ok := bufferPools[class].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, bufferSizes[class])
	return &b
}

// copied is how one direction ended.
type copied int

const (
	copyEnded   copied = iota // src ended in good order
	copyBroken                // src broke off: reset, cut short, closed by us
	copyRefused               // dst takes no more
	copyPaused                // not ended: it is to be parked
)

// flow counts the bytes of one direction, for the connection and for its
// listener. The zero flow counts nothing.
type flow struct {
	conn     *atomic.Uint64
	listener *telemetry.Counter
}

func (f flow) add(n int) {
	if f.conn != nil {
		f.conn.Add(uint64(n))
		f.listener.Add(uint64(n))
	}
}

// inlet is where a stream reads.
type inlet interface {
	// next waits for bytes and returns some, which are good until release.
	// The errors are those of Read: io.EOF is an end in good order.
	next() ([]byte, error)

	// release gives the buffer back that the bytes of next are in.
	release()

	// socket is what is waited for, nil where it cannot be parked, or is a
	// herald.
	socket() syscall.RawConn

	// interrupt ends a next that waits with os.ErrDeadlineExceeded, and
	// those to come until resume.
	interrupt()
	resume()

	// keep takes the buffer that the bytes of next are in, with its class, in
	// place of release: the caller puts it back into the pool.
	keep() (*[]byte, int)

	// rest gives back what is held between two reads.
	rest()
}

// herald is an inlet without a socket that can be parked: who brings it bytes
// wakes who waits for them. It tells whether some came since it last waited.
type herald interface{ came() bool }

// stream is one direction of a connection.
type stream struct {
	sleeper
	from side
	dst  sink
	flow flow
}

// sink is where a stream writes.
type sink interface {
	io.Writer
	CloseWrite() error
}

// run moves bytes until the stream ends or is parked.
func (s *stream) run() {
	for {
		how, err := s.pump()
		if how != copyPaused {
			s.state.Store(over)
			s.c.copied(s.from, s.dst, how, err)
			s.c.streamEnded()
			return
		}
		if s.park() {
			return
		}
	}
}

// pump copies src to dst until one of them ends or it is to be parked.
func (s *stream) pump() (copied, error) {
	for {
		b, err := s.src.next()
		if len(b) > 0 {
			_, werr := s.dst.Write(b)
			s.flow.add(len(b))
			s.src.release()
			if werr != nil {
				return copyRefused, werr
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			return copyEnded, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return copyPaused, nil
		default:
			return copyBroken, err
		}
	}
}

// resized returns the class for the next read after one of n bytes into a
// buffer of the given class.
func resized(class, n int) int {
	switch {
	case n >= payloads[class] && class < len(payloads)-1:
		return class + 1
	case class > 0 && n <= payloads[class]/8:
		return class - 1
	}
	return class
}

// bare is an inlet without TLS.
type bare struct {
	end   end
	raw   syscall.RawConn
	ready func(fd uintptr) bool // p.read, made once
	class int
	buf   *[]byte // taken while bytes are in it
	held  int     // class of buf
	n     int
	err   error
}

func newBare(e end) *bare {
	p := &bare{end: e, raw: rawOf(e)}
	p.ready = p.read
	return p
}

// rawOf returns the socket of e, or nil where there is none.
func rawOf(e net.Conn) syscall.RawConn {
	if sc, ok := e.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}

func (p *bare) next() ([]byte, error) {
	if p.raw == nil {
		return p.nextBlocking()
	}
	if err := p.raw.Read(p.ready); err != nil {
		return nil, err
	}
	return p.got()
}

func (p *bare) got() ([]byte, error) {
	if p.n == 0 {
		return nil, p.err
	}
	p.class = resized(p.class, p.n)
	return (*p.buf)[:p.n], nil
}

// nextBlocking is for ends that are no sockets.
func (p *bare) nextBlocking() ([]byte, error) {
	p.held, p.buf = p.class, takeBuffer(p.class)
	p.n, p.err = p.end.Read((*p.buf)[:payloads[p.class]])
	if p.n == 0 {
		p.release()
	}
	return p.got()
}

// read reads from a socket that may be readable, and reports false when there
// is nothing to read yet. The buffer is held only while there is something in
// it.
func (p *bare) read(fd uintptr) bool {
	p.held, p.buf = p.class, takeBuffer(p.class)
	p.n, p.err = readSocket(int(fd), (*p.buf)[:payloads[p.class]])
	if p.n == 0 {
		p.release()
	}
	return !errors.Is(p.err, unix.EAGAIN)
}

func (p *bare) release() {
	bufferPools[p.held].Put(p.buf)
	p.buf = nil
}

func (p *bare) keep() (*[]byte, int) {
	buf := p.buf
	p.buf = nil
	return buf, p.held
}

func (p *bare) socket() syscall.RawConn { return p.raw }
func (p *bare) interrupt()              { _ = p.end.SetReadDeadline(past) }
func (p *bare) resume()                 { _ = p.end.SetReadDeadline(time.Time{}) }
func (p *bare) rest()                   {}

// past is a deadline that is over.
var past = time.Unix(1, 0)

// readSocket is read(2), with io.EOF for the end of the stream.
func readSocket(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// abort closes c so that its peer learns that the stream was broken off and
// not finished: by RST where there is one, never by a TLS close_notify.
func abort(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only on a socket that is closed already
	}
	_ = c.Close()
}

// explainBroken tells a person why reading from an end failed.
func explainBroken(err error) string {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "ended without TLS close_notify"
	case errors.Is(err, syscall.ECONNRESET):
		return "connection reset"
	case errors.Is(err, syscall.EPIPE):
		return "closed while we were writing"
	}
	return err.Error()
}
