package proxy

import (
	"errors"
	"sync"
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

	mu      sync.Mutex // guards the following
	kept    []byte     // not sent yet
	collect bool       // nothing is sent before flush
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
	if len(s.kept) == 0 && !s.collect {
		if n = s.attempt(b); s.err != nil {
			return n, s.err
		}
	}
	s.kept = append(s.kept, b[n:]...)
	return len(b), nil
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
	if err == nil && s.err == nil {
		s.settle(s.attempt(s.kept))
	}
	return errors.Join(err, s.err)
}

// settle takes what was sent from what is kept, with s.mu held.
func (s *spool) settle(sent int) {
	s.kept = s.kept[:copy(s.kept, s.kept[sent:])]
	if len(s.kept) > 0 {
		return
	}
	if cap(s.kept) == spoolSize {
		b := s.kept
		spools.Put(&b)
	}
	s.kept = nil
}

// pending returns how much is kept.
func (s *spool) pending() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0
	}
	return len(s.kept)
}

// drain sends what is kept, and waits for that.
func (s *spool) drain() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && len(s.kept) > 0 {
		n, err := s.end.Write(s.kept)
		s.settle(n)
		s.err = err
	}
	return s.err
}
