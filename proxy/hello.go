package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file is about clients that connect and say nothing, which costs them
// nothing either. Until the first TLS record of a client is there, its
// connection takes no part in a handshake, holds no buffer, and is given less
// time than a handshake.

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
	c.deadlines[endHello] = deadline{}
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
	return saysNoMore(fd) // in the midst of it
}
