package proxy

import (
	"errors"
	"io"
	"runtime"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is who computes. A handshake is some tenths of a millisecond of
// work for us and next to none for a peer, so that only a few of a listener's
// handshakes compute at once, the others in the order in which they came. What
// is established already waits behind those few and never behind a thousand.
//
// A handshake that waits for its peer has no turn: peers that stall keep
// nobody from anything, but for a connection of the listener's limit, and of
// those the one that is waited for longest goes when others want its place.

// turnsPerCPU is how many handshakes of a listener compute at once, by CPU:
// more than one, because a goroutine that computes may have to wait for a CPU.
const turnsPerCPU = 2

func defaultMaxHandshakes() int { return turnsPerCPU * runtime.GOMAXPROCS(0) }

// errNoTurn is why a handshake ended that got no turn within its time.
var errNoTurn = errors.New("too many handshakes at once")

// turns is one end during its handshake: it has a turn but while it waits for
// its peer.
type turns struct {
	end
	c       *conn
	until   time.Time // the handshake's deadline
	has     bool
	had     bool // one before
	written int
}

// take waits for a turn. Handshakes that have begun come before those that
// have not: what was put into them is not to be lost. A peer that has gone
// while it waited is none to work for.
func (t *turns) take() error {
	if t.c.l.handshakes.try() {
		t.has, t.had = true, true
		return nil
	}
	timer := time.NewTimer(time.Until(t.until))
	defer timer.Stop()
	if !t.c.l.handshakes.take(nil, timer.C, t.had) {
		return errNoTurn
	}
	if hasGone(t.end) {
		t.c.l.handshakes.give()
		return io.EOF
	}
	t.has, t.had = true, true
	return nil
}

// hasGone reports whether the far end of a socket was closed. In a handshake
// nobody closes half of it.
func hasGone(c end) (gone bool) {
	raw, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	sock, err := raw.SyscallConn()
	if err != nil {
		return true
	}
	err = sock.Control(func(fd uintptr) { gone = finished(int(fd)) })
	return gone || err != nil
}

func (t *turns) give() {
	if t.has {
		t.has = false
		t.c.l.handshakes.give()
	}
}

// Read gives the turn back until the peer has sent something.
func (t *turns) Read(b []byte) (int, error) {
	t.give()
	if t.c.request.Direction == policy.Inbound {
		t.c.l.waits(t.c)
	}
	n, err := t.end.Read(b)
	t.c.l.heard(t.c)
	if err != nil {
		return n, err // what is left to do is an alert
	}
	return n, t.take()
}

// roomForSure is what a fresh socket takes without waiting for its peer
// (tcp(7): tcp_wmem is 16 KiB, of which a part is the kernel's own).
const roomForSure = 8 << 10

// Write gives the turn back where it might have to wait.
func (t *turns) Write(b []byte) (int, error) {
	if t.written += len(b); t.written <= roomForSure || !t.has {
		return t.end.Write(b)
	}
	t.give()
	n, err := t.end.Write(b)
	if err != nil {
		return n, err
	}
	return n, t.take()
}

// inTurn runs the TLS handshake of s, computing in turn.
func (c *conn) inTurn(s *secured, within time.Duration) error {
	t := &turns{end: s.wire.end, c: c, until: time.Now().Add(within)}
	if c.request.Direction == policy.Outbound { // a server has nothing to do before it has read
		if err := t.take(); err != nil {
			return err
		}
	}
	s.wire.end = t
	err := s.Handshake()
	s.wire.end = t.end
	t.give()
	return err
}

// waits notes that a connection waits for its client to say or prove who it
// is.
func (l *listener) waits(c *conn) {
	if c.request.Direction != policy.Inbound && !c.began.ProxyProtocol.trusts(c.down) {
		return // a caller may wait for the other side to speak first
	}
	l.mu.Lock()
	c.silent = l.silent.PushBack(c)
	wanted := l.wanted
	l.mu.Unlock()
	if wanted {
		l.makeRoom()
	}
}

// heard takes it back.
func (l *listener) heard(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.silent != nil {
		l.silent.Remove(c.silent)
		c.silent = nil
	}
}

// want says whether somebody wants the place of the next one.
func (l *listener) want(place bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wanted = place
}

func (p *Proxy) want(place bool) {
	for l := range p.world.Load().listeners {
		l.want(place)
	}
}

// makeRoom ends, of the connections of all listeners whose clients are waited
// for, the one that has been there for longest.
func (p *Proxy) makeRoom() {
	var oldest *listener
	var since time.Time
	for l := range p.world.Load().listeners {
		l.mu.Lock()
		if first := l.silent.Front(); first != nil {
			if start := first.Value.(*conn).start; oldest == nil || start.Before(since) {
				oldest, since = l, start
			}
		}
		l.mu.Unlock()
	}
	if oldest == nil {
		p.want(true)
		return
	}
	oldest.makeRoom()
}

// makeRoom ends the connection whose client was waited for longest. Where none
// is, it will be the next one.
func (l *listener) makeRoom() {
	l.mu.Lock()
	first := l.silent.Front()
	l.wanted = first == nil
	var c *conn
	if first != nil {
		c = l.silent.Remove(first).(*conn)
		c.silent = nil
	}
	l.mu.Unlock()
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kill(closing{"error", "we waited for its TLS handshake, and others wanted its place: the connection limit is reached"})
}
