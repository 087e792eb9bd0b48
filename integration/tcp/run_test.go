//go:build integration

package tcp_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// host is one `narthex run` with a development server: a caller reaches the
// service in plaintext, through an outbound and an inbound listener of the same
// proxy.
type host struct {
	*stage.Process
	*stage.Face
	t       *testing.T
	dir     string
	program string // the binary that was started, where a newer one is put
	entry   string // where callers come to
	inbound string
	how     []func(*exec.Cmd)
}

// newHost prepares one whose proxy runs as user daemon. Only the server runs
// yet.
func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, dir: stage.Folder(t, "host"), entry: stage.FreeAddress(t), inbound: stage.FreeAddress(t)}
	h.Face = stage.NewFace(t, "host", h.dir)
	// The proxy makes its sockets and its access log there.
	if err := os.Chmod(h.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	h.program = filepath.Join(h.dir, "narthex")
	h.install(stage.Narthex)
	service, server := serve(t, answerLines), stage.FreeAddress(t)
	stage.WriteFile(t, h.file("entries.yaml"), fmt.Sprintf(`
trust_domain: example.org
listen: %s
entries:
  - {spiffe_id: "spiffe://example.org/orders", selectors: ["unix:uid:1"]}
  - {spiffe_id: "spiffe://example.org/inventory", selectors: ["unix:uid:1"]}
`, server), 0o644)
	stage.WriteFile(t, h.file("rules.yaml"), `version: 1
rules:
  - {id: in, effect: allow, from: ["spiffe://example.org/orders"], to: ["spiffe://example.org/inventory"]}
`, 0o644)
	stage.WriteFile(t, h.file("narthex.yaml"), fmt.Sprintf(`
trust_domain: example.org
data_dir: data
agent:
  server: {address: %q, bundle: {file: dev/bundle.pem}}
  node_attestor: {join_token: {token_file: dev/join-token}}
  workload_api: {socket: %s}
proxy:
  user: daemon
  policies: [rules.yaml]
  listeners:
    - {name: inventory, direction: inbound, bind: %q, target: %s, identity: {spiffe_id: "spiffe://example.org/inventory"}}
    - {name: to-inventory, direction: outbound, bind: %q, target: %s, expect: ["spiffe://example.org/inventory"], identity: {spiffe_id: "spiffe://example.org/orders"}}
%slog: {level: debug}
`, server, h.file("api/api.sock"), h.inbound, service.address, h.entry, h.inbound, h.YAML()), 0o644)
	stage.Start(t, "dev-server", stage.Narthex, []string{"dev-server", "-f", h.file("entries.yaml"), "--out", h.file("dev")})
	stage.Eventually(t, stage.Soon, "the development server has a token", func() error {
		_, err := os.Stat(h.file("dev/join-token"))
		return err
	})
	return h
}

func (h *host) file(name string) string { return filepath.Join(h.dir, name) }

