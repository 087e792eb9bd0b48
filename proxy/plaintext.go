package proxy

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is about plaintext on a permissive listener: how it is told from
// TLS, and who it is to the policy. Who still speaks it is in sources.go.

// plaintextAfter is how long a client of a permissive listener may say nothing
// before it is taken for one that speaks plaintext and waits for the server to
// speak first, as those of SMTP, SSH and MySQL do. It is long enough for a TLS
// hello that was lost once: the sender repeats it after 200 ms at the soonest
// (Linux, TCP_RTO_MIN).
const plaintextAfter = 300 * time.Millisecond

// speech is what a client's first bytes are.
type speech int

const (
	saysNothing speech = iota // yet
	maybeTLS                  // too few bytes to tell
	saysTLS
	saysPlaintext
	hasLeft // without a word
)

// headOfHello is how many bytes tell a TLS ClientHello: the head of its record
// (RFC 8446 §5.1) and the type of the handshake message (§4).
const headOfHello = 6

// speechOf tells a TLS ClientHello by its first bytes, at least one and at
// most headOfHello: a handshake record of version 3.x that begins with a
// message of type client_hello.
func speechOf(b []byte) speech {
	const (
		handshakeRecord = 22
		major           = 3
		clientHello     = 1
	)
	for at, want := range map[int]byte{0: handshakeRecord, 1: major, headOfHello - 1: clientHello} {
		if at < len(b) && b[at] != want {
			return saysPlaintext
		}
	}
	if len(b) < headOfHello {
		return maybeTLS
	}
	return saysTLS
}

// peekSpeech looks at the first bytes without taking them.
func peekSpeech(fd int) speech {
	var head [headOfHello]byte
	n, _, err := unix.Recvfrom(fd, head[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return saysNothing
	case err != nil, n <= 0:
		return hasLeft
	}
	said := speechOf(head[:n])
	if said == maybeTLS && saysNoMore(fd) {
		return saysTLS // and will not end its hello, which the handshake says
	}
	return said
}

// saysNoMore reports whether the far end will send no more.
func saysNoMore(fd int) bool {
	events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		_, err := unix.Poll(events, 0)
		if errors.Is(err, unix.EINTR) { // also where it had not to wait
			continue
		}
		return err != nil || events[0].Revents != 0
	}
}

// speaksPlaintext waits until it is plain what the client of a permissive
// listener speaks. A beginning that can still be TLS is waited for as long as
// a hello is; what ends that wait is the table.
func (c *conn) speaksPlaintext(sock syscall.RawConn, within time.Duration) bool {
	var said speech
	patience := min(plaintextAfter, within/2)
	if c.began.HTTP != nil { // whose clients speak first: silence is no plaintext
		patience = within
	}
	if c.down.SetReadDeadline(time.Now().Add(patience)) != nil {
		return false // the handshake finds what is wrong with the socket
	}
	err := sock.Read(func(fd uintptr) bool {
		said = peekSpeech(int(fd))
		return said != saysNothing
	})
	_ = c.down.SetReadDeadline(time.Time{}) // as above
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// On a busy machine the time may be over before we come to look.
		err = sock.Control(func(fd uintptr) { said = peekSpeech(int(fd)) })
		if err == nil && said == saysNothing {
			return c.began.HTTP == nil
		}
	}
	if said == maybeTLS {
		_ = sock.Read(func(fd uintptr) bool {
			said = peekSpeech(int(fd))
			return said != maybeTLS && said != saysNothing
		})
	}
	return said == saysPlaintext
}

// identifyPlaintext notes that the client is nobody we know, and counts it by
// where it comes from. From here on changes ask the connection.
func (c *conn) identifyPlaintext(s *session) {
	c.l.meters.plaintext.Inc()
	c.l.plaintext.add(c.request.Source.Addr(), c.start)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setEnds(s.identity, policy.Peer{Unauthenticated: true})
}

// inPlaintext reports whether the client speaks plaintext to a listener that
// wants TLS, with c.mu held.
func (q *question) inPlaintext() bool { return q.request.From.Unauthenticated }

// peerName returns who a peer is, for people: its SPIFFE ID, the word for
// plaintext, or nothing.
func peerName(p *policy.Peer) string {
	switch {
	case p.Unauthenticated:
		return policy.Unauthenticated
	case p.ID.IsZero():
		return ""
	}
	return p.ID.String()
}
