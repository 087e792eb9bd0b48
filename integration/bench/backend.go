package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
)

// What a client asks of the backend, in the first byte of a request. sink and
// source are followed by a number of bytes, eight bytes big-endian.
const (
	opPing   = 'p' // answers with the same byte
	opSink   = 'u' // takes that many bytes, then answers with the same byte
	opSource = 'd' // sends that many bytes
	opEcho   = 'e' // sends back all that comes from now on
)

// chunk is the size of the backend's and the client's reads and writes of
// bulk.
const chunk = 64 << 10

// backend is the plaintext service behind every proxy.
type backend struct {
	listener  net.Listener
	serving   sync.WaitGroup
	responses map[int][]byte // of HTTP, by the size of the body

	mu     sync.Mutex // guards the following
	closed bool
	conns  map[net.Conn]bool
}

func startBackend() (*backend, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start the backend: %w", err)
	}
	b := &backend{listener: l, conns: map[net.Conn]bool{}, responses: map[int][]byte{}}
	for _, size := range []int{0, kib, 64 * kib, mib} {
		b.responses[size] = response(size)
	}
	b.serving.Go(b.accept)
	return b, nil
}

func (b *backend) address() string { return b.listener.Addr().String() }

// close ends the backend and all its connections.
func (b *backend) close() {
	b.mu.Lock()
	b.closed = true
	_ = b.listener.Close()
	for c := range b.conns {
		_ = c.Close()
	}
	b.mu.Unlock()
	b.serving.Wait()
}

func (b *backend) accept() {
	for {
		c, err := b.listener.Accept()
		if err != nil {
			return // closed; out of descriptors, the rows fail and say so
		}
		b.mu.Lock()
		if b.closed {
			_ = c.Close()
		} else {
			b.conns[c] = true
			b.serving.Go(func() { b.serve(c) })
		}
		b.mu.Unlock()
	}
}

func (b *backend) serve(c net.Conn) {
	defer func() {
		_ = c.Close()
		b.mu.Lock()
		delete(b.conns, c)
		b.mu.Unlock()
	}()
	var op [1]byte
	for {
		if _, err := io.ReadFull(c, op[:]); err != nil {
			return
		}
		if op[0] == 'G' || op[0] == 'P' { // of GET and PUT, and of HTTP/2's preface
			b.serveHTTP(c, op[0])
			return
		}
		if answer(c, op[0]) != nil {
			return
		}
	}
}

// chunks are for bulk alone, so that idle connections hold none.
var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// answer does what one request asks.
func answer(c net.Conn, op byte) error {
	if op == opPing {
		_, err := c.Write([]byte{op})
		return err
	}
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	if op == opEcho {
		for {
			n, err := c.Read(*buf)
			if err != nil {
				return err
			}
			if _, err := c.Write((*buf)[:n]); err != nil {
				return err
			}
		}
	}
	var size [8]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return err
	}
	left := binary.BigEndian.Uint64(size[:])
	switch op {
	case opSink:
		if err := take(c, *buf, left); err != nil {
			return err
		}
		_, err := c.Write([]byte{op})
		return err
	case opSource:
		return give(c, *buf, left)
	}
	return fmt.Errorf("unknown request %q", op)
}

// take reads n bytes and forgets them.
func take(r io.Reader, buf []byte, n uint64) error {
	for n > 0 {
		got, err := r.Read(buf[:min(n, uint64(len(buf)))])
		n -= uint64(got)
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}

// give writes n bytes of whatever is in buf.
func give(w io.Writer, buf []byte, n uint64) error {
	for n > 0 {
		part := buf[:min(n, uint64(len(buf)))]
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= uint64(len(part))
	}
	return nil
}
