package csi

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// How a volume is mounted: a socket can be connected to, and nothing else can be
// done with it. Connecting needs no file system that can be written to.
const (
	mountFlags  = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	statfsFlags = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
)

// maxStacked bounds how many mounts on one place are taken away in one call:
// drivers before us may have left one for each restart of kubelet.
const maxStacked = 4096

// bindMount mounts the directory source on the directory target. The mount has
// its flags before it is anywhere to be seen, and both ends are descriptors: no
// path is looked up between the check and the mount. Only that directory is
// mounted, not what is mounted beneath it.
func bindMount(source, target int) error {
	tree, err := unix.OpenTree(source, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("copy the mount: %w", err)
	}
	defer unix.Close(tree)
	// Private: what is mounted over the source later does not come along.
	attr := &unix.MountAttr{Attr_set: mountFlags, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return fmt.Errorf("make the mount read-only: %w", err)
	}
	if err := unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach the mount: %w", err)
	}
	return nil
}

// fileID names a file for as long as it exists.
type fileID struct{ dev, ino uint64 }

// found is what stands at a volume's place.
type found struct {
	file      fileID
	mountID   uint64
	directory bool
	mounted   bool // it is the root of a mount
	flags     int64
}

func look(f *os.File) (found, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_MNT_ID, &st); err != nil {
		return found{}, &os.PathError{Op: "statx", Path: f.Name(), Err: err}
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return found{}, errOldKernel
	}
	out := found{
		file:      fileID{unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino},
		mountID:   st.Mnt_id,
		directory: st.Mode&unix.S_IFMT == unix.S_IFDIR,
		mounted:   st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0,
	}
	if out.mounted {
		var fsys unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &fsys); err != nil {
			return found{}, &os.PathError{Op: "statfs", Path: f.Name(), Err: err}
		}
		out.flags = int64(fsys.Flags) //nolint:unconvert // of another type on some architectures
	}
	return out, nil
}

// shows reports whether it is a mount of the directory source with our flags.
func (f found) shows(source found) bool {
	return f.mounted && f.file == source.file && f.flags&statfsFlags == statfsFlags
}

// detach takes away every mount on the volume's place and returns what is
// beneath them. Each is taken by its descriptor, by way of /proc, and lazily:
// the descriptor itself would keep it busy otherwise. Copies of it in running
// containers stay until these end.
func detach(dir *os.File) (*os.File, error) {
	for range maxStacked {
		top, err := openTarget(dir)
		if err != nil {
			return nil, err
		}
		what, err := look(top)
		if err != nil || !what.mounted {
			return top, err
		}
		err = unix.Unmount(filepath.Join("/proc/self/fd", strconv.Itoa(int(top.Fd()))), unix.MNT_DETACH)
		_ = top.Close()
		if err != nil {
			return nil, fmt.Errorf("unmount: %w", err)
		}
	}
	return nil, fmt.Errorf("unmount: more than %d mounts are stacked here", maxStacked)
}

var errOldKernel = errors.New("this kernel is too old: mounting by descriptors takes Linux 5.12")

// checkPlace returns an error where this process may not mount, or where pods
// would not see what it mounts beneath dir.
func checkPlace(dir string) error {
	if err := mayMount(); err != nil {
		return err
	}
	pods, err := openPath(unix.AT_FDCWD, dir, unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("find kubelet's directory of pods (does the container mount it, and is --kubelet-dir kubelet's --root-dir?): %w", err)
	}
	defer pods.Close()
	what, err := look(pods)
	if err != nil {
		return err
	}
	table, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("find how mounts propagate: %w", err)
	}
	defer table.Close()
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 7 || fields[0] != strconv.FormatUint(what.mountID, 10) {
			continue
		}
		for _, field := range fields[6:] { // optional ones, up to a dash: proc(5)
			if field == "-" {
				break
			}
			if strings.HasPrefix(field, "shared:") {
				return nil
			}
		}
		return fmt.Errorf("mounts beneath %s would not be seen outside this container: give its volumeMount mountPropagation: Bidirectional, which takes a privileged container", dir)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("find how mounts propagate: %w", err)
	}
	return fmt.Errorf("find how mounts propagate: the mount of %s is not in /proc/self/mountinfo", dir)
}

// mayMount asks the kernel to change a mount that is not there: it says first
// whether we may at all.
func mayMount() error {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	switch {
	case errors.Is(err, unix.ENOSYS):
		return errOldKernel
	case errors.Is(err, unix.EPERM):
		return errors.New("this process may not mount: run it as root with CAP_SYS_ADMIN, in Kubernetes as a privileged container")
	}
	return nil // EBADF: we may
}

// deleted returns the innermost directory on a path that is there for us and yet
// deleted: what a bind mount shows of one that was removed on the host. "" where
// there is none.
func deleted(path string) string {
	for dir := path; ; dir = filepath.Dir(dir) {
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err == nil {
			if st.Nlink == 0 {
				return dir
			}
			return ""
		} else if !errors.Is(err, fs.ErrNotExist) || dir == "/" {
			return ""
		}
	}
}
