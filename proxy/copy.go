package proxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// end is one end of a connection as the copies see it: *net.TCPConn,
// *net.UnixConn and *tls.Conn all are.
type end interface {
	net.Conn
	CloseWrite() error
}

// The sizes of copy buffers. A copy starts with the smallest, takes the next
// when a read filled the one it had, and goes back when reads have become
// small, so that a connection that fell silent does not sit on 64 KiB.
var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10}

var bufferPools [len(bufferSizes)]sync.Pool

// tlsClass bounds the buffers for reading from TLS: one Read never returns
// more than one record of 16 KiB.
const tlsClass = 1

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
)

// flow counts the bytes of one direction, for the connection and for its
// listener.
type flow struct {
	conn     *atomic.Uint64
	listener *telemetry.Counter
}

// pump copies src to dst until one of them ends.
func pump(dst, src end, class int, n flow) (copied, error) {
	size := 0
	buf := takeBuffer(size)
	defer func() { bufferPools[size].Put(buf) }()
	for {
		got, err := src.Read(*buf)
		if got > 0 {
			if _, werr := dst.Write((*buf)[:got]); werr != nil {
				return copyRefused, werr
			}
			n.conn.Add(uint64(got))
			n.listener.Add(uint64(got))
		}
		switch {
		case errors.Is(err, io.EOF):
			return copyEnded, nil
		case err != nil:
			return copyBroken, err
		case got == len(*buf) && size < class:
			bufferPools[size].Put(buf)
			size++
			buf = takeBuffer(size)
		case got <= len(*buf)/8 && size > 0:
			bufferPools[size].Put(buf)
			size--
			buf = takeBuffer(size)
		}
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
