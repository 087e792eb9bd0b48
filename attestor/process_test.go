package attestor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// noPeerPidfd stands for a kernel before 6.5.
func noPeerPidfd(int) (int, error) { return 0, unix.ENOPROTOOPT }

// ways are the two ways to pin a peer.
var ways = map[string]func(*net.UnixConn) (*Process, error){
	"PeerOf":               PeerOf,
	"without SO_PEERPIDFD": func(c *net.UnixConn) (*Process, error) { return peerOf(c, noPeerPidfd) },
}

func eachWay(t *testing.T, test func(t *testing.T, pinPeer func(*net.UnixConn) (*Process, error))) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) { test(t, way) })
	}
}

func mustPin(t *testing.T, c *net.UnixConn, pinPeer func(*net.UnixConn) (*Process, error)) *Process {
	t.Helper()
	p, err := pinPeer(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func wantAlive(t *testing.T, p *Process) {
	t.Helper()
	if err := p.Alive(); err != nil {
		t.Fatalf("Alive: %v", err)
	}
}

func wantGone(t *testing.T, err error, because string) {
	t.Helper()
	if !errors.Is(err, ErrProcessGone) {
		t.Fatalf("error %v, want ErrProcessGone", err)
	}
	if !strings.Contains(err.Error(), because) {
		t.Fatalf("error %q, want one that says %q", err, because)
	}
}

func TestPeerIsTheProcessThatConnected(t *testing.T) {
	eachWay(t, func(t *testing.T, pinPeer func(*net.UnixConn) (*Process, error)) {
		child, c := connect(t, self, nil)
		p := mustPin(t, c, pinPeer)
		if p.PID != child.cmd.Process.Pid || p.UID != uint32(os.Geteuid()) || p.GID != uint32(os.Getegid()) {
			t.Fatalf("pinned %d %d:%d, want %d %d:%d", p.PID, p.UID, p.GID, child.cmd.Process.Pid, os.Geteuid(), os.Getegid())
		}
		wantAlive(t, p)
	})
}

func TestPeerOfAnotherUser(t *testing.T) {
	if !isRoot() {
		// An ordinary user sees a process of another user, init, by its PID
		// only; what it executes stays unknown, and that is no obstacle.
		p, err := Pin(1)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if p.UID != 0 || p.exe != (program{}) {
			t.Fatalf("init is pinned as user %d, program %v", p.UID, p.exe)
		}
		wantAlive(t, p)
		return
	}
	eachWay(t, func(t *testing.T, pinPeer func(*net.UnixConn) (*Process, error)) {
		_, c := connect(t, self, asUser(4001, 4002))
		p := mustPin(t, c, pinPeer)
		if p.UID != 4001 || p.GID != 4002 {
			t.Fatalf("pinned as %d:%d, want 4001:4002", p.UID, p.GID)
		}
		wantAlive(t, p)
	})
}

func asUser(uid, gid uint32, groups ...uint32) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}}
	}
}

func TestChangedOwnerIsGone(t *testing.T) {
	uid, gid := os.Geteuid(), os.Getegid()
	if isRoot() {
		uid, gid = 4001, 4002 // only root can change; for others the commands keep what they have
	}
	for command, because := range map[string]string{
		fmt.Sprintf("seteuid %d", uid): fmt.Sprintf("runs as %d:0, not as 0:0", uid),
		fmt.Sprintf("setegid %d", gid): fmt.Sprintf("runs as 0:%d, not as 0:0", gid),
	} {
		t.Run(command, func(t *testing.T) {
			child, c := connect(t, self, nil)
			p := mustPin(t, c, PeerOf)
			child.do(command)
			if !isRoot() {
				wantAlive(t, p)
				return
			}
			wantGone(t, p.Alive(), because)
			// What counts is the owner at connect, also if it changed before
			// the connection was accepted.
			_, err := PeerOf(c)
			wantGone(t, err, because)
		})
	}
}

