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

// Half-open peers. On loopback and unix sockets there are none, since the
// kernel itself knows when the other end is gone, and a dial sets no option
// for them. To another host, one that is silent for keepIdle is asked every
// keepInterval, and the connection is broken off once nothing it was sent,
// question or data, was acknowledged for userTimeout (tcp(7)): a host that
// vanished is noticed after keepIdle + userTimeout at the latest.
const (
	keepIdle     = 30 * time.Second
	keepInterval = 10 * time.Second
	userTimeout  = 60 * time.Second
)

// near and far make sockets without and with keep-alives. They are given IP
// addresses alone: there is no lookup and no race of address families. (Their
// DialTCP would bind(2) each socket first, which takes a local port from all
// destinations.)
var (
	near = net.Dialer{KeepAlive: -1}
	far  = net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: keepIdle, Interval: keepInterval, Count: int(userTimeout / keepInterval),
	}}
)

// dial connects to p until the deadline, or until ctx is cancelled. It costs
// what the system calls cost: socket, connect, the wait for it, TCP_NODELAY.
func (p place) dial(ctx context.Context, deadline time.Time) (net.Conn, error) {
	if p.path != "" {
		return p.dialUnix(ctx, deadline)
	}
	d := near
	remote := !p.ip.Addr().IsLoopback()
	if remote {
		d = far
	}
	d.Deadline = deadline
	c, err := d.DialContext(ctx, "tcp", p.ip.String())
	if err != nil {
		return nil, err
	}
	if remote {
		if err := setUserTimeout(c.(*net.TCPConn)); err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("dial %s: set TCP_USER_TIMEOUT: %w", p, err)
		}
	}
	return c, nil
}

func setUserTimeout(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	})
	return errors.Join(err, set)
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
