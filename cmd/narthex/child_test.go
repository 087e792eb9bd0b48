package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// spy is a child that reports what it was given.
func spy(t *testing.T, c *child, script string) string {
	t.Helper()
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	if shell, err = filepath.EvalSymlinks(shell); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	c.name, c.binary, c.args, c.stdout = "spy", shell, []string{"-c", script}, &out
	if err := c.run(context.Background(), context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestChildIsGivenNoSecretsOfOthers(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
	t.Setenv("LC_ALL", "C")
	secret, err := os.CreateTemp(t.TempDir(), "secret")
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	fd, err := unix.Dup(int(secret.Fd())) // as a careless parent leaves it: open across exec
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := keepFilesToOurselves(); err != nil {
		t.Fatal(err)
	}
	out := spy(t, &child{}, "env; ls -l /proc/self/fd")
	if strings.Contains(out, "hunter2") || strings.Contains(out, "secret") {
		t.Errorf("the child was given what is not its business:\n%s", out)
	}
	if !strings.Contains(out, "LC_ALL=C") {
		t.Errorf("the child was not given its locale:\n%s", out)
	}
}

func TestChildInheritsWhatIsMeantForIt(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	out := spy(t, &child{files: map[string]*os.File{"inventory": w}}, "echo $"+filesEnv+"; echo hello >&3")
	if strings.TrimSpace(out) != "inventory=3" {
		t.Errorf("told %q, want inventory=3", out)
	}
	data := make([]byte, 6)
	if _, err := r.Read(data); err != nil || string(data) != "hello\n" {
		t.Errorf("read %q, %v", data, err)
	}
}

// TestChildInheritsManyFiles gives a child more files than the program's own
// descriptor is high: none may take its place before it is started.
func TestChildInheritsManyFiles(t *testing.T) {
	files := map[string]*os.File{}
	for i := range 40 {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[fmt.Sprint("file", i)] = f
	}
	if out := spy(t, &child{files: files}, "echo alive"); out != "alive\n" {
		t.Errorf("said %q", out)
	}
}

// TestHangupWaitsUntilAChildListens sends SIGHUP to a child that has just
// begun and would die of it.
func TestHangupWaitsUntilAChildListens(t *testing.T) {
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	if shell, err = filepath.EvalSymlinks(shell); err != nil {
		t.Fatal(err)
	}
	// What we catch is not ignored by our children, even under nohup.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	defer signal.Stop(caught)
	var out strings.Builder
	c := &child{name: "spy", binary: shell, stdout: &out, args: []string{"-c", `trap 'echo told; exit 0' HUP; i=0; while [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done`}}
	hangup := make(chan struct{}, 1)
	hangup <- struct{}{}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.run(ctx, ctx, hangup); err != nil {
		t.Fatal(err)
	}
	if out.String() != "told\n" {
		t.Errorf("the child said %q", out.String())
	}
}

// onWrite is called for each write.
type onWrite func()

func (f onWrite) Write(b []byte) (int, error) {
	f()
	return len(b), nil
}

func TestSecondRequestKills(t *testing.T) {
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	if shell, err = filepath.EvalSymlinks(shell); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	kill, killNow := context.WithCancel(context.Background())
	defer killNow()
	// It says when it listens, and when it was asked once.
	requests := []func(){cancel, killNow}
	said := onWrite(func() {
		if len(requests) > 0 {
			requests[0]()
			requests = requests[1:]
		}
	})
	c := &child{name: "spy", binary: shell, stdout: said, args: []string{"-c", `trap 'n=$((n+1)); [ "$n" -lt 2 ] || exit 7; echo asked' TERM; echo listens; i=0; while [ $i -lt 200 ]; do sleep 0.1; i=$((i+1)); done`}}
	err = c.run(ctx, kill, nil)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 && exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v, want by the second SIGTERM", err)
	}
}
