package reload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
)

// Child is a program that is started when it is told for the first time, and
// signalled from then on. It is of our environment, and of a process group of
// its own, so that what a terminal sends reaches it once, by Pass.
type Child struct {
	args   []string
	signal syscall.Signal
	ended  chan struct{}
	waits  sync.WaitGroup

	mu  sync.Mutex // guards the following
	cmd *exec.Cmd  // nil: not started yet
	err error      // how it ended; set before ended is closed
}

// NewChild returns a program that is not started yet. Wait ends it.
func NewChild(args []string, signal syscall.Signal) *Child {
	return &Child{args: args, signal: signal, ended: make(chan struct{})}
}

// Tell starts the program, or signals it.
func (c *Child) Tell(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.ended:
		return nil // whoever watches Ended ends too
	default:
	}
	if c.cmd != nil {
		return c.send(c.signal)
	}
	cmd := exec.Command(c.args[0], c.args[1:]...) //nolint:gosec // whoever calls us names it
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		c.err = fmt.Errorf("start %s: %w", c.args[0], err)
		close(c.ended)
		return c.err
	}
	c.cmd = cmd
	c.waits.Go(func() {
		err := cmd.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err = err
		close(c.ended)
	})
	return nil
}

func (c *Child) send(s os.Signal) error {
	if err := c.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", c.args[0], err)
	}
	return nil
}

// Pass sends a signal on. It reports false where there is nobody to send it to.
func (c *Child) Pass(s os.Signal) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd == nil {
		return false
	}
	return c.send(s) == nil
}

// Ended is closed once the program has ended or could not be started.
func (c *Child) Ended() <-chan struct{} { return c.ended }

// Wait asks a program that runs to end (SIGTERM), waits for it, and returns its
// exit code: 128 and the signal that ended it, as a shell has it, 0 where it was
// never told to start. The error says that it could not be started.
func (c *Child) Wait() (code int, err error) {
	c.mu.Lock()
	started := c.cmd != nil
	select {
	case <-c.ended:
	default:
		if started {
			_ = c.send(syscall.SIGTERM) // one that has just ended needs none
		}
	}
	c.mu.Unlock()
	c.waits.Wait()
	var exit *exec.ExitError
	switch {
	case c.err == nil:
		return 0, nil
	case !errors.As(c.err, &exit):
		return 1, c.err
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return exit.ExitCode(), nil
}
