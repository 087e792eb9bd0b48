package agent

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Undumpable keeps this process's memory, which holds the keys of the agent
// and of its workloads, out of core files and away from other processes of
// the same user: it is not dumped, and cannot be traced or read through
// /proc/PID/mem (PR_SET_DUMPABLE, RLIMIT_CORE). It is for the program to call,
// before it reads a key; New does not, as it is for a whole process.
//
// From then on the process's files in /proc belong to root. It still reads
// its own and walks /proc/self/fd, but without root's rights it can no longer
// write to them, as to /proc/self/comm. Children are not affected once they
// execute a program.
func Undumpable() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make this process undumpable: %w", err)
	}
	return nil
}
