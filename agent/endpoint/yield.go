package endpoint

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/narthex-id/narthex/internal/socket"
)

// Socket returns the listening socket, for a process that takes this one's
// place, and whether the file at its path is ours to remove. It stays the
// server's.
func (s *Server) Socket() (_ net.Listener, owned bool) {
	if s.socket == nil {
		return s.listener.Listener, false
	}
	return s.socket.UnixListener, s.socket.Owned()
}

// InPlace reports whether a socket is at the path that addr says.
func InPlace(addr string) bool {
	path, err := socket.Path(addr)
	if err != nil {
		return false
	}
	info, err := os.Lstat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// Own makes the file of a listener that was handed over ours, so that it is
// removed at the end. It is for when the process before us has let go.
func (s *Server) Own() error {
	if s.socket == nil {
		return errors.New("own the socket: it is not one of a path")
	}
	return s.socket.Own()
}

// Pause stops accepting. Calls that are there are still answered with what is
// known, and a Serve that ends while the server is paused gives those without
// an answer a moment for it. given says that another process has the socket: who
// connects waits until that one accepts, and the socket's file is left alone.
func (s *Server) Pause(given bool) {
	s.given.Store(given)
	s.yielding.Store(true)
	s.listener.gate.shut()
	s.setAcceptDeadline(time.Unix(1, 0))
}

// Resume goes on after Pause, as if nothing had been.
func (s *Server) Resume() {
	s.yielding.Store(false)
	s.given.Store(false)
	s.setAcceptDeadline(time.Time{})
	s.listener.gate.open()
}

// setAcceptDeadline wakes an Accept that waits. It is of this process alone,
// whoever else has the socket.
func (s *Server) setAcceptDeadline(at time.Time) {
	if l, ok := s.listener.Listener.(interface{ SetDeadline(time.Time) error }); ok {
		_ = l.SetDeadline(at) // fails on a closed listener only
	}
}

// Close closes the listener, and ends the wait of an Accept.
func (l *listener) Close() error {
	err := l.Listener.Close()
	l.gate.open()
	return err
}

// gate is shut while nobody may be accepted.
type gate struct {
	mu     sync.Mutex    // guards the following
	opened chan struct{} // closed when the gate is opened; nil: it is open
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opened == nil {
		g.opened = make(chan struct{})
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opened != nil {
		close(g.opened)
		g.opened = nil
	}
}

// wait returns once the gate is open, and whether it was shut.
func (g *gate) wait() bool {
	g.mu.Lock()
	opened := g.opened
	g.mu.Unlock()
	if opened == nil {
		return false
	}
	<-opened
	return true
}
