package proxy

import (
	"errors"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// spool is a socket that is written to without waiting: what it does not take
// now is kept until drain. Who reads from one peer can pass on to another by
// it, and is never held up by how slowly that one reads.
type spool struct {
	end   end
	raw   syscall.RawConn
	ready func(fd uintptr) bool // s.try, made once

	unsent atomic.Int64 // bytes of kept, and of what drain is at

	mu      sync.Mutex // guards the following
	kept    []byte     // not sent yet
	collect bool       // nothing is sent before together ends
	drains  bool       // drain is at what came before kept
	trying  []byte     // of try
	sent    int        // likewise
	err     error      // of the socket
}

func newSpool(e end) *spool {
	s := &spool{end: e, raw: rawOf(e)}
	s.ready = s.try
	return s
}

// spoolSize is how much is collected at most without allocating, in bytes: four
// TLS records.
const spoolSize = 66 << 10

var spools = sync.Pool{New: func() any { b := make([]byte, 0, spoolSize); return &b }}

// write implements what io.Writer does; only the socket's errors come of it.
func (s *spool) write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	n := 0
	if len(s.kept) == 0 && !s.collect && !s.drains {
		if n = s.attempt(b); s.err != nil {
			return n, s.err
		}
	}
	if len(s.kept) > maxKept {
		s.err = errTakesNothing
		return n, s.err
	}
	s.keep(b[n:])
	return len(b), nil
}

// maxKept bounds what is kept, in bytes. Who sends waits once there is any: more
// comes of TLS alone, which answers a peer that asks for new keys.
const maxKept = 1 << 20

var errTakesNothing = errors.New("it takes nothing of what it is sent")

func (s *spool) keep(b []byte) { // with s.mu held
	s.kept = append(s.kept, b...)
	s.unsent.Add(int64(len(b)))
}

// attempt sends what the socket takes of b, with s.mu held.
func (s *spool) attempt(b []byte) int {
	if s.raw == nil { // no socket: there is nothing to wait for either
		n, err := s.end.Write(b)
		s.err = err
		return n
	}
	s.trying, s.sent = b, 0
	if err := s.raw.Write(s.ready); err != nil {
		s.err = err
	}
	s.trying = nil
	return s.sent
}

// try writes to the socket once, as often as it takes something.
func (s *spool) try(fd uintptr) bool {
	for s.sent < len(s.trying) {
		n, err := unix.Write(int(fd), s.trying[s.sent:])
		switch {
		case err == nil:
			s.sent += n
		case errors.Is(err, unix.EINTR):
		default:
			if !errors.Is(err, unix.EAGAIN) {
				s.err = err
			}
			return true
		}
	}
	return true
}

// together has what write writes leave at once.
func (s *spool) together(write func() error) error {
	s.mu.Lock()
	s.collect = true
	if s.kept == nil {
		s.kept = *spools.Get().(*[]byte)
	}
	s.mu.Unlock()
	err := write()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.collect = false
	if err == nil && s.err == nil && !s.drains {
		s.settle(s.attempt(s.kept))
	}
	return errors.Join(err, s.err)
}

// settle takes what was sent from what is kept, with s.mu held.
func (s *spool) settle(sent int) {
	s.unsent.Add(-int64(sent))
	s.kept = s.kept[:copy(s.kept, s.kept[sent:])]
	if len(s.kept) == 0 {
		giveSpool(s.kept)
		s.kept = nil
	}
}

func giveSpool(b []byte) {
	if cap(b) == spoolSize {
		b = b[:0]
		spools.Put(&b)
	}
}

// pending returns how much is kept. It does not wait for drain.
func (s *spool) pending() int { return int(s.unsent.Load()) }

// drain sends what is kept, and waits for that.
func (s *spool) drain() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && len(s.kept) > 0 {
		out := s.kept
		s.kept, s.drains = nil, true
		s.mu.Unlock() // who reads from the peer is not to wait for it
		_, err := s.end.Write(out)
		s.mu.Lock()
		s.drains = false
		s.unsent.Add(-int64(len(out)))
		giveSpool(out)
		if s.err == nil {
			s.err = err
		}
	}
	if s.err != nil {
		s.unsent.Store(0)
	}
	return s.err
}
