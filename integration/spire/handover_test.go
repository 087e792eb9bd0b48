//go:build integration

package spire_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// newHost prepares a node whose agent joins with a token, which is good once:
// an agent that the server no longer knows could not come back. Root is its
// one workload.
func newHost(t *testing.T, o serverOptions) (*node, *server) {
	t.Helper()
	o.cacheReload = time.Second
	s := newServer(t, o)
	n := newNode(t, "host", proxyUser)
	id := n.joins(s)
	s.add(entry{path: "/root", parent: id, selector: "unix:uid:0"})
	n.admin = filepath.Join(n.dir, "private", "admin.sock")
	n.configure()
	return n, s
}

// agent starts an agent of the node beside those that run.
func (n *node) agent(how ...func(*exec.Cmd)) *stage.Process {
	n.t.Helper()
	return stage.Start(n.t, n.name+": narthex agent", stage.Narthex, []string{"agent", "-c", n.configFile(), "--standby"}, how...)
}

// succeed starts an agent that takes the place of the one that runs, and
// returns that one.
func (n *node) succeed() (before *stage.Process) {
	n.t.Helper()
	before, n.Process = n.Process, n.agent()
	n.Says(stage.Soon, "took over")
	before.Says(stage.Soon, "in standby until that one is gone")
	return before
}

// callers are go-spiffe clients of a node's Workload API.
type callers struct {
	n       *node
	heard   []atomic.Int64 // updates, by client that holds a stream
	fetched atomic.Int64
	failed  atomic.Int64
	first   atomic.Value // error
	slowest atomic.Int64 // fetch, in nanoseconds
	end     func()
}

// newCallers has so many clients hold a stream, and others fetch without pause:
// on connections of their own, and on one that they keep.
func newCallers(n *node, holding, fetching int) *callers {
	n.t.Helper()
	n.fetches(stage.Soon) // the server may take a moment to know of the entry
	c := &callers{n: n, heard: make([]atomic.Int64, holding)}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	c.end = sync.OnceFunc(func() { cancel(); all.Wait() })
	n.t.Cleanup(c.end)
	at := workloadapi.WithAddr("unix://" + n.api)
	for i := range holding {
		all.Go(func() { _ = workloadapi.WatchX509Context(ctx, &holder{c, i}, at) })
	}
	for range fetching {
		all.Go(func() {
			c.fetch(ctx, func(ctx context.Context) error {
				_, err := workloadapi.FetchX509SVID(ctx, at)
				return err
			})
		})
		all.Go(func() {
			client, err := workloadapi.New(ctx, at)
			if err != nil {
				n.t.Error(err)
				return
			}
			defer client.Close()
			c.fetch(ctx, func(ctx context.Context) error {
				_, err := client.FetchX509SVID(ctx)
				return err
			})
		})
	}
	c.allHear(0)
	return c
}

func (c *callers) fetch(ctx context.Context, once func(context.Context) error) {
	for ctx.Err() == nil {
		within, cancel := context.WithTimeout(ctx, callTime)
		begun := time.Now()
		err := once(within)
		cancel()
		if ctx.Err() != nil {
			return
		}
		c.fetched.Add(1)
		if took := int64(time.Since(begun)); took > c.slowest.Load() {
			c.slowest.Store(took)
		}
		if err != nil {
			c.failed.Add(1)
			c.first.CompareAndSwap(nil, fmt.Errorf("a fetch: %w", err))
		}
		time.Sleep(10 * time.Millisecond) // the pace of a caller: without it they would be a load, and take the cores from the agents
	}
}

// holder is a client that holds a stream.
type holder struct {
	c *callers
	i int
}

func (h *holder) OnX509ContextUpdate(*workloadapi.X509Context) { h.c.heard[h.i].Add(1) }

func (h *holder) OnX509ContextWatchError(err error) {
	if !strings.Contains(err.Error(), "Unavailable") && !strings.Contains(err.Error(), "Canceled") {
		h.c.failed.Add(1)
		h.c.first.CompareAndSwap(nil, fmt.Errorf("a held stream: %w", err))
	}
}

// allHear waits until each that holds a stream has heard more than so often.
func (c *callers) allHear(than int64) {
	c.n.t.Helper()
	stage.Eventually(c.n.t, stage.Soon, "every held stream is there", func() error {
		for i := range c.heard {
			if c.heard[i].Load() <= than {
				return fmt.Errorf("client %d has heard %d times", i, c.heard[i].Load())
			}
		}
		return nil
	})
}

