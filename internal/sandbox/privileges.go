package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// prctl calls prctl(2) on every thread of the process: no_new_privs and the
// capability sets belong to a thread.
func prctl(option, arg2, arg3 uintptr) error {
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, option, arg2, arg3, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// NoNewPrivs keeps this process and its children from gaining privileges by
// executing a set-user-ID program or one with file capabilities. A process of
// root's that executes a program as root loses nothing by it.
func NoNewPrivs() error {
	if err := noNewPrivs(); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

func noNewPrivs() error { return prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0) }

func noCoreFiles() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) }

// undumpable keeps the memory away from other processes of the same user:
// ptrace, /proc/PID/mem. Its files in /proc are root's from then on.
func undumpable() error {
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // of the whole process
}

// dropCapabilities leaves the process no capability but those in keep that it
// has, and none that a program it executed could get.
func dropCapabilities(keep uint64) error {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := new([2]unix.CapUserData)
	if err := unix.Capget(header, &data[0]); err != nil {
		return fmt.Errorf("read the capabilities: %w", err)
	}
	// A kernel without ambient capabilities has none to clear.
	if err := prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("clear the ambient capabilities: %w", err)
	}
	// The bounding set takes CAP_SETPCAP to change. Who does not have it
	// executes nothing that gains capabilities either, by no_new_privs.
	if data[0].Effective&(1<<unix.CAP_SETPCAP) != 0 {
		if err := dropBounding(prctl); err != nil {
			return err
		}
	}
	for i := range data {
		kept := uint32(keep >> (32 * i))
		data[i].Permitted &= kept
		data[i].Effective = data[i].Permitted
		data[i].Inheritable = 0
	}
	// The call is made by other threads too: the memory must not move.
	var pin runtime.Pinner
	defer pin.Unpin()
	header.Pid = 0
	pin.Pin(header)
	pin.Pin(data)
	if _, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0); errno != 0 { //nolint:gosec // G103: capset(2) takes two pointers
		return fmt.Errorf("drop the capabilities: %w", errno)
	}
	return nil
}

// lowPortsMatter reports whether this process can bind ports below 1024 by its
// capability, and not because everybody may, as in many containers.
func lowPortsMatter() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil || data[0].Permitted&(1<<unix.CAP_NET_BIND_SERVICE) == 0 {
		return false
	}
	first, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	return err != nil || strings.TrimSpace(string(first)) != "0"
}

// dropBounding empties the capability bounding set by way of call.
func dropBounding(call func(option, arg2, arg3 uintptr) error, keep ...uintptr) error {
	for c := uintptr(0); ; c++ {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // past the last there is
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the capability bounding set: %w", err)
		}
		if has == 0 || slices.Contains(keep, c) {
			continue
		}
		if err := call(unix.PR_CAPBSET_DROP, c, 0); err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
}

// ConfineChildren takes from the calling thread, and so from the processes it
// starts, no_new_privs and every capability a program could gain; with
// lowPorts, CAP_NET_BIND_SERVICE stays. The thread keeps the capabilities it
// has, so that it can still start a process as another user. It must be locked
// (runtime.LockOSThread), and never unlocked: it ends with its goroutine.
func ConfineChildren(lowPorts bool) error {
	var keep []uintptr
	if lowPorts {
		keep = []uintptr{unix.CAP_NET_BIND_SERVICE}
	}
	own := func(option, arg2, arg3 uintptr) error { return unix.Prctl(int(option), arg2, arg3, 0, 0) }
	if err := own(unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := dropBounding(own, keep...); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil // without CAP_SETPCAP there is still no_new_privs
}
