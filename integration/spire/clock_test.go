//go:build integration

package spire_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// retry bounds how long an agent takes to go on once it can: the pause between
// two attempts is 45 s at most.
const retry = 2 * time.Minute

// buildWithClock builds the binary under test with a package time whose wall clock
// can be wrong: Go asks the kernel in a way that no preloaded library gets
// between.
var buildWithClock = sync.OnceValues(func() (string, error) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find Go's own packages: %w", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	original := filepath.Join(dir, "time.go")
	text, err := os.ReadFile(original)
	if err != nil {
		return "", err
	}
	const now = "\n\tsec, nsec, mono := runtimeNow()\n"
	if n := strings.Count(string(text), now); n != 1 {
		return "", fmt.Errorf("%s reads the clock in %d places by %q, want one: this Go is another one than the test knows", original, n, strings.TrimSpace(now))
	}
	clock, err := filepath.Abs(filepath.Join("testdata", "wrongclock.go"))
	if err != nil {
		return "", err
	}
	changed, overlay := filepath.Join(stage.Scratch, "time.go"), filepath.Join(stage.Scratch, "overlay.json")
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {original: changed, filepath.Join(dir, "wrongclock.go"): clock}})
	err = errors.Join(err,
		os.WriteFile(changed, []byte(strings.Replace(string(text), now, now+"\tsec += *wrongClock\n", 1)), 0o644),
		os.WriteFile(overlay, replace, 0o644))
	if err != nil {
		return "", err
	}
	binary := filepath.Join(stage.Scratch, "narthex-clock")
	build := exec.Command("go", "build", "-tags", "sandboxtrap", "-overlay", overlay, "-o", binary, "github.com/narthex-id/narthex/cmd/narthex")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build narthex with a clock of its own: %w\n%s", err, out)
	}
	return binary, os.Chmod(binary, 0o755)
})

// clock is a host's, by how much it is wrong.
type clock struct {
	t    *testing.T
	file *os.File // the seconds, read by the process at each look at its clock
}

