package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// This architecture has no older forms of calls.
var (
	plainHere   = []uint32{unix.SYS_FSTATAT, unix.SYS_GETRLIMIT}
	deadlyHere  []uint32
	checkedHere map[uint32]block
)
