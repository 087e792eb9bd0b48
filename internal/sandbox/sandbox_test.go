package sandbox_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/sandbox"
)

// tryEnv has this test's binary enter the sandbox and try one thing.
const tryEnv = "SANDBOX_TEST_TRY"

func TestMain(m *testing.M) {
	name := os.Getenv(tryEnv)
	if name == "" {
		os.Exit(m.Run())
	}
	var c sandbox.Config
	if err := json.Unmarshal([]byte(os.Getenv("SANDBOX_TEST_CONFIG")), &c); err != nil {
		panic(err)
	}
	if address := os.Getenv("SANDBOX_TEST_NOTIFY"); address != "" {
		notify = must(net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: address}))
	}
	if os.Getenv("SANDBOX_TEST_OLD") != "" {
		olderKernel()
	}
	box := sandbox.Enter(c)
	if missing := box.Missing(); len(missing) > 0 {
		fmt.Println("enforced:", box.Enforced(), "missing:", missing)
		os.Exit(exitMissing)
	}
	if err := tries[name](box, os.Getenv("SANDBOX_TEST_DIR")); err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	os.Exit(0)
}

// exitMissing is how a child ends in which the sandbox is not whole.
const exitMissing = 3

// notify is connected before the sandbox is entered, as to a service manager
// whose socket may have an abstract name.
var notify *net.UnixConn