func (c *callers) finish() {
	c.n.t.Helper()
	c.end()
	if c.failed.Load() > 0 {
		c.n.t.Errorf("%d callers failed, the first: %v", c.failed.Load(), c.first.Load())
	}
	c.n.t.Logf("%d fetches, the slowest took %s", c.fetched.Load(), time.Duration(c.slowest.Load()).Round(time.Millisecond))
}

// followSerials follows the serial numbers that the server knows an agent by, until
// the returned function is called.
func followSerials(s *server, id string) (end func() []string) {
	var seen []string
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			if a, err := s.agent(id); err == nil && (len(seen) == 0 || seen[len(seen)-1] != a.X509SvidSerialNumber) {
				seen = append(seen, a.X509SvidSerialNumber)
			}
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond): // the server tells nobody of a change: it is asked, more often than an agent renews
			}
		}
	}()
	return func() []string { close(stop); <-done; return seen }
}

// TestAgentHandOvers has five agents take the place of each other under
// callers, while the agent's SVID is renewed every few seconds.
func TestAgentHandOvers(t *testing.T) {
	t.Parallel()
	n, s := newHost(t, serverOptions{agentTTL: 30 * time.Second})
	n.Process = n.agent()
	n.ready()
	status, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	known := followSerials(s, status.Agent.ID)
	c := newCallers(n, 50, 3)
	inode, adminInode := fileOf(t, n.api), fileOf(t, n.admin)
	agents := []*stage.Process{n.Process}
	for round := range 5 {
		fetched := c.fetched.Load()
		before := n.succeed()
		c.allHear(int64(round + 1))
		agents = append(agents, n.Process)
		n.ready()
		stage.Eventually(t, stage.Soon, "fetches go on", func() error {
			if c.fetched.Load() < fetched+50 {
				return fmt.Errorf("%d", c.fetched.Load()-fetched)
			}
			return nil
		})
		if err := before.Alive(); err != nil {
			t.Errorf("the agent before does not stand by: %v", err)
		}
	}
	serial := func() string {
		a, err := s.agent(status.Agent.ID)
		if err != nil {
			t.Fatal(err)
		}
		return a.X509SvidSerialNumber
	}
	last := serial()
	stage.Eventually(t, stage.Soon, "the agent renews its SVID once more", func() error {
		if serial() == last {
			return fmt.Errorf("it is still %s", last)
		}
		return nil
	})
	c.finish()
	if now := fileOf(t, n.api); now != inode {
		t.Error("the socket is another one than at the start")
	}
	if now := fileOf(t, n.admin); now != adminInode {
		t.Error("the admin socket is another one than at the start")
	}
	stage.Must(t, stage.Narthex, "logger", "get", "-c", n.configFile())
	seen := known()
	t.Logf("the server knew %d serial numbers", len(seen))
	if sorted := slices.Compact(slices.Sorted(slices.Values(seen))); len(sorted) != len(seen) || len(seen) < 2 {
		t.Errorf("the server knew these serial numbers one after the other: %v", seen)
	}
	attested := 0
	for _, a := range agents {
		attested += a.Count("attested: ")
		if a.Count("AGENT_NOT_ACTIVE")+a.Count("not active") > 0 {
			t.Error("an agent was not active at the server")
		}
	}
	if attested != 1 {
		t.Errorf("the agents attested %d times; the token is good once", attested)
	}
	if s.Count("AGENT_NOT_ACTIVE")+s.Count("not active") > 0 {
		t.Error("the server refused an agent that was not active")
	}
	if list := s.cli("agent", "list"); !strings.Contains(list, status.Agent.ID) || !strings.Contains(list, "Found 1 attested agent") {
		t.Errorf("`spire-server agent list`:\n%s", list)
	}
	for i, a := range agents[:len(agents)-1] {
		t.Logf("in standby, agent %d takes %d KiB", i, stage.RSS(t, a.PID())>>10)
		a.Stop()
		if code := a.Cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("an agent in standby ended with status %d", code)
		}
	}
	n.fetches(stage.Soon)
	n.Stop()
	for _, socket := range []string{n.api, n.admin} {
		if _, err := os.Lstat(socket); err == nil {
			t.Errorf("the last agent left %s behind", socket)
		}
	}
}

