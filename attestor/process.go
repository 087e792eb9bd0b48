package attestor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrProcessGone is wrapped by errors about a process that has exited or
	// is not what it was when it was pinned.
	ErrProcessGone = errors.New("not the pinned process any more")

	// ErrPIDNamespace is wrapped by errors about a process whose PID means
	// nothing here: it lives in a PID namespace this process cannot look
	// into, or the proc file system read (HOST_PROC) shows another namespace
	// than this process's own.
	ErrPIDNamespace = errors.New("another PID namespace")
)

// Process is a local process, pinned by a pidfd: while it is held, PID cannot
// come to mean another process unnoticed. The one who pinned it closes it. Its
// methods may be called from several goroutines at once.
//
// What counts as the same process is narrower than the kernel's notion. A
// process that changes its effective user or group, or that executes another
// program, is ErrProcessGone from then on. Between them, a connection and a
// PID survive execve(2) and fork(2): a process could connect, leave the socket
// to a child and then execute a registered program, whose identity the child
// would read from the socket. The file being executed (device and inode) is
// therefore remembered when the process is pinned, no selector is taken from
// another one, and Alive fails once it differs. Honest clients lose nothing:
// their sockets close on exec, so the new program connects anew. Two limits
// remain. An execve between connect and PeerOf leaves no trace, so PeerOf
// belongs directly behind accept. And where the program cannot be read
// (neither the same user nor CAP_SYS_PTRACE), it stays unknown; then no
// selector depends on it either.
type Process struct {
	PID int    // in this process's PID namespace
	UID uint32 // effective user, as this process's user namespace maps it
	GID uint32 // effective group, likewise

	pidfd *os.File // nil in a Process that was not made by PeerOf or Pin
	proc  string   // its folder in the proc file system
	exe   program

	mu    sync.Mutex // guards the following
	facts []finding
}

// program identifies the file a process executes. The zero program stands for
// one that may not be looked at.
type program struct{ dev, ino uint64 }

// PeerOf pins the process that connected c, a connection that was accepted,
// with the effective user and group it had then (SO_PEERCRED, unix(7)). Where
// the kernel has SO_PEERPIDFD (6.5) the pidfd is that process's for certain.
// On older kernels the PID is opened and its user, group and start time are
// compared: a process that took over the PID of a caller that died before
// PeerOf, and runs as the same user and group, passes there.
//
// The error wraps ErrProcessGone if the process has exited or is not what it
// was at connect, ErrPIDNamespace if its PID cannot be known here.
func PeerOf(c *net.UnixConn) (*Process, error) {
	return peerOf(c, peerPidfd)
}

// peerOf is PeerOf, with pidfdOf as the way to ask a socket for its peer's
// pidfd; ENOPROTOOPT from it means that the kernel has none.
func peerOf(c *net.UnixConn, pidfdOf func(socket int) (int, error)) (*Process, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("pin peer: %w", err)
	}
	var (
		cred              *unix.Ucred
		fd                int
		credErr, pidfdErr error
	)
	err = raw.Control(func(s uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr == nil && cred.Pid > 0 {
			fd, pidfdErr = pidfdOf(int(s))
		}
	})
	switch err := cmp.Or(err, credErr); {
	case err != nil:
		return nil, fmt.Errorf("pin peer: %w", err)
	case cred.Pid <= 0:
		return nil, fmt.Errorf("pin peer: %w: the caller's PID is not visible here; run the agent in the host's PID namespace (hostPID: true)", ErrPIDNamespace)
	case errors.Is(pidfdErr, unix.ENOPROTOOPT):
		return pinPID(int(cred.Pid), cred)
	case errors.Is(pidfdErr, unix.ESRCH), errors.Is(pidfdErr, unix.EINVAL): // which of them depends on the kernel
		return nil, fmt.Errorf("pin peer: process %d has exited: %w", cred.Pid, ErrProcessGone)
	case pidfdErr != nil:
		return nil, fmt.Errorf("pin peer: SO_PEERPIDFD of process %d: %w", cred.Pid, pidfdErr)
	}
	return pin(int(cred.Pid), os.NewFile(uintptr(fd), "pidfd"), cred)
}

// peerPidfd asks a socket for its peer's pidfd, which is close-on-exec.
func peerPidfd(socket int) (int, error) {
	return unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
}

// Pin pins the process that has this PID now, for PIDs that a person or an
// authorized caller names. The error wraps ErrProcessGone if there is none,
// ErrPIDNamespace as for PeerOf.
func Pin(pid int) (*Process, error) {
	return pinPID(pid, nil)
}