// tries are what a child does in the sandbox. They return what was refused.
var tries = map[string]func(box *sandbox.Sandbox, dir string) error{
	"exec": func(*sandbox.Sandbox, string) error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"execveat": func(*sandbox.Sandbox, string) error {
		_, _, errno := unix.Syscall6(unix.SYS_EXECVEAT, 0, 0, 0, 0, 0, 0)
		return errno
	},
	"fork":        func(*sandbox.Sandbox, string) error { return exec.Command("/bin/true").Run() },
	"shadow":      func(*sandbox.Sandbox, string) error { return open("/etc/shadow") },
	"readOutside": func(_ *sandbox.Sandbox, dir string) error { return open(dir + "/outside/file") },
	"listOutside": func(_ *sandbox.Sandbox, dir string) error { _, err := os.ReadDir(dir + "/outside"); return err },
	"otherProcess": func(*sandbox.Sandbox, string) error {
		return open(fmt.Sprintf("/proc/%d/environ", os.Getppid()))
	},
	"writeRead":   func(_ *sandbox.Sandbox, dir string) error { return os.WriteFile(dir+"/read/new", nil, 0o600) },
	"writeTmp":    func(_ *sandbox.Sandbox, dir string) error { return os.WriteFile(dir+"/new", nil, 0o600) },
	"removeLog":   func(_ *sandbox.Sandbox, dir string) error { return os.Remove(dir + "/logs/access.log") },
	"readLog":     func(_ *sandbox.Sandbox, dir string) error { return open(dir + "/logs/access.log") },
	"symlink":     func(_ *sandbox.Sandbox, dir string) error { return os.Symlink("/etc", dir+"/logs/link") },
	"moveBetween": func(_ *sandbox.Sandbox, dir string) error { return os.Rename(dir+"/logs/access.log", dir+"/socks/x") },
	"writeAbove":  func(_ *sandbox.Sandbox, dir string) error { return os.WriteFile(dir+"/keep/new", nil, 0o600) },
	"dirInKept":   func(_ *sandbox.Sandbox, dir string) error { return os.Mkdir(dir+"/keep/data/new", 0o700) },
	"ptrace":      func(*sandbox.Sandbox, string) error { return unix.PtraceAttach(os.Getppid()) },
	"unshare":     func(*sandbox.Sandbox, string) error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"mount":       func(_ *sandbox.Sandbox, dir string) error { return unix.Mount("x", dir, "tmpfs", 0, "") },
	"rebind":      rebind,
	"setns":       func(*sandbox.Sandbox, string) error { return unix.Setns(0, unix.CLONE_NEWNS) },
	"fsopen":      func(*sandbox.Sandbox, string) error { _, err := unix.Fsopen("tmpfs", 0); return err },
	"byHandle": func(*sandbox.Sandbox, string) error {
		_, err := unix.OpenByHandleAt(0, unix.NewFileHandle(1, []byte{0}), 0)
		return err
	},
	"tcp":   socket(unix.AF_INET, unix.SOCK_STREAM, 0),
	"udp":   socket(unix.AF_INET6, unix.SOCK_DGRAM, 0),
	"route": socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE),
	"keyctl": func(*sandbox.Sandbox, string) error {
		_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
		return err
	},
	"bpf": func(*sandbox.Sandbox, string) error {
		_, _, errno := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
		return errno
	},
	"ioUring": func(*sandbox.Sandbox, string) error {
		_, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
		return errno
	},
	"memfd":     func(*sandbox.Sandbox, string) error { _, err := unix.MemfdCreate("x", 0); return err },
	"setuid":    func(*sandbox.Sandbox, string) error { return unix.Setresuid(1, 1, 1) },
	"rawSocket": socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP),
	"ping":      socket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP),
	"packet":    socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0),
	"vsock":     socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0),
	"alg":       socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0),
	"netfilter": socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER),
	"mmapExec": func(*sandbox.Sandbox, string) error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
		return err
	},
	"mprotectExec": func(*sandbox.Sandbox, string) error {
		page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return fmt.Errorf("the mapping itself: %w", err)
		}
		return unix.Mprotect(page, unix.PROT_READ|unix.PROT_EXEC)
	},
	"killOther": func(*sandbox.Sandbox, string) error { return unix.Kill(os.Getppid(), unix.SIGCONT) },
	"killGroup": func(*sandbox.Sandbox, string) error { return unix.Kill(0, unix.SIGCONT) },
	"setown": func(*sandbox.Sandbox, string) error {
		_, err := unix.FcntlInt(0, unix.F_SETOWN, os.Getppid())
		return err
	},
	"tiocsti": func(*sandbox.Sandbox, string) error { return unix.IoctlSetInt(0, unix.TIOCSTI, 0) },
	"abstract": func(_ *sandbox.Sandbox, dir string) error {
		_, err := net.Dial("unix", "@"+filepath.Base(dir))
		return err
	},
	"lowPort": func(*sandbox.Sandbox, string) error {
		return fmt.Errorf("capabilities: %s", statusField("CapEff"))
	},
	"status": func(*sandbox.Sandbox, string) error {
		return fmt.Errorf("NoNewPrivs %s Seccomp %s CapBnd %s CapEff %s CapPrm %s CapAmb %s dumpable %d",
			statusField("NoNewPrivs"), statusField("Seccomp"), statusField("CapBnd"), statusField("CapEff"),
			statusField("CapPrm"), statusField("CapAmb"), must(unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)))
	},
	"notify":     func(*sandbox.Sandbox, string) error { _, err := notify.Write([]byte("READY=1")); return err },
	"ordinary":   ordinary,
	"afterwards": afterwards,
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func open(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return f.Close()
}

func socket(family, kind, proto int) func(*sandbox.Sandbox, string) error {
	return func(*sandbox.Sandbox, string) error {
		_, err := unix.Socket(family, kind, proto)
		return err
	}
}

// statusField reads a line of all threads: what one has, all must have.
func statusField(name string) string {
	threads := must(os.ReadDir("/proc/self/task"))
	values := map[string]bool{}
	for _, t := range threads {
		for line := range strings.Lines(string(must(os.ReadFile("/proc/self/task/" + t.Name() + "/status")))) {
			if key, value, _ := strings.Cut(line, ":"); key == name {
				values[strings.TrimSpace(value)] = true
			}
		}
	}
	if len(values) != 1 {
		return fmt.Sprintf("%v", values)
	}
	for v := range values {
		return v
	}
	return ""
}

