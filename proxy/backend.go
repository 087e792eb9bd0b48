package proxy

import (
	"net"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// backend is a connection to an endpoint of a listener's target. It is lent for
// one request at a time and lies idle between them.
type backend struct {
	backed
	end // raw, or mTLS on it
	in  intake

	socket syscall.RawConn
	peek   func(fd uintptr) // looks whether it is quiet, made once
	quiet  bool
	one    [1]byte

	stay stay
}

// backed is what is known of a connection to a service: outbound, whom it was
// made to and as whom.
type backed struct {
	raw        net.Conn // as dialled
	own        *identity.Identity
	peer       policy.Peer
	standing   *identity.Standing
	serverName string
	proved     telemetry.Access // what its handshake came to: TLS and server name alone
}

func newBackend(known backed, e end) *backend {
	b := &backend{backed: known, end: e, socket: rawOf(known.raw)}
	b.in.src = inletOf(e)
	b.peek = b.look
	return b
}

// look notes whether there is nothing to read, and no end either.
func (b *backend) look(fd uintptr) {
	// unix.Recvfrom makes an address for every call.
	_, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b.one)), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0) //nolint:gosec // one byte that lives as long as b
	b.quiet = errno == unix.EAGAIN
}

// Alive implements upstream.Keeper: the far end has not closed, has sent
// nothing that nobody asked for, and its SVID has not expired.
func (b *backend) Alive() bool {
	if !b.untouched() {
		return false
	}
	if b.standing != nil && !time.Now().Before(b.standing.NotAfter()) {
		return false
	}
	if b.socket == nil {
		return true
	}
	b.quiet = false
	return b.socket.Control(b.peek) == nil && b.quiet
}

// untouched reports whether nothing came that nobody has asked for.
func (b *backend) untouched() bool {
	b.stay.mu.Lock()
	defer b.stay.mu.Unlock()
	if b.stay.with || b.stay.gone { // who stays with it reads it
		return !b.stay.gone
	}
	if len(b.in.b) > 0 || b.in.err != nil {
		return false
	}
	t, ok := b.end.(*secured)
	return !ok || t.wire.buf == nil
}

// rest gives back what an idle connection does not need.
func (b *backend) rest() {
	b.in.drop()
	b.in.src.rest()
}
