package proxy

import (
	"errors"
	"io"
	"runtime"
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
// its peer. The methods of a nil *turns do nothing.
type turns struct {
	c       *conn
	end     end
	until   time.Time // the handshake's deadline
	has     bool
	had     bool // one before
	written int
	gave    int // how many times it had to wait for its peer

	queued time.Duration // waited for turns
	waited time.Duration // waited for the peer
	since  time.Time     // when it began to wait for the peer; zero while it does not
}

// take waits for a turn, unless it has one. Handshakes that have begun come
// before those that have not: what was put into them is not to be lost. A peer
// that has gone while it waited is none to work for.
func (t *turns) take() error {
	if t == nil || t.has {
		return nil
	}
	t.c.l.heard(t.c)
	t.answered()
	if t.c.l.handshakes.try() {
		t.has, t.had = true, true
		return nil
	}
	timer := time.NewTimer(time.Until(t.until))
	defer timer.Stop()
	begin := time.Now()
	defer func() { t.queued += time.Since(begin) }()
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

// give gives the turn back because the peer is waited for.
func (t *turns) give() {
	if t == nil || !t.has {
		return
	}
	t.has, t.since = false, time.Now()
	t.c.l.handshakes.give()
	t.gave++
	if t.c.request.Direction == policy.Inbound {
		t.c.l.waits(t.c, t.gave > manyWaits)
	}
}

// manyWaits is after how many waits for it a client goes first when others want
// its place, however short each of them was: who drips its handshake would
// never be the one that was waited for longest. Most are waited for twice.
const manyWaits = 16

// answered notes that the peer is waited for no more.
func (t *turns) answered() {
	if !t.since.IsZero() {
		t.waited += time.Since(t.since)
		t.since = time.Time{}
	}
}

// muchLate is how long a peer that is in good order waits for us at least.
const muchLate = time.Second

// late reports whether the peer had to wait for us, and longer than we waited
// for it: that it lost patience, or did not do its part in what time was left,
// says nothing of it.
func (t *turns) late() bool { return t.queued >= muchLate && t.queued > t.waited }

// roomForSure is what a fresh socket takes without waiting for its peer
// (tcp(7): tcp_wmem is 16 KiB, of which a part is the kernel's own).
const roomForSure = 8 << 10

// write writes to c, and gives the turn back where that might have to wait.
func (t *turns) write(c end, b []byte) (int, error) {
	if t == nil || !t.has {
		return c.Write(b)
	}
	if t.written += len(b); t.written <= roomForSure {
		return c.Write(b)
	}
	t.give()
	n, err := c.Write(b)
	if err != nil {
		return n, err
	}
	return n, t.take()
}

// hasGone reports whether the far end of a socket was closed. In a handshake
// nobody closes half of it.
func hasGone(c end) (gone bool) {
	raw := rawOf(c)
	if raw == nil {
		return false
	}
	err := raw.Control(func(fd uintptr) { gone = saysNoMore(int(fd)) })
	return gone || err != nil
}

// inTurn runs the TLS handshake of s, computing in turn. It reports whether the
// peer had to wait for that for long.
func (c *conn) inTurn(s *secured, within time.Duration) (late bool, err error) {
	t := &turns{c: c, end: s.wire.end, until: time.Now().Add(within)}
	if c.request.Direction == policy.Outbound { // a server has nothing to do before it has read
		if err := t.take(); err != nil {
			return t.late(), err
		}
	}
	s.wire.turns = t
	err = s.Handshake()
	s.wire.turns = nil
	if t.has {
		c.l.handshakes.give()
	}
	c.l.heard(c)
	t.answered()
	return t.late(), err
}

// waits notes that a connection waits for its client to say or prove who it
// is, and whether it is the first to go.
func (l *listener) waits(c *conn, first bool) {
	if c.request.Direction != policy.Inbound && !c.began.ProxyProtocol.trusts(c.down) {
		return // a caller may wait for the other side to speak first
	}
	l.mu.Lock()
	if first {
		c.silent = l.silent.PushFront(c)
	} else {
		c.silent = l.silent.PushBack(c)
	}
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
// for, the one that has been there for longest. Where none is, it will be the
// next one.
func (p *Proxy) makeRoom() {
	oldest := p.longestSilent()
	if oldest == nil {
		p.want(true)
		oldest = p.longestSilent() // one may have come before it could learn that
	}
	if oldest != nil {
		oldest.makeRoom()
	}
}

// longestSilent returns the listener of that connection.
func (p *Proxy) longestSilent() (oldest *listener) {
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
	return oldest
}

// makeRoom ends the connection whose client was waited for longest. Where none
// is, it will be the next one.
func (l *listener) makeRoom() {
	for {
		l.mu.Lock()
		first := l.silent.Front()
		l.wanted = first == nil
		if first == nil {
			l.mu.Unlock()
			return
		}
		c := l.silent.Remove(first).(*conn)
		c.silent = nil
		l.mu.Unlock()
		if c.giveUp() {
			return
		}
	}
}

// giveUp ends a connection whose client is waited for, unless that has proved
// itself a moment ago.
func (c *conn) giveUp() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing == nil && c.phase != opening {
		return false
	}
	c.kill(closing{"error", "we waited for its TLS handshake, and others wanted its place: the connection limit is reached"})
	return true
}
