package stage

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a child process of the test. It is ended with the test, and what
// it said is shown when the test fails.
type Process struct {
	Name   string
	Cmd    *exec.Cmd
	Output string        // file; a pipe would be held open by children that outlive the process
	Done   chan struct{} // closed once the process has ended

	t testing.TB
}

// starts is asked to start processes on the one thread that lives as long as
// the test binary: the kernel tells a child of its parent's death
// (PR_SET_PDEATHSIG) when the thread that started it ends.
var starts = make(chan func())

func startStarter() (stop func()) {
	var g sync.WaitGroup
	g.Go(func() {
		runtime.LockOSThread()
		for start := range starts {
			start()
		}
	})
	return func() { close(starts); g.Wait() }
}

// As runs a process as another user.
func As(uid, gid int) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
}

// InNamespaces has a process run in namespaces of its own, after a script has
// prepared them. The process is the same one, so that signals reach it.
func InNamespaces(script string, flags ...string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		args := append([]string{"unshare"}, flags...)
		args = append(args, "sh", "-ec", script+"\nexec \"$@\"", "sh", cmd.Path)
		cmd.Args = append(args, cmd.Args[1:]...)
		path, err := exec.LookPath("unshare")
		if err != nil {
			cmd.Err = err
		}
		cmd.Path = path
	}
}

// Start starts a program.
func Start(t testing.TB, name, program string, args []string, how ...func(*exec.Cmd)) *Process {
	t.Helper()
	output, err := os.CreateTemp(Scratch, "output-")
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	p := &Process{t: t, Name: name, Output: output.Name(), Done: make(chan struct{}), Cmd: exec.Command(program, args...)}
	p.Cmd.Stdout, p.Cmd.Stderr = output, output
	p.Cmd.Dir = "/"
	// A group of its own: what the terminal sends is for the test alone.
	p.Cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	for _, h := range how {
		h(p.Cmd)
	}
	started := make(chan error)
	starts <- func() { started <- p.Cmd.Start() }
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", filepath.Base(program), err)
	}
	go func() {
		_ = p.Cmd.Wait() // ProcessState tells how it ended
		close(p.Done)
	}()
	t.Cleanup(p.end)
	return p
}

// Said returns what the process has written so far.
func (p *Process) Said() string {
	p.t.Helper()
	return ReadFile(p.t, p.Output)
}

// end stops the process and shows what it said if the test has failed.
func (p *Process) end() {
	p.Stop()
	if p.t.Failed() {
		p.t.Logf("---- %s (%s) said:\n%s", p.Name, p.Cmd.ProcessState, lastLines(p.Said(), 80))
	}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if skipped := len(lines) - n; skipped > 0 {
		lines = append([]string{fmt.Sprintf("(%d lines before)", skipped)}, lines[skipped:]...)
	}
	return strings.Join(lines, "\n")
}

// stopTime bounds how long a process takes to end. It is less than the 30 s
// that a proxy drains for: nobody is to be connected to one that is stopped.
const stopTime = 25 * time.Second

// Stop asks the process to end and waits. One that does not within stopTime is
// an error, and killed.
func (p *Process) Stop() {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.Done:
	case <-time.After(stopTime):
		p.t.Errorf("%s does not end within %s of SIGTERM", p.Name, stopTime)
		p.Kill()
	}
}

// Kill ends the process without asking and waits.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.Done
}

// Signal sends a signal, if the process has not ended.
func (p *Process) Signal(s syscall.Signal) {
	select {
	case <-p.Done:
	default:
		_ = p.Cmd.Process.Signal(s) // it may end at this very moment
	}
}

// Alive returns nil while the process runs, then how it ended.
func (p *Process) Alive() error {
	select {
	case <-p.Done:
		return fmt.Errorf("%s has ended: %s", p.Name, p.Cmd.ProcessState)
	default:
		return nil
	}
}

// Says waits until the process has written all of texts.
func (p *Process) Says(within time.Duration, texts ...string) {
	p.t.Helper()
	Eventually(p.t, within, p.Name+" says", func() error {
		for _, text := range texts {
			if !strings.Contains(p.Said(), text) {
				return fmt.Errorf("%q is not in its output", text)
			}
		}
		return nil
	})
}

// Count tells how often the output holds text.
func (p *Process) Count(text string) int { return strings.Count(p.Said(), text) }

// PID returns the process's ID.
func (p *Process) PID() int { return p.Cmd.Process.Pid }

// RSS returns the memory of a process, in bytes.
func RSS(t testing.TB, pid int) int { return 1024 * proc(t, pid, "VmRSS") }

func anonymous(t testing.TB, pid int) int { return 1024 * proc(t, pid, "RssAnon") }

// Growth looks at how much a process takes until stop is called, which
// returns how much more it was than at first, in bytes. It does without the
// pages of its program, which come and go as they are needed.
func Growth(t testing.TB, pid int) (stop func() (grown int)) {
	t.Helper()
	first := anonymous(t, pid)
	most := first
	ended := make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-ended:
				tick.Stop()
				return
			case <-tick.C:
				most = max(most, anonymous(t, pid))
			}
		}
	})
	return func() int {
		close(ended)
		g.Wait()
		return max(0, most-first)
	}
}

// OpenFiles returns how many files a process has open.
func OpenFiles(t testing.TB, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// UIDOf returns the effective user of a process.
func UIDOf(t testing.TB, pid int) int {
	t.Helper()
	for line := range strings.SplitSeq(ReadFile(t, fmt.Sprintf("/proc/%d/status", pid)), "\n") {
		var real, effective int
		if n, _ := fmt.Sscanf(line, "Uid: %d %d", &real, &effective); n == 2 {
			return effective
		}
	}
	t.Fatalf("process %d has no uid", pid)
	return 0
}

// proc returns a number of /proc/pid/status.
func proc(t testing.TB, pid int, key string) int {
	t.Helper()
	for line := range strings.SplitSeq(ReadFile(t, fmt.Sprintf("/proc/%d/status", pid)), "\n") {
		var value int
		if n, _ := fmt.Sscanf(line, key+": %d", &value); n == 1 {
			return value
		}
	}
	t.Fatalf("process %d has no %s", pid, key)
	return 0
}
