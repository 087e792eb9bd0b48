package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// ofThisNetwork reports whether a listening socket accepts what is sent to this
// process's network namespace. Unix sockets are found by their paths, which
// network namespaces do not share out.
func ofThisNetwork(l net.Listener) (bool, error) {
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return true, nil
	}
	theirs, err := networkOf(tcp)
	if errors.Is(err, unix.ENOPROTOOPT) { // before Linux 5.14
		return taken(tcp.Addr())
	}
	if err != nil {
		return false, fmt.Errorf("ask for its network namespace: %w", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("ask for our network namespace: %w", err)
	}
	defer unix.Close(fd)
	ours, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return false, fmt.Errorf("ask for our network namespace: %w", err)
	}
	return theirs == ours, nil
}

// networkOf returns the cookie of the socket's network namespace: no two that
// exist at one time have the same.
func networkOf(c syscall.Conn) (cookie uint64, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	if controlErr := raw.Control(func(fd uintptr) {
		cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	}); controlErr != nil {
		return 0, controlErr
	}
	return cookie, err
}

// taken reports whether somebody listens at an address here: then it is the
// socket that was handed to us, for two cannot.
func taken(at net.Addr) (bool, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), at.Network(), at.String())
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return true, nil
	case errors.Is(err, unix.EADDRNOTAVAIL): // an address that this namespace does not have
		return false, nil
	case err != nil:
		return false, fmt.Errorf("find out whether it is of this network: %w", err)
	}
	return false, l.Close()
}
