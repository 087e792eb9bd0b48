package sandbox

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// What is allowed beneath a directory.
const (
	mayRead   landlock.AccessFSSet = ll.AccessFSReadFile | ll.AccessFSReadDir
	mayAppend landlock.AccessFSSet = ll.AccessFSWriteFile | ll.AccessFSMakeReg
	mayKeep   landlock.AccessFSSet = mayRead | mayAppend | ll.AccessFSRemoveFile
	mayBind   landlock.AccessFSSet = ll.AccessFSMakeSock | ll.AccessFSRemoveFile
	onFile    landlock.AccessFSSet = ll.AccessFSReadFile | ll.AccessFSWriteFile // of these, what makes sense for a file
)

// root is a directory, or a file, beneath which something is allowed. Landlock
// knows it by its inode: one made in its place later is another.
type root struct {
	path   string
	dev    uint64
	ino    uint64
	access landlock.AccessFSSet
}

// places collects what is to be allowed where.
type places map[string]landlock.AccessFSSet

// own adds what c names.
func (p places) own(c Config) (wide []string) {
	add := func(dir string, access landlock.AccessFSSet) {
		if depth(dir) == 1 && !slices.Contains(wide, dir) {
			wide = append(wide, dir)
		}
		p[dir] |= access
	}
	for _, pattern := range c.Read {
		path := absolute(pattern)
		if filepath.Dir(path) == "/" { // all files there are: this one alone
			p[path] |= mayRead & onFile
			continue
		}
		add(filepath.Dir(path), mayRead)
		for _, file := range expand([]string{path}) {
			for _, dir := range turns(file) {
				add(dir, mayRead)
			}
		}
	}
	for _, path := range c.Append {
		path = absolute(path)
		if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() { // a terminal, /dev/stdout
			p[path] |= mayAppend & onFile
			continue
		}
		add(filepath.Dir(path), mayAppend)
		if real, err := filepath.EvalSymlinks(path); err == nil && real != path {
			add(filepath.Dir(real), mayAppend)
		}
	}
	for _, path := range c.Sockets {
		add(filepath.Dir(absolute(path)), mayBind)
	}
	for _, dir := range c.Keep {
		p[absolute(dir)] |= mayKeep
	}
	return wide
}

// turns follows the symbolic links in a path and returns the directories that
// must be open for it to be read: where it leads now, and where it will lead
// when a link is turned, as Kubernetes does with ..data and deploy scripts do
// with "current". That is the directory of a link that points beneath it, or
// the one the link's target is in; neither where it is / or right beneath /,
// which would open half the host.
func turns(path string) []string {
	var dirs []string
	at := "/"
	rest := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for links := 0; len(rest) > 0; {
		next := filepath.Join(at, rest[0])
		rest = rest[1:]
		info, err := os.Lstat(next)
		if err != nil {
			return dirs
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			at = next
			continue
		}
		target, err := os.Readlink(next)
		if links++; err != nil || links > 40 { // as many as the kernel follows
			return dirs
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(at, target)
		}
		holder := filepath.Dir(target)
		if strings.HasPrefix(target, at+"/") {
			holder = at
		}
		if real, err := filepath.EvalSymlinks(holder); err == nil && depth(real) >= 2 {
			dirs = append(dirs, real)
		}
		rest = append(strings.Split(strings.Trim(target, "/"), "/"), rest...)
		at = "/"
	}
	return append(dirs, filepath.Dir(at))
}

func depth(path string) int {
	if path == "/" {
		return 0
	}
	return strings.Count(filepath.Clean(path), "/")
}

// expand returns the files that patterns name now.
func expand(patterns []string) []string {
	var files []string
	for _, pattern := range patterns {
		pattern = absolute(pattern)
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			files = append(files, found...)
		}
	}
	return files
}

