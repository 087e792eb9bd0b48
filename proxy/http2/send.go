package http2

import (
	"net/http"

	"github.com/narthex-id/narthex/proxy/http1"
)

// Reserve takes a place for a stream that a client is to open. It reports false
// where there is none, or the connection takes no more.
func (c *Conn) Reserve() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving || c.failed.Load() != nil || c.held >= c.most || c.next > maxStreamID-2*maxOpen {
		return false
	}
	c.held++
	return true
}

// Unreserve gives back a place that no stream was opened in.
func (c *Conn) Unreserve() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held--
}

// Request opens a stream in a place that was reserved, which it gives back when
// it is released. With ended nothing follows. The error is ErrLeaving or an
// [*Error] of the connection; the place is still reserved then.
func (c *Conn) Request(r *http1.Request, e *http1.Edit, scheme string, ended bool, receiver Receiver) (*Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.failed.Load() != nil:
		return nil, c.failed.Load()
	case c.leaving:
		return nil, ErrLeaving
	}
	s := c.open(c.next, receiver)
	c.next += 2
	s.place, s.bare = true, r.Method == http.MethodHead
	from := c.begin()
	*c.out = closeBlock(appendRequest(*c.out, r, e, scheme), from, s.id, ended)
	s.endSend(ended)
	return s, nil
}

// begin makes room for a head and returns where it begins, with c.mu held.
func (c *Conn) begin() (from int) {
	b := c.buffer(MaxHead / 16) // most are smaller; others make it grow
	from = len(b)
	b = openBlock(b)
	if c.shrinks {
		b = append(b, emptyTable)
		c.shrinks = false
	}
	*c.out = b
	return from
}

// Respond sends the head of a response; with ended nothing follows. Interim ones
// may come before it; they are left out where as much waits to be sent as may.
// The error is an [*Error].
func (s *Stream) Respond(r *http1.Response, e *http1.Edit, ended bool) error {
	if r.Interim() && s.c.backlogged() {
		return nil
	}
	return s.sendHead(ended, func(b []byte) []byte { return appendResponse(b, r, e) })
}

// Answer sends a head of our own: a status and fields. The error is an [*Error].
func (s *Stream) Answer(status int, fields []http1.Field, ended bool) error {
	return s.sendHead(ended, func(b []byte) []byte {
		b = appendStatus(b, status)
		return appendFields(b, fields, &http1.Edit{})
	})
}

// Trailers sends fields behind the content, which end it. They may overtake
// nothing: everything was written before. The error is an [*Error].
func (s *Stream) Trailers(fields []http1.Field) error {
	return s.sendHead(true, func(b []byte) []byte {
		return appendFields(b, fields, &http1.Edit{})
	})
}

func (s *Stream) sendHead(ended bool, block func([]byte) []byte) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.closed(); err != nil {
		return err
	}
	from := c.begin()
	*c.out = closeBlock(block(*c.out), from, s.id, ended)
	s.endSend(ended)
	return nil
}

// closed returns why nothing can be sent, with c.mu held.
func (s *Stream) closed() error {
	switch {
	case s.err != nil:
		return s.err
	case s.over || s.sentEnded:
		return brokenStream(s.id, StreamClosed, "the stream has ended")
	}
	return nil
}

// endSend notes that we send nothing more, with c.mu held.
func (s *Stream) endSend(ended bool) {
	if ended {
		s.sentEnded = true
		s.settle()
	}
}

// Write sends of b what there is room for, and with ended its end if that was
// all. It does not wait: where it took less, or not the end, Receiver.Room
// tells when there is more. The error is an [*Error].
func (s *Stream) Write(b []byte, ended bool) (n int, err error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := s.closed(); err != nil {
		return 0, err
	}
	if len(b) == 0 { // an end needs no room
		c.waiting.remove(s)
	}
	if !s.waits { // else those who waited before go first
		n = s.fill(b, ended)
	}
	if n < len(b) {
		if !s.waits {
			c.waiting.add(s)
		}
		return n, nil
	}
	s.endSend(ended)
	return n, nil
}

// fill sends as many frames as there is room for, with c.mu held.
func (s *Stream) fill(b []byte, ended bool) (n int) {
	c := s.c
	for {
		size := min(len(b)-n, MaxFrame, int(max(0, c.roomFor(s))))
		last := ended && n+size == len(b)
		if size == 0 && (!last || n > 0 || len(b) > 0) {
			return n
		}
		flags := uint8(0)
		if last {
			flags = endStream
		}
		out := appendHead(c.buffer(frameHead+size), data, flags, s.id, size)
		*c.out = append(out, b[n:n+size]...)
		s.send -= int64(size)
		c.send -= int64(size)
		if n += size; n == len(b) || size >= SmallUpdate { // else its windows are tiny
			c.patience.gain(gainSent)
		}
		if n == len(b) {
			return n
		}
	}
}

// Reset ends the stream, whatever is still on its way. Nothing is told to its
// receiver any more.
func (s *Stream) Reset(code Code) {
	c := s.c
	c.mu.Lock()
	if !s.over {
		if s.sentEnded { // it was answered, and what else the peer sends is not needed
			c.patience.gain(gainRequest)
		}
		c.sendReset(s.id, code)
		c.bury(s, brokenStream(s.id, code, "it was reset here"), true)
	}
	c.mu.Unlock()
}

// Release gives the place of the stream back: its owner is done with it. One
// that is still open is reset. What it holds is dropped.
func (s *Stream) Release(code Code) {
	s.Reset(code)
	c := s.c
	c.mu.Lock()
	if s.place {
		s.place = false
		c.held--
	}
	c.mu.Unlock()
	s.leave()
}
