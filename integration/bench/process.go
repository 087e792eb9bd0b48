package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// keeper starts processes and sees to it that none of them outlives the
// benchmark: close ends them, and where the benchmark itself is killed, the
// kernel tells them (PR_SET_PDEATHSIG).
type keeper struct {
	starts chan func()

	mu      sync.Mutex // guards the following
	closed  bool
	running map[*process]bool
}

// newKeeper returns a keeper, which must be closed.
func newKeeper() *keeper {
	k := &keeper{starts: make(chan func()), running: map[*process]bool{}}
	go func() {
		// The kernel tells children when the thread that started them ends,
		// so all are started by one that stays.
		runtime.LockOSThread()
		for start := range k.starts {
			start()
		}
	}()
	return k
}

// process is one that the keeper started, the leader of a process group.
type process struct {
	keeper *keeper
	cmd    *exec.Cmd
	log    string         // the file with what it says
	first  syscall.Signal // what it is told before it is told to end; 0 for nothing
	done   chan struct{}  // closed once it has ended
	err    error          // how it ended, after done
}

// start starts cmd in a process group of its own. Its output is appended to
// the file log.
func (k *keeper) start(cmd *exec.Cmd, log string) (*process, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, errors.New("the benchmark ends")
	}
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = out
	}
	cmd.Stderr = out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	k.starts <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	p := &process{keeper: k, cmd: cmd, log: log, done: make(chan struct{})}
	k.running[p] = true
	go func() {
		p.err = cmd.Wait()
		k.mu.Lock()
		delete(k.running, p)
		k.mu.Unlock()
		close(p.done)
	}()
	return p, nil
}

// close ends all processes and waits for them. Nothing can be started
// afterwards.
func (k *keeper) close() {
	k.mu.Lock()
	was := k.closed
	k.closed = true
	var list []*process
	for p := range k.running {
		list = append(list, p)
	}
	k.mu.Unlock()
	if !was {
		defer close(k.starts)
	}
	var ending sync.WaitGroup
	for _, p := range list {
		ending.Go(p.stop)
	}
	ending.Wait()
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// patience is how long a process has to end after SIGTERM. Nothing it might
// still do is of interest.
const patience = 2 * time.Second

// profileTime is how long a process has to write its profile.
const profileTime = time.Second

// stop ends the process and all of its group, and waits for it. SIGTERM comes
// first, for those that have children in groups of their own.
func (p *process) stop() {
	if p.first != 0 && p.running() {
		_ = p.cmd.Process.Signal(p.first)
		time.Sleep(profileTime)
	}
	if p.running() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may end at this very moment
		select {
		case <-p.done:
		case <-time.After(patience):
		}
	}
	_ = syscall.Kill(-p.pid(), syscall.SIGKILL) // there may be nobody left
	<-p.done
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// ended returns an error with the last lines the process said, if it has
// ended.
func (p *process) ended() error {
	if p.running() {
		return nil
	}
	return fmt.Errorf("%s has ended: %s\n%s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, p.said())
}

// said returns the last lines of the process's output.
func (p *process) said() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
