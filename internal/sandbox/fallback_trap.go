//go:build sandboxtrap

package sandbox

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// fallback, in a binary built to find calls that the list forgot, ends the
// program with the goroutine's stack at the call (SIGSYS).
var fallback = block{bpf.RetConstant{Val: unix.SECCOMP_RET_TRAP}}
