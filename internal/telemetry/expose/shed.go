package expose

import (
	"container/list"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// shedding is a listener of which at most most connections are open that have
// said nothing yet, and as many that have: one more closes the one of its kind
// that has been open longest. A probe sends its request with the connection and
// is answered within a millisecond, so what is closed is one whose client
// stalls; none waits behind it.
type shedding struct {
	net.Listener
	most int

	mu             sync.Mutex // guards the following
	silent, spoken list.List  // of *shed, the oldest first
}

func newShedding(l net.Listener, most int) *shedding { return &shedding{Listener: l, most: most} }

// Accept implements net.Listener.
func (l *shedding) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &shed{Conn: raw, from: l}
	if hasSpoken(raw) { // most have, as their request came with them
		c.once.Do(func() { l.join(c, &l.spoken) })
	} else {
		l.join(c, &l.silent)
	}
	return c, nil
}

// hasSpoken reports whether something was sent that can be read.
func hasSpoken(c net.Conn) bool {
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	err = raw.Control(func(fd uintptr) {
		var one [1]byte
		n, _, _ = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	})
	return err == nil && n > 0
}

// join puts c among those of its kind and closes the oldest of them where there
// are too many.
func (l *shedding) join(c *shed, kind *list.List) {
	l.mu.Lock()
	if c.closed {
		l.mu.Unlock()
		return
	}
	c.leave()
	c.kind, c.place = kind, kind.PushBack(c)
	var oldest *shed
	if kind.Len() > l.most {
		oldest, _ = kind.Front().Value.(*shed)
	}
	l.mu.Unlock()
	if oldest != nil {
		_ = oldest.Close()
	}
}

// shed is one connection.
type shed struct {
	net.Conn
	from *shedding
	once sync.Once // it has spoken

	kind   *list.List    // guarded by from.mu, as is the following
	place  *list.Element // nil once it is closed
	closed bool
}

// Read implements net.Conn.
func (c *shed) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.once.Do(func() { c.from.join(c, &c.from.spoken) })
	}
	return n, err
}

// leave takes c from where it is, with from.mu held.
func (c *shed) leave() {
	if c.place != nil {
		c.kind.Remove(c.place)
		c.place = nil
	}
}

// Close implements net.Conn.
func (c *shed) Close() error {
	c.from.mu.Lock()
	c.leave()
	c.closed = true
	c.from.mu.Unlock()
	return c.Conn.Close()
}
