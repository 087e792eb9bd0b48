// Package sandbox gives up, for the rest of a process's life, what the process
// does not need: the proxy parses what strangers send, and whoever finds a
// mistake in it should find nothing else to take.
//
//	box := sandbox.Enter(sandbox.Config{Read: files, Append: logs, Sockets: sockets})
//	log.Info("sandboxed", "enforced", box.Enforced(), "missing", box.Missing())
//	…
//	if err := box.Admits(next); err != nil {
//		return err // names the path that a restart would open
//	}
//
// Four things are given up, each on its own, for all threads and without a way
// back: privileges (no_new_privs, capabilities), being read by others of the
// same user (core files, ptrace), files (Landlock) and system calls (seccomp).
// A kernel that lacks one of them still gives the others; what is missing is
// told, not fatal.
//
// What is open already stays open: enter when sockets, logs and sources are,
// and before the first stranger is heard.
package sandbox

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Config says what the process needs from now on. Paths are made absolute at
// Enter; they need not exist.
type Config struct {
	Read     []string // files, or patterns of them, that are opened again: their directories, so that files may be replaced by rename and by Kubernetes' ..data links
	Append   []string // files that are opened again for appending, and made: likewise
	Sockets  []string // Unix sockets that are bound and removed: likewise
	Keep     []string // directories in which files are made, read, replaced and removed, and beneath them
	Connect  []string // Unix sockets that are connected to: only looked at by Check
	Watched  bool     // leave processes of the same user a way to look at this one, as an agent of that user does to attest it; core files are forbidden all the same
	LowPorts bool     // keep CAP_NET_BIND_SERVICE, where the process has it
	Mounts   bool     // keep CAP_SYS_ADMIN and the calls that bind and detach mounts. Landlock, which forbids every change of mounts, is left out; no socket but Unix ones can be made
}

// Sandbox is the sandbox that this process is in. A nil Sandbox is none: it
// enforces nothing and admits everything.
type Sandbox struct {
	enforced     []string
	missing      []string
	wide         []string
	lowPortsGone bool   // CAP_NET_BIND_SERVICE was there, is of use, and was given up
	roots        []root // nil: Landlock is not in force
	pinned       []int  // descriptors that keep entries of /proc the ones that were allowed
}

// Enter closes the sandbox around this process, all its threads included.
// What the kernel or the place the process runs in does not offer is left out,
// and said by Missing. It is to be called once.
func Enter(c Config) *Sandbox {
	s := &Sandbox{}
	s.step(noNewPrivs, "no_new_privs")
	s.step(noCoreFiles, "no core files")
	if !c.Watched {
		s.step(undumpable, "undumpable")
	}
	var keep uint64
	name := "no capabilities"
	if c.LowPorts {
		keep, name = 1<<unix.CAP_NET_BIND_SERVICE, "no capabilities but CAP_NET_BIND_SERVICE"
	}
	if c.Mounts {
		keep, name = keep|1<<unix.CAP_SYS_ADMIN, "no capabilities but CAP_SYS_ADMIN"
	}
	s.lowPortsGone = !c.LowPorts && lowPortsMatter()
	s.step(func() error { return dropCapabilities(keep) }, name)
	if !c.Mounts {
		s.landlock(c)
	}
	s.step(func() error { return filterSyscalls(c.Mounts) }, "seccomp")
	return s
}

func (s *Sandbox) step(f func() error, name string) {
	if err := f(); err != nil {
		s.missing = append(s.missing, fmt.Sprintf("%s: %v", name, err))
		return
	}
	s.enforced = append(s.enforced, name)
}

// Enforced names what is in force, for people.
func (s *Sandbox) Enforced() []string {
	if s == nil {
		return nil
	}
	return s.enforced
}

// Missing names what is not in force, each with the reason, for people.
func (s *Sandbox) Missing() []string {
	if s == nil {
		return nil
	}
	return s.missing
}

// Wide names directories near the root that stay open because a file is right
// in them. Files in a directory of their own would leave less to read.
func (s *Sandbox) Wide() []string {
	if s == nil {
		return nil
	}
	return s.wide
}

// Check opens what c names the way it will be opened again, and returns an
// error for each file that could be opened at the start only with privileges
// that are now gone. It makes no file.
func (s *Sandbox) Check(c Config) []error {
	if s == nil {
		return nil
	}
	var errs []error
	note := func(err error) {
		if errors.Is(err, os.ErrPermission) {
			errs = append(errs, err)
		}
	}
	for _, file := range expand(c.Read) {
		f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			err = f.Close()
		}
		note(err)
	}
	for _, set := range [][]string{c.Append, c.Keep, c.Connect} {
		for _, file := range set {
			if err := unix.Faccessat(unix.AT_FDCWD, file, unix.W_OK, unix.AT_EACCESS); err != nil {
				note(&os.PathError{Op: "write to", Path: file, Err: err})
			}
		}
	}
	return errs
}
