package endpoint

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

// maxSocketPath is what sun_path holds beside its terminating zero: unix(7).
const maxSocketPath = 107

// socketMode lets every local process connect; attestation decides.
const socketMode = 0o777

// dialTimeout bounds the question whether anybody serves a socket.
const dialTimeout = time.Second

// socket is a listener on a Unix socket that we made, and that file.
type socket struct {
	*net.UnixListener
	path string

	mu   sync.Mutex // guards the following
	file fileID     // zero: not ours to remove
}

// fileID names a file for as long as it exists.
type fileID struct{ dev, ino uint64 }

// Addr returns the path the socket was asked for: the listener itself only
// knows the name under which it was bound.
func (s *socket) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: s.path} }

// socketPath drops the scheme of a socket address and checks what is left.
func socketPath(addr string) (string, error) {
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
	case len(path) > maxSocketPath:
		return "", fmt.Errorf("listen on %s: the path has %d bytes, the system allows %d: choose a shorter one", path, len(path), maxSocketPath)
	}
	return filepath.Clean(path), nil
}

// listenUnix binds a socket under a name of its own, opens its mode and only
// then puts it in place: under its real name it is never there with another
// mode, whatever the umask, and never there without a listener behind it.
func listenUnix(addr string) (_ *socket, err error) {
	path, err := socketPath(addr)
	if err != nil {
		return nil, err
	}
	if err := makeParents(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	stale, err := staleSocket(path)
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer dir.Close()
	// Bound through the open directory, the temporary name cannot be too
	// long where the final one is not.
	name := fmt.Sprintf(".narthex-%d-%d", os.Getpid(), time.Now().UnixNano())
	bound := filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: bound})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	s := &socket{UnixListener: l, path: path}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close(), ignoreMissing(unlinkAt(dir, name)))
		}
	}()
	if err := os.Chmod(bound, socketMode); err != nil {
		return nil, err
	}
	if s.file, err = identify(bound); err != nil {
		return nil, err
	}
	if err := putInPlace(dir, name, filepath.Base(path), stale); err != nil {
		return nil, err
	}
	return s, nil
}

// makeParents makes dir and what is missing above it with mode 0755, whatever
// the umask. Directories that exist are left as they are.
func makeParents(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeParents(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // every user of the node has to reach the socket in it
		if errors.Is(err, fs.ErrExist) {
			return nil // somebody else made it meanwhile
		}
		return err
	}
	return os.Chmod(dir, 0o755)
}

// staleSocket returns the identity of a socket at path that nobody serves, or
// the zero identity where nothing is there.
func staleSocket(path string) (fileID, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fileID{}, nil
	}
	if err != nil {
		return fileID{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fileID{}, fmt.Errorf("listen on %s: a file that is not a socket is there: move it or choose another path", path)
	}
	file, err := identify(path)
	if err != nil {
		return fileID{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	c, err := net.DialTimeout("unix", path, dialTimeout)
	switch {
	case err == nil:
		_ = c.Close()
		return fileID{}, fmt.Errorf("listen on %s: %w", path, errServed)
	case errors.Is(err, syscall.ECONNREFUSED):
		return file, nil
	case errors.Is(err, fs.ErrNotExist):
		return fileID{}, nil // removed since
	}
	return fileID{}, fmt.Errorf("listen on %s: a socket is there and it is not clear whether it is served: %w", path, err)
}

var errServed = errors.New("a live process serves this socket: stop it or choose another path")

// putInPlace renames a freshly bound socket to base, replacing the stale one
// and no other: two agents that start at once both find the stale socket, and
// the second must not take the first one's from under it.
func putInPlace(dir *os.File, name, base string, stale fileID) error {
	fd := int(dir.Fd())
	if stale == (fileID{}) {
		err := unix.Renameat2(fd, name, fd, base, unix.RENAME_NOREPLACE)
		switch {
		case errors.Is(err, unix.EEXIST):
			return errServed
		case errors.Is(err, unix.EINVAL):
			return unix.Renameat(fd, name, fd, base) // a file system without the flag
		}
		return err
	}
	err := unix.Renameat2(fd, name, fd, base, unix.RENAME_EXCHANGE)
	switch {
	case errors.Is(err, unix.ENOENT):
		return putInPlace(dir, name, base, fileID{})
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
	if (fileID{uint64(st.Dev), st.Ino}) != stale {
		return errors.Join(errServed, unix.Renameat2(fd, name, fd, base, unix.RENAME_EXCHANGE))
	}
	return unlinkAt(dir, name)
}

// remove deletes the socket's file if it is still the one we made.
func (s *socket) remove() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	file, err := identify(s.path)
	if err == nil && file == s.file {
		err = os.Remove(s.path)
	}
	if err := ignoreMissing(err); err != nil {
		return fmt.Errorf("remove socket: %w", err)
	}
	return nil
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileID{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return fileID{uint64(st.Dev), st.Ino}, nil
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
