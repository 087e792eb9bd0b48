//go:build integration

// Package demo_test runs the README's first command as a stranger would: with
// an empty HOME, as another user, with busy ports, without cgo.
package demo_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

const root = "../.."

// environment is what a stranger's shell has, beside the module cache, which
// saves the download.
func environment(t *testing.T, home string) []string {
	t.Helper()
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home}
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPROXY", "GOFLAGS"} {
		value, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		env = append(env, name+"="+strings.TrimSpace(string(value)))
	}
	return env
}

// occupy takes the well-known port of the status page, unless somebody has it.
func occupy(t *testing.T) {
	if l, err := net.Listen("tcp", "127.0.0.1:9901"); err == nil {
		t.Cleanup(func() { l.Close() })
	}
}

func checkOnce(t *testing.T, out string) {
	t.Helper()
	for _, want := range []string{
		`allowed +orders  -> inventory   GET /stock/espresso: .*"stock": *12`,
		`"for": *"spiffe://demo.example/orders"`,
		`forbidden +orders  -> inventory   DELETE /stock/espresso: 403, by orders' own proxy: policy: no rule allows it`,
		`refused +reports -> inventory   by inventory's proxy: policy: no rule allows it`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("no line like %q in:\n%s", want, out)
		}
	}
	if strings.Contains(out, "http://127.0.0.1:9901/") {
		t.Error("the status page claims a port that somebody else has")
	}
}

func TestMakeDemoWithAnEmptyHomeAndABusyPort(t *testing.T) {
	occupy(t)
	cmd := exec.Command("make", "demo", "ARGS=--once")
	cmd.Dir, cmd.Env = root, environment(t, t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make demo: %v\n%s", err, out)
	}
	checkOnce(t, string(out))
}

// binary builds narthex where every user may run it.
func binary(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "narthex-demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "narthex")
	cmd := exec.Command("go", "build", "-o", path, "./cmd/narthex")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

// other makes cmd run as another user where that is allowed, with nothing in
// its environment.
func other(cmd *exec.Cmd) {
	cmd.Dir, cmd.Env = "/", []string{}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
}

func TestDemoAsAnotherUserWithoutEnvironment(t *testing.T) {
	occupy(t)
	cmd := exec.Command(binary(t), "demo", "--once")
	other(cmd)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("demo: %v\n%s", err, out)
	}
	checkOnce(t, string(out))
}

// TestDemoGoesOnWhileSVIDsRotate lets it run for longer than SVIDs live.
func TestDemoGoesOnWhileSVIDsRotate(t *testing.T) {
	cmd := exec.Command(binary(t), "demo")
	other(cmd)
	said := stage.Watch()
	cmd.Stdout, cmd.Stderr = said, said
	cmd.WaitDelay = stage.Soon
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	stage.Eventually(t, 5*time.Minute, "every SVID has rotated twice", func() error {
		select {
		case <-ended:
			t.Fatalf("the demo ended by itself: %s\n%s", cmd.ProcessState, said.All())
		default:
		}
		for _, service := range []string{"orders", "inventory", "reports"} {
			if n := strings.Count(said.All(), "rotated      spiffe://demo.example/"+service); n < 2 {
				return fmt.Errorf("%s rotated %d times:\n%s", service, n, said.All())
			}
		}
		return nil
	})
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(stage.Soon):
		t.Fatalf("the demo does not end after Ctrl-C\n%s", said.All())
	}
	out := said.All()
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d after Ctrl-C\n%s", code, out)
	}
	end := regexp.MustCompile(`ended after (\d+) allowed, (\d+) refused and 0 failed calls`).FindStringSubmatch(out)
	if end == nil || len(end[1]) < 2 {
		t.Errorf("want dozens of allowed calls and none failed:\n%s", out)
	}
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "narthex-demo-[0-9]*"))
	if err == nil {
		for _, dir := range left {
			if info, err := os.Stat(dir); err == nil && info.Sys().(*syscall.Stat_t).Uid == 65534 {
				t.Errorf("the demo left %s behind", dir)
			}
		}
	}
}
