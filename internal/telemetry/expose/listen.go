package expose

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// listen opens host:port or unix:/path. Its errors name the key that the
// address was read from.
func listen(key, address string) (net.Listener, error) {
	path, isUnix := strings.CutPrefix(address, "unix:")
	var l net.Listener
	var err error
	if isUnix {
		l, err = listenUnix(path)
	} else {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp", address)
	}
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen on %s %s: another program listens there; stop it, or give %s another address (port 0 takes a free one): %w", key, address, key, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("listen on %s %s: not allowed; give %s a port above 1023, or a path in a directory this process may write: %w", key, address, key, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("listen on %s %s: this host has no such address; change %s: %w", key, address, key, err)
	}
	return nil, fmt.Errorf("listen on %s %s: %w", key, address, err)
}

// listenUnix replaces a socket that nobody listens on any more. Owner and
// group may connect.
func listenUnix(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "unix", path)
		if err == nil {
			_ = c.Close()
			return nil, syscall.EADDRINUSE
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove the stale socket: %w", err)
			}
		}
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
