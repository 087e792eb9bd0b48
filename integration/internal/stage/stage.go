// Package stage is what tests against real things stand on: the narthex
// binary, built once, scratch folders, addresses nobody else has, processes
// that end with their test, and a look at what a running Narthex shows.
//
//	func TestMain(m *testing.M) { os.Exit(stage.Main(m, 4)) }
//	…
//	p := stage.Start(t, "redis", "redis-server", []string{"--port", port})
//	p.Says(stage.Soon, "Ready to accept connections")
package stage

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Set by Main, before any test runs.
var (
	Narthex string // the binary under test
	Scratch string // everything the tests write; others may read it
)

// Main runs the tests of a package, so many at once: most tests wait most of
// the time, so more of them than there are cores can run. What prepare does
// comes first.
func Main(m *testing.M, parallel int, prepare ...func() error) int {
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests run processes as several users, which takes root: run them as root, for example with sudo")
		return 1
	}
	if err := flag.Set("test.parallel", strconv.Itoa(parallel)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var err error
	if Scratch, err = os.MkdirTemp("", "nx-"); err == nil {
		defer os.RemoveAll(Scratch)
		err = os.Chmod(Scratch, 0o755)
	}
	go cleanWhenInterrupted()
	if err == nil {
		err = buildNarthex()
	}
	for _, p := range prepare {
		if err == nil {
			err = p()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare the tests:", err)
		return 1
	}
	stop := startStarter()
	defer stop()
	return m.Run()
}

// interrupted is what cleans up, besides Scratch, when the tests are
// interrupted and their own cleanups do not run. Processes end with us.
var interrupted struct {
	mu    sync.Mutex
	clean []func()
}

// WhenInterrupted has clean run then.
func WhenInterrupted(clean func()) {
	interrupted.mu.Lock()
	defer interrupted.mu.Unlock()
	interrupted.clean = append(interrupted.clean, clean)
}

func cleanWhenInterrupted() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	<-signals
	interrupted.mu.Lock() // for good: nothing new begins
	for _, clean := range interrupted.clean {
		clean()
	}
	_ = os.RemoveAll(Scratch)
	os.Exit(1)
}

// buildNarthex builds the binary, unless NARTHEX names one.
func buildNarthex() error {
	if Narthex = os.Getenv("NARTHEX"); Narthex != "" {
		_, err := os.Stat(Narthex)
		return err
	}
	Narthex = filepath.Join(Scratch, "narthex")
	// A system call that the sandbox has forgotten ends this build with a stack.
	cmd := exec.Command("go", "build", "-tags", "sandboxtrap", "-o", Narthex, "github.com/narthex-id/narthex/cmd/narthex")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build narthex: %w\n%s", err, out)
	}
	return os.Chmod(Narthex, 0o755)
}

// Tools returns the folder of the tools that `integration/tools/install.sh
// name` builds, building them where nobody has. The environment variable, if
// set, names the folder.
func Tools(name, variable string, programs ...string) (string, error) {
	dir := os.Getenv(variable)
	if dir == "" {
		cmd := exec.Command(filepath.Join("..", "tools", "install.sh"), name)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("build the tools of %s: %w", name, err)
		}
		dir = strings.TrimSpace(string(out))
	}
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			return "", fmt.Errorf("%w: %s must name the folder that `integration/tools/install.sh %s` prints", err, variable, name)
		}
	}
	return dir, nil
}

// Folder makes a new folder of the test that every user may enter. Its path
// is short, because those of sockets have 107 bytes.
func Folder(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp(Scratch, name+"-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// WriteFile writes a file by renaming it into place: one that is watched is
// never seen half written.
func WriteFile(t testing.TB, path, text string, mode os.FileMode) {
	t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

// ReadFile returns a file that has to be there.
func ReadFile(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Soon bounds what takes well under a second when the machine is idle. It may
// be as busy as it likes.
const Soon = time.Minute

// Eventually waits for what other processes do, asking ok until it returns
// nil. It fails the test with ok's last error.
func Eventually(t testing.TB, within time.Duration, what string, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// StandsStill waits until n has grown, and grows no more.
func StandsStill(t testing.TB, n *atomic.Int64) int64 {
	t.Helper()
	last, since := int64(0), time.Now()
	Eventually(t, Soon, "nothing moves", func() error {
		if now := n.Load(); now != last || now == 0 {
			last, since = now, time.Now()
		}
		if time.Since(since) < time.Second {
			return fmt.Errorf("%d bytes have", last)
		}
		return nil
	})
	return last
}

// Tell runs a command that ends by itself and returns what it said.
func Tell(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Soon)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

// Must runs a command that has to succeed.
func Must(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := Tell(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return out
}
