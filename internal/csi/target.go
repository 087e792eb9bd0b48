package csi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// volumePlace is the place of a volume beneath kubelet's directory of pods, as
// kubelet has it since there are CSI volumes: UID/volumes/kubernetes.io~csi/NAME/mount.
type volumePlace struct {
	path string // all of it
	dir  string // of the volume, beneath the directory of pods: kubelet makes it
}

// mountName is the last part of a place: the directory that we make, mount on
// and remove.
const mountName = "mount"

// place checks a path that kubelet gives, by its letters: what is really there
// is looked at by openDir.
func (d *Driver) place(path string) (volumePlace, error) {
	switch {
	case path == "":
		return volumePlace{}, errors.New("the path is empty")
	case len(path) > maxPath:
		return volumePlace{}, fmt.Errorf("the path has %d bytes, the system allows %d", len(path), maxPath)
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0):
		return volumePlace{}, fmt.Errorf("%q: want an absolute path without . and .. and without a slash at its end", printable(path))
	}
	beneath, ok := strings.CutPrefix(path, d.pods+"/")
	if !ok {
		return volumePlace{}, fmt.Errorf("%q is not beneath %s, where pods have their volumes: --kubelet-dir has to be kubelet's --root-dir", printable(path), d.pods)
	}
	parts := strings.Split(beneath, "/")
	if len(parts) != 5 || parts[1] != "volumes" || parts[2] != "kubernetes.io~csi" || parts[4] != mountName {
		return volumePlace{}, fmt.Errorf("%q is no place of a CSI volume: want %s/UID/volumes/kubernetes.io~csi/NAME/%s", printable(path), d.pods, mountName)
	}
	return volumePlace{path: path, dir: filepath.Dir(beneath)}, nil
}

// openDir opens the directory of the volume. Beneath the directory of pods no
// symbolic link is followed, whoever made it, and the descriptor stays the
// directory that was found, whatever happens to the path. The error is
// fs.ErrNotExist where kubelet has not made it, or has removed it.
func (d *Driver) openDir(p volumePlace) (*os.File, error) {
	pods, err := openPath(unix.AT_FDCWD, d.pods, unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer pods.Close()
	return openPath(int(pods.Fd()), p.dir, unix.O_DIRECTORY, noLinks|unix.RESOLVE_BENEATH)
}

const noLinks = unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// resolveAttempts bounds how often a path is walked again because something was
// renamed meanwhile: openat2(2), EAGAIN.
const resolveAttempts = 16

// openPath opens a path for its place alone (O_PATH): no device or pipe that
// stood there would notice.
func openPath(dir int, path string, flags, resolve uint64) (*os.File, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | flags, Resolve: resolve}
	for attempt := 1; ; attempt++ {
		fd, err := unix.Openat2(dir, path, how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) && attempt < resolveAttempts:
			continue
		case errors.Is(err, unix.ELOOP):
			return nil, fmt.Errorf("open %s: a symbolic link is on the way, and none is followed: %w", path, err)
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
}

// openSource opens the directory that is mounted. Whoever may write beside it
// cannot lead elsewhere by a link.
func (d *Driver) openSource() (*os.File, error) {
	return openPath(unix.AT_FDCWD, d.cfg.SocketDir, unix.O_DIRECTORY, noLinks)
}

// openTarget opens what stands at the volume's place: the uppermost mount of it.
func openTarget(dir *os.File) (*os.File, error) {
	return openPath(int(dir.Fd()), mountName, unix.O_NOFOLLOW, noLinks|unix.RESOLVE_BENEATH)
}
