package csi

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// maxSocketPath is what sun_path holds beside its terminating zero: unix(7).
const maxSocketPath = 107

// dialTimeout bounds the question whether anybody serves a socket.
const dialTimeout = time.Second

var errServed = errors.New("a live process serves this socket: another driver of this name runs on the node; remove it, or give this one another name")

// socket is a listener on a Unix socket that we made, and that file.
type socket struct {
	*net.UnixListener
	path string
	file fileID
	log  hclog.Logger
}

// fileID names a file for as long as it exists.
type fileID struct{ dev, ino uint64 }

// Accept returns the next connection of root, or of the driver's own user, which
// is root where it can mount: kubelet's. Modes and directories let nobody else
// come this far; this holds where somebody has opened them.
func (s *socket) Accept() (net.Conn, error) {
	for {
		c, err := s.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if err := checkPeer(c); err != nil {
			s.log.Warn("refused a caller that is not kubelet", "socket", s.path, "error", err)
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

// listen binds a socket of mode 0600 under a hidden name, which kubelet passes
// over, and moves it into place in one step: a stale socket is replaced, one
// that is served is not. With private, its directory is made, and closed to all
// but its owner.
func listen(path string, private bool, log hclog.Logger) (_ *socket, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("listen on %s: %w", path, err)
		}
	}()
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path has %d bytes, the system allows %d: choose a shorter name or directory", len(path), maxSocketPath)
	}
	dir, err := openSocketDir(filepath.Dir(path), private)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	stale, err := staleSocket(path)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf(".narthex-%d-%d", os.Getpid(), time.Now().UnixNano())
	bound := filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), name) // never too long where the path is not
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: bound})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	s := &socket{UnixListener: l, path: path, log: log}
	defer func() {
		if err != nil {
			_ = l.Close()
			_ = unix.Unlinkat(int(dir.Fd()), name, 0)
		}
	}()
	if err := os.Chmod(bound, 0o600); err != nil {
		return nil, err
	}
	if s.file, err = identify(bound); err != nil {
		return nil, err
	}
	return s, putInPlace(int(dir.Fd()), name, filepath.Base(path), stale)
}

func openSocketDir(path string, private bool) (*os.File, error) {
	if private {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, err
		}
	}
	dir, err := os.Open(path)
	if err != nil || !private {
		return dir, err
	}
	if err := dir.Chmod(0o700); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return dir, nil
}

// staleSocket returns the identity of a socket at path that nobody serves, or
// the zero identity where nothing is there.
func staleSocket(path string) (fileID, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fileID{}, nil
	}
	if err != nil {
		return fileID{}, err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fileID{}, errors.New("a file that is not a socket is there: move it away")
	}
	file, err := identify(path)
	if err != nil {
		return fileID{}, err
	}
	c, err := net.DialTimeout("unix", path, dialTimeout)
	switch {
	case err == nil:
		_ = c.Close()
		return fileID{}, errServed
	case errors.Is(err, unix.ECONNREFUSED):
		return file, nil
	case errors.Is(err, fs.ErrNotExist):
		return fileID{}, nil // removed since
	}
	return fileID{}, fmt.Errorf("a socket is there and it is not clear whether it is served: %w", err)
}

// putInPlace renames a freshly bound socket to base, replacing the stale one
// and no other.
func putInPlace(dir int, name, base string, stale fileID) error {
	if stale == (fileID{}) {
		err := unix.Renameat2(dir, name, dir, base, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EEXIST) {
			return errServed
		}
		return err
	}
	err := unix.Renameat2(dir, name, dir, base, unix.RENAME_EXCHANGE)
	switch {
	case errors.Is(err, unix.ENOENT): // removed since
		return putInPlace(dir, name, base, fileID{})
	case err != nil:
		return err
	}
	// The old socket now has our temporary name.
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if (fileID{uint64(st.Dev), st.Ino}) != stale { //nolint:unconvert // 32 bits on some architectures
		return errors.Join(errServed, unix.Renameat2(dir, name, dir, base, unix.RENAME_EXCHANGE))
	}
	return unix.Unlinkat(dir, name, 0)
}

// stands reports whether the socket's file is still the one we made.
func (s *socket) stands() bool {
	file, err := identify(s.path)
	return err == nil && file == s.file
}

// remove deletes the socket's file if it is still the one we made.
func (s *socket) remove() error {
	if !s.stands() {
		return nil
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove socket: %w", err)
	}
	return nil
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileID{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return fileID{uint64(st.Dev), st.Ino}, nil //nolint:unconvert // 32 bits on some architectures
}
