package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// handled are the rights of files that are denied where no rule allows them:
// all of ABI 5, executing and moving between directories among them. Two kinds
// are left alone: TCP and UDP ports (ABI 4, 10) and connecting to Unix sockets
// by path (ABI 9). A reload may add listeners and targets anywhere, and what
// Landlock has denied cannot be allowed again.
var handled = landlock.V5.HandledAccessFS

// signalsWork is the erratum of ABI 6 without which threads of one process
// could not signal each other, as Go's scheduler does.
const signalsWork = 1 << 1

// landlock closes the file system but for what c and the system's own files
// need.
func (s *Sandbox) landlock(c Config) {
	abi, err := ll.LandlockGetABIVersion()
	if err != nil {
		s.missing = append(s.missing, fmt.Sprintf("landlock: %v", unavailable(err)))
		return
	}
	var scoped landlock.ScopedSet
	if errata, err := ll.LandlockGetErrata(); abi >= 6 && err == nil && errata&signalsWork != 0 {
		scoped = ll.ScopeSignal | ll.ScopeAbstractUnixSocket
	}
	allowed := places{}
	allowed.system()
	s.wide = allowed.own(c)
	rules, roots := s.rules(allowed)
	if err := landlock.MustConfig(handled, scoped).BestEffort().Restrict(rules...); err != nil {
		s.missing = append(s.missing, fmt.Sprintf("landlock: %v", err))
		return
	}
	s.roots = roots
	s.enforced = append(s.enforced, describe(abi, scoped))
	if lacks := lacking(abi, scoped); lacks != "" {
		s.missing = append(s.missing, fmt.Sprintf("landlock ABI %d: %s", abi, lacks))
	}
}

// rules makes a rule of each place that is there. Entries of /proc are made
// anew when the kernel has forgotten them, and would be others then: an open
// descriptor keeps it from that.
func (s *Sandbox) rules(allowed places) (rules []landlock.Rule, roots []root) {
	paths := make([]string, 0, len(allowed))
	for path := range allowed {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			continue
		}
		access := allowed[path]
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
		case unix.S_IFIFO, unix.S_IFSOCK: // of no file system: /dev/stdout
			continue
		default:
			access &= onFile
		}
		if access == 0 {
			continue
		}
		if strings.HasPrefix(path, "/proc/") {
			if fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0); err == nil {
				s.pinned = append(s.pinned, fd)
			}
		}
		rules = append(rules, landlock.PathAccess(access, path).IgnoreIfMissing())
		roots = append(roots, root{path: path, dev: st.Dev, ino: st.Ino, access: access})
	}
	return rules, roots
}

func describe(abi int, scoped landlock.ScopedSet) string {
	parts := []string{"files"}
	if abi >= 5 {
		parts = append(parts, "device ioctls")
	}
	if scoped&ll.ScopeSignal != 0 {
		parts = append(parts, "signals")
	}
	if scoped&ll.ScopeAbstractUnixSocket != 0 {
		parts = append(parts, "abstract sockets")
	}
	return fmt.Sprintf("landlock ABI %d (%s)", abi, strings.Join(parts, ", "))
}

// lacking names what an older kernel does not restrict.
func lacking(abi int, scoped landlock.ScopedSet) string {
	var lacks []string
	if abi < 3 {
		lacks = append(lacks, "truncating files")
	}
	if abi < 5 {
		lacks = append(lacks, "device ioctls")
	}
	if scoped&ll.ScopeSignal == 0 {
		lacks = append(lacks, "signals")
	}
	if scoped&ll.ScopeAbstractUnixSocket == 0 {
		lacks = append(lacks, "abstract sockets")
	}
	if len(lacks) == 0 {
		return ""
	}
	return "this kernel does not restrict " + strings.Join(lacks, ", ")
}

func unavailable(err error) error {
	switch {
	case errors.Is(err, unix.ENOSYS):
		return errors.New("this kernel does not have it (Linux 5.13), or a container's seccomp profile hides it")
	case errors.Is(err, unix.EOPNOTSUPP):
		return errors.New("this kernel has it switched off; add landlock to its lsm= boot parameter")
	case errors.Is(err, unix.EPERM):
		return errors.New("a container's seccomp profile does not allow it")
	}
	return err
}