// world makes directories for a child and returns them with its sandbox.
func world(t *testing.T) (string, sandbox.Config) {
	t.Helper()
	dir := t.TempDir()
	for _, sub := range []string{"read", "logs", "socks", "outside", "keep", "keep/data", "keep/data/below"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"read/file", "outside/file", "logs/access.log"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte("text"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	return dir, sandbox.Config{
		Read:    []string{dir + "/read/*"},
		Append:  []string{dir + "/logs/access.log"},
		Sockets: []string{dir + "/socks/a.sock"},
		Keep:    []string{dir + "/keep/data"},
	}
}

// try runs one of tries in a child and returns what it printed and how it
// ended.
func try(t *testing.T, name, dir string, c sandbox.Config) (string, *os.ProcessState) {
	t.Helper()
	out, state := start(t, name, dir, c)
	if state.ExitCode() == exitMissing {
		t.Fatalf("this kernel cannot show it: %s", out)
	}
	return out, state
}

func start(t *testing.T, name, dir string, c sandbox.Config) (string, *os.ProcessState) {
	t.Helper()
	config, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), tryEnv+"="+name, "SANDBOX_TEST_CONFIG="+string(config), "SANDBOX_TEST_DIR="+dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), cmd.ProcessState
}

func TestForbidden(t *testing.T) {
	const killed = "killed"
	for name, want := range map[string]string{
		"exec": killed, "execveat": killed, "ptrace": killed, "unshare": killed, "mount": killed, "keyctl": killed, "bpf": killed,
		"fork":        "operation not permitted",
		"shadow":      "open /etc/shadow: permission denied",
		"readOutside": "permission denied", "listOutside": "permission denied", "otherProcess": "permission denied",
		"writeRead": "permission denied", "writeTmp": "permission denied", "writeAbove": "permission denied", "dirInKept": "permission denied",
		"removeLog": "permission denied", "readLog": "permission denied", "symlink": "function not implemented", "moveBetween": "cross-device link|permission denied",
		"ioUring": "function not implemented", "memfd": "function not implemented", "setuid": "function not implemented",
		"rawSocket": "operation not permitted", "ping": "operation not permitted", "netfilter": "operation not permitted",
		"packet": "not supported", "vsock": "not supported", "alg": "not supported",
		"mmapExec": "operation not permitted", "mprotectExec": "operation not permitted",
		"killOther": "operation not permitted", "killGroup": "operation not permitted", "setown": "operation not permitted", "tiocsti": "operation not permitted",
		"abstract": "operation not permitted",
		"lowPort":  "capabilities: 0000000000000000",
		"status":   "NoNewPrivs 1 Seccomp 2 CapBnd 0000000000000000 CapEff 0000000000000000 CapPrm 0000000000000000 CapAmb 0000000000000000 dumpable 0",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, c := world(t)
			if name == "abstract" {
				l, err := net.Listen("unix", "@"+filepath.Base(dir))
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
			}
			if name == "status" && os.Geteuid() != 0 {
				want = "NoNewPrivs 1 Seccomp 2 " // the bounding set is not ours to empty
			}
			out, state := try(t, name, dir, c)
			if want == killed {
				status := state.Sys().(syscall.WaitStatus)
				if !status.Signaled() || status.Signal() != unix.SIGSYS || status.CoreDump() {
					t.Errorf("ended by %v, want SIGSYS: %s", state, out)
				}
				return
			}
			for _, alternative := range strings.Split(want, "|") {
				if state.ExitCode() == 2 && strings.Contains(out, alternative) {
					return
				}
			}
			t.Errorf("%v: %q, want %q", state, out, want)
		})
	}
}

func TestLowPortsKeepOneCapability(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root: there is no capability to keep")
		return
	}
	dir, c := world(t)
	c.LowPorts = true
	if out, _ := try(t, "lowPort", dir, c); !strings.Contains(out, "capabilities: 0000000000000400") {
		t.Errorf("with LowPorts: %q", out)
	}
}

