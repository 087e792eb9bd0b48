//go:build integration

// Package spire_test runs the narthex binary against a real SPIRE Server and
// beside a real spire-agent.
//
//	NARTHEX_TOOLS=$(integration/tools/install.sh spire) go test -tags integration ./integration/spire/
//
// Each test has servers, nodes and folders of its own. Read one as a story: a
// server (server_test.go), nodes that run narthex (node_test.go), the service
// behind them and those who call it (traffic_test.go); every process is a
// process_test.go process, ended by its pid. What the parts of the product do
// by themselves is tested in their own packages.
package spire_test

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Set by TestMain.
var (
	tools   string // folder of spire-server and spire-agent
	narthex string // the binary under test
	scratch string // everything the tests write; others may read it
)

// proxyUser is whom the proxy becomes, and otherProxyUser where a test wants
// two: accounts that every Debian has.
var (
	proxyUser      = user{"daemon", 1}
	otherProxyUser = user{"bin", 2}
)

type user struct {
	name string
	uid  int
}

func (u user) selector() string { return fmt.Sprintf("unix:uid:%d", u.uid) }

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests run proxies as users daemon and bin, which takes root: run them as root, for example with sudo")
		return 1
	}
	// Most tests wait most of the time, so more of them than there are cores
	// can run.
	if err := flag.Set("test.parallel", "4"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var err error
	if scratch, err = os.MkdirTemp("", "nx-"); err == nil {
		defer os.RemoveAll(scratch)
		err = os.Chmod(scratch, 0o755)
	}
	if err == nil {
		tools, err = findTools()
	}
	if err == nil {
		narthex, err = buildNarthex()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare the tests:", err)
		return 1
	}
	stop := startStarter()
	defer stop()
	return m.Run()
}

// findTools returns the folder with spire-server and spire-agent, building
// them where nobody has.
func findTools() (string, error) {
	dir := os.Getenv("NARTHEX_TOOLS")
	if dir == "" {
		cmd := exec.Command(filepath.Join("..", "tools", "install.sh"), "spire")
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("build spire-server and spire-agent: %w", err)
		}
		dir = strings.TrimSpace(string(out))
	}
	for _, tool := range []string{"spire-server", "spire-agent"} {
		if _, err := os.Stat(filepath.Join(dir, tool)); err != nil {
			return "", fmt.Errorf("%w: NARTHEX_TOOLS must name the folder that `integration/tools/install.sh spire` prints", err)
		}
	}
	return dir, nil
}

func buildNarthex() (string, error) {
	path := filepath.Join(scratch, "narthex")
	cmd := exec.Command("go", "build", "-o", path, "github.com/narthex-id/narthex/cmd/narthex")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build narthex: %w\n%s", err, out)
	}
	return path, os.Chmod(path, 0o755)
}

// folder makes a new folder of the test that every user may enter. Its path
// is short, because those of sockets have 107 bytes.
func folder(t *testing.T, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, name+"-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func writeFile(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	// Renamed into place: a file that is watched is never seen half written.
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// firstPort is below the ports that the kernel gives to outgoing connections,
// so that what is free here stays free while a process restarts.
const firstPort = 21000

var lastPort atomic.Int32

// freeAddress returns a loopback address nobody listens on, and never the
// same twice.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 1000 {
		addr := fmt.Sprintf("127.0.0.1:%d", firstPort+lastPort.Add(1))
		l, err := net.Listen("tcp", addr)
		if err == nil {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			return addr
		}
	}
	t.Fatal("no free port on loopback")
	return ""
}

// eventually waits for what other processes do, asking ok until it returns
// nil. It fails the test with ok's last error.
func eventually(t *testing.T, within time.Duration, what string, ok func() error) {
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

// soon bounds what takes well under a second when the machine is idle.
const soon = 20 * time.Second

// tell runs a command that ends by itself and returns what it said.
func tell(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

// must runs a command that has to succeed.
func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tell(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return out
}
