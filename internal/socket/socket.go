// Package socket listens on Unix sockets that are files: under its path a
// socket is never there with another mode than it is to have, whatever the
// umask, and never without a listener behind it. One that nobody serves any
// more is replaced, and no other.
//
//	l, err := socket.Listen("/run/narthex/public/api.sock", 0o777)
//	…
//	err = l.Remove() // unless the file is somebody else's by now
//
// Directories and who may connect are the business of whoever calls.
package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MaxPath is how many bytes a path may have: what sun_path holds beside its
// terminating zero, unix(7).
const MaxPath = 107

// dialTimeout bounds the question whether anybody serves a socket.
const dialTimeout = time.Second

// ErrServed is wrapped by the error of Listen where a live process serves the
// socket.
var ErrServed = errors.New("a live process serves this socket")

// Listener is a listener on a Unix socket, and that file.
type Listener struct {
	*net.UnixListener
	path string

	mu   sync.Mutex // guards the following
	file file       // zero: not ours to remove
}

// file names a file for as long as it exists.
type file struct{ dev, ino uint64 }

// Path drops the scheme ("unix:" or "unix://") of a socket's address and checks
// what is left.
func Path(addr string) (string, error) {
	path := addr
	for _, scheme := range []string{"unix://", "unix:"} {
		if rest, ok := strings.CutPrefix(path, scheme); ok {
			path = rest
			break
		}
	}
	switch {
	case path == "":
		return "", errors.New("listen: the socket has no path")
	case path[0] == '@' || strings.ContainsRune(path, 0):
		return "", fmt.Errorf("listen on %q: want the path of a file; abstract sockets have no owner or mode", addr)
	case len(path) > MaxPath:
		return "", fmt.Errorf("listen on %s: the path has %d bytes, the system allows %d: choose a shorter one", path, len(path), MaxPath)
	}
	return filepath.Clean(path), nil
}

// Listen binds a socket under a hidden name of its own, gives it its mode and
// only then puts it in place, in a directory that is there. The error wraps
// ErrServed where somebody serves it.
func Listen(addr string, mode fs.FileMode) (_ *Listener, err error) {
	path, err := Path(addr)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("listen on %s: %w", path, err)
		}
	}()
	stale, err := staleSocket(path)
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	// Bound through the open directory, the temporary name cannot be too
	// long where the final one is not.
	name := fmt.Sprintf(".narthex-%d-%d", os.Getpid(), time.Now().UnixNano())
	bound := filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: bound})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close(), ignoreMissing(unlinkAt(dir, name)))
		}
	}()
	made, err := setMode(dir, name, mode)
	if err != nil {
		return nil, err
	}
	if err := putInPlace(dir, name, filepath.Base(path), stale); err != nil {
		return nil, err
	}
	return &Listener{UnixListener: l, path: path, file: made}, nil
}

// Inherit is the listener of a socket that another process has made at this
// address. Its file is not ours until Own.
func Inherit(l *net.UnixListener, addr string) (*Listener, error) {
	path, err := Path(addr)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	return &Listener{UnixListener: l, path: path}, nil
}

// Addr returns the path the socket was asked for: the listener itself only
// knows the name under which it was bound.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: l.path} }

// Own makes the file that is at the path now ours to remove.
func (l *Listener) Own() error {
	now, err := identify(l.path)
	if err != nil {
		return fmt.Errorf("own the socket: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.file = now
	return nil
}

// Owned reports whether a file is ours to remove.
func (l *Listener) Owned() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file != file{}
}

// Stands reports whether the file at the path is still ours.
func (l *Listener) Stands() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, err := identify(l.path)
	return err == nil && now == l.file
}

// Remove deletes the socket's file if it is still ours. It closes nothing.
func (l *Listener) Remove() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, err := identify(l.path)
	if err == nil && now == l.file {
		err = os.Remove(l.path)
	}
	if err := ignoreMissing(err); err != nil {
		return fmt.Errorf("remove socket: %w", err)
	}
	return nil
}

// staleSocket returns the identity of a socket at path that nobody serves, or
// the zero identity where nothing is there.
func staleSocket(path string) (file, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file{}, nil
	}
	if err != nil {
		return file{}, err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return file{}, errors.New("a file that is not a socket is there: move it or choose another path")
	}
	found, err := identify(path)
	if err != nil {
		return file{}, err
	}
	c, err := net.DialTimeout("unix", path, dialTimeout)
	switch {
	case err == nil:
		_ = c.Close()
		return file{}, ErrServed
	case errors.Is(err, syscall.ECONNREFUSED):
		return found, nil
	case errors.Is(err, fs.ErrNotExist):
		return file{}, nil // removed since
	}
	return file{}, fmt.Errorf("a socket is there and it is not clear whether it is served: %w", err)
}

// setMode gives the socket that was just bound its mode, whatever the umask made
// of it. Whoever else may write to the directory can have put something else in
// its place, a link to a file of ours for one: what cannot be the socket is left
// as it is, which is an error.
func setMode(dir *os.File, name string, mode fs.FileMode) (made file, err error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return file{}, &fs.PathError{Op: "openat", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return file{}, err
	}
	// With a second name it is a socket from elsewhere.
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || int(st.Uid) != os.Geteuid() || st.Nlink != 1 {
		return file{}, fmt.Errorf("somebody has replaced the new socket: choose a directory that only user %d can write to", os.Geteuid())
	}
	// chmod(2) of an O_PATH descriptor, which fchmod(2) does not take.
	if err := os.Chmod(filepath.Join("/proc/self/fd", strconv.Itoa(fd)), mode); err != nil {
		return file{}, err
	}
	return fileOf(&st), nil
}

// putInPlace renames a freshly bound socket to base, replacing the stale one
// and no other: two processes that start at once both find the stale socket,
// and the second must not take the first one's from under it.
func putInPlace(dir *os.File, name, base string, stale file) error {
	fd := int(dir.Fd())
	if stale == (file{}) {
		err := unix.Renameat2(fd, name, fd, base, unix.RENAME_NOREPLACE)
		switch {
		case errors.Is(err, unix.EEXIST):
			return ErrServed
		case errors.Is(err, unix.EINVAL):
			return unix.Renameat(fd, name, fd, base) // a file system without the flag
		}
		return err
	}
	err := unix.Renameat2(fd, name, fd, base, unix.RENAME_EXCHANGE)
	switch {
	case errors.Is(err, unix.ENOENT):
		return putInPlace(dir, name, base, file{})
	case errors.Is(err, unix.EINVAL):
		return unix.Renameat(fd, name, fd, base)
	case err != nil:
		return err
	}
	// The old socket now has our temporary name.
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if fileOf(&st) != stale {
		return errors.Join(ErrServed, unix.Renameat2(fd, name, fd, base, unix.RENAME_EXCHANGE))
	}
	return unlinkAt(dir, name)
}

func identify(path string) (file, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return file{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return fileOf(&st), nil
}

func fileOf(st *unix.Stat_t) file {
	return file{uint64(st.Dev), st.Ino} //nolint:unconvert // 32 bits on some architectures
}

func unlinkAt(dir *os.File, name string) error {
	return unix.Unlinkat(int(dir.Fd()), name, 0)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
