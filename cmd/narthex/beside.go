package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

// startBeside starts this command again without --beside, as a process that
// outlives this one, and returns once it is ready, or the reason why it ended.
func startBeside(ctx context.Context, log hclog.Logger) error {
	image, err := openImage()
	if err != nil {
		return err
	}
	defer image.close()
	reader, writer, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the new process: %w", err)
	}
	defer reader.Close()
	args := slices.DeleteFunc(slices.Clone(os.Args), func(arg string) bool { return arg == "--beside" || arg == "--beside=true" })
	cmd := &exec.Cmd{
		Path: "/proc/self/fd/4", Args: args, Stdout: os.Stdout, Stderr: os.Stderr,
		Env:         append(besideEnvironment(), filesEnv+"="+besideName+"=3", programEnv+"=4"),
		ExtraFiles:  []*os.File{writer, image.file},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}, // a terminal's signals are not for it
	}
	err = cmd.Start()
	_ = writer.Close()
	if err != nil {
		return fmt.Errorf("start the new process: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with that process, or with this one
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(reader).ReadString('\n') // empty: it has ended
		said <- line
	}()
	select {
	case line := <-said:
		if line != "" {
			log.Info("the new process serves", "pid", cmd.Process.Pid)
			return nil
		}
		if err := <-ended; err != nil {
			return fmt.Errorf("the new process ended before it served: %w", err)
		}
		return errors.New("the new process ended before it served")
	case <-ctx.Done():
	case <-time.After(2 * readyWithin):
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	return errors.Join(errors.New("the new process did not come to serve in time, and was ended"), ctx.Err())
}

// besideName is the inherited pipe on which a process started with --beside
// says, with one line, that it serves.
const besideName = "@beside"

// besideEnvironment is ours without what is meant for this process alone.
func besideEnvironment() []string {
	return slices.DeleteFunc(os.Environ(), func(item string) bool {
		name, _, _ := strings.Cut(item, "=")
		return name == "WATCHDOG_PID" || name == filesEnv || strings.HasPrefix(name, "LISTEN_")
	})
}
