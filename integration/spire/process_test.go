//go:build integration

package spire_test

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

// process is a child process of the test. It is ended with the test, and what
// it said is shown when the test fails.
type process struct {
	t      *testing.T
	name   string
	cmd    *exec.Cmd
	output string        // file; a pipe would be held open by children that outlive the process
	done   chan struct{} // closed once the process has ended
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

// as runs a process as another user.
func as(u user) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(u.uid), Gid: uint32(u.uid)}
	}
}

// start starts a program.
func start(t *testing.T, name, program string, args []string, how ...func(*exec.Cmd)) *process {
	t.Helper()
	output, err := os.CreateTemp(scratch, "output-")
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	p := &process{t: t, name: name, output: output.Name(), done: make(chan struct{}), cmd: exec.Command(program, args...)}
	p.cmd.Stdout, p.cmd.Stderr = output, output
	p.cmd.Dir = "/"
	// A group of its own: what the terminal sends is for the test alone.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	for _, h := range how {
		h(p.cmd)
	}
	started := make(chan error)
	starts <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", filepath.Base(program), err)
	}
	go func() {
		_ = p.cmd.Wait() // ProcessState tells how it ended
		close(p.done)
	}()
	t.Cleanup(p.end)
	return p
}

// said returns what the process has written so far.
func (p *process) said() string {
	p.t.Helper()
	return readFile(p.t, p.output)
}

// end stops the process and shows what it said if the test has failed.
func (p *process) end() {
	p.stop()
	if p.t.Failed() {
		p.t.Logf("---- %s (%s) said:\n%s", p.name, p.cmd.ProcessState, lastLines(p.said(), 80))
	}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if skipped := len(lines) - n; skipped > 0 {
		lines = append([]string{fmt.Sprintf("(%d lines before)", skipped)}, lines[skipped:]...)
	}
	return strings.Join(lines, "\n")
}

// stop asks the process to end and waits. One that does not within ten
// seconds is an error, and killed.
func (p *process) stop() {
	p.signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.t.Errorf("%s does not end within 10 s of SIGTERM", p.name)
		p.kill()
	}
}

// kill ends the process without asking and waits.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

func (p *process) signal(s syscall.Signal) {
	select {
	case <-p.done:
	default:
		_ = p.cmd.Process.Signal(s) // it may end at this very moment
	}
}

// alive returns nil while the process runs, then how it ended.
func (p *process) alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended: %s", p.name, p.cmd.ProcessState)
	default:
		return nil
	}
}

// says waits until the process has written all of texts.
func (p *process) says(within time.Duration, texts ...string) {
	p.t.Helper()
	eventually(p.t, within, p.name+" says", func() error {
		for _, text := range texts {
			if !strings.Contains(p.said(), text) {
				return fmt.Errorf("%q is not in its output", text)
			}
		}
		return nil
	})
}

// count tells how many lines of the output hold text.
func (p *process) count(text string) int { return strings.Count(p.said(), text) }

// uidOf returns the effective user of a process.
func uidOf(t *testing.T, pid int) int {
	t.Helper()
	for line := range strings.SplitSeq(readFile(t, fmt.Sprintf("/proc/%d/status", pid)), "\n") {
		var real, effective int
		if n, _ := fmt.Sscanf(line, "Uid: %d %d", &real, &effective); n == 2 {
			return effective
		}
	}
	t.Fatalf("process %d has no uid", pid)
	return 0
}