// The pidfd and the proc file system, of which older kernels are asked, tell
// the same.
func TestOwner(t *testing.T) {
	change, uid, gid := func(*exec.Cmd) {}, uint32(os.Geteuid()), uint32(os.Getegid())
	if isRoot() {
		change, uid, gid = asUser(4001, 4002), 4001, 4002
	}
	_, c := connect(t, self, change)
	p := mustPin(t, c, PeerOf)
	for name, owner := range map[string]func() (uint32, uint32, error){
		"pidfd": p.owner,
		"proc":  func() (uint32, uint32, error) { return readOwner(p.proc) },
	} {
		if u, g, err := owner(); u != uid || g != gid || err != nil {
			t.Errorf("%s: %d:%d, %v, want %d:%d", name, u, g, err, uid, gid)
		}
	}
}

func TestBuffer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	long := strings.Repeat("0123456789", 3000)
	for _, content := range []string{"", "short", long} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var b buffer
		for range 2 {
			if got, err := b.whole(path, len(long)); string(got) != content || err != nil {
				t.Errorf("%d bytes of %d, %v", len(got), len(content), err)
			}
			if got, err := b.head(path, 3); string(got) != content[:min(3, len(content))] || err != nil {
				t.Errorf("head %q, %v", got, err)
			}
		}
	}
	if got, err := new(buffer).whole(path, len(long)-1); got != nil || err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, err := new(buffer).head(path+"x", 3); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestExitedIsGone(t *testing.T) {
	eachWay(t, func(t *testing.T, pinPeer func(*net.UnixConn) (*Process, error)) {
		child, c := connect(t, self, nil)
		p := mustPin(t, c, pinPeer)
		child.stdin.Close()
		child.out.ReadString('\n') // ends when the child has closed its files
		awaitExit(t, p)
		// Not yet waited for: its PID and its /proc folder are still there.
		wantGone(t, p.Alive(), "has exited")
		if _, err := os.Stat(p.ProcPath("stat")); err != nil {
			t.Fatalf("the zombie is not one: %v", err)
		}
		_, err := pinPeer(c)
		wantGone(t, err, "has exited")

		child.reap()
		wantGone(t, p.Alive(), "has exited")
		_, err = pinPeer(c)
		wantGone(t, err, "")
	})
}

// awaitExit blocks until the process has ended, reaped or not.
func awaitExit(t *testing.T, p *Process) {
	t.Helper()
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
			if err != unix.EINTR {
				if n != 1 {
					t.Errorf("poll: %d, %v", n, err)
				}
				return
			}
		}
	})
}

// A PID comes to mean another process of the same user; the pinned one stays
// gone.
func TestReusedPIDIsGone(t *testing.T) {
	child, c := connect(t, self, nil)
	p := mustPin(t, c, PeerOf)
	child.exit()
	wantGone(t, p.Alive(), "has exited")

	for range 500 {
		err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(p.PID-1)), 0)
		if err != nil {
			t.Logf("which PID comes next cannot be chosen here: %v", err)
			return
		}
		next := exec.Command("/bin/cat")
		stdin, err := next.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Start(); err != nil {
			t.Fatal(err)
		}
		reused := next.Process.Pid == p.PID
		if reused {
			if _, err := readStart(p.proc, p.PID); err != nil {
				t.Errorf("the successor is not in /proc: %v", err)
			}
			wantGone(t, p.Alive(), "has exited")
			if _, err := PeerOf(c); !errors.Is(err, ErrProcessGone) {
				t.Errorf("PeerOf on the connection of its predecessor: %v", err)
			}
		}
		stdin.Close()
		next.Wait()
		if reused {
			return
		}
	}
	t.Fatal("the PID was never taken again")
}

// Where the kernel cannot give the peer's pidfd, a successor that runs as
// another user is told apart by its user.
func TestReusedPIDWithoutPeerPidfd(t *testing.T) {
	p, err := pinPID(os.Getpid(), &unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Geteuid()) + 1, Gid: uint32(os.Getegid())})
	if p != nil {
		t.Fatal("pinned under another user")
	}
	wantGone(t, err, "runs as")
}

