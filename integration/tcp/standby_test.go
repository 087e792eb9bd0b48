//go:build integration

package tcp_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// standsBy starts a proxy of the door's configuration with --standby.
func (d *door) standsBy(how ...func(*exec.Cmd)) *stage.Process {
	d.t.Helper()
	return stage.Start(d.t, "a proxy that can stand by", stage.Narthex, []string{"proxy", "-c", d.file("narthex.yaml"), "--standby"}, how...)
}

// newPair is a door whose proxy can stand by.
func newPair(t *testing.T, more ...string) (*door, string) {
	t.Helper()
	d, unix := newHeir(t, more...)
	d.Stop()
	d.Process = d.standsBy()
	d.ready()
	return d, unix
}

// TestProxyTakesBack kills the newer of two proxies, while clients hold
// connections of the older.
func TestProxyTakesBack(t *testing.T) {
	t.Parallel()
	d, unix := newPair(t)
	held, err := d.enter("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := ask(held, "before"); err != nil {
		t.Fatal(err)
	}
	first := d.Process
	for round := range 3 {
		p := d.standsBy()
		p.Says(stage.Soon, "took over")
		stage.Eventually(t, stage.Soon, "the one before stands by", func() error {
			if n := first.Count("in standby until"); n != round+1 {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
		if err := d.passes("tcp", d.address); err != nil {
			t.Fatal(err)
		}
		p.Kill()
		for _, at := range [][2]string{{"tcp", d.address}, {"unix", unix}} {
			stage.Eventually(t, stage.Soon, "the older proxy serves "+at[1], func() error { return d.passes(at[0], at[1]) })
		}
		if err := ask(held, "still here"); err != nil {
			t.Errorf("a connection of before: %v", err)
		}
		d.ready()
	}
	if first.Count("taking the place back") != 3 {
		t.Error("it does not say so")
	}
	// Rules that change are taken up by whoever serves.
	d.rules(allow("other", "spiffe://example.org/other"))
	stage.Eventually(t, stage.Soon, "nobody may pass any more", func() error {
		if d.passes("tcp", d.address) == nil {
			return fmt.Errorf("passes")
		}
		return nil
	})
	d.rules(d.clientMay())
	stage.Eventually(t, stage.Soon, "clients may pass again", func() error { return d.passes("tcp", d.address) })
	_ = held.Close()
	first.Stop()
	if code := first.Cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("status %d", code)
	}
	for _, path := range []string{unix, d.file("handover.sock"), d.Figures()} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left behind", path)
		}
	}
}

// TestThirdProxy has a third proxy take over from the second while the first
// stands by, and the second stand by too.
func TestThirdProxy(t *testing.T) {
	t.Parallel()
	d, _ := newPair(t)
	all := []*stage.Process{d.Process}
	for range 3 {
		p := d.standsBy()
		p.Says(stage.Soon, "took over")
		all[len(all)-1].Says(stage.Soon, "in standby until")
		all = append(all, p)
	}
	time.Sleep(time.Second) // in which nobody is to take anything
	for i, p := range all {
		if p.Count("taking the place back") > 0 {
			t.Errorf("process %d takes a place back that is not free", i)
		}
	}
	if err := d.passes("tcp", d.address); err != nil {
		t.Error(err)
	}
	for i, p := range all[:len(all)-1] {
		t.Logf("in standby, process %d takes %d KiB", i, stage.RSS(t, p.PID())>>10)
		p.Stop()
		if code := p.Cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("process %d: status %d", i, code)
		}
	}
	if err := d.passes("tcp", d.address); err != nil {
		t.Error(err)
	}
	all[len(all)-1].Stop()
}

// TestProxyOfAnotherNetwork has a proxy on another host's network take over:
// it shares the Unix sockets, and has ports of its own.
func TestProxyOfAnotherNetwork(t *testing.T) {
	t.Parallel()
	w := newNetwork(t)
	d, unix := newPair(t)
	first := d.Process
	second := d.standsBy(w.near.enter)
	second.Says(stage.Soon, "took over", "of_another_network="+d.address)
	first.Says(stage.Soon, "in standby until")
	c, err := d.enter("unix", unix) // and no further: the service is in the first network
	if err != nil {
		t.Fatalf("the shared Unix socket: %v", err)
	}
	_ = c.Close()
	if c, err := net.Dial("tcp", d.address); err == nil {
		_ = c.Close()
		t.Error("the first network's port is served on")
	}
	inside := stage.Must(t, "nsenter", "--net=/run/netns/"+w.near.name, "ss", "-ltnH")
	if !strings.Contains(inside, d.address) {
		t.Errorf("the second network's port is not served:\n%s", inside)
	}
	second.Kill()
	stage.Eventually(t, stage.Soon, "the first serves again", func() error { return d.passes("tcp", d.address) })
	if err := d.passes("unix", unix); err != nil {
		t.Error(err)
	}
}

// TestStandbyNeedsHandover refuses a proxy in whose place nobody could come.
func TestStandbyNeedsHandover(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	out, err := stage.Tell(t, stage.Narthex, "proxy", "-c", d.file("narthex.yaml"), "--standby")
	if err == nil || !strings.Contains(out+err.Error(), "proxy.handover") {
		t.Errorf("%v\n%s", err, out)
	}
}
