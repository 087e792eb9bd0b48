package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file is listening sockets: opened, taken over, given back.

const unixPrefix = "unix:"

// maxUnixPath is the longest path a unix socket can have: sockaddr_un holds
// 108 bytes, the last of them zero (unix(7)).
const maxUnixPath = 107

// resumeSocket makes a socket that was paused accept again.
func (l *listener) resumeSocket() {
	if d, ok := l.socket.(interface{ SetDeadline(time.Time) error }); ok {
		_ = d.SetDeadline(time.Time{})
	}
}

// closeSocket closes the socket and removes its file, if the file is still
// ours.
func (l *listener) closeSocket() {
	_ = l.socket.Close()
	if l.unlink == nil {
		return
	}
	path := strings.TrimPrefix(l.bind, unixPrefix)
	if now, err := os.Lstat(path); err == nil && os.SameFile(now, l.unlink) {
		_ = os.Remove(path)
	}
}

// open opens the listening socket.
func (l *listener) open(s *settings) error {
	if s.Socket != nil {
		l.socket = s.Socket
	}
	if l.socket != nil {
		return nil
	}
	network, address := splitAddress(s.Bind)
	if network == "unix" {
		return l.bindUnix(s, address)
	}
	lc := net.ListenConfig{KeepAlive: -1, Control: keepAlive} // -1: package net is not to set it, by four calls, on each connection
	lc.SetMultipathTCP(false)                                 // nobody asks for it, and it costs on every segment
	socket, err := lc.Listen(context.Background(), network, address)
	if err != nil {
		return explainBind(s.Bind, err)
	}
	l.socket = socket
	return nil
}

// Hosts that are gone are noticed after (1+keepAliveProbes) × keepAliveEvery of
// silence, as package net would have it.
const (
	keepAliveEvery  = 15 // seconds
	keepAliveProbes = 9
)

// keepAlive sets TCP keep-alive on a listening socket: what it accepts
// inherits it (tcp(7)).
func keepAlive(_, _ string, c syscall.RawConn) error {
	var errs error
	err := c.Control(func(fd uintptr) {
		errs = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveEvery),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveEvery),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveProbes),
		)
	})
	return errors.Join(err, errs)
}

// bindUnix makes a unix socket. A stale one is replaced, one that somebody
// serves is not.
func (l *listener) bindUnix(s *settings, path string) error {
	mode := s.UnixMode
	if err := removeStale(path); err != nil {
		return err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// bind(2) gives the file the socket's own mode less the umask, so
		// there is no moment at which it is open to more than it should be.
		var chmodErr error
		if err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), uint32(mode.Perm())) }); err != nil {
			return err
		}
		return chmodErr
	}}
	socket, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return explainBind(s.Bind, err)
	}
	socket.(*net.UnixListener).SetUnlinkOnClose(false) // another process may have taken the path by then
	l.socket = socket
	if err := os.Chmod(path, mode.Perm()); err != nil {
		_ = socket.Close()
		return fmt.Errorf("bind unix:%s: set mode %o: %w", path, mode.Perm(), err)
	}
	if l.unlink, err = os.Lstat(path); err != nil {
		_ = socket.Close()
		return fmt.Errorf("bind unix:%s: %w", path, err)
	}
	return nil
}

// explainBind says of a socket that cannot be opened what to do next.
func explainBind(bind string, err error) error {
	path, isUnix := strings.CutPrefix(bind, unixPrefix)
	var next string
	switch {
	case isUnix && errors.Is(err, fs.ErrNotExist):
		next = fmt.Sprintf("there is no directory %s; make it, or name another path", filepath.Dir(path))
	case isUnix && errors.Is(err, fs.ErrPermission):
		next = fmt.Sprintf("not allowed; let the user this process runs as write to %s, or name another path", filepath.Dir(path))
	case errors.Is(err, syscall.EADDRINUSE):
		next = "another program listens there; stop it, or give the listener another bind"
	case errors.Is(err, fs.ErrPermission):
		next = "not allowed; give the listener a port above 1023, or this process the capability CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		next = "this host has no such address; give the listener one it has, or :port for all of them"
	default:
		return fmt.Errorf("bind %s: %w", bind, err)
	}
	return fmt.Errorf("bind %s: %s: %w", bind, next, err)
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return explainBind(unixPrefix+path, err)
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("bind unix:%s: the file is there and is no socket: remove it or name another path", path)
	}
	probe, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = probe.Close()
		return fmt.Errorf("bind unix:%s: another process serves it: stop it or name another path", path)
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("bind unix:%s: a socket is there that we may not connect to, so we cannot tell whether it is served: remove it, or name another path: %w", path, err)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("bind unix:%s: cannot tell whether the socket that is there is served: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("bind unix:%s: replace a stale socket: %w", path, err)
	}
	return nil
}

func checkUnixPath(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return fmt.Errorf("unix:%s: the path must be absolute", path)
	case len(path) > maxUnixPath:
		return fmt.Errorf("unix:%s: the path has %d bytes, a unix socket's can have %d: use a shorter one", path, len(path), maxUnixPath)
	}
	return nil
}

func splitAddress(address string) (network, rest string) {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return "unix", path
	}
	return "tcp", address
}
