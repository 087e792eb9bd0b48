package http2

import "sync"

// This file is what is to be sent. It is collected in one buffer, which whoever
// sends takes as a whole: frames of many streams leave together.

// The sizes of the buffers: what most need, and what is bounded by MaxUnsent and
// MaxControl, with a head more.
const (
	smallOut = 4 << 10
	largeOut = MaxUnsent + 2*MaxFrame
)

var (
	smallOuts = sync.Pool{New: func() any { b := make([]byte, 0, smallOut); return &b }}
	largeOuts = sync.Pool{New: func() any { b := make([]byte, 0, largeOut); return &b }}
)

// buffer returns out with room for n more bytes, with c.mu held. What is
// appended to it is to be stored in *c.out.
func (c *Conn) buffer(n int) []byte {
	switch {
	case c.out == nil && n <= smallOut:
		c.out = smallOuts.Get().(*[]byte)
	case c.out == nil:
		c.out = largeOuts.Get().(*[]byte)
	case len(*c.out)+n > cap(*c.out) && cap(*c.out) < largeOut:
		to := largeOuts.Get().(*[]byte)
		*to = append((*to)[:0], *c.out...)
		giveBack(c.out)
		c.out = to
	}
	return *c.out
}

// backlog returns how many bytes wait to be sent, with c.mu held.
func (c *Conn) backlog() int {
	if c.out == nil {
		return 0
	}
	return len(*c.out)
}

func (c *Conn) backlogged() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.backlog() >= MaxUnsent
}

// put stores what a frame was appended to that answers the peer, with c.mu
// held, unless it has read none of many.
func (c *Conn) put(b []byte) *Error {
	c.control += len(b) - len(*c.out)
	*c.out = b
	if c.control > MaxControl {
		return broken(EnhanceYourCalm, "the peer reads no answers to what it sends")
	}
	return nil
}

// Take returns what is to be sent, or nil where nothing is. Once it was sent it
// is to be given back to Sent.
func (c *Conn) Take() *[]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.out
	c.out, c.control = nil, 0
	return out
}

// Sent gives back what Take has returned. Streams that waited for room are to
// be pumped.
func (c *Conn) Sent(b *[]byte) { giveBack(b) }

// Pending reports whether something is to be sent.
func (c *Conn) Pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out != nil
}

func giveBack(b *[]byte) {
	*b = (*b)[:0]
	switch {
	case cap(*b) == smallOut:
		smallOuts.Put(b)
	case cap(*b) >= largeOut && cap(*b) <= 2*largeOut:
		largeOuts.Put(b)
	}
}

// Pump has streams that waited go on where there is room for them, each in its
// turn.
func (c *Conn) Pump() {
	c.mu.Lock()
	for range c.waiting.size {
		s := c.waiting.first(func(s *Stream) bool { return c.roomFor(s) > 0 })
		if s == nil {
			break
		}
		receiver := s.receiver
		c.mu.Unlock()
		receiver.Room()
		c.mu.Lock()
	}
	c.mu.Unlock()
}

// roomFor returns how much of its data a stream may send now, with c.mu held.
func (c *Conn) roomFor(s *Stream) int64 {
	return min(int64(MaxUnsent-c.backlog()), s.send, c.send)
}

// queue is streams in the order in which they came.
type queue struct {
	head, tail *Stream
	size       int
}

func (q *queue) add(s *Stream) {
	s.waits, s.after, s.before = true, nil, q.tail
	if q.tail == nil {
		q.head = s
	} else {
		q.tail.after = s
	}
	q.tail = s
	q.size++
}

// remove takes a stream out, if it is in.
func (q *queue) remove(s *Stream) {
	if !s.waits {
		return
	}
	if s.before == nil {
		q.head = s.after
	} else {
		s.before.after = s.after
	}
	if s.after == nil {
		q.tail = s.before
	} else {
		s.after.before = s.before
	}
	s.waits, s.before, s.after = false, nil, nil
	q.size--
}

// first takes out the first one that is good.
func (q *queue) first(good func(*Stream) bool) *Stream {
	for s := q.head; s != nil; s = s.after {
		if good(s) {
			q.remove(s)
			return s
		}
	}
	return nil
}
