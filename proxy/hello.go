package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is about clients that connect and say nothing, which costs them
// nothing either. Until the first TLS record of a client is there, its
// connection takes no part in a handshake, holds no buffer, is given less time
// than a handshake, and is the first to go when others want its place.

// helloWithin bounds how long a client may take for its first TLS record,
// within the time of a handshake: enough for a lost packet or two.
const helloWithin = 3 * time.Second

// hear waits for the client's first TLS record, or reports that the client
// speaks plaintext, where it may. The settings of the moment it is there are
// those the connection begins under.
func (c *conn) hear() (plaintext bool, err error) {
	within := min(helloWithin, c.began.Timeouts.Handshake)
	c.endBy(endHello, c.start.Add(within), closing{"error", fmt.Sprintf("the client sent no TLS hello within %s", within)})
	if raw, ok := c.down.(syscall.Conn); ok {
		_, whole := c.down.(*net.TCPConn) // the buffer of a unix socket may have no room for a hello in many writes
		if sock, err := raw.SyscallConn(); err == nil {
			plaintext = c.began.Mode == ModePermissive && c.speaksPlaintext(sock, within)
			if !plaintext {
				_ = sock.Read(func(fd uintptr) bool { return helloIsThere(int(fd), whole) }) // what is wrong with the socket the handshake finds too
			}
		}
	}
	c.l.heard(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ends[endHello] = deadline{}
	c.request.From.Unauthenticated = plaintext
	c.began = c.under(c.l.proxy.world.Load())
	if c.closing != nil {
		c.l.handshaked("timeout")
		return plaintext, refuse("refused", "%s", c.closing.why)
	}
	return plaintext, nil
}

// helloIsThere reports whether the first record, or a part of it, can be read
// without waiting, or it is plain by now that none will come.
func helloIsThere(fd int, whole bool) bool {
	const (
		handshakeRecord = 22
		headSize        = 5
		maxRecord       = 16<<10 + 256 // RFC 8446 §5.2
	)
	var head [headSize]byte
	n, _, err := unix.Recvfrom(fd, head[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case err != nil, n <= 0, !whole, head[0] != handshakeRecord:
		return true
	}
	if n == headSize {
		size := int(binary.BigEndian.Uint16(head[3:]))
		if there, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err != nil || size > maxRecord || there >= headSize+size {
			return true
		}
	}
	return finished(fd) // in the midst of it
}

// waits notes that a connection has yet to send something.
func (l *listener) waits(c *conn) {
	if c.request.Direction != policy.Inbound && !c.began.ProxyProtocol.trusts(c.down) {
		return // a caller may wait for the other side to speak first
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c.silent = l.silent.PushBack(c)
}

// makeRoom ends, of the silent connections of all listeners, the one that has
// been so for longest.
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
	if oldest != nil {
		oldest.makeRoom()
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

// makeRoom ends the connection that has been silent for longest, if there is
// one.
func (l *listener) makeRoom() {
	l.mu.Lock()
	first := l.silent.Front()
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
	c.kill(closing{"error", "it had sent no TLS hello yet, and others wanted its place: the connection limit is reached"})
}
