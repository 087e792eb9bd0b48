//go:build integration

package spire_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// What goes wrong around an agent takes no identity from a workload and gives it
// no other. Clocks that are wrong have tests of their own (clock_test.go).

// slowWay is a network on the way to the server, with a delay of its own.
type slowWay struct {
	address string
	delay   atomic.Int64 // each way, of what is sent at once
}

func newSlowWay(t *testing.T, to string) *slowWay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &slowWay{address: l.Addr().String()}
	var g sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	g.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			g.Go(func() { w.copy(in, out) })
			g.Go(func() { w.copy(out, in) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		g.Wait()
	})
	return w
}

func (w *slowWay) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if d := time.Duration(w.delay.Load()); d > 0 {
			time.Sleep(d)
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// holdsTo asks for this process's SVID again and again, until the test calls
// what is returned: each time it is given the same identity.
func (n *node) holdsTo(id string) (finish func()) {
	n.t.Helper()
	stop := make(chan struct{})
	var g sync.WaitGroup
	var asked int
	var wrong error
	g.Go(func() {
		for {
			svid, err := n.fetch(stage.Soon)
			asked++
			switch {
			case n.t.Context().Err() != nil:
				return
			case err != nil:
				wrong = errors.Join(wrong, err)
			case svid.ID.String() != id:
				wrong = errors.Join(wrong, fmt.Errorf("it gives %s", svid.ID))
			case time.Now().After(svid.Certificates[0].NotAfter):
				wrong = errors.Join(wrong, fmt.Errorf("it gives an SVID that ended at %s", svid.Certificates[0].NotAfter))
			}
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	return func() {
		n.t.Helper()
		close(stop)
		g.Wait()
		n.t.Logf("%s was asked %d times", n.name, asked)
		if wrong != nil {
			n.t.Errorf("%s, which should give %s: %v", n.name, id, wrong)
		}
	}
}

// TestChaosOfTheServer kills, stops and slows down the server.
func TestChaosOfTheServer(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	way := newSlowWay(t, s.address)
	n := newNode(t, "chaos", proxyUser)
	agent := n.joins(s)
	n.server = way.address
	mine := s.id("/mine")
	s.add(entry{path: "/mine", parent: agent, selector: "unix:uid:0", ttl: 30 * time.Second})
	n.start("agent")
	n.fetches(stage.Soon)
	finish := n.holdsTo(mine)

	// arrives makes an entry for somebody else, which the agent shall sign ahead.
	entries := 1
	arrives := func(when string) {
		t.Helper()
		s.add(entry{path: fmt.Sprintf("/other%d", entries), parent: agent, selector: "unix:uid:4242"})
		entries++
		n.Becomes(2*stage.Soon, "has a new entry signed "+when, func(st telemetry.Status) bool {
			return len(st.Agent.Identities) == entries && st.Agent.Problem == ""
		})
	}
	s.Kill()
	n.Becomes(stage.Soon, "says that the server is away", func(st telemetry.Status) bool { return !st.Agent.Reachable })
	s.start()
	arrives("after the server was killed")

	s.Signal(syscall.SIGSTOP)
	time.Sleep(5 * time.Second)
	s.Signal(syscall.SIGCONT)
	arrives("after the server was stopped")

	way.delay.Store(int64(300 * time.Millisecond))
	arrives("by a slow network")
	finish()
	if n := n.Count("attested: "); n != 1 {
		t.Errorf("it attested %d times, with a token that is good once", n)
	}
}

// TestChaosFullDisk fills data_dir when the agent's SVID has to be renewed.
func TestChaosFullDisk(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second, agentTTL: 30 * time.Second})
	n := newNode(t, "full", proxyUser)
	agent := n.joins(s)
	if err := os.Mkdir(n.dataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", n.dataDir(), "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Fatalf("mount a small file system, for which this test has to be root: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(n.dataDir(), syscall.MNT_DETACH) })
	s.add(entry{path: "/mine", parent: agent, selector: "unix:uid:0"})
	n.start("agent")
	n.fetches(stage.Soon)
	finish := n.holdsTo(s.id("/mine"))

	filler, err := os.Create(filepath.Join(n.dataDir(), "filler"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(filler, zeros{}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	filler.Close()
	n.Says(stage.Soon, "cannot renew the agent's SVID yet", "no space left on device")
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	n.Says(stage.Soon, "renewed the agent's SVID")
	finish()
	attested := n.Count("attested: ")
	n.Kill()
	n.start("agent")
	n.Says(stage.Soon, "took up the saved SVID")
	n.fetches(stage.Soon)
	if attested += n.Count("attested: "); attested != 1 {
		t.Errorf("it attested %d times, with a token that is good once", attested)
	}
}

// zeros is a file without end.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// TestChaosOfTheAgent kills the agent twenty times while it starts and renews
// its SVID, which it could not get again.
func TestChaosOfTheAgent(t *testing.T) {
	t.Parallel()
	const kills, ttl = 20, 12 * time.Second // renewed about a second after each start
	s := newServer(t, serverOptions{cacheReload: time.Second, agentTTL: ttl})
	n := newNode(t, "killed", proxyUser)
	agent := n.joins(s)
	s.add(entry{path: "/mine", parent: agent, selector: "unix:uid:0"})
	n.start("agent")
	n.fetches(stage.Soon)
	attested, renewed := n.Count("attested: "), 0
	for range kills {
		n.Kill()
		renewed += n.Count("renewed the agent's SVID")
		n.start("agent")
		n.Says(stage.Soon, "took up the saved SVID")
		wait := time.Duration(rand.Int64N(int64(1500 * time.Millisecond)))
		if status, err := n.Status(); err == nil && time.Until(status.Agent.ExpiresAt) < 2*ttl/3 {
			n.Says(stage.Soon, "renewed the agent's SVID") // else it would end for want of time
			wait /= 10
		}
		time.Sleep(wait)
		attested += n.Count("attested: ")
	}
	if got := n.fetches(stage.Soon).ID.String(); got != s.id("/mine") {
		t.Errorf("after %d kills it gives %s", kills, got)
	}
	n.Becomes(stage.Soon, "is who it was", func(st telemetry.Status) bool { return st.Agent.ID == agent && st.Agent.Problem == "" })
	if attested != 1 {
		t.Errorf("it attested %d times, with a token that is good once", attested)
	}
	left, err := filepath.Glob(filepath.Join(n.dataDir(), "*"))
	if err != nil || strings.Contains(strings.Join(left, " "), ".corrupt") {
		t.Errorf("data_dir holds %v (%v)", left, err)
	}
	t.Logf("killed %d times, renewed %d times", kills, renewed)
}
