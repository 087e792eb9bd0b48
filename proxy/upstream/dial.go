package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// place is where an endpoint listens: a path, or an IP address and port.
type place struct {
	path string // of a unix socket, or empty
	ip   netip.AddrPort
}

// String is host:port or unix:/path.
func (p place) String() string {
	if p.path != "" {
		return unixPrefix + p.path
	}
	return p.ip.String()
}

// parsePlace reads an address that needs no lookup. Otherwise it returns the
// name that does, and the port.
func parsePlace(address string) (p place, host string, port uint16) {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return place{path: path}, "", 0
	}
	host, word, err := net.SplitHostPort(address)
	if err != nil {
		panic(err) // CheckTarget has seen it
	}
	n, err := strconv.ParseUint(word, 10, 16)
	if err != nil {
		panic(err)
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return place{}, host, uint16(n)
	}
	return place{ip: netip.AddrPortFrom(ip.Unmap(), uint16(n))}, "", 0
}

// near and far make sockets without and with keep-alives. On loopback and unix
// sockets the kernel itself knows when the other end is gone, so a dial sets
// no option for them; another host that is silent is asked as package net does
// by default (after 15 s, every 15 s, 9 times). How long data may stay without
// an acknowledgement is for those who know the connection's timeouts.
//
// They are given IP addresses alone: there is no lookup and no race of address
// families. (Their DialTCP would bind(2) each socket first, which takes a
// local port from all destinations.)
var (
	near = net.Dialer{KeepAlive: -1}
	far  net.Dialer
)

// dial connects to p until the deadline, or until ctx is cancelled. It costs
// what the system calls cost: socket, connect, the wait for it, TCP_NODELAY.
func (p place) dial(ctx context.Context, deadline time.Time) (net.Conn, error) {
	if p.path != "" {
		return p.dialUnix(ctx, deadline)
	}
	d := far
	if p.ip.Addr().IsLoopback() {
		d = near
		d.Control = p.connect
	}
	d.Deadline = deadline
	return d.DialContext(ctx, "tcp", p.ip.String())
}

// connect begins to connect a new socket. On loopback connect(2) says that it
// is in progress and has done it by then, so that the dialer's own connect,
// coming second, finds it done: it neither waits in the poller nor starts a
// goroutine that watches over the wait. Where it is not done yet, or failed,
// the dialer's own connect says so.
func (p place) connect(_, _ string, socket syscall.RawConn) error {
	var to unix.Sockaddr = &unix.SockaddrInet6{Port: int(p.ip.Port()), Addr: p.ip.Addr().As16()}
	if p.ip.Addr().Is4() {
		to = &unix.SockaddrInet4{Port: int(p.ip.Port()), Addr: p.ip.Addr().As4()}
	}
	return socket.Control(func(fd uintptr) { _ = unix.Connect(int(fd), to) })
}

// Where a unix socket's backlog is full, connect(2) says so at once instead
// of waiting as TCP does, so the wait is here.
const (
	minFull = time.Millisecond
	maxFull = 50 * time.Millisecond
)

func (p place) dialUnix(ctx context.Context, deadline time.Time) (net.Conn, error) {
	d := near
	d.Deadline = deadline
	address := net.UnixAddr{Name: p.path, Net: "unix"}
	for pause := minFull; ; pause = min(2*pause, maxFull) {
		c, err := d.DialUnix(ctx, "unix", nil, &address)
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		if time.Now().Add(pause).After(deadline) {
			return nil, fmt.Errorf("the service accepts too slowly, its backlog is full: %w", err)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
	}
}

// timedOut reports whether a dial ended because its time was over.
func timedOut(err error) bool {
	if errors.Is(err, syscall.EAGAIN) { // which calls itself one
		return false
	}
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}