// absolute needs the working directory, which a process without one has not:
// such a path names nothing then.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// system adds what every Go program that resolves names and looks after
// itself reads.
func (p places) system() {
	for _, file := range []string{
		"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/services", "/etc/gai.conf", "/etc/host.conf",
		"/etc/localtime", "/etc/passwd", "/etc/group", "/dev/null", "/dev/urandom",
	} {
		p[file] |= mayRead & onFile
		// systemd-resolved and NetworkManager replace the file a link of
		// /etc leads to.
		if real, err := filepath.EvalSymlinks(file); err == nil && real != file && depth(real) > 2 {
			p[filepath.Dir(real)] |= mayRead
		}
	}
	p["/dev/null"] |= mayAppend & onFile
	if replaceable("/etc/resolv.conf") && os.Geteuid() != 0 {
		// A DHCP client renames a new one over it, which a rule on the file
		// would not cover, and a proxy that resolves nothing any more is no
		// safer. For root, /etc/shadow is a file like others.
		p["/etc"] |= mayRead
	}
	for _, dir := range []string{"/usr/share/zoneinfo", "/sys/fs/cgroup", "/sys/kernel/mm/transparent_hugepage", "/proc/self", "/proc/sys/net"} {
		p[dir] |= mayRead
	}
	for _, file := range []string{"/proc/stat", "/proc/meminfo", "/proc/sys/kernel/cap_last_cap"} {
		p[file] |= mayRead & onFile
	}
}

// replaceable reports whether path is a plain file of the directory it is in,
// not a link and not a mount, as it is in containers.
func replaceable(path string) bool {
	var file, dir unix.Stat_t
	if unix.Lstat(path, &file) != nil || file.Mode&unix.S_IFMT != unix.S_IFREG {
		return false
	}
	return unix.Stat(filepath.Dir(path), &dir) == nil && file.Dev == dir.Dev
}

// Admits returns an error when c needs what was given up, with the path and
// what to do: the sandbox cannot be widened.
// What is not there at all is for those who open it to complain of.
func (s *Sandbox) Admits(c Config) error {
	if s == nil {
		return nil
	}
	if c.LowPorts && s.lowPortsGone {
		return fmt.Errorf("a port below 1024 needs CAP_NET_BIND_SERVICE, which the proxy gave up at the start, as no listener had such a port: restart or upgrade the proxy: %w", fs.ErrPermission)
	}
	if s.roots == nil {
		return nil
	}
	for _, pattern := range c.Read {
		paths := append(expand([]string{pattern}), absolute(pattern))
		for _, path := range paths {
			if err := s.admits(path, mayRead, "read files"); err != nil {
				return err
			}
		}
	}
	for _, path := range c.Append {
		if err := s.admits(absolute(path), mayAppend, "write files"); err != nil {
			return err
		}
	}
	for _, path := range c.Sockets {
		if err := s.admits(absolute(path), mayBind, "make sockets"); err != nil {
			return err
		}
	}
	return nil
}

// admits looks up from where the path really is, as Landlock does. A path
// that is not there is where its directory is.
func (s *Sandbox) admits(path string, want landlock.AccessFSSet, do string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		if real, err = filepath.EvalSymlinks(filepath.Dir(path)); err != nil {
			return nil //nolint:nilerr // not there: whoever opens it says so
		}
	}
	missing := want
	if info, err := os.Stat(real); err == nil && !info.IsDir() {
		if missing &^= s.at(real); missing&onFile == 0 && want&mayBind == 0 {
			return nil // the file itself
		}
		real = filepath.Dir(real)
	}
	for dir := real; ; dir = filepath.Dir(dir) {
		if missing &^= s.at(dir); missing == 0 {
			return nil
		}
		if dir == "/" {
			return &OutsideError{Path: path, Dir: real, do: do}
		}
	}
}

// at returns what is allowed by a rule on this very file or directory.
func (s *Sandbox) at(path string) landlock.AccessFSSet {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	var access landlock.AccessFSSet
	for _, r := range s.roots {
		if r.dev == st.Dev && r.ino == st.Ino {
			access |= r.access
		}
	}
	return access
}

// OutsideError says that a path is outside the sandbox.
type OutsideError struct {
	Path string // as it was named
	Dir  string // where it is
	do   string
}

func (e *OutsideError) Error() string {
	return fmt.Sprintf("%s: the sandbox, which was closed at the start, does not let this process %s in %s: restart or upgrade the proxy to open that directory", e.Path, e.do, e.Dir)
}

// Is makes it an fs.ErrPermission.
func (e *OutsideError) Is(target error) bool { return target == fs.ErrPermission }
