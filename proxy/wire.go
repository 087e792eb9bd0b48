package proxy

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// wire is the connection below TLS. It reads as much as there is at once and
// hands crypto/tls one record at a time, so that it is always known whether
// another whole record is there: records that came together are decrypted
// together and leave in one write. In the same way the records of one large
// write leave together. It also notes that the far end closed it.
type wire struct {
	end
	raw   syscall.RawConn
	ready func(fd uintptr) bool // w.fill, made once
	turns *turns                // while the handshake lasts

	// The following belong to the reader.
	eof    bool
	noWait bool // Read gives what is there and does not wait
	class  int
	buf    *[]byte // what was read and not yet taken; nil where nothing was
	held   int     // class of buf
	r, w   int     // the bytes in buf
	head   [recordHead]byte
	headed int // bytes of head that were taken
	record int // bytes of the record that are yet to be taken
	err    error

	// The stream that writes is not alone: crypto/tls answers a KeyUpdate, and
	// sends alerts, from the one that reads.
	cork   sync.Mutex // guards the following
	out    *[]byte    // records that are to leave together; nil while each leaves at once
	filled int
	spool  *spool // in place of the socket; nil while it is written to
}

const (
	recordHead = 5                   // RFC 8446 §5.1: type, version, length
	maxRecord  = maxPlaintext + 2048 // of any version (RFC 5246 §6.2.3)
)

func newWire(e end) *wire {
	w := &wire{end: e, raw: rawOf(e)}
	w.ready = w.fill
	return w
}

// errNothingThere is the timeout that crypto/tls takes as one: it can be asked
// again.
var errNothingThere error = &net.OpError{Op: "read", Net: "tls", Err: os.ErrDeadlineExceeded}

// Read implements io.Reader. It does not go beyond the end of a record.
func (w *wire) Read(b []byte) (int, error) {
	if w.noWait {
		if !w.whole() {
			return 0, errNothingThere
		}
	} else if w.w == w.r {
		if err := w.await(); err != nil {
			return 0, err
		}
	}
	n := 0
	if w.record == 0 {
		n = copy(w.head[w.headed:], (*w.buf)[w.r:w.w])
		n = copy(b, w.head[w.headed:w.headed+n])
		w.headed += n
		if w.headed == recordHead {
			w.record, w.headed = int(binary.BigEndian.Uint16(w.head[3:])), 0
		}
	}
	// The rest leaves with its head: crypto/tls asks for it by itself where it
	// has none, and makes a reader each time it asks.
	m := copy(b[n:min(len(b), n+w.record)], (*w.buf)[w.r+n:w.w])
	w.record -= m
	w.took(n + m)
	return n + m, nil
}

func (w *wire) took(n int) {
	w.r += n
	if w.r == w.w {
		w.drop()
	}
}

func (w *wire) drop() {
	if w.buf != nil {
		bufferPools[w.held].Put(w.buf)
		w.buf, w.r, w.w = nil, 0, 0
	}
}

// size returns how long the next record is, its head included, or 0 while that
// is not known. Only between two records.
func (w *wire) size() int {
	if w.w-w.r < recordHead {
		return 0
	}
	return recordHead + int(binary.BigEndian.Uint16((*w.buf)[w.r+3:]))
}

// whole reports whether the next record can be read without waiting, or is
// none that anybody would wait for. While one is in the midst of being read,
// what is there of it can be.
func (w *wire) whole() bool {
	if w.record > 0 || w.headed > 0 {
		return w.w > w.r
	}
	size := w.size()
	return size > 0 && (w.w-w.r >= size || size > maxRecord)
}

// await waits for more bytes from the socket.
func (w *wire) await() error {
	if w.raw == nil {
		w.turns.give()
		w.fillBlocking()
	} else if err := w.raw.Read(w.ready); err != nil {
		return err
	}
	if err := w.err; err != nil {
		w.err = nil
		w.eof = w.eof || errors.Is(err, io.EOF)
		return err
	}
	return w.turns.take()
}

// room sees to it that there is a buffer with room for more, and for the whole
// of the next record.
func (w *wire) room() []byte {
	if w.buf == nil {
		w.held, w.buf = w.class, takeBuffer(w.class)
	}
	size := w.size()
	if w.r > 0 && (size > len(*w.buf)-w.r || w.w == len(*w.buf)) {
		w.w, w.r = copy(*w.buf, (*w.buf)[w.r:w.w]), 0
	}
	if size > len(*w.buf) {
		w.move(classOf(size))
	}
	return (*w.buf)[w.w:]
}

// move puts what was read into a buffer of another class.
func (w *wire) move(class int) {
	to := takeBuffer(class)
	n := copy(*to, (*w.buf)[w.r:w.w])
	bufferPools[w.held].Put(w.buf)
	w.buf, w.held, w.r, w.w = to, class, 0, n
}

// rest gives back what the bytes that are there do not need: who announces a
// large record and sends no more of it is to cost no more.
func (w *wire) rest() {
	if w.buf == nil {
		return
	}
	if class := classOf(w.w - w.r); class < w.held {
		w.move(class)
	}
}