func TestAbandonedConnectionIsGone(t *testing.T) {
	eachWay(t, func(t *testing.T, pinPeer func(*net.UnixConn) (*Process, error)) {
		child, c := connect(t, self, nil)
		p := mustPin(t, c, pinPeer)
		child.do("abandon") // the grandchild says ok
		child.reap()
		wantGone(t, p.Alive(), "has exited")
		_, err := pinPeer(c)
		wantGone(t, err, "")
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatalf("the grandchild does not hold the connection: %v", err)
		}
		selectors, err := Attest(testContext(t), p, []Workload{NewUnix(UnixConfig{})})
		wantGone(t, err, "has exited")
		if selectors != nil {
			t.Fatalf("selectors %v", selectors)
		}
	})
}

// The connection, the PID and the start time survive execve(2).
func TestOtherProgramIsGone(t *testing.T) {
	eachWay(t, func(t *testing.T, pinPeer func(*net.UnixConn) (*Process, error)) {
		other := copyOfSelf(t)
		child, c := connect(t, self, nil)
		p := mustPin(t, c, pinPeer)
		child.do("exec " + other)
		wantGone(t, p.Alive(), "executes another program")

		_, err := NewUnix(UnixConfig{DiscoverPath: true}).Attest(testContext(t), p)
		wantGone(t, err, "executes another program")

		// As documented: before PeerOf the change leaves no trace.
		wantAlive(t, mustPin(t, c, pinPeer))
	})
}

func TestAliveAcrossHostileNames(t *testing.T) {
	for _, name := range []string{"a) R (b c", ")))", "((((", "x\nUid:\t0\t0\t0", "\t", "é\x80"} {
		child, c := connect(t, self, nil)
		p := mustPin(t, c, PeerOf)
		child.do("name " + strconv.Quote(name))
		wantAlive(t, p)
		wantAlive(t, mustPin(t, c, PeerOf))
	}
}

func TestPin(t *testing.T) {
	p, err := Pin(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	wantAlive(t, p)
	if p.UID != uint32(os.Geteuid()) || p.GID != uint32(os.Getegid()) || p.PID != os.Getpid() {
		t.Fatalf("pinned %+v", p)
	}
	if want := fmt.Sprintf("/proc/%d/cgroup", os.Getpid()); p.ProcPath("cgroup") != want {
		t.Fatalf("ProcPath: %s, want %s", p.ProcPath("cgroup"), want)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	wantGone(t, p.Alive(), "closed")
	p.Close()

	for _, pid := range []int{0, -1} {
		if _, err := Pin(pid); err == nil || errors.Is(err, ErrProcessGone) {
			t.Errorf("Pin(%d): %v", pid, err)
		}
	}
	_, err = Pin(1 << 22) // the highest PID of Linux is one below
	wantGone(t, err, "no such process")
}

func TestPinThread(t *testing.T) {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		tid, _ := strconv.Atoi(thread.Name())
		if tid == os.Getpid() {
			continue
		}
		if _, err := Pin(tid); err == nil || !strings.Contains(err.Error(), "thread") {
			t.Fatalf("Pin(thread %d): %v", tid, err)
		}
		return
	}
	t.Fatal("a Go process with one thread")
}

func TestNeverPinned(t *testing.T) {
	p := &Process{PID: os.Getpid()}
	wantGone(t, p.Alive(), "never pinned")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAliveAndCloseAtOnce(t *testing.T) {
	p, err := Pin(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for p.Alive() == nil {
			}
		})
	}
	p.Close()
	all.Wait()
}

func TestPeerOfClosedConnection(t *testing.T) {
	_, c := connect(t, self, nil)
	c.Close()
	if _, err := PeerOf(c); err == nil || errors.Is(err, ErrProcessGone) {
		t.Fatalf("PeerOf of a closed connection: %v", err)
	}
}