// TestMounts gives a process its mounts, and nothing else that comes with them.
func TestMounts(t *testing.T) {
	const killed = "killed"
	for name, want := range map[string]string{
		"mount": killed, "unshare": killed, "setns": killed, "fsopen": killed, "byHandle": killed, "exec": killed,
		"rebind": "operation not permitted|rebound", // no capability to start with where the tests are not root
		"tcp":    "not supported",
		"udp":    "not supported",
		"route":  "not supported",
		"status": "NoNewPrivs 1 Seccomp 2 CapBnd 0000000000000000 CapEff 0000000000200000 CapPrm 0000000000200000 CapAmb 0000000000000000 dumpable 0",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, c := world(t)
			c.Mounts = true
			if os.Geteuid() != 0 && name == "status" {
				want = "NoNewPrivs 1 Seccomp 2 "
			}
			if os.Geteuid() == 0 && name == "rebind" {
				want = "rebound"
			}
			out, state := try(t, name, dir, c)
			if want == killed {
				if status := state.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != unix.SIGSYS {
					t.Errorf("ended by %v, want SIGSYS: %s", state, out)
				}
				return
			}
			for _, alternative := range strings.Split(want, "|") {
				if strings.Contains(out, alternative) {
					return
				}
			}
			t.Errorf("%v: %q, want %q", state, out, want)
		})
	}
}

// rebind mounts a directory on another and takes it away again.
func rebind(_ *sandbox.Sandbox, dir string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir+"/read", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, dir+"/outside", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	if err := unix.Unmount(dir+"/outside", unix.MNT_DETACH); err != nil {
		return err
	}
	return errors.New("rebound")
}

func TestNotifyGoesOn(t *testing.T) {
	dir, c := world(t)
	address := &net.UnixAddr{Net: "unixgram", Name: "@" + filepath.Base(dir) + "/notify" + t.Name()}
	l, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("SANDBOX_TEST_NOTIFY", address.Name)
	if out, state := try(t, "notify", dir, c); !state.Success() {
		t.Fatalf("%v: %s", state, out)
	}
	got := make([]byte, 16)
	if n, err := l.Read(got); err != nil || string(got[:n]) != "READY=1" {
		t.Errorf("the service manager was told %q, %v", got[:n], err)
	}
}

// olderKernel has this process find neither Landlock nor seccomp, as on an
// old kernel or behind a container's profile.
func olderKernel() {
	code := must(bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_LANDLOCK_CREATE_RULESET, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SECCOMP, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
	}))
	program := make([]unix.SockFilter, len(code))
	for i, in := range code {
		program[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	prog := &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := sandbox.NoNewPrivs(); err != nil {
		panic(err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(prog))); errno != 0 {
		panic(errno)
	}
}

func TestOlderKernel(t *testing.T) {
	dir, c := world(t)
	t.Setenv("SANDBOX_TEST_OLD", "1")
	out, state := start(t, "ordinary", dir, c)
	if state.ExitCode() != exitMissing {
		t.Fatalf("%v: %s", state, out)
	}
	for _, want := range []string{
		"enforced: [no_new_privs no core files undumpable no capabilities]",
		"landlock: this kernel does not have it", "seccomp: this kernel does not filter system calls",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q does not say %q", out, want)
		}
	}
}

func TestOrdinary(t *testing.T) {
	dir, c := world(t)
	if out, state := try(t, "ordinary", dir, c); !state.Success() {
		t.Errorf("%v: %s", state, out)
	}
}