// fill reads from a socket that may be readable, and reports false when there
// is nothing to read yet.
func (w *wire) fill(fd uintptr) bool {
	room := w.room()
	n, err := readSocket(int(fd), room)
	w.filledBy(n, err)
	if errors.Is(err, unix.EAGAIN) {
		w.turns.give()
		return false
	}
	return true
}

// fillBlocking is for ends that are no sockets.
func (w *wire) fillBlocking() {
	n, err := w.end.Read(w.room())
	if n > 0 {
		err = nil
	}
	w.filledBy(n, err)
}

func (w *wire) filledBy(n int, err error) {
	w.w += n
	w.err = err
	if n > 0 {
		w.class = resized(w.class, n)
	} else if w.w == w.r {
		w.drop()
	}
}

// Write implements io.Writer. crypto/tls calls it with its lock for records
// held, so that they come here in their order.
func (w *wire) Write(b []byte) (int, error) {
	if w.turns != nil { // nothing is collected in a handshake
		return w.turns.write(w.end, b)
	}
	w.cork.Lock()
	defer w.cork.Unlock()
	if w.spool != nil {
		return w.spool.write(b)
	}
	if w.out == nil {
		return w.end.Write(b)
	}
	if w.filled+len(b) > len(*w.out) {
		if err := w.flush(); err != nil {
			return 0, err
		}
		if len(b) > len(*w.out) {
			return w.end.Write(b)
		}
	}
	w.filled += copy((*w.out)[w.filled:], b)
	return len(b), nil
}

// SetWriteDeadline does nothing. crypto/tls sets a deadline in the past once it
// has sent close_notify, and then cannot answer a peer that asks for new keys,
// and believes the peer's next record a forgery: who half-closed could no more
// be sent to. How long anything takes is the table's to bound.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

func (w *wire) flush() error { // with w.cork held
	if w.filled == 0 {
		return nil
	}
	_, err := w.end.Write((*w.out)[:w.filled])
	w.filled = 0
	return err
}

// together has the records that write makes leave in as few writes as can be.
func (w *wire) together(write func() (int, error)) (n int, err error) {
	w.cork.Lock()
	w.out = takeBuffer(largeClass)
	w.cork.Unlock()
	n, err = write()
	w.cork.Lock()
	defer w.cork.Unlock()
	if ferr := w.flush(); err == nil {
		err = ferr
	}
	bufferPools[largeClass].Put(w.out)
	w.out = nil
	return n, err
}

// secured is a TLS connection that tells a stream that was finished from one
// that was cut off. crypto/tls reports both as io.EOF when the cut falls
// between two records; only the first came with the peer's close_notify, and
// anybody on the network can make the second (RFC 8446 §6.1).
//
// Once the handshake is over it is the inlet of a stream.
type secured struct {
	*tls.Conn
	wire *wire
	buf  *[]byte // the plaintext of next
	held int
}

// secure runs TLS on c: as the server, or as the client.
func secure(c end, side func(net.Conn, *tls.Config) *tls.Conn, config *tls.Config) *secured {
	w := newWire(c)
	return &secured{Conn: side(w, config), wire: w}
}

func (s *secured) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if errors.Is(err, io.EOF) && s.wire.eof {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (s *secured) Write(b []byte) (int, error) {
	if len(b) <= maxPlaintext {
		return s.Conn.Write(b)
	}
	return s.wire.together(func() (int, error) { return s.Conn.Write(b) })
}

// next decrypts the records that are there, waiting for the first.
func (s *secured) next() ([]byte, error) {
	w := s.wire
	for !w.whole() {
		if err := w.await(); err != nil {
			return nil, s.cut(err)
		}
	}
	s.held = classOf(min(w.w-w.r, payloads[len(payloads)-1]))
	s.buf = takeBuffer(s.held)
	w.noWait = true
	n, err := s.decrypt(*s.buf)
	w.noWait = false
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil // a record without payload, such as a KeyUpdate
	}
	if n == 0 {
		s.release()
		return nil, err
	}
	return (*s.buf)[:n], err
}

// cut is what an error of the wire between two records, or in one, is to the
// stream: without close_notify no end is in good order.
func (s *secured) cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// decrypt fills b with the plaintext of the whole records that are there, as
// long as what the next one holds is sure to fit.
func (s *secured) decrypt(b []byte) (n int, err error) {
	for {
		m, err := s.Read(b[n:])
		n += m
		if err != nil || !s.wire.whole() || s.wire.size() > len(b)-n {
			return n, err
		}
	}
}

// classOf returns the smallest class whose buffers hold n bytes.
func classOf(n int) int {
	for class, size := range bufferSizes {
		if n <= size {
			return class
		}
	}
	return len(bufferSizes) - 1
}

func (s *secured) release() {
	bufferPools[s.held].Put(s.buf)
	s.buf = nil
}

func (s *secured) keep() (*[]byte, int) {
	buf := s.buf
	s.buf = nil
	return buf, s.held
}

func (s *secured) socket() syscall.RawConn { return s.wire.raw }
func (s *secured) interrupt()              { _ = s.wire.SetReadDeadline(past) }
func (s *secured) resume()                 { _ = s.wire.SetReadDeadline(time.Time{}) }

func (s *secured) rest() {
	s.wire.rest()
	shed(s.Conn)
}