func TestHostProc(t *testing.T) {
	_, c := connect(t, self, nil)
	elsewhere := filepath.Join(t.TempDir(), "host-proc")
	t.Setenv("HOST_PROC", elsewhere)
	_, err := PeerOf(c)
	if !errors.Is(err, ErrPIDNamespace) || !strings.Contains(err.Error(), elsewhere) {
		t.Fatalf("PeerOf without a proc file system: %v", err)
	}
	if err := os.Symlink("/proc", elsewhere); err != nil {
		t.Fatal(err)
	}
	p := mustPin(t, c, PeerOf)
	if !strings.HasPrefix(p.ProcPath("exe"), elsewhere+"/") {
		t.Fatalf("ProcPath: %s", p.ProcPath("exe"))
	}
	selectors, err := Attest(testContext(t), p, []Workload{NewUnix(UnixConfig{DiscoverPath: true})})
	if err != nil || len(selectors) < 4 {
		t.Fatalf("Attest: %v, %v", selectors, err)
	}
}

// inPIDNamespace starts the child as PID 1 of a PID namespace of its own, for
// which an ordinary user needs a user namespace.
func inPIDNamespace(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if !isRoot() {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
	}
}

func TestPeerOutsideOurPIDNamespace(t *testing.T) {
	l := listen(t)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	agent := start(t, self, rolePeerOf, "", func(cmd *exec.Cmd) {
		inPIDNamespace(cmd)
		cmd.ExtraFiles = []*os.File{f}
	})
	if agent == nil {
		t.Log("PID namespaces may not be made here")
		return
	}
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	line, _ := agent.out.ReadString('\n')
	if !strings.Contains(line, ErrPIDNamespace.Error()) || !strings.Contains(line, "hostPID") {
		t.Fatalf("PeerOf said %q", line)
	}
}

// /proc/1 is init's, not that of the child that is PID 1 in its namespace.
func TestProcOfAnotherPIDNamespace(t *testing.T) {
	agent := start(t, self, rolePinSelf, "", inPIDNamespace)
	if agent == nil {
		t.Log("PID namespaces may not be made here")
		return
	}
	line, _ := agent.out.ReadString('\n')
	if !strings.Contains(line, ErrPIDNamespace.Error()) || !strings.Contains(line, "/proc is of another one") {
		t.Fatalf("Pin said %q", line)
	}
}

// What a connection to the Workload API costs before its selectors are looked
// up.
func BenchmarkPinAndAttest(b *testing.B) {
	for name, config := range map[string]UnixConfig{"unix": {}, "unix with path": {DiscoverPath: true}} {
		b.Run(name, func(b *testing.B) {
			_, c := connect(b, self, nil)
			attestors := []Workload{NewUnix(config)}
			for b.Loop() {
				p, err := PeerOf(c)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := Attest(b.Context(), p, attestors); err != nil {
					b.Fatal(err)
				}
				p.Close()
			}
		})
	}
}

func TestAwaitExit(t *testing.T) {
	t.Parallel()
	child := exec.Command("sleep", "600")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Pin(child.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 2 { // a wait that was ended leaves nothing behind for the next
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if err := p.AwaitExit(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("while it runs: got %v, want the end of the context", err)
		}
		cancel()
	}
	ended := make(chan error, 1)
	go func() { ended <- p.AwaitExit(t.Context()) }()
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil { // before anybody has waited for it
		t.Errorf("once it was killed: %v", err)
	}
	_ = child.Wait()
	if err := p.AwaitExit(t.Context()); err != nil {
		t.Errorf("once it is gone: %v", err)
	}
}

func TestNested(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		how  func(*exec.Cmd)
		want bool
	}{"beside": {func(*exec.Cmd) {}, false}, "below": {inPIDNamespace, true}} {
		child := exec.Command("sleep", "600")
		test.how(child)
		if err := child.Start(); err != nil {
			t.Logf("PID namespaces may not be made here: %v", err)
			continue
		}
		p, err := Pin(child.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := p.Nested(); err != nil || got != test.want {
			t.Errorf("%s: got %t, %v, want %t", name, got, err, test.want)
		}
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait()
		if _, err := p.Nested(); err == nil {
			t.Errorf("%s: it is told of a process that is gone", name)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}
