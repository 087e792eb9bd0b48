//go:build integration

package tcp_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// newHeir starts a door that a newer proxy can take over: with a listener on
// TCP and one on a Unix socket.
func newHeir(t *testing.T, more ...string) (*door, string) {
	t.Helper()
	d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "heir", d.ca.leaf("/server"), d.ca)
	d.proxy = []string{fmt.Sprintf("handover: {socket: %s}", d.file("handover.sock"))}
	d.address = d.inbound("door", d.service.address, more...)
	unix := d.file("door.sock")
	d.listen(&listener{name: "backdoor", bind: "unix:" + unix, target: d.service.address, more: more})
	d.rules(d.clientMay())
	d.start()
	return d, unix
}

// next starts a proxy of the same configuration beside the one that runs and
// waits until it has taken over. It returns the one before.
func (d *door) next() (before *stage.Process) {
	d.t.Helper()
	before = d.Process
	d.Process = d.beside()
	d.Says(stage.Soon, "took over")
	return before
}

func (d *door) beside(how ...func(*exec.Cmd)) *stage.Process {
	d.t.Helper()
	return stage.Start(d.t, "the next proxy", stage.Narthex, []string{"proxy", "-c", d.file("narthex.yaml")}, how...)
}

// enter makes a mutual TLS connection.
func (d *door) enter(network, address string) (*tls.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: callTime}, network, address, d.client.client())
}

// passes makes one request on a connection of its own.
func (d *door) passes(network, address string) error {
	c, err := d.enter(network, address)
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c, "hello")
}

// crowd are clients that come without pause, and clients that stay.
type crowd struct {
	came, failed atomic.Int64
	moved        atomic.Int64 // answers on connections that were held
	first        atomic.Value // error
	stop         chan struct{}
	g            sync.WaitGroup
}

func (c *crowd) fail(err error) {
	c.failed.Add(1)
	c.first.CompareAndSwap(nil, err)
}

// comes has a client make one connection after the other.
func (c *crowd) comes(d *door, network, address string) {
	c.g.Go(func() {
		for {
			select {
			case <-c.stop:
				return
			default:
			}
			c.came.Add(1)
			if err := d.passes(network, address); err != nil {
				c.fail(fmt.Errorf("a new connection: %w", err))
			}
		}
	})
}