// TestAgentTakesBack kills the newer of two agents, and has a third come.
func TestAgentTakesBack(t *testing.T) {
	t.Parallel()
	n, s := newHost(t, serverOptions{})
	n.Process = n.agent()
	n.ready()
	c := newCallers(n, 10, 0)
	first := n.succeed()
	c.allHear(1)
	second := n.Process
	n.succeed()
	c.allHear(2)
	killed := time.Now()
	n.Kill()
	n.fetches(stage.Soon) // from one of those in standby
	t.Logf("served again %s after the newest was killed", time.Since(killed).Round(time.Millisecond))
	c.allHear(3)
	c.finish()
	if back := first.Count("taking the place back") + second.Count("taking the place back"); back == 0 {
		t.Error("nobody says that it takes the place back")
	}
	both := first.Count("took up the saved SVID") + second.Count("took up the saved SVID")
	if both != 2 { // the second at its start, and one of them now
		t.Errorf("the saved SVID was taken up %d times", both)
	}
	if s.Count("not active") > 0 {
		t.Error("the server refused an agent that was not active")
	}
	// A newer one comes again: it asks whoever serves.
	n.Process = n.agent()
	n.Says(stage.Soon, "took over")
	n.fetches(stage.Soon)
	n.Kill()
	n.fetches(stage.Soon)
	stage.Must(t, stage.Narthex, "logger", "get", "-c", n.configFile())
	for _, p := range []*stage.Process{first, second} {
		p.Stop()
		if code := p.Cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("status %d", code)
		}
	}
	if _, err := os.Lstat(n.api); err == nil {
		t.Error("the last agent left its socket behind")
	}
}

// TestAgentHandOverFails starts agents that cannot take over.
func TestAgentHandOverFails(t *testing.T) {
	t.Parallel()
	n, _ := newHost(t, serverOptions{})
	n.Process = n.agent()
	n.ready()
	c := newCallers(n, 5, 1)
	good := stage.ReadFile(t, n.configFile())
	broken := filepath.Join(n.dir, "broken.yaml")
	for _, text := range []string{
		strings.ReplaceAll(good, "workload_api:", "workload_apes:"),
		strings.ReplaceAll(good, "trust_domain: example.org", "trust_domain: example.com"),
		good + "telemetry: {}\n",
	} {
		stage.WriteFile(t, broken, text, 0o644)
		if out, err := stage.Tell(t, stage.Narthex, "agent", "-c", broken, "--standby"); err == nil {
			t.Errorf("it should have failed:\n%s", out)
		}
	}
	// Killed in the midst of it, at whatever moment that is: the time is the test,
	// since each moment of a take-over has to be one to die in.
	for _, after := range []time.Duration{20, 60, 100, 150, 250} {
		p := n.agent()
		time.Sleep(after * time.Millisecond)
		p.Kill()
		n.fetches(stage.Soon)
	}
	c.end()
	t.Logf("%d of %d fetches failed while agents were killed", c.failed.Load(), c.fetched.Load())
	n.fetches(stage.Soon)
	if n.Count("attested: ") != 1 {
		t.Error("it attested again")
	}
}

