package attestor

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Bounds on what looking at executables may take. They are files of the
// caller's choice, on file systems of the caller's choice.
const (
	// defaultSizeLimit is the largest executable hashed unless configured
	// otherwise: well above what compilers make, and a second or so of one
	// processor. A sparse file of any size costs its owner nothing.
	defaultSizeLimit = 512 << 20

	// How many callers' executables are looked at, at a time, and how many
	// are hashed: of one user, and in all. One that hangs takes a slot until
	// it is let go.
	looksPerUser, looksInAll   = 64, 512
	hashesPerUser, hashesInAll = 2, 32
)

// executable is what is known of the file a process executes.
type executable struct {
	path string // empty where it names another file here
	sum  string // SHA-256 in hexadecimal, empty where it is not hashed
}

// executableOf looks at the program of p. It returns soon after ctx ends.
func (u *unixAttestor) executableOf(ctx context.Context, p *Process) (executable, error) {
	var found executable
	err := u.looks.do(ctx, p.UID, func() (err error) {
		found, err = u.readExecutable(ctx, p.ProcPath("exe"), p.UID, p.exe)
		return err
	})
	if err != nil {
		return executable{}, err // found may still be written
	}
	return found, nil
}

// readExecutable takes path and content from one opened file, which must be
// pinned, the one the process executed when it was pinned: reading them one
// after the other through /proc/PID/exe could give those of two programs.
func (u *unixAttestor) readExecutable(ctx context.Context, exe string, uid uint32, pinned program) (found executable, err error) {
	flags := unix.O_RDONLY
	if u.config.SizeLimit < 0 {
		flags = unix.O_PATH // needs no read access to the file
	}
	f, err := os.OpenFile(exe, flags, 0)
	if err != nil {
		return found, fmt.Errorf("open the program: %w", err)
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return found, err
	}
	var st unix.Stat_t
	var statErr, linkErr error
	var path string
	err = raw.Control(func(fd uintptr) {
		statErr = unix.Fstat(int(fd), &st)
		path, linkErr = os.Readlink(filepath.Join(procRoot(), "self", "fd", strconv.Itoa(int(fd))))
	})
	if err := cmp.Or(err, statErr, linkErr); err != nil {
		return found, fmt.Errorf("look at the program: %w", err)
	}
	if programOf(&st) != pinned {
		return found, fmt.Errorf("it executes another program than when it was pinned: %w", ErrProcessGone)
	}
	if isHere(path, pinned) {
		found.path = path
	}
	limit := cmp.Or(u.config.SizeLimit, defaultSizeLimit)
	switch {
	case limit < 0:
		return found, nil
	case st.Size > limit:
		return found, fmt.Errorf("hash %s: %d bytes is above the size limit of %d (workload_size_limit)", path, st.Size, limit)
	}
	if found.sum, err = u.digests.of(ctx, f, versionOf(&st), uid); err != nil {
		return found, fmt.Errorf("hash %s: %w", path, err)
	}
	return found, nil
}

// isHere tells whether path, as a process's own mount namespace has it, names
// the same file in a namespace that only an administrator builds: this
// process's or, where HOST_PROC is set, that of the host's init. Anybody may
// make a mount namespace and put a program of theirs in the place of another.
func isHere(path string, file program) bool {
	if !filepath.IsAbs(path) {
		return false
	}
	roots := []string{"/"}
	if os.Getenv(hostProc) != "" {
		roots = append(roots, filepath.Join(procRoot(), "1", "root"))
	}
	for _, root := range roots {
		if found, err := statProgram(filepath.Join(root, path)); err == nil && found == file {
			return true
		}
	}
	return false
}
