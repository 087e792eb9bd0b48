package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// filterSyscalls installs the filter on all threads. It is the last step: what
// the other steps call is not on its list.
func filterSyscalls(mounts bool) error {
	code, err := filter(mounts)
	if err != nil {
		return err
	}
	raw, err := bpf.Assemble(code)
	if err != nil {
		return fmt.Errorf("assemble the filter: %w", err)
	}
	program := make([]unix.SockFilter, len(raw))
	for i, in := range raw {
		program[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	prog := &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// With the log flag the kernel's audit log names each call that was
	// refused. Kernels before 4.14 do not have it.
	err = install(prog, unix.SECCOMP_FILTER_FLAG_TSYNC|unix.SECCOMP_FILTER_FLAG_LOG)
	if errors.Is(err, unix.EINVAL) {
		err = install(prog, unix.SECCOMP_FILTER_FLAG_TSYNC)
	}
	return err
}

func install(prog *unix.SockFprog, flags uintptr) error {
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(prog))) //nolint:gosec // G103: seccomp(2) takes a pointer
	runtime.KeepAlive(prog)
	switch {
	case errno == unix.ENOSYS || errno == unix.EINVAL:
		return fmt.Errorf("this kernel does not filter system calls: %w", errno)
	case errno != 0:
		return errno
	case thread != 0:
		return fmt.Errorf("thread %d has a filter of its own", thread)
	}
	return nil
}

// Offsets into struct seccomp_data (linux/seccomp.h). Only the low half of an
// argument is looked at, as the kernel itself takes all those we look at for
// 32 bits, or looks at no others of their bits.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

func argument(n int) bpf.Instruction {
	return bpf.LoadAbsolute{Off: uint32(offArgs + 8*n), Size: 4}
}

// A block is code whose every path ends with a verdict.
type block []bpf.Instruction

var (
	allow = block{bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}}
	kill  = block{bpf.RetConstant{Val: unix.SECCOMP_RET_KILL_PROCESS}}
)

func refuse(errno unix.Errno) block {
	return block{bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}}
}

func concat(parts ...block) block {
	var all block
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// when decides by then where the argument, masked, is value; it falls through
// to what follows where it is not.
func when(arg int, mask, value uint32, then block) block {
	return concat(block{
		argument(arg),
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: mask},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: value, SkipTrue: uint8(len(then))},
	}, then)
}

const whole = ^uint32(0)

// oneOf allows the values of an argument, and otherwise decides by other.
func oneOf(arg int, other block, values ...uint32) block {
	code := block{argument(arg)}
	for _, v := range values {
		code = append(code, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1}, allow[0])
	}
	return concat(code, other)
}

// none allows the call where no bit of the mask is set.
func none(arg int, mask uint32, other block) block {
	return concat(when(arg, mask, 0, allow), other)
}

// filter is the whole program: the architecture, then the number looked up in
// a binary tree, then what is said of it. From Linux 5.11 on the kernel keeps
// a bitmap of the numbers that are allowed whatever their arguments, and does
// not run the program for them at all.
func filter(mounts bool) (block, error) {
	rules, err := syscalls(uint32(unix.Getpid()), mounts)
	if err != nil {
		return nil, err
	}
	return concat(
		block{
			bpf.LoadAbsolute{Off: offArch, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
			kill[0],
			bpf.LoadAbsolute{Off: offNumber, Size: 4},
		},
		tree(spans(rules)),
	), nil
}

// span are the numbers from first up to the next span's.
type span struct {
	first   uint32
	verdict block
}

// spans fills the gaps between the numbers with the fallback.
func spans(rules map[uint32]block) []span {
	var list []span
	add := func(first uint32, verdict block) {
		if n := len(list); n > 0 && len(verdict) == 1 && len(list[n-1].verdict) == 1 && list[n-1].verdict[0] == verdict[0] {
			return // goes on as before
		}
		list = append(list, span{first, verdict})
	}
	for number := uint32(0); number < topNumber; number++ {
		verdict, ok := rules[number]
		if !ok {
			verdict = fallback
		}
		add(number, verdict)
	}
	add(topNumber, fallback)
	add(foreignNumbers, kill)
	return list
}

const (
	topNumber      = 1024       // no architecture's numbers come near
	foreignNumbers = 0x40000000 // __X32_SYSCALL_BIT: the same calls by other numbers
)

// tree looks the number up. Jumps reach 255 instructions; longer ones go by
// way of an unconditional one.
func tree(list []span) block {
	if len(list) == 1 {
		return list[0].verdict
	}
	half := len(list) / 2
	low, high := tree(list[:half]), tree(list[half:])
	pivot := list[half].first
	if len(low) <= 255 {
		return concat(block{bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: pivot, SkipTrue: uint8(len(low))}}, low, high)
	}
	return concat(block{
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: pivot, SkipFalse: 1},
		bpf.Jump{Skip: uint32(len(low))},
	}, low, high)
}