// pinPID pins by PID. The start time is the same before and after the PID is
// opened: it did not come to mean another process meanwhile.
func pinPID(pid int, cred *unix.Ucred) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("pin process %d: not a PID", pid)
	}
	before, beforeErr := readStart(procFolder(pid), pid)
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("pin process %d: there is no such process: %w", pid, ErrProcessGone)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("pin process %d: the number of a thread, not of a process", pid)
	case errors.Is(err, unix.ENOSYS):
		return nil, fmt.Errorf("pin process %d: pidfd_open: %w: needs Linux 5.3 and a seccomp profile that allows it", pid, err)
	case err != nil:
		return nil, fmt.Errorf("pin process %d: pidfd_open: %w", pid, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // for AwaitExit
		return nil, errors.Join(fmt.Errorf("pin process %d: %w", pid, err), unix.Close(fd))
	}
	after, afterErr := readStart(procFolder(pid), pid)
	p, err := pin(pid, os.NewFile(uintptr(fd), "pidfd"), cred) // looks last whether it has exited
	if err != nil {
		return nil, err
	}
	if beforeErr != nil || afterErr != nil || before != after {
		p.Close()
		return nil, fmt.Errorf("pin process %d: the PID changed hands meanwhile: %w", pid, ErrProcessGone)
	}
	return p, nil
}

// pin makes a Process of a pidfd, which it owns from here on. The user and
// group are those of cred, and those the process has now unless there is one.
func pin(pid int, pidfd *os.File, cred *unix.Ucred) (*Process, error) {
	p := &Process{PID: pid, pidfd: pidfd, proc: procFolder(pid)}
	if err := p.fill(cred); err != nil {
		pidfd.Close()
		return nil, fmt.Errorf("pin process %d: %w", pid, err)
	}
	return p, nil
}

func (p *Process) fill(cred *unix.Ucred) error {
	if err := p.sameNamespace(); err != nil {
		return err
	}
	now, err := p.look()
	if err != nil {
		return err
	}
	p.exe, p.UID, p.GID = now.exe, now.uid, now.gid
	if cred != nil {
		p.UID, p.GID = cred.Uid, cred.Gid
		return p.compare(now)
	}
	return nil
}

// sameNamespace makes sure that the proc file system knows the process under
// the same PID as we do. A proc file system shows the PIDs of the namespace it
// was mounted in; the fdinfo of a pidfd, read there, is the kernel's own
// translation.
func (p *Process) sameNamespace() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	b := buffers.Get().(*buffer)
	defer b.free()
	var fdinfo []byte
	var readErr error
	if err := raw.Control(func(fd uintptr) {
		fdinfo, readErr = b.head(filepath.Join(procRoot(), "self", "fdinfo", strconv.Itoa(int(fd))), maxFdinfo)
	}); err != nil {
		return err
	}
	if errors.Is(readErr, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s does not show this process itself; mount the proc file system of the host's PID namespace there and share that namespace", ErrPIDNamespace, procRoot())
	}
	if readErr != nil {
		return readErr
	}
	switch pid, err := parsePidfd(fdinfo); {
	case err != nil:
		return err
	case pid == p.PID:
		return nil
	case pid == -1:
		return fmt.Errorf("it has exited: %w", ErrProcessGone)
	default:
		return fmt.Errorf("%w: %s is of another one than this process; mount the proc file system of the agent's own PID namespace there", ErrPIDNamespace, procRoot())
	}
}

// Alive returns nil while the process runs, under the same effective user and
// group and executing the same file as when it was pinned. Otherwise, and
// after Close, the error wraps ErrProcessGone. What was read of the process
// before Alive returned nil was its own, and not of a later owner of its PID.
func (p *Process) Alive() error {
	now, err := p.look()
	if err == nil {
		err = p.compare(now)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrProcessGone):
		return fmt.Errorf("process %d: %w", p.PID, err)
	default: // if it cannot be told, it does not count
		return fmt.Errorf("process %d: %w: %w", p.PID, err, ErrProcessGone)
	}
}

// state is what a process may not change while it is pinned.
type state struct {
	uid, gid uint32
	exe      program
}

// look reads the process's state. It looks last whether the process has
// exited: until then nobody else can have had its PID, so what was read before
// was its own.
func (p *Process) look() (state, error) {
	var now state
	var err error
	if now.uid, now.gid, err = p.owner(); err == nil {
		now.exe, err = readProgram(p.proc)
	}
	if gone := p.exited(); gone != nil {
		return state{}, gone
	}
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, fmt.Errorf("it runs, but is hidden from us (is %s mounted with hidepid?): %w", procRoot(), err)
	}
	return now, err
}

func (p *Process) compare(now state) error {
	switch {
	case now.uid != p.UID || now.gid != p.GID:
		return fmt.Errorf("it runs as %d:%d, not as %d:%d any more: %w", now.uid, now.gid, p.UID, p.GID, ErrProcessGone)
	case now.exe == program{} && p.exe != program{}:
		return fmt.Errorf("its program cannot be seen any more: %w", ErrProcessGone)
	case now.exe != p.exe:
		return fmt.Errorf("it executes another program: %w", ErrProcessGone)
	}
	return nil
}

