package reload

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestWords(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		line string
		want []string
		err  string
	}{
		{line: "systemctl reload nginx", want: []string{"systemctl", "reload", "nginx"}},
		{line: "  a\t b\n", want: []string{"a", "b"}},
		{line: `sh -c 'echo "$HOME"; date'`, want: []string{"sh", "-c", `echo "$HOME"; date`}},
		{line: `a "b 'c'"d ''`, want: []string{"a", "b 'c'd", ""}},
		{line: `a\ b`, want: []string{`a\`, "b"}},
		{line: "", err: "empty"},
		{line: "''", err: "empty"},
		{line: "a 'b", err: "a ' is not closed"},
		{line: "a\x00", err: "zero byte"},
	} {
		got, err := Words(c.line)
		if !slices.Equal(got, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: %q, %v", c.line, got, err)
		}
	}
}

// FuzzWords keeps every word whole: quoted and split again it is the same.
func FuzzWords(f *testing.F) {
	f.Add("a b 'c d'")
	f.Add(`"a'b" c`)
	f.Fuzz(func(t *testing.T, line string) {
		words, err := Words(line)
		if err != nil {
			return
		}
		var quoted []string
		for _, w := range words {
			quoted = append(quoted, "'"+strings.ReplaceAll(w, "'", `'"'"'`)+"'")
		}
		again, err := Words(strings.Join(quoted, " "))
		if err != nil || !slices.Equal(again, words) {
			t.Errorf("%q: %q, then %q, %v", line, words, again, err)
		}
	})
}

func TestParseSignal(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]syscall.Signal{
		"HUP": syscall.SIGHUP, "SIGUSR1": syscall.SIGUSR1, "usr2": syscall.SIGUSR2,
		"KILL": 0, "STOP": 0, "": 0, "1": 0, "NOPE": 0,
	} {
		got, err := ParseSignal(name)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %v, %v", name, got, err)
		}
	}
}

func FuzzParsePID(f *testing.F) {
	for _, text := range []string{"1", "42\n", "42\n/var/lib\n", "-1", "99999999999999"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if pid, err := parsePID(text); err == nil && pid <= 1 {
			t.Errorf("%q: process %d", text, pid)
		}
	})
}

func TestCommand(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	if err := (Command{Args: []string{"sh", "-c", "echo told"}, Output: &out}).Tell(t.Context()); err != nil || out.String() != "told\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	if err := (Command{Args: []string{"false"}}).Tell(t.Context()); err == nil || err.Error() != "run false: exit status 1" {
		t.Error(err)
	}
	if err := (Command{Args: []string{"/nowhere/x"}}).Tell(t.Context()); err == nil {
		t.Error("what is not there was run")
	}
}

// TestCommandIsEnded ends it with its own children, which hold its output.
func TestCommandIsEnded(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ended := make(chan error, 1)
	go func() {
		ended <- Command{Args: []string{"sh", "-c", "sleep 1000 & echo begun; wait"}, Output: w}.Tell(ctx)
		w.Close()
	}()
	if _, err := r.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("it ended well")
	}
	if _, err := r.Read(make([]byte, 10)); err == nil {
		t.Error("a child of the command lives on")
	}
}

// told starts a shell that says which signals it gets, and ends with its input.
func told(t *testing.T) (pid int, says func() string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", `trap 'echo HUP' HUP; trap 'echo USR1' USR1; echo begun; while kill -0 `+fmt.Sprint(os.Getpid())+`; do sleep 0.05; done`)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	says = func() string {
		buffer := make([]byte, 100)
		n, err := out.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(buffer[:n]))
	}
	if s := says(); s != "begun" {
		t.Fatal(s)
	}
	return cmd.Process.Pid, says
}

func TestPIDFile(t *testing.T) {
	t.Parallel()
	pid, says := told(t)
	path := filepath.Join(t.TempDir(), "pid")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		_ = os.Remove(path)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	tell := func() error { return PIDFile{Path: path, Signal: syscall.SIGHUP}.Tell(t.Context()) }
	if err := tell(); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
	write(fmt.Sprintf("%d\n/var/lib/postgresql\n5432\n", pid), 0o644)
	if err := tell(); err != nil {
		t.Fatal(err)
	}
	if s := says(); s != "HUP" {
		t.Errorf("it says %q", s)
	}
	for text, want := range map[string]string{"": "first line is", "1": "first line is", "x": "first line is", "2147483646": "no such process"} {
		write(text, 0o644)
		if err := tell(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	write(fmt.Sprint(pid), 0o666)
	if err := tell(); err == nil || !strings.Contains(err.Error(), "only its owner writes") {
		t.Error(err)
	}
	if os.Geteuid() == 0 { // a stranger's file that names a process of root's
		write(fmt.Sprint(pid), 0o644)
		if err := os.Chown(path, 1, 1); err != nil {
			t.Fatal(err)
		}
		if err := tell(); err == nil || !strings.Contains(err.Error(), "who wrote it?") {
			t.Error(err)
		}
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := (PIDFile{Path: link, Signal: syscall.SIGHUP}).Tell(t.Context()); err == nil {
		t.Error("a symbolic link was followed")
	}
}

func TestChild(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "said")
	script := fmt.Sprintf(`trap 'echo HUP >>%[1]s' HUP; trap 'echo USR1 >>%[1]s' USR1; trap 'exit 7' TERM; echo begun >>%[1]s; while :; do sleep 0.02; done`, file)
	c := NewChild([]string{"sh", "-c", script}, syscall.SIGHUP)
	if c.Pass(syscall.SIGUSR1) {
		t.Error("a signal was passed to nobody")
	}
	says := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; {
			got, _ := os.ReadFile(file)
			if string(got) == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("it says %q, want %q", got, want)
			}
			<-time.After(5 * time.Millisecond)
		}
	}
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return c.Tell(t.Context()) }, "begun\n"},
		{func() error { return c.Tell(t.Context()) }, "begun\nHUP\n"},
		{func() error { c.Pass(syscall.SIGUSR1); return nil }, "begun\nHUP\nUSR1\n"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		says(step.want)
	}
	if code, err := c.Wait(); code != 7 || err != nil {
		t.Errorf("it ended with %d, %v", code, err)
	}
	if err := c.Tell(t.Context()); err != nil {
		t.Errorf("told after its end: %v", err)
	}
}

func TestChildEnds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		code int
		err  bool
	}{
		{[]string{"sh", "-c", "exit 0"}, 0, false},
		{[]string{"sh", "-c", "exit 3"}, 3, false},
		{[]string{"sh", "-c", "kill -KILL $$"}, 137, false},
		{[]string{"/nowhere/program"}, 1, true},
	} {
		child := NewChild(c.args, syscall.SIGHUP)
		if err := child.Tell(t.Context()); (err != nil) != c.err {
			t.Errorf("%v: start: %v", c.args, err)
		}
		<-child.Ended()
		if code, err := child.Wait(); code != c.code || (err != nil) != c.err {
			t.Errorf("%v: %d, %v", c.args, code, err)
		}
	}
	if code, err := NewChild([]string{"true"}, syscall.SIGHUP).Wait(); code != 0 || err != nil {
		t.Errorf("never started: %d, %v", code, err)
	}
}