// stays has a client keep one connection and use it.
func (c *crowd) stays(d *door, network, address string) {
	d.t.Helper()
	conn, err := d.enter(network, address)
	if err != nil {
		d.t.Fatal(err)
	}
	c.g.Go(func() {
		defer conn.Close()
		for {
			if err := ask(conn, "still here"); err != nil {
				c.fail(fmt.Errorf("a connection that was held: %w", err))
				return
			}
			c.moved.Add(1)
			select {
			case <-c.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
}

func (c *crowd) leave() {
	close(c.stop)
	c.g.Wait()
}

// TestUpgradesUnderLoad has five processes take the place of each other while
// clients come, and others stay with the process that accepted them.
func TestUpgradesUnderLoad(t *testing.T) {
	t.Parallel()
	d, unix := newHeir(t)
	inode := inodeOf(t, unix)
	c := &crowd{stop: make(chan struct{})}
	for range 2 {
		c.comes(d, "tcp", d.address)
	}
	c.comes(d, "unix", unix)
	var before []*stage.Process
	for range 5 {
		for range 5 {
			c.stays(d, "tcp", d.address)
			c.stays(d, "unix", unix)
		}
		before = append(before, d.next())
		moved, came := c.moved.Load(), c.came.Load()
		stage.Eventually(t, stage.Soon, "held connections go on, and new ones come", func() error {
			if c.moved.Load() < moved+200 || c.came.Load() < came+20 {
				return fmt.Errorf("%d answers, %d connections", c.moved.Load()-moved, c.came.Load()-came)
			}
			return nil
		})
		if err := d.Ready(); err != nil {
			t.Errorf("after an upgrade: %v", err)
		}
	}
	for i, p := range before {
		if err := p.Alive(); err != nil {
			t.Errorf("process %d ended while clients of it were there: %v", i, err)
		}
	}
	c.leave()
	t.Logf("%d new connections, %d answers on 50 held ones, %d failures", c.came.Load(), c.moved.Load(), c.failed.Load())
	if n := c.failed.Load(); n > 0 {
		t.Errorf("%d connections failed, the first: %v", n, c.first.Load())
	}
	for i, p := range before {
		waitExit(t, p, fmt.Sprintf("process %d", i))
	}
	if got := inodeOf(t, unix); got != inode {
		t.Errorf("the Unix socket is another file than before: inode %d, was %d", got, inode)
	}
	for _, path := range []string{unix, d.file("handover.sock"), d.Figures()} {
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("after the upgrades: %v", err)
		}
	}
	d.Stop()
	for _, path := range []string{unix, d.file("handover.sock"), d.Figures()} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there after the last process has ended", path)
		}
	}
}

func waitExit(t *testing.T, p *stage.Process, who string) {
	t.Helper()
	select {
	case <-p.Done:
	case <-time.After(stage.Soon):
		t.Fatalf("%s has not ended", who)
	}
	if code := p.Cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("%s: %s, want exit status 0", who, p.Cmd.ProcessState)
	}
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// TestUpgradeWithAnotherConfiguration takes over by address: the name of a
// listener, its limits and what else there is may be other ones.
func TestUpgradeWithAnotherConfiguration(t *testing.T) {
	t.Parallel()
	d, unix := newHeir(t)
	held, err := d.enter("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := ask(held, "before"); err != nil {
		t.Fatal(err)
	}
	before := d.Process
	// The file is not to be taken up by the one that runs: it names another.
	stopped := d.listeners
	d.listeners = []*listener{{name: "gate", bind: d.address, target: d.service.address}}
	added := d.inbound("window", d.service.address)
	text := stage.ReadFile(t, d.file("narthex.yaml"))
	d.configure()
	other := d.file("other.yaml")
	if err := os.Rename(d.file("narthex.yaml"), other); err != nil {
		t.Fatal(err)
	}
	stage.WriteFile(t, d.file("narthex.yaml"), text, 0o644)
	d.Process = stage.Start(t, "another configuration", stage.Narthex, []string{"proxy", "-c", other})
	d.Says(stage.Soon, "took over")
	for _, address := range []string{d.address, added} {
		if err := d.passes("tcp", address); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
	stage.Eventually(t, stage.Soon, "a listener that is no more is gone", func() error {
		if _, err := os.Lstat(unix); err == nil {
			return fmt.Errorf("%s is still there", unix)
		}
		return nil
	})
	if err := ask(held, "after"); err != nil {
		t.Errorf("a connection that was held: %v", err)
	}
	_ = held.Close()
	waitExit(t, before, "the process before")
	d.listeners = stopped
}

// TestUpgradesThatFail leave the proxy that runs as it was.
func TestUpgradesThatFail(t *testing.T) {
	t.Parallel()
	d, unix := newHeir(t)
	c := &crowd{stop: make(chan struct{})}
	c.comes(d, "tcp", d.address)
	c.stays(d, "tcp", d.address)
	c.stays(d, "unix", unix)
	good := stage.ReadFile(t, d.file("narthex.yaml"))
	variant := func(name, was, is string) string {
		if !strings.Contains(good, was) {
			t.Fatalf("%q is not in the configuration", was)
		}
		stage.WriteFile(t, d.file(name), strings.ReplaceAll(good, was, is), 0o644)
		return d.file(name)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, file := range map[string]string{
		"no YAML":              variant("bad.yaml", "listeners:", "lesteners:"),
		"no policy":            variant("nopolicy.yaml", "policies: [rules.yaml]", "policies: [nothing.yaml]"),
		"an address is taken":  variant("taken.yaml", "  listeners:\n", fmt.Sprintf("  listeners:\n    - {name: more, direction: inbound, bind: %q, target: %s}\n", taken.Addr(), d.service.address)),
		"a half that is other": variant("agent.yaml", "proxy:", "prox:"),
	} {
		p := stage.Start(t, name, stage.Narthex, []string{"proxy", "-c", file})
		select {
		case <-p.Done:
		case <-time.After(stage.Soon):
			t.Fatalf("%s: the new process has not ended", name)
		}
		if p.Cmd.ProcessState.ExitCode() == 0 {
			t.Errorf("%s: exit status 0", name)
		}
	}

	// One that never gets its identity, and is killed while the other waits.
	waiting := variant("waiting.yaml", "  source: files\n", "  source: workload_api\n  workload_api: {socket: /nonexistent/api.sock}\n")
	text := stage.ReadFile(t, waiting)
	from, to := strings.Index(text, "  files:\n"), strings.Index(text, "  policies:")
	stage.WriteFile(t, waiting, text[:from]+text[to:], 0o644)
	p := stage.Start(t, "without identity", stage.Narthex, []string{"proxy", "-c", waiting})
	p.Says(stage.Soon, "a proxy runs")
	p.Kill()
	d.Says(stage.Soon, "no hand-over: this process goes on", "the other process is gone")

	for name, say := range map[string]string{
		"speaks version 2": `{"narthex_handover":2,"step":"hello"}`,
		"not a message":    "GET / HTTP/1.1\r\n\r\n",
		"in place of":      `{"narthex_handover":1,"step":"ready","taken":[0]}`,
		"longer than":      strings.Repeat("x", 100<<10),
	} {
		conn, err := net.Dial("unixpacket", d.file("handover.sock"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(say))
		answer := make([]byte, 4096)
		n, _ := conn.Read(answer)
		if !strings.Contains(string(answer[:n]), "refused") {
			t.Errorf("%s: answered %q", name, answer[:n])
		}
		_ = conn.Close()
		d.Says(stage.Soon, name)
	}

	// Another user, who is told so, even where the socket's mode lets him in.
	// Without the log he would not come as far as that.
	if err := os.Chmod(d.file("access.log"), 0o666); err != nil {
		t.Fatal(err)
	}
	for mode, word := range map[os.FileMode]string{0o600: "start this one as the user of that one", 0o666: "refused"} {
		if err := os.Chmod(d.file("handover.sock"), mode); err != nil {
			t.Fatal(err)
		}
		stranger := d.beside(stage.As(2, 2), func(cmd *exec.Cmd) { cmd.Dir = "/" })
		select {
		case <-stranger.Done:
		case <-time.After(stage.Soon):
			t.Fatal("another user's process has not ended")
		}
		stranger.Says(stage.Soon, word)
		if stranger.Cmd.ProcessState.ExitCode() == 0 {
			t.Error("another user took over")
		}
	}

	if err := d.Alive(); err != nil {
		t.Fatal(err)
	}
	before := d.next() // and then one that does not fail
	c.leave()
	waitExit(t, before, "the process before")
	if n := c.failed.Load(); n > 0 {
		t.Errorf("%d of %d connections failed, the first: %v", n, c.came.Load(), c.first.Load())
	}
}

// TestUpgradesAtOnce starts three proxies at one moment: they take over one
// after the other, and the last one stays.
func TestUpgradesAtOnce(t *testing.T) {
	t.Parallel()
	d, unix := newHeir(t)
	c := &crowd{stop: make(chan struct{})}
	c.comes(d, "tcp", d.address)
	c.comes(d, "unix", unix)
	all := []*stage.Process{d.Process}
	for range 3 {
		all = append(all, d.beside())
	}
	stage.Eventually(t, 2*stage.Soon, "one process is left", func() error {
		alive := 0
		for _, p := range all {
			if p.Alive() == nil {
				alive++
				d.Process = p
			}
		}
		if alive != 1 {
			return fmt.Errorf("%d are", alive)
		}
		return nil
	})
	c.leave()
	if n := c.failed.Load(); n > 0 {
		t.Errorf("%d of %d connections failed, the first: %v", n, c.came.Load(), c.first.Load())
	}
	for _, p := range all {
		if p != d.Process {
			waitExit(t, p, "a process before")
		}
	}
	if err := d.passes("tcp", d.address); err != nil {
		t.Error(err)
	}
}