func newClock(t *testing.T, wrong time.Duration) *clock {
	t.Helper()
	file, err := os.Create(filepath.Join(stage.Folder(t, "clock"), "wrong"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	c := &clock{t, file}
	c.set(wrong)
	return c
}

func (c *clock) set(wrong time.Duration) {
	c.t.Helper()
	seconds := binary.NativeEndian.AppendUint64(nil, uint64(int64(wrong/time.Second)))
	if _, err := c.file.WriteAt(seconds, 0); err != nil {
		c.t.Fatal(err)
	}
}

// on has narthex run by this clock.
func (c *clock) on(cmd *exec.Cmd) {
	path, err := buildWithClock()
	if err != nil {
		cmd.Err = err
		return
	}
	cmd.Path = path
	cmd.Env = append(os.Environ(), "NARTHEX_WRONG_CLOCK="+c.file.Name())
}

// blames waits until the status says that the clock is wrong.
func (n *node) blames(texts ...string) {
	n.t.Helper()
	n.Becomes(stage.Soon, "says that the clock is wrong", func(st telemetry.Status) bool {
		for _, want := range append([]string{"this host's clock says"}, texts...) {
			if st.Agent == nil || !strings.Contains(st.Agent.Problem, want) {
				return false
			}
		}
		return true
	})
}

// content waits until the status has nothing to say.
func (n *node) content(within time.Duration) {
	n.t.Helper()
	n.Becomes(within, "says no more that anything is wrong", func(st telemetry.Status) bool {
		return st.Agent != nil && st.Agent.Reachable && st.Agent.Problem == ""
	})
}

// attestedOnce fails the test where the node has attested again.
func (n *node) attestedOnce() {
	n.t.Helper()
	if got := n.Count("attested: "); got != 1 {
		n.t.Errorf("%s attested %d times, want once", n.name, got)
	}
}

// TestWrongClockAtStart starts agents whose clock is wrong. They serve nothing,
// say why, spend no join token on it, and go on once the clock is set.
func TestWrongClockAtStart(t *testing.T) {
	t.Parallel()
	// An agent's SVID that lives shorter than the server's own certificate can be
	// over by a clock that the server is known by.
	s := newServer(t, serverOptions{agentTTL: 30 * time.Minute, cacheReload: time.Second})
	for name, test := range map[string]struct {
		wrong time.Duration
		join  func(*node, *server) string
		says  []string
	}{
		"ahead":       {2 * time.Hour, (*node).joins, []string{"the server's certificate is valid until"}},
		"ahead-x509":  {2 * time.Hour, (*node).proves, []string{"the server's certificate is valid until"}},
		"behind":      {-2 * time.Hour, (*node).joins, []string{"the server's certificate is not valid before"}},
		"behind-x509": {-2 * time.Hour, (*node).proves, []string{"the server's certificate is not valid before"}},
		"half":        {45 * time.Minute, (*node).joins, []string{"the agent's SVID is valid until"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := s.of(t)
			n := newNode(t, name, proxyUser)
			id := "/" + name
			s.add(entry{path: id, parent: test.join(n, s), selector: "unix:uid:0"})
			clock := newClock(t, test.wrong)
			n.start("agent", clock.on)
			n.blames(test.says...)
			stage.Eventually(t, stage.Soon, "a caller is told", func() error { return n.tells(append(test.says, "this host's clock says")...) })
			if err := n.Ready(); err == nil || !strings.Contains(err.Error(), "this host's clock says") {
				t.Errorf("/readyz: %v", err)
			}
			n.Says(stage.Soon, "set the clock that is wrong")

			clock.set(0)
			svid := n.fetches(retry)
			s.verify(svid.Certificates, s.id(id))
			n.content(retry)
			n.attestedOnce()
		})
	}
}

// TestClockJumps sets the clock of an agent that serves: ahead, which ends what it
// has, back, to before the server's certificate begins, and right again.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "jumps", proxyUser)
	id := n.joins(s)
	s.add(entry{path: "/jumps", parent: id, selector: "unix:uid:0"})
	clock := newClock(t, 0)
	n.start("agent", clock.on)
	good := func(within time.Duration) {
		t.Helper()
		svid := n.fetches(within)
		s.verify(svid.Certificates, s.id("/jumps"))
		if now := time.Now(); now.After(svid.Certificates[0].NotAfter) {
			t.Errorf("it serves an SVID that ended at %s", svid.Certificates[0].NotAfter)
		}
	}
	good(stage.Soon)

	clock.set(2 * time.Hour)
	if svid, err := n.fetch(callTime); err == nil {
		t.Errorf("it serves an SVID that is over by its clock: until %s", svid.Certificates[0].NotAfter)
	}
	n.blames("valid until")
	stage.Eventually(t, stage.Soon, "a caller is told", func() error { return n.tells("this host's clock says") })
	clock.set(0)
	good(retry)
	n.content(retry)

	clock.set(-2 * time.Hour)
	s.Stop() // so that it has to make another connection
	s.start()
	n.blames("the server's certificate is not valid before")
	good(stage.Soon)
	clock.set(0)
	n.content(retry)
	good(stage.Soon)
	s.add(entry{path: "/news", parent: id, selector: proxyUser.selector()})
	n.Becomes(stage.Soon, "has the entry made afterwards", func(st telemetry.Status) bool { return st.Agent.Entries == 2 })
	n.attestedOnce()
}

// TestClockBehind runs agents whose clock is behind by less than the server's
// certificate is old, through SVIDs that live shorter than that: one from the
// start, one whose clock is set back while it runs. They replace SVIDs by the time
// that passes.
func TestClockBehind(t *testing.T) {
	t.Parallel()
	const behind, ttl, watched = 30 * time.Second, 20 * time.Second, time.Minute
	s := newServer(t, serverOptions{agentTTL: ttl, cacheReload: time.Second})
	began := time.Now()
	for name, wrong := range map[string]time.Duration{"behind": -behind, "set-back": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := s.of(t)
			n := newNode(t, name, proxyUser)
			s.add(entry{path: "/" + name, parent: n.joins(s), selector: "unix:uid:0", ttl: ttl})
			clock := newClock(t, wrong)
			n.start("agent", clock.on)
			n.fetches(behind + retry) // the server's certificate has to begin first
			time.Sleep(time.Until(began.Add(behind)))
			clock.set(-behind)
			serials := map[string]bool{}
			for end := time.Now().Add(watched); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
				svid, err := n.fetch(callTime)
				if err != nil {
					t.Fatal(err)
				}
				leaf := svid.Certificates[0]
				serials[leaf.SerialNumber.String()] = true
				if now := time.Now(); !now.Before(leaf.NotAfter) {
					t.Fatalf("it serves an SVID that ended at %s, and it is %s", leaf.NotAfter, now)
				}
			}
			t.Logf("%d SVIDs in %s", len(serials), watched)
			if len(serials) < 3 {
				t.Errorf("%d SVIDs of %s in %s, want 3 or more", len(serials), ttl, watched)
			}
			n.blames("is not valid before")
			clock.set(0)
			n.content(stage.Soon)
			n.attestedOnce()
		})
	}
}
