package attestor

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Bounds on what is read of /proc. The kernel writes these files, but how long
// they get is up to the process they describe.
const (
	maxStat      = 4 << 10   // the comm of at most 64 bytes and 51 numbers
	maxStatus    = 128 << 10 // one or two KiB and 11 bytes for each group
	maxFdinfo    = 4 << 10
	maxGroups    = 4096 // Linux allows 65,536, of which each would cost a look-up by name
	headOfStatus = 4 << 10
)

// hostProc names the variable that says where the host's proc file system is
// mounted, as stock spire-agent reads it.
const hostProc = "HOST_PROC"

// procRoot returns where the proc file system is mounted.
func procRoot() string {
	return cmp.Or(os.Getenv(hostProc), "/proc")
}

// ownProc is where a proc file system was found to be of our own PID namespace.
// That it is mounted over while we run is not looked for.
var ownProc atomic.Pointer[string]

// procIsOwn reports whether the proc file system that is read shows the PIDs of
// our own PID namespace; false where it cannot be told. The kernel lists the
// PIDs of a process from the namespace of the file system down to that of the
// process, proc_pid_status(5): of ours there is one if they are the same.
func procIsOwn() bool {
	root := procRoot()
	if known := ownProc.Load(); known != nil && *known == root {
		return true
	}
	b := buffers.Get().(*buffer)
	defer b.free()
	status, err := b.whole(filepath.Join(root, "self", "status"), maxStatus)
	if err != nil {
		return false
	}
	line, err := statusLine(status, "NSpid:")
	if err != nil || string(bytes.TrimSpace(line)) != strconv.Itoa(os.Getpid()) {
		return false
	}
	ownProc.Store(&root)
	return true
}

// parseStat returns the PID and the start time (in clock ticks since boot) of
// a /proc/PID/stat, proc_pid_stat(5). The comm between the parentheses is the
// process's own choice and may hold spaces, parentheses and line breaks; no
// later field holds a parenthesis, so the last one ends it.
func parseStat(stat []byte) (pid int, start uint64, err error) {
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return 0, 0, errors.New("parse stat: the command is not in parentheses")
	}
	pid, err = strconv.Atoi(string(bytes.TrimSpace(stat[:open])))
	if err != nil || pid <= 0 {
		return 0, 0, errors.New("parse stat: field 1 is not a PID")
	}
	const startField = 22
	field := 2
	for value := range bytes.FieldsSeq(stat[end+1:]) {
		if field++; field < startField {
			continue
		}
		start, err = strconv.ParseUint(string(value), 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("parse stat: field %d is not a start time", startField)
		}
		return pid, start, nil
	}
	return 0, 0, fmt.Errorf("parse stat: %d fields, need %d", field, startField)
}

// parseOwner returns the effective user and group IDs of a /proc/PID/status,
// proc_pid_status(5), of which the head is enough.
func parseOwner(status []byte) (uid, gid uint32, err error) {
	if uid, err = parseEffective(status, "Uid:"); err != nil {
		return 0, 0, err
	}
	gid, err = parseEffective(status, "Gid:")
	return uid, gid, err
}

// parseEffective returns the second of the four IDs (real, effective, saved,
// file system) on the line that begins with key.
func parseEffective(status []byte, key string) (uint32, error) {
	line, err := statusLine(status, key)
	if err != nil {
		return 0, err
	}
	ids := bytes.Fields(line)
	if len(ids) != 4 {
		return 0, fmt.Errorf("parse status: %s %d values, want 4", key, len(ids))
	}
	id, err := strconv.ParseUint(string(ids[1]), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("parse status: %s the second value is not an ID", key)
	}
	return uint32(id), nil
}

// parseGroups returns the supplementary group IDs of a whole
// /proc/PID/status, in its order.
func parseGroups(status []byte) ([]uint32, error) {
	line, err := statusLine(status, "Groups:")
	if err != nil {
		return nil, err
	}
	fields := bytes.Fields(line)
	if len(fields) > maxGroups {
		return nil, fmt.Errorf("parse status: %d supplementary groups, at most %d are supported", len(fields), maxGroups)
	}
	groups := make([]uint32, len(fields))
	for i, field := range fields {
		gid, err := strconv.ParseUint(string(field), 10, 32)
		if err != nil {
			return nil, errors.New("parse status: Groups: a value is not an ID")
		}
		groups[i] = uint32(gid)
	}
	return groups, nil
}