// TestAgentAfterOneThatEnds starts agents while another one has the lease and
// answers nobody.
func TestAgentAfterOneThatEnds(t *testing.T) {
	t.Parallel()
	n, _ := newHost(t, serverOptions{})
	n.Process = n.agent()
	n.ready()
	n.fetches(stage.Soon)
	before := n.Process
	before.Signal(syscall.SIGTERM)
	n.Process = n.agent()
	n.ready()
	n.fetches(stage.Soon)
	n.Stop()
	if _, err := os.Lstat(filepath.Join(n.dataDir(), "handover.sock")); err == nil {
		t.Error("the last agent left its hand-over socket behind")
	}

	lease, err := os.OpenFile(filepath.Join(n.dataDir(), "lease"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	if err := unix.Flock(int(lease.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	out, err := stage.Tell(t, stage.Narthex, "agent", "-c", n.configFile(), "--standby")
	if err == nil || !strings.Contains(out, "in use by another agent (pid ") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestAgentHandOverWithKeysInMemory has agents whose keys end with them: each
// attests again, once the one before it is silent.
func TestAgentHandOverWithKeysInMemory(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "host", proxyUser)
	s.add(entry{path: "/root", parent: n.proves(s), selector: "unix:uid:0"})
	n.configure()
	text := stage.ReadFile(t, n.configFile())
	stage.WriteFile(t, n.configFile(), strings.Replace(text, "  workload_api:", "  key_manager: {memory: {}}\n  workload_api:", 1), 0o644)
	n.Process = n.agent()
	n.ready()
	c := newCallers(n, 10, 1)
	agents := []*stage.Process{n.Process}
	for round := range 2 {
		n.succeed()
		c.allHear(int64(round + 1))
		agents = append(agents, n.Process)
	}
	n.ready()
	c.finish()
	for i, a := range agents {
		if got := a.Count("attested: "); got != 1 {
			t.Errorf("agent %d attested %d times", i, got)
		}
	}
	n.Kill()
	n.fetches(stage.Soon)
	if s.Count("not active") > 0 {
		t.Error("the server refused an agent that was not active")
	}
}

// TestTwoAgentsAtOnce has two agents come at one time.
func TestTwoAgentsAtOnce(t *testing.T) {
	t.Parallel()
	n, s := newHost(t, serverOptions{})
	n.Process = n.agent()
	n.ready()
	c := newCallers(n, 5, 1)
	both := []*stage.Process{n.agent(), n.agent()}
	for _, p := range both {
		p.Says(stage.Soon, "took over")
	}
	n.Says(stage.Soon, "in standby")
	stage.Eventually(t, stage.Soon, "one of them stands by", func() error {
		if got := both[0].Count("in standby") + both[1].Count("in standby"); got != 1 {
			return fmt.Errorf("%d do", got)
		}
		return nil
	})
	c.finish()
	if s.Count("not active") > 0 {
		t.Error("the server refused an agent that was not active")
	}
}

// TestAgentOfAnotherNetwork has an agent in another network namespace take
// over: Unix sockets are shared, ports are not.
func TestAgentOfAnotherNetwork(t *testing.T) {
	t.Parallel()
	n, s := newHost(t, serverOptions{})
	health := stage.FreeAddress(t)
	config := strings.Replace(stage.ReadFile(t, n.configFile()), "telemetry: {", fmt.Sprintf("telemetry: {health: %q, ", health), 1)
	stage.WriteFile(t, n.configFile(), config, 0o644)
	n.Process = n.agent()
	n.ready()
	c := newCallers(n, 5, 1)
	answers := func(page string, code int, text string) {
		t.Helper()
		stage.Eventually(t, stage.Soon, fmt.Sprintf("%s says %d %s", page, code, text), func() error {
			resp, err := http.Get("http://" + health + page)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != code || !strings.Contains(string(body), text) {
				return fmt.Errorf("%s: %s %w", resp.Status, body, err)
			}
			return nil
		})
	}
	answers("/readyz", 200, "ok")

	before := n.Process
	n.Process = n.agent(anotherNetwork(t, s.address))
	n.Says(stage.Soon, "took over", "of_another_network="+health)
	c.allHear(1)
	answers("/livez", 200, "ok")
	answers("/readyz", 200, "ok") // its workloads are served, and a DaemonSet must not delete it yet
	n.ready()                     // on the Unix socket, which the new one has
	c.finish()
	n.Kill()
	before.Says(stage.Soon, "taking the place back")
	answers("/readyz", 200, "ok")
	n.fetches(stage.Soon)
}

// anotherNetwork runs a process in a network of its own, from which only the
// given address of ours can be reached.
func anotherNetwork(t *testing.T, address string) func(*exec.Cmd) {
	t.Helper()
	name := fmt.Sprintf("nx-spire-%d", os.Getpid())
	stage.Must(t, "ip", "netns", "add", name)
	remove := func() { _, _ = exec.Command("ip", "netns", "del", name).Output() }
	stage.WhenInterrupted(remove)
	t.Cleanup(remove)
	stage.Must(t, "ip", "-n", name, "link", "set", "lo", "up")
	listening := make(chan net.Listener)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is of no use any more
		ns, err := os.Open("/run/netns/" + name)
		if err == nil {
			err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), ns.Close())
		}
		var l net.Listener
		if err == nil {
			l, err = net.Listen("tcp", address)
		}
		if err != nil {
			t.Error(err)
		}
		listening <- l
	}()
	l := <-listening
	if l == nil {
		t.FailNow()
	}
	var all sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	all.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", address)
			if err != nil {
				_ = from.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
				all.Go(func() {
					_, _ = io.Copy(way[0], way[1])
					_ = way[0].Close()
				})
			}
		}
	})
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Fatal(err)
	}
	return func(cmd *exec.Cmd) {
		cmd.Args = append([]string{"nsenter", "--net=/run/netns/" + name, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = nsenter
	}
}

func fileOf(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}
