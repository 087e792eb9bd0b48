package main

import (
	"context"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// This file is how a process keeps its memory. A handshake leaves some 30 KiB
// of garbage behind, and with Go's defaults a proxy whose connections hold
// little collects it every hundred handshakes: an eighth of the CPU time. So
// much garbage may lie there while there is work, little by connection, and
// none of it stays once there is no work: nor do the pages of the program that
// only its start has needed, which are three quarters of what a process without
// work holds.

const (
	// collectAt is GOGC: garbage may grow to that part, in percent, of what
	// is in use and heapFloor.
	collectAt = 50
	// heapFloor counts as in use though it is not.
	heapFloor = 64 << 20
	// limitPart is the part of the cgroup's memory that the heap may take
	// before Go would rather collect than grow.
	limitPart = 0.9
)

// keepMemory sets how this process collects garbage, and tidies up whenever it
// has nothing to do, until ctx ends. Where the environment says how (GOGC,
// GOMEMLIMIT), it is done as the environment says.
func keepMemory(ctx context.Context) {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	// Never written to, so that it takes addresses and no memory. A heap
	// minimum, which this stands for, is not among Go's settings.
	floor := make([]byte, heapFloor)
	defer runtime.KeepAlive(floor)
	debug.SetGCPercent(collectAt)
	if limit, ok := memoryLimit("/"); ok {
		debug.SetMemoryLimit(int64(float64(limit)*limitPart) + heapFloor)
	}
	tidyUp(ctx, proxyWorth)
}

// tidyUp tidies up whenever this process has nothing to do and has allocated
// worth bytes since it last did, until ctx ends.
func tidyUp(ctx context.Context, worth uint64) {
	ticks := time.NewTicker(quietFor)
	defer ticks.Stop()
	t := tidier{collect: collectAll, worth: worth}
	for {
		select {
		case now := <-ticks.C:
			t.look(now, allocated())
		case <-ctx.Done():
			return
		}
	}
}

const (
	// The process counts as having nothing to do when next to nothing,
	// quietBytes, was allocated in quietFor, quietTimes on end: by then the
	// connections that fell silent have given up what they held, which is
	// most of what there is to give back.
	quietFor   = 500 * time.Millisecond
	quietBytes = 64 << 10
	quietTimes = 3
	// What has to have been allocated since it was last tidied. An agent at
	// rest allocates some hundred KiB each time it asks server and kubelet,
	// of which the collector keeps no more than as much as is in use.
	proxyWorth, agentWorth = 1 << 20, 8 << 20
	// tidyShare bounds the time it takes to tidy up: the pause before it is
	// done again is that many times as long.
	tidyShare = 20
)

// tidier collects garbage and gives memory back to the system when work has
// ceased.
type tidier struct {
	collect    func()
	worth      uint64
	seen, tidy uint64 // bytes allocated so far when it last looked, and tidied
	quiet      int    // looks on end at which next to nothing was
	next       time.Time
}

// look is called each quietFor with all the bytes that were allocated so far.
func (t *tidier) look(now time.Time, allocated uint64) {
	t.quiet++
	if allocated-t.seen >= quietBytes {
		t.quiet = 0
	}
	t.seen = allocated
	if t.quiet < quietTimes || t.tidy > 0 && allocated-t.tidy < t.worth || now.Before(t.next) { // after the start, whatever it took
		return
	}
	begin := time.Now()
	t.collect()
	t.tidy = allocated
	t.next = now.Add(tidyShare * time.Since(begin))
}

// collectAll collects twice: pools give back what they hold at the second time
// only, and stacks shrink by half each time.
func collectAll() {
	runtime.GC()
	debug.FreeOSMemory()
	leaveProgram()
}

// leaveProgram lets go of the pages of the program's file. The kernel maps
// sixteen around each that is touched, so that a start has nearly all of them;
// those that are still needed come back from the page cache when they are. What
// the program was changed to in memory would not: a linker has written to pages
// that cannot be written to any more, and a mapping with such pages is left alone.
func leaveProgram() {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return
	}
	var begin, length uintptr
	ours := false
	for line := range strings.Lines(string(smaps)) {
		if kilobytes, ok := strings.CutPrefix(line, "Anonymous:"); ok {
			if ours && strings.TrimSpace(kilobytes) == "0 kB" {
				_, _, _ = unix.Syscall(unix.SYS_MADVISE, begin, length, unix.MADV_DONTNEED) // of no consequence where it fails
			}
			ours = false
			continue
		}
		if b, l, ok := readOnlyMapping(line, program); ok {
			begin, length, ours = b, l, true
		}
	}
}

// readOnlyMapping returns where a line of /proc/PID/smaps, proc_pid_smaps(5), has
// a mapping of the file that cannot be written to.
func readOnlyMapping(line, file string) (begin, length uintptr, ok bool) {
	fields := strings.Fields(line)
	if len(fields) != 6 || fields[5] != file || strings.Contains(fields[1], "w") || !strings.HasSuffix(fields[1], "p") {
		return 0, 0, false
	}
	from, to, _ := strings.Cut(fields[0], "-")
	first, err := strconv.ParseUint(from, 16, 64)
	if err != nil {
		return 0, 0, false
	}
	end, err := strconv.ParseUint(to, 16, 64)
	if err != nil || end <= first {
		return 0, 0, false
	}
	return uintptr(first), uintptr(end - first), true
}

// allocated returns how many bytes were allocated so far.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// memoryLimit returns how many bytes the cgroups (version 2) that this process
// is in allow it, the smallest of all levels. It is false where they allow
// everything, or do not say.
func memoryLimit(root string) (limit uint64, ok bool) {
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return 0, false
	}
	limit = math.MaxUint64
	for line := range strings.Lines(string(text)) {
		path, unified := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !unified {
			continue
		}
		for {
			if most, err := readLimit(filepath.Join(root, "sys/fs/cgroup", path, "memory.max")); err == nil {
				limit = min(limit, most)
			}
			if path == "/" || path == "." {
				break
			}
			path = filepath.Dir(path)
		}
	}
	return limit, limit < math.MaxInt64-heapFloor
}

var errNoLimit = errors.New("no limit")

func readLimit(file string) (uint64, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, errNoLimit
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64) // "max" is none
}
