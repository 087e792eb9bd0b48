// Package reload tells programs that the files they read are new: by a command,
// by a signal to the process that a file names, or by a signal to a child that
// it starts with the first files.
package reload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// CommandTime bounds how long a Command runs.
const CommandTime = time.Minute

// Command runs a program, without a shell, and waits for it.
type Command struct {
	Args   []string  // the program, by path or name, and its arguments
	Output io.Writer // of what it says; nil: nobody hears it
}

// Tell runs the program. One that takes longer than CommandTime, or than ctx, is
// killed, with the processes it has started.
func (c Command) Tell(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, CommandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...) //nolint:gosec // whoever calls us names it
	cmd.Stdout, cmd.Stderr = c.Output, c.Output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("run %s: not done within %s", c.Args[0], CommandTime)
	case err != nil:
		return fmt.Errorf("run %s: %w", c.Args[0], err)
	}
	return nil
}

// PIDFile signals the process that a file names, which is read each time.
type PIDFile struct {
	Path   string
	Signal syscall.Signal
}

// Tell sends the signal. It fails where the file is not a plain one of root's,
// of ours or of the user whose process it names: anybody else could have root
// signal what they may not.
func (p PIDFile) Tell(context.Context) error {
	if err := p.tell(); err != nil {
		return fmt.Errorf("signal the process of %s: %w", p.Path, err)
	}
	return nil
}

func (p PIDFile) tell() error {
	pid, owner, err := readPID(p.Path)
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(pid), &st); err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	if owner != 0 && int(owner) != os.Geteuid() && owner != st.Uid {
		return fmt.Errorf("the file belongs to user %d, process %d to user %d: who wrote it?", owner, pid, st.Uid)
	}
	if err := unix.PidfdSendSignal(fd, p.Signal, nil, 0); err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	return nil
}

// readPID returns the number in a file's first line, and the file's owner.
func readPID(path string) (pid int, owner uint32, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() || info.Mode().Perm()&0o002 != 0 {
		return 0, 0, fmt.Errorf("%v is not the mode of a file that only its owner writes: %w", info.Mode(), fs.ErrInvalid)
	}
	data, err := io.ReadAll(io.LimitReader(f, 256))
	if err != nil {
		return 0, 0, err
	}
	pid, err = parsePID(string(data))
	return pid, st.Uid, err
}

// parsePID reads the first line of a PID file: PostgreSQL has more.
func parsePID(text string) (int, error) {
	line, _, _ := strings.Cut(text, "\n")
	n, err := strconv.ParseInt(strings.TrimSpace(line), 10, 32)
	if err != nil || n <= 1 {
		return 0, fmt.Errorf("its first line is %.40q, want the number of a process", line)
	}
	return int(n), nil
}

// ParseSignal reads HUP, SIGHUP or hup.
func ParseSignal(name string) (syscall.Signal, error) {
	full := strings.ToUpper(name)
	if !strings.HasPrefix(full, "SIG") {
		full = "SIG" + full
	}
	s := unix.SignalNum(full)
	if s == 0 || s == syscall.SIGKILL || s == syscall.SIGSTOP {
		return 0, fmt.Errorf("signal %q: want one that a program can act on, such as HUP, USR1 or USR2", name)
	}
	return s, nil
}

// Words splits a command line: at spaces, except within '…' or "…", where
// nothing is special but the end. There is no shell: no variable is replaced.
func Words(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	var quote rune // 0: none is open
	begun := false
	end := func() {
		if begun {
			words = append(words, word.String())
			word.Reset()
			begun = false
		}
	}
	for _, c := range line {
		switch {
		case c == 0:
			return nil, errors.New("a command cannot hold a zero byte")
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(c)
		case c == '\'' || c == '"':
			quote, begun = c, true
		case c == ' ' || c == '\t' || c == '\n':
			end()
		default:
			begun = true
			word.WriteRune(c)
		}
	}
	end()
	switch {
	case quote != 0:
		return nil, fmt.Errorf("command %.200q: a %c is not closed", line, quote)
	case len(words) == 0 || words[0] == "":
		return nil, errors.New("the command is empty")
	}
	return words, nil
}
