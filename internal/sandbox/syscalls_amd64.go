package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// plainHere are the older forms that this architecture still has.
var plainHere = []uint32{
	unix.SYS_OPEN, unix.SYS_STAT, unix.SYS_LSTAT, unix.SYS_NEWFSTATAT, unix.SYS_ACCESS, unix.SYS_READLINK, unix.SYS_UNLINK,
	unix.SYS_RENAME, unix.SYS_MKDIR, unix.SYS_CHMOD, unix.SYS_INOTIFY_INIT, unix.SYS_PIPE, unix.SYS_DUP2,
	unix.SYS_POLL, unix.SYS_SELECT, unix.SYS_EPOLL_CREATE, unix.SYS_EPOLL_WAIT, unix.SYS_TIME, unix.SYS_GETRLIMIT, unix.SYS_GETPGRP,
}

var deadlyHere = []uint32{unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_USELIB, unix.SYS_CREATE_MODULE}

// checkedHere: a new thread's own storage.
var checkedHere = map[uint32]block{
	unix.SYS_ARCH_PRCTL: oneOf(0, refuse(unix.EPERM), archSetFS),
}

const archSetFS = 0x1002 // ARCH_SET_FS (asm/prctl.h)