// Nested tells whether the process is in a PID namespace below the one that the
// proc file system shows: it has further PIDs there, and what it takes for the PID
// of some process is here another's.
func (p *Process) Nested() (bool, error) {
	b := buffers.Get().(*buffer)
	defer b.free()
	status, err := b.whole(p.ProcPath("status"), maxStatus)
	if err != nil {
		return false, fmt.Errorf("process %d: %w", p.PID, err)
	}
	nested, err := parseNested(status)
	if err == nil {
		err = p.Alive()
	}
	return nested, err
}

// parseNested tells whether a whole /proc/PID/status is that of a process with
// more PIDs than one: one for each namespace, pid_namespaces(7).
func parseNested(status []byte) (bool, error) {
	line, err := statusLine(status, "NSpid:")
	if err != nil {
		return false, err
	}
	pids := bytes.Fields(line)
	if len(pids) == 0 {
		return false, errors.New("parse status: NSpid: no value")
	}
	return len(pids) > 1, nil
}

// statusLine returns what follows key on the one complete line that begins
// with it. The kernel escapes line breaks in the name a process gives itself,
// so a second such line can only mean that this is not the kernel's file.
func statusLine(status []byte, key string) ([]byte, error) {
	var value []byte
	found := false
	for line := range bytes.Lines(status) {
		rest, ok := bytes.CutPrefix(line, []byte(key))
		if !ok || !bytes.HasSuffix(line, []byte("\n")) {
			continue
		}
		if found {
			return nil, fmt.Errorf("parse status: two lines begin with %s", key)
		}
		value, found = rest, true
	}
	if !found {
		return nil, fmt.Errorf("parse status: no line begins with %s", key)
	}
	return value, nil
}

// parsePidfd returns the PID in the fdinfo of a pidfd: 0 when the process is
// not in that proc file system's PID namespace, -1 when it is reaped.
func parsePidfd(fdinfo []byte) (int, error) {
	line, err := statusLine(fdinfo, "Pid:")
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(line)))
	if err != nil {
		return 0, errors.New("parse fdinfo: Pid: the value is not a PID")
	}
	return pid, nil
}

// buffer is what a file of /proc is read into. The zero buffer works.
type buffer struct{ b []byte }

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// usual is what the files of most processes take.
const usual = 4 << 10

// free gives the buffer back, and with it all it has returned.
func (b *buffer) free() {
	if cap(b.b) <= 4*usual {
		buffers.Put(b)
	}
}

// head returns at most the first limit bytes of a file, which hold until the
// buffer is used again. It makes four system calls where package os makes
// eight, and is for files on which nobody waits, such as those of /proc.
func (b *buffer) head(path string, limit int) ([]byte, error) {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	b.b = slices.Grow(b.b[:0], min(usual, limit))
	for len(b.b) < limit {
		if len(b.b) == cap(b.b) {
			b.b = slices.Grow(b.b, cap(b.b))
		}
		free := b.b[len(b.b):min(cap(b.b), limit)]
		n, err := retry(func() (int, error) { return unix.Read(fd, free) })
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			break
		}
		b.b = b.b[:len(b.b)+n]
	}
	return b.b, nil
}

// whole returns a file's content as head does, or an error if it is longer
// than limit bytes.
func (b *buffer) whole(path string, limit int) ([]byte, error) {
	content, err := b.head(path, limit+1)
	if err != nil {
		return nil, err
	}
	if len(content) > limit {
		return nil, fmt.Errorf("read %s: longer than %d bytes", path, limit)
	}
	return content, nil
}

// retry calls a system call again that a signal has interrupted.
func retry(call func() (int, error)) (n int, err error) {
	for {
		if n, err = call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// readBounded returns a file's content, or an error if it is longer than limit
// bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: longer than %d bytes", path, limit)
	}
	return b, nil
}
