package endpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/narthex-id/narthex/internal/socket"
)

// privateMode is of sockets for few: their owner and their group.
const privateMode = 0o770

// listenPrivate makes a socket for few, and its directory where that is missing.
// It is not made in the directory of the socket apart, or below, which everybody
// sees; apart may be empty.
func listenPrivate(addr, apart string) (*socket.Listener, error) {
	path, err := socket.Path(addr)
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := makePrivate(dir); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := keepApart(dir, apart); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := socket.Listen(path, privateMode)
	if errors.Is(err, socket.ErrServed) {
		err = fmt.Errorf("%w: stop it or choose another path", err)
	}
	return l, err
}

// makePrivate makes dir with mode 0700, and what is missing above it with mode
// 0755. One that is there must not let everybody put a socket of their own in the
// place of ours.
func makePrivate(dir string) error {
	if err := makeParents(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err == nil || !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o002 != 0 {
		return fmt.Errorf("everybody may write to %s (mode %04o), and so put another socket there: chmod o-w it or choose another directory", dir, info.Mode().Perm())
	}
	return nil
}

// keepApart refuses a directory that is, whatever links say, the one of the
// Workload API's socket or below it.
func keepApart(dir, apart string) error {
	if apart == "" {
		return nil
	}
	path, err := socket.Path(apart)
	if err != nil {
		return err
	}
	public, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // and nothing can be below it
	}
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	if real == public || strings.HasPrefix(real, strings.TrimSuffix(public, "/")+"/") {
		return fmt.Errorf("%s is, or is in, the directory of the Workload API's socket, which is shown to workloads: choose another directory", dir)
	}
	return nil
}