// install puts a program where h was or will be started from, as a package
// manager does.
func (h *host) install(program string) {
	h.t.Helper()
	data, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(h.program+".new", data, 0o755)
	}
	if err == nil {
		err = os.Chmod(h.program+".new", 0o755)
	}
	if err == nil {
		err = os.Rename(h.program+".new", h.program)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// start starts the supervisor and waits until a call goes through.
func (h *host) start() {
	h.t.Helper()
	h.Process = stage.Start(h.t, "narthex run", h.program, []string{"run", "-c", h.file("narthex.yaml")}, h.how...)
	stage.Eventually(h.t, stage.Soon, "a call goes through", func() error {
		if err := h.Alive(); err != nil {
			h.t.Fatal(err)
		}
		return call(h.entry)
	})
}

// halves returns the processes of a half, newest last.
func (h *host) halves(name string) (pids []int) {
	h.t.Helper()
	out, err := exec.Command("pgrep", "-P", fmt.Sprint(h.PID()), "-x", "narthex-"+name).Output()
	if err != nil {
		return nil // there is none
	}
	for _, word := range strings.Fields(string(out)) {
		var pid int
		if _, err := fmt.Sscan(word, &pid); err != nil {
			h.t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// half returns the one process of a half.
func (h *host) half(name string) (pid int) {
	h.t.Helper()
	stage.Eventually(h.t, stage.Soon, "there is one "+name, func() error {
		pids := h.halves(name)
		if len(pids) != 1 {
			return fmt.Errorf("processes %v", pids)
		}
		pid = pids[0]
		return nil
	})
	return pid
}

// runs returns the inode of the program that a process runs.
func (h *host) runs(pid int) uint64 {
	h.t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		h.t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// callers come without pause, and stay.
func (h *host) callers() *crowd {
	c := &crowd{stop: make(chan struct{})}
	for range 2 {
		c.g.Go(func() {
			for {
				select {
				case <-c.stop:
					return
				default:
				}
				c.came.Add(1)
				if err := call(h.entry); err != nil {
					c.fail(fmt.Errorf("a new call: %w", err))
				}
			}
		})
	}
	conn := dial(h.t, h.entry)
	c.g.Go(func() {
		for {
			if err := ask(conn, "still here"); err != nil {
				c.fail(fmt.Errorf("a held connection: %w", err))
				return
			}
			c.moved.Add(1)
			select {
			case <-c.stop:
				_ = conn.Close()
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	return c
}

// TestRunIsUpgraded sends SIGUSR2 to the supervisor: both halves run the new
// program then, and no caller has noticed.
func TestRunIsUpgraded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.start()
	proxy, agent := h.half("proxy"), h.half("agent")
	old := h.runs(proxy)
	c := h.callers()

	// A program that is none, and one that ends at once, change nothing.
	h.install("/etc/hostname")
	h.Signal(syscall.SIGUSR2)
	h.Says(stage.Soon, "the upgrade failed")
	h.install("/bin/false")
	h.Signal(syscall.SIGUSR2)
	h.Says(stage.Soon, "the new proxy ended before it took over")
	stage.Eventually(t, stage.Soon, "both upgrades have failed", func() error {
		if n := h.Count("the upgrade failed"); n != 2 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})
	if h.half("proxy") != proxy || h.half("agent") != agent {
		t.Error("a failed upgrade started other halves")
	}

	for range 2 {
		h.install(stage.Narthex)
		count := h.Count("upgraded;")
		h.Signal(syscall.SIGUSR2)
		stage.Eventually(t, 2*stage.Soon, "upgraded", func() error {
			if h.Count("upgraded;") == count {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		info, err := os.Stat(h.program)
		if err != nil {
			t.Fatal(err)
		}
		want := info.Sys().(*syscall.Stat_t).Ino
		newest := h.halves("proxy")
		if got := h.runs(newest[len(newest)-1]); got != want || got == old {
			t.Errorf("the proxy runs inode %d, want %d", got, want)
		}
		if uid := stage.UIDOf(t, newest[len(newest)-1]); uid != 1 {
			t.Errorf("the new proxy runs as uid %d", uid)
		}
		if got := h.runs(h.half("agent")); got != want {
			t.Errorf("the agent runs inode %d, want %d", got, want)
		}
	}
	c.leave()
	if n := c.failed.Load(); n > 0 || c.came.Load() < 10 || c.moved.Load() < 10 {
		t.Errorf("%d of %d new calls and %d answers failed, the first: %v", n, c.came.Load(), c.moved.Load(), c.first.Load())
	}
	t.Logf("%d new calls, %d answers on a held connection, %d failures", c.came.Load(), c.moved.Load(), c.failed.Load())
	h.half("proxy") // those before it have drained and ended
	if h.half("agent") == agent {
		t.Error("the agent is the one it was")
	}
	if err := h.Ready(); err != nil {
		t.Error(err)
	}
}

// TestRunStartsAgain kills the proxy, and then the supervisor: whoever is
// started in their place finds the ports, the sockets and data_dir.
func TestRunStartsAgain(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.start()
	proxy, agent := h.half("proxy"), h.half("agent")
	held := dial(t, h.entry)
	if err := ask(held, "hello"); err != nil {
		t.Fatal(err)
	}
	// One that ends within three seconds of the first start is taken for a
	// mistake in the configuration.
	stage.Eventually(t, stage.Soon, "the proxy has lived for a while", func() error {
		if s, err := h.Status(); err != nil || time.Since(s.Started) < 4*time.Second {
			return fmt.Errorf("started %v, %w", s.Started, err)
		}
		return nil
	})
	// The program has been replaced meanwhile: what is started again is still
	// the one that ran, until somebody asks for an upgrade.
	program := h.runs(proxy)
	h.install("/bin/false")
	_ = syscall.Kill(proxy, syscall.SIGKILL)
	stage.Eventually(t, stage.Soon, "a call goes through again", func() error { return call(h.entry) })
	if h.half("agent") != agent {
		t.Error("the agent was started again though only the proxy was killed")
	}
	if got := h.runs(h.half("proxy")); got != program {
		t.Errorf("the proxy runs inode %d, want %d as before", got, program)
	}
	h.install(stage.Narthex)

	for range 2 {
		halves := append(h.halves("proxy"), h.halves("agent")...)
		h.Kill()
		for _, pid := range halves {
			stage.Eventually(t, stage.Soon, "the halves end with their supervisor", func() error {
				if syscall.Kill(pid, 0) == nil {
					return fmt.Errorf("%d is there", pid)
				}
				return nil
			})
		}
		if c, err := net.Dial("tcp", h.entry); err == nil {
			_ = c.Close()
			t.Error("somebody still listens")
		}
		h.start()
	}
	if err := h.Ready(); err != nil {
		t.Error(err)
	}
}
