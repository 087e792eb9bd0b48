package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

// pieces is an end that yields what is left of its bytes in pieces.
type pieces struct {
	end
	rest []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	p.size = p.size*7%9973 + 1
	n := copy(b, p.rest[:min(p.size, len(p.rest))])
	p.rest = p.rest[n:]
	return n, nil
}

// FuzzWire: whatever a stranger sends and however it comes, it is handed on
// byte for byte, no read goes beyond a record, and one that must not wait
// begins none that is not there as a whole.
func FuzzWire(f *testing.F) {
	f.Add([]byte("\x16\x03\x01\x00\x05hello\x17\x03\x03\x00\x00\x17\x03\x03\x00\x01!"), uint16(3), true)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), uint16(1), false)
	f.Add(append([]byte{23, 3, 3, 0x40, 0}, make([]byte, 0x4000)...), uint16(700), true)
	f.Add(bytes.Repeat([]byte{23, 3, 3, 0xff, 0xff, 0}, 30), uint16(5000), true)
	f.Fuzz(func(t *testing.T, sent []byte, size uint16, impatient bool) {
		r := &wireReader{t: t, sent: sent, buf: make([]byte, 1+int(size)%600)}
		r.w = newWire(&pieces{rest: sent, size: int(size)})
		for {
			if impatient && r.whole() {
				continue
			}
			if impatient && r.between() { // as a stream waits: for all of the next record
				if r.w.whole() {
					continue
				}
				if r.w.await() != nil {
					break
				}
				continue
			}
			if !r.read() {
				break
			}
		}
		if w := r.w; w.w > w.r {
			r.got = append(r.got, (*w.buf)[w.r:w.w]...) // a part of a record, at the end
		}
		if !bytes.Equal(r.got, sent) {
			t.Fatalf("%d bytes came for %d, or others", len(r.got), len(sent))
		}
		if !r.w.eof {
			t.Error("the end was not noticed")
		}
	})
}

// wireReader follows the records of a wire by a reckoning of its own.
type wireReader struct {
	t    *testing.T
	w    *wire
	sent []byte
	buf  []byte
	got  []byte
	head []byte
	left int // of the record
}

func (r *wireReader) between() bool { return len(r.head) == 0 && r.left == 0 }

// whole reads without waiting, and reports whether there was something.
func (r *wireReader) whole() bool {
	between := r.between()
	r.w.noWait = true
	n, err := r.w.Read(r.buf)
	r.w.noWait = false
	if n > 0 && between && !wholeAt(r.sent[len(r.got):]) {
		r.t.Fatalf("at %d a record was begun that is not whole", len(r.got))
	}
	if err != nil && !errors.Is(err, errNothingThere) {
		r.t.Fatal(err)
	}
	r.follow(n)
	return n > 0
}

// read reads and waits, and reports whether there is more to come.
func (r *wireReader) read() bool {
	n, err := r.w.Read(r.buf)
	r.follow(n)
	return err == nil
}

// follow fails where a read goes from one record into the next.
func (r *wireReader) follow(n int) {
	r.got = append(r.got, r.buf[:n]...)
	for i, b := range r.buf[:n] {
		if r.left > 0 {
			r.left--
		} else if r.head = append(r.head, b); len(r.head) == recordHead {
			r.left, r.head = int(binary.BigEndian.Uint16(r.head[3:])), nil
		}
		if r.between() && i < n-1 {
			r.t.Fatalf("a read of %d bytes goes beyond a record, which ends at %d", n, i+1)
		}
	}
}

// wholeAt reports whether b begins with a whole record, or with one that is
// longer than any may be.
func wholeAt(b []byte) bool {
	if len(b) < recordHead {
		return false
	}
	size := recordHead + int(binary.BigEndian.Uint16(b[3:]))
	return len(b) >= size || size > maxRecord
}