// ordinary is what a proxy does all day.
func ordinary(box *sandbox.Sandbox, dir string) error {
	for _, step := range []struct {
		name string
		do   func(dir string) error
	}{
		{"read", func(dir string) error { return open(dir + "/read/file") }},
		{"log", rotateLog},
		{"keep", replaceKept},
		{"listen and dial", listenAndDial},
		{"threads", manyThreads},
		{"signals and stacks", signalsAndStacks},
		{"names", names},
		{"/proc", procFiles},
	} {
		if err := step.do(dir); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	if errs := box.Check(sandbox.Config{Read: []string{dir + "/read/*"}, Append: []string{dir + "/logs/access.log"}, Keep: []string{dir + "/keep/data"}}); len(errs) > 0 {
		return errors.Join(errs...)
	}
	return nil
}

func rotateLog(dir string) error {
	f, err := os.OpenFile(dir+"/logs/new.log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString("line\n")
	return errors.Join(err, f.Sync(), f.Close())
}

func replaceKept(dir string) error {
	kept := dir + "/keep/data/below/kept"
	for range 2 {
		f, err := os.OpenFile(kept+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if _, err = f.WriteString("text"); err == nil {
			err = f.Sync()
		}
		if err = errors.Join(err, f.Close(), os.Rename(kept+".new", kept)); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(filepath.Dir(kept))
	if err == nil && len(entries) != 1 {
		err = fmt.Errorf("it holds %v", entries)
	}
	return errors.Join(err, open(kept), os.Remove(kept))
}

func listenAndDial(dir string) error {
	for _, at := range []struct{ network, address string }{
		{"tcp", "127.0.0.1:0"}, {"tcp", "[::1]:0"}, {"unix", dir + "/socks/a.sock"},
	} {
		l, err := net.Listen(at.network, at.address)
		if err != nil {
			return err
		}
		if at.network == "unix" {
			if err := os.Chmod(at.address, 0o660); err != nil {
				return err
			}
		}
		var accepting sync.WaitGroup
		accepting.Go(func() {
			if c, err := l.Accept(); err == nil {
				_, _ = c.Write([]byte("hello"))
				_ = c.Close()
			}
		})
		c, err := net.Dial(at.network, l.Addr().String())
		if err != nil {
			return err
		}
		got := make([]byte, 5)
		_, err = c.Read(got)
		accepting.Wait()
		if err := errors.Join(err, c.Close(), l.Close()); err != nil || string(got) != "hello" {
			return fmt.Errorf("%s: %q, %w", at.address, got, err)
		}
	}
	_, err := net.Interfaces()
	return err
}

// manyThreads has the runtime start threads and interrupt them.
func manyThreads(string) error {
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for begun := time.Now(); time.Since(begun) < 20*time.Millisecond; {
				// busy, so that it has to be interrupted
			}
		})
	}
	wg.Wait()
	runtime.GC()
	debug.FreeOSMemory()
	return nil
}

func signalsAndStacks(string) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, unix.SIGHUP)
	defer signal.Stop(hangups)
	if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
		return err
	}
	<-hangups
	if n := runtime.Stack(make([]byte, 1<<20), true); n == 0 {
		return errors.New("no stacks")
	}
	return nil
}

func names(string) error {
	r := &net.Resolver{PreferGo: true}
	found, err := r.LookupHost(context.Background(), "localhost")
	if err != nil || len(found) == 0 {
		return fmt.Errorf("localhost: %v, %w", found, err)
	}
	if _, err := time.LoadLocation("Europe/Berlin"); err != nil && !errors.Is(err, fs.ErrNotExist) && !strings.Contains(err.Error(), "unknown time zone") {
		return err
	}
	return open("/etc/resolv.conf")
}

func procFiles(string) error {
	for _, path := range []string{"/proc/self/stat", "/proc/self/limits", "/proc/self/fd", "/proc/self/smaps_rollup", "/proc/stat", "/proc/sys/net/core/somaxconn", "/proc/net/tcp"} {
		if err := open(path); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkSyscall runs in this process before and after it enters the
// sandbox: last, as there is no way back.
func BenchmarkSyscall(b *testing.B) {
	calls := []struct {
		name string
		do   func()
	}{
		{"getppid", func() { unix.Getppid() }},
		{"write", func() { _, _, _ = unix.RawSyscall(unix.SYS_WRITE, ^uintptr(0), 0, 0) }},
		{"mmap+munmap", func() {
			if page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE); err == nil {
				_ = unix.Munmap(page)
			}
		}},
		{"socket+close", func() {
			if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err == nil {
				_ = unix.Close(fd)
			}
		}},
	}
	run := func(where string) {
		for _, c := range calls {
			b.Run(c.name+"/"+where, func(b *testing.B) {
				for b.Loop() {
					c.do()
				}
			})
		}
	}
	run("without")
	if missing := sandbox.Enter(sandbox.Config{}).Missing(); len(missing) > 0 {
		b.Fatal(missing)
	}
	run("sandboxed")
}