// exited returns nil until the process, with all its threads, has ended. A
// pidfd becomes readable then, pidfd_open(2), also while the parent has not
// yet waited for the process; a signal could still be sent to it at that time.
func (p *Process) exited() error {
	if p.pidfd == nil {
		return fmt.Errorf("it was never pinned: %w", ErrProcessGone)
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("poll its pidfd: %w: %w", err, ErrProcessGone)
	}
	var n int
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		for {
			n, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			if !errors.Is(pollErr, unix.EINTR) {
				return
			}
		}
	})
	if err = cmp.Or(err, pollErr); err != nil {
		return fmt.Errorf("poll its pidfd: %w: %w", err, ErrProcessGone)
	}
	if n > 0 {
		return fmt.Errorf("it has exited: %w", ErrProcessGone)
	}
	return nil
}

// AwaitExit returns nil once the process, which Pin pinned, has ended, or else
// the error of ctx. No thread waits meanwhile. One call at a time may wait. It
// says nothing of a process that became another one without ending: see Alive.
func (p *Process) AwaitExit(ctx context.Context) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	if err := p.pidfd.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		_ = p.pidfd.SetReadDeadline(time.Unix(1, 0)) // fails on a closed file only
	})
	defer func() {
		if !stop() {
			<-cut // lest it end the next wait
		}
	}()
	err = raw.Read(func(uintptr) bool { return p.exited() != nil })
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fmt.Errorf("wait for process %d: %w", p.PID, err)
}

// Close lets the process go. Closing twice is an error of no consequence.
func (p *Process) Close() error {
	if p.pidfd == nil {
		return nil
	}
	return p.pidfd.Close()
}

// ProcPath returns the path of a file of this process in the proc file system,
// such as ProcPath("cgroup"), HOST_PROC respected. What is read there counts
// only if Alive returns nil afterwards.
func (p *Process) ProcPath(name string) string { return filepath.Join(p.proc, name) }

// ReadProc returns the content of a file of this process in the proc file
// system, or an error if it is longer than limit bytes. See ProcPath for when
// it counts.
func (p *Process) ReadProc(name string, limit int) ([]byte, error) {
	b := buffers.Get().(*buffer)
	defer b.free()
	content, err := b.whole(p.ProcPath(name), limit)
	return bytes.Clone(content), err
}

func procFolder(pid int) string { return filepath.Join(procRoot(), strconv.Itoa(pid)) }

func readStart(proc string, pid int) (uint64, error) {
	b := buffers.Get().(*buffer)
	defer b.free()
	stat, err := b.head(filepath.Join(proc, "stat"), maxStat)
	if err != nil {
		return 0, err
	}
	shown, start, err := parseStat(stat)
	if err == nil && shown != pid {
		err = fmt.Errorf("%s shows process %d", proc, shown)
	}
	return start, err
}

// owner returns the effective user and group the process has now: from its
// pidfd, of which Linux 6.13 and later can be asked, or from the proc file
// system.
func (p *Process) owner() (uid, gid uint32, err error) {
	if p.pidfd == nil {
		return readOwner(p.proc)
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CREDS}
	var infoErr error
	if err := raw.Control(func(fd uintptr) { infoErr = unix.IoctlPidfdInfo(int(fd), &info) }); err != nil {
		return 0, 0, err
	}
	if infoErr == nil && info.Mask&unix.PIDFD_INFO_CREDS != 0 {
		return info.Euid, info.Egid, nil
	}
	return readOwner(p.proc)
}

func readOwner(proc string) (uid, gid uint32, err error) {
	b := buffers.Get().(*buffer)
	defer b.free()
	status, err := b.head(filepath.Join(proc, "status"), headOfStatus)
	if err != nil {
		return 0, 0, err
	}
	return parseOwner(status)
}

// readProgram returns the file the process executes: zero if we may not look,
// or if there is none, as for kernel threads.
func readProgram(proc string) (program, error) {
	found, err := statProgram(filepath.Join(proc, "exe"))
	switch {
	case err == nil:
		return found, nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
		return program{}, nil
	default:
		return program{}, fmt.Errorf("look at the program: %w", err)
	}
}

// statProgram looks at a file without asking the file system's server, which
// may not answer: device and inode of an open file are known.
func statProgram(path string) (program, error) {
	var st unix.Statx_t
	for {
		err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return program{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}, err
	}
}

func programOf(st *unix.Stat_t) program {
	return program{dev: uint64(st.Dev), ino: st.Ino}
}
