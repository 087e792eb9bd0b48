//go:build amd64 || arm64

package sandbox

import "golang.org/x/sys/unix"

// plain are allowed whatever their arguments.
var plain = []uint32{
	// what connections are made of
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_CLOSE, unix.SYS_SHUTDOWN,
	unix.SYS_ACCEPT, unix.SYS_ACCEPT4, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_CONNECT,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT,
	unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_RECVMSG, unix.SYS_SENDMMSG, unix.SYS_RECVMMSG,
	unix.SYS_SPLICE, unix.SYS_TEE, unix.SYS_SENDFILE, unix.SYS_COPY_FILE_RANGE, unix.SYS_PIPE2, unix.SYS_DUP, unix.SYS_DUP3,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_EVENTFD2,
	unix.SYS_PPOLL, unix.SYS_PSELECT6, unix.SYS_TIMERFD_CREATE, unix.SYS_TIMERFD_SETTIME, unix.SYS_TIMERFD_GETTIME,

	// Go's runtime, and the race detector's
	unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY,
	unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETCPU,
	unix.SYS_MUNMAP, unix.SYS_MREMAP, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK, unix.SYS_MEMBARRIER,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_RT_SIGTIMEDWAIT, unix.SYS_RT_SIGPENDING, unix.SYS_RT_SIGSUSPEND,
	unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL, unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
	unix.SYS_SET_TID_ADDRESS, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ,
	unix.SYS_SETITIMER, unix.SYS_GETITIMER, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE,
	unix.SYS_GETRANDOM, unix.SYS_UNAME, unix.SYS_SYSINFO, unix.SYS_GETRUSAGE, unix.SYS_TIMES, unix.SYS_UMASK,
	unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETTID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID,
	unix.SYS_GETGROUPS, unix.SYS_GETRESUID, unix.SYS_GETRESGID, unix.SYS_GETPGID, unix.SYS_GETSID, unix.SYS_CAPGET,

	// files, within what Landlock allows
	unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_LSEEK, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_GETDENTS64,
	unix.SYS_FSTAT, unix.SYS_STATX, unix.SYS_STATFS, unix.SYS_FSTATFS, unix.SYS_READLINKAT, unix.SYS_GETCWD,
	unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_FADVISE64, unix.SYS_FLOCK,
	unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_MKDIRAT, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2,
	unix.SYS_INOTIFY_INIT1, unix.SYS_INOTIFY_ADD_WATCH, unix.SYS_INOTIFY_RM_WATCH, unix.SYS_CLOSE_RANGE,
}

// deadly are calls that nothing in this program makes: whoever makes one has
// taken it over. The process ends at once, and what started it says so.
var deadly = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
	unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_UNSHARE, unix.SYS_SETNS,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_SYSLOG,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_FANOTIFY_INIT,
	unix.SYS_PERSONALITY, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
}

// binding are the calls that bind and detach mounts, by open descriptors. None
// of them makes a file system or looks up a path that is given as text, but
// umount2, which takes /proc/self/fd.
var binding = []uint32{unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR, unix.SYS_MOVE_MOUNT, unix.SYS_UMOUNT2}

// allowMounts changes the rules to those of a process that mounts and speaks to
// its own host only: what it listens on by then, it keeps.
func allowMounts(rules map[uint32]block) {
	for _, number := range binding {
		rules[number] = allow
	}
	rules[unix.SYS_SOCKET] = oneOf(0, refuse(unix.EAFNOSUPPORT), unix.AF_UNIX)
}

// Protocols of AF_INET and AF_INET6.
const protoMPTCP = 262 // Go listens with it, for plain TCP too

// syscalls says of each number what is done; numbers that are not in it get
// the fallback. pid is this process's; mounts is Config.Mounts.
func syscalls(pid uint32, mounts bool) (map[uint32]block, error) {
	rules := map[uint32]block{}
	for _, list := range [][]uint32{plain, plainHere} {
		for _, number := range list {
			rules[number] = allow
		}
	}
	for _, list := range [][]uint32{deadly, deadlyHere} {
		for _, number := range list {
			rules[number] = kill
		}
	}
	denied := refuse(unix.EPERM)

	// Threads, never processes, and none in other namespaces. The flags of
	// clone3 are out of a filter's sight; without it, clone is used.
	const thread = unix.CLONE_THREAD | unix.CLONE_VM | unix.CLONE_SIGHAND
	const spaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	rules[unix.SYS_CLONE] = concat(when(0, thread|spaces, thread, allow), denied)
	rules[unix.SYS_CLONE3] = refuse(unix.ENOSYS)

	// Signals to this process alone: the scheduler interrupts its threads.
	rules[unix.SYS_TGKILL] = oneOf(0, denied, pid)
	rules[unix.SYS_KILL] = oneOf(0, denied, pid)
	rules[unix.SYS_PRLIMIT64] = oneOf(0, denied, 0, pid)

	// No memory that can be executed.
	rules[unix.SYS_MMAP] = none(2, unix.PROT_EXEC, denied)
	rules[unix.SYS_MPROTECT] = none(2, unix.PROT_EXEC, denied)

	// Streams and datagrams; netlink to list interfaces.
	internet := concat(
		when(1, 0xf, unix.SOCK_STREAM, oneOf(2, denied, 0, unix.IPPROTO_TCP, protoMPTCP)),
		when(1, 0xf, unix.SOCK_DGRAM, oneOf(2, denied, 0, unix.IPPROTO_UDP)),
		denied)
	rules[unix.SYS_SOCKET] = concat(
		when(0, whole, unix.AF_UNIX, allow),
		when(0, whole, unix.AF_INET, internet),
		when(0, whole, unix.AF_INET6, internet),
		when(0, whole, unix.AF_NETLINK, oneOf(2, denied, unix.NETLINK_ROUTE)),
		refuse(unix.EAFNOSUPPORT))
	rules[unix.SYS_SOCKETPAIR] = oneOf(0, refuse(unix.EAFNOSUPPORT), unix.AF_UNIX)

	// Nothing that has the kernel signal others (F_SETOWN), or types into
	// terminals (TIOCSTI).
	rules[unix.SYS_FCNTL] = oneOf(1, denied,
		unix.F_DUPFD, unix.F_DUPFD_CLOEXEC, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL,
		unix.F_GETLK, unix.F_SETLK, unix.F_SETLKW, unix.F_OFD_GETLK, unix.F_OFD_SETLK, unix.F_OFD_SETLKW,
		unix.F_GETPIPE_SZ, unix.F_SETPIPE_SZ)
	rules[unix.SYS_IOCTL] = oneOf(1, denied,
		fionread, unix.SIOCOUTQ, fionbio, unix.TCGETS, unix.TIOCGWINSZ)
	rules[unix.SYS_PRCTL] = oneOf(0, denied,
		unix.PR_SET_VMA, unix.PR_SET_NAME, unix.PR_GET_NAME, unix.PR_GET_DUMPABLE, unix.PR_GET_NO_NEW_PRIVS,
		unix.PR_GET_SECCOMP, unix.PR_CAPBSET_READ, unix.PR_SET_THP_DISABLE, unix.PR_GET_THP_DISABLE)
	for number, verdict := range checkedHere {
		rules[number] = verdict
	}
	if mounts {
		allowMounts(rules)
	}
	return rules, nil
}

// Of asm-generic/ioctls.h.
const (
	fionread = 0x541b // FIONREAD
	fionbio  = 0x5421 // FIONBIO
)
