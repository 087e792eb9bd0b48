package http2

import (
	"sync"

	"github.com/narthex-id/narthex/proxy/http1"
)

// This file is content on its way to its receiver. What is not taken at once is
// held, in as much memory as the windows allow, and at most smallChunk more for
// each stream, or a chunk where it holds more than that.

// The sizes of what it is held in, in bytes. Many streams hold a little each.
const (
	smallChunk = 2 << 10
	chunkSize  = MaxFrame
)

var (
	smallChunks = sync.Pool{New: func() any { b := make([]byte, 0, smallChunk); return &b }}
	chunks      = sync.Pool{New: func() any { b := make([]byte, 0, chunkSize); return &b }}
)

// deliver offers content to the receiver, behind what is held.
func (s *Stream) deliver(b []byte, ended bool) {
	s.order.Lock()
	defer s.unlock()
	if s.gone.Load() {
		s.Credit(len(b))
		return
	}
	if len(s.chunks) == 0 && !s.heldEnd {
		n := s.receiver.Data(b, ended)
		s.Credit(n)
		if n == len(b) && n > 0 {
			return
		}
		b = b[n:]
	}
	s.hold(b)
	s.heldEnd = s.heldEnd || ended
}

// hold keeps a copy, with s.order held.
func (s *Stream) hold(b []byte) {
	for len(b) > 0 {
		if n := len(s.chunks); n == 0 || len(*s.chunks[n-1]) == cap(*s.chunks[n-1]) {
			from := &chunks
			if n == 0 && len(b) <= smallChunk {
				from = &smallChunks
			}
			s.chunks = append(s.chunks, from.Get().(*[]byte))
		}
		last := s.chunks[len(s.chunks)-1]
		n := min(len(b), cap(*last)-len(*last))
		*last = append(*last, b[:n]...)
		b = b[n:]
	}
}

// Credit tells the peer that it may send so many bytes more: those that were
// taken of Next. What Data and Held take is seen to.
func (s *Stream) Credit(n int) {
	if n == 0 {
		return
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.c.credit(s, int64(n))
}

// Held offers what is held, as Receiver.Data does, until less than all of it is
// taken, and then the trailers. It is not to be called from within the
// receiver's methods of this stream.
func (s *Stream) Held(take func(b []byte, ended bool) int) {
	s.order.Lock()
	defer s.unlock()
	for len(s.chunks) > 0 {
		first := s.chunks[0]
		last := s.heldEnd && len(s.chunks) == 1 && s.trailers == nil
		n := take(*first, last)
		s.Credit(n)
		if n < len(*first) {
			*first = (*first)[:copy(*first, (*first)[n:])]
			return
		}
		s.give(first)
		if last {
			s.heldEnd = false
			return
		}
	}
	switch {
	case s.trailers != nil:
		fields := s.trailers
		s.trailers, s.heldEnd = nil, false
		s.receiver.Trailers(fields)
	case s.heldEnd && take(nil, true) == 0:
		s.heldEnd = false
	}
}

func (s *Stream) give(first *[]byte) {
	*first = (*first)[:0]
	if cap(*first) == smallChunk {
		smallChunks.Put(first)
	} else {
		chunks.Put(first)
	}
	s.chunks[0] = nil
	if s.chunks = s.chunks[1:]; len(s.chunks) == 0 {
		s.chunks = nil
	}
}

// Next is for receivers that take nothing in Data: it appends all that is held
// to b, up to its capacity, and reports whether that was the end of it, with the
// trailers if there were any. The peer is to be told by Credit.
func (s *Stream) Next(b []byte) (got []byte, ended bool, trailers []http1.Field) {
	s.order.Lock()
	defer s.unlock()
	for len(s.chunks) > 0 && len(b) < cap(b) {
		first := s.chunks[0]
		n := min(len(*first), cap(b)-len(b))
		b = append(b, (*first)[:n]...)
		if n < len(*first) {
			*first = (*first)[:copy(*first, (*first)[n:])]
			break
		}
		s.give(first)
	}
	if len(s.chunks) > 0 || !s.heldEnd {
		return b, false, nil
	}
	return b, true, s.trailers
}

// drop lets go of what is held, with s.order held.
func (s *Stream) drop() {
	left := 0
	for len(s.chunks) > 0 {
		left += len(*s.chunks[0])
		s.give(s.chunks[0])
	}
	s.heldEnd, s.trailers = false, nil
	s.Credit(left)
}
