package expose

import (
	"container/list"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// shedding is a listener of which at most most connections are open that have
// said nothing yet, and about as many that have: for one more, the one of its
// kind that has been open longest is closed. A probe sends its request with the
// connection and is answered within a millisecond, so what is closed is one
// whose client stalls.
//
// What is young is not closed, so that on a slow machine a request has the time
// to arrive and its answer to leave; further connections wait in the kernel's
// queue until one is old enough: a crowd of silent ones holds a probe up by
// young for each most that are before it there. Accept is for one goroutine at a time.
type shedding struct {
	net.Listener
	most int
	left chan struct{} // told that a connection has gone
	end  chan struct{} // closed by Close
	stop sync.Once

	mu             sync.Mutex // guards the following
	silent, spoken list.List  // of *shed, the oldest first
}

// young is how long a connection is safe from those that come after it.
const young = 100 * time.Millisecond

func newShedding(l net.Listener, most int) *shedding {
	return &shedding{Listener: l, most: most, left: make(chan struct{}, 1), end: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *shedding) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &shed{Conn: raw, from: l, since: time.Now()}
	for {
		wait := l.admit(c)
		if wait == 0 {
			return c, nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-l.left:
		case <-l.end:
			timer.Stop()
			_ = raw.Close()
			return nil, net.ErrClosed
		}
		timer.Stop()
	}
}

// Close implements net.Listener: it ends an Accept that waits for room, too.
func (l *shedding) Close() error {
	l.stop.Do(func() { close(l.end) })
	return l.Listener.Close()
}

// admit takes c in, in place of the oldest where there is no room, or returns
// how long that one is still young.
func (l *shedding) admit(c *shed) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	kind := &l.silent
	if hasSpoken(c.Conn) { // most have, as their request came with them
		kind = &l.spoken
	}
	for full := l.full(kind); full != nil; full = l.full(kind) {
		oldest, _ := full.Front().Value.(*shed)
		if full == &l.silent && hasSpoken(oldest.Conn) { // and was not read yet
			oldest.move(&l.spoken)
			continue
		}
		if age := time.Since(oldest.since); age < young {
			return young - age
		}
		oldest.leave()
		_ = oldest.Conn.Close()
	}
	c.move(kind)
	return 0
}

// full returns which connections are too many for one more of that kind, with
// l.mu held; nil: none are. Those that have spoken can be more than most: the
// silent ones become such.
func (l *shedding) full(kind *list.List) *list.List {
	switch {
	case kind.Len() >= l.most:
		return kind
	case l.silent.Len()+l.spoken.Len() >= 2*l.most:
		return &l.spoken
	}
	return nil
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

// shed is one connection.
type shed struct {
	net.Conn
	from  *shedding
	since time.Time // it was accepted

	kind  *list.List    // guarded by from.mu, as is the following
	place *list.Element // nil before it is taken in, and once it is closed
}

// Read implements net.Conn.
func (c *shed) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.from.mu.Lock()
		if c.place != nil && c.kind == &c.from.silent {
			c.move(&c.from.spoken)
		}
		c.from.mu.Unlock()
	}
	return n, err
}

// move puts c last among those of a kind, with from.mu held.
func (c *shed) move(kind *list.List) {
	c.leave()
	c.kind, c.place = kind, kind.PushBack(c)
}

// leave takes c from where it is, with from.mu held.
func (c *shed) leave() {
	if c.place != nil {
		c.kind.Remove(c.place)
		c.place = nil
		select {
		case c.from.left <- struct{}{}:
		default:
		}
	}
}

// Close implements net.Conn.
func (c *shed) Close() error {
	c.from.mu.Lock()
	c.leave()
	c.from.mu.Unlock()
	return c.Conn.Close()
}
