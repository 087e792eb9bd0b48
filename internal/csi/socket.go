package csi

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/socket"
)

// listener is the listener of a socket on which kubelet alone is heard.
type listener struct {
	*socket.Listener
	log hclog.Logger
}

// Accept returns the next connection of root, or of the driver's own user, which
// is root where it can mount: kubelet's. Modes and directories let nobody else
// come this far; this holds where somebody has opened them.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if err := checkPeer(c); err != nil {
			l.log.Warn("refused a caller that is not kubelet", "socket", l.Addr().String(), "error", err)
			_ = c.Close()
			continue
		}
		return c, nil
	}
}

// checkPeer asks the kernel who connected.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("ask the kernel who connected: %w", credErr)
	}
	return admits(cred)
}

func admits(cred *unix.Ucred) error {
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("process %d of user %d may not call the driver: only root may", cred.Pid, cred.Uid)
	}
	return nil
}

// listen makes a socket of mode 0600; its name until it is in place is a hidden
// one, which kubelet passes over. With private, its directory is made, and
// closed to all but its owner.
func listen(path string, private bool, log hclog.Logger) (*listener, error) {
	if private {
		if err := makePrivate(filepath.Dir(path)); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", path, err)
		}
	}
	l, err := socket.Listen(path, 0o600)
	if errors.Is(err, socket.ErrServed) {
		err = fmt.Errorf("%w: another driver of this name runs on the node; remove it, or give this one another name", err)
	}
	if err != nil {
		return nil, err
	}
	return &listener{Listener: l, log: log}, nil
}

func makePrivate(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Chmod(0o700), dir.Close())
}
