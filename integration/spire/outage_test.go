//go:build integration

package spire_test

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// fetch asks a node's Workload API as this process, which is root's, for at
// most as long as given.
func (n *node) fetch(within time.Duration) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(n.t.Context(), within)
	defer cancel()
	return workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+n.api))
}

// fetches waits until the Workload API gives this process an SVID.
func (n *node) fetches(within time.Duration) *x509svid.SVID {
	n.t.Helper()
	var svid *x509svid.SVID
	stage.Eventually(n.t, within, n.name+" gives root its SVID", func() (err error) {
		svid, err = n.fetch(within)
		return err
	})
	return svid
}

// TestServerAway stops the server under traffic and starts it again.
func TestServerAway(t *testing.T) {
	t.Parallel()
	const away = 15 * time.Second
	s := newShop(t, shopOptions{})
	s.open()
	traffic := newTraffic(t, s.orders.bind(toInventory), "inventory")
	s.server.Stop()
	stopped := time.Now()
	for _, n := range []*node{s.orders, s.inventory} {
		n.Becomes(stage.Soon, "says that the server is away", func(st telemetry.Status) bool {
			return !st.Agent.Reachable && strings.Contains(st.Agent.Problem, s.server.address) && strings.Contains(st.Agent.Problem, "unreachable since")
		})
	}
	if gauge := s.orders.Metric("narthex_server_reachable"); gauge != 0 {
		t.Errorf("narthex_server_reachable is %g, want 0", gauge)
	}

	// An agent that starts meanwhile says why it cannot answer.
	late := newNode(t, "late", proxyUser)
	late.server, late.td, late.bundle, late.syncs = s.server.address, s.orders.td, s.orders.bundle, time.Second
	cert, key, parsed := s.server.nodes.issue("late", "")
	late.attestor = "x509pop: {certificate: " + cert + ", key: " + key + "}"
	late.start("agent")
	stage.Eventually(t, stage.Soon, "the late agent says that the server is away", func() error { return late.tells("unreachable", s.server.address) })

	time.Sleep(time.Until(stopped.Add(away))) // how long the server is away is what is tested
	s.server.start()
	s.server.add(
		entry{path: "/late", parent: s.server.id("/spire/agent/x509pop/" + fingerprint(parsed)), selector: "unix:uid:0"},
		entry{path: "/after", parent: s.ordersAgent, selector: "unix:uid:0"},
	)
	// The pause between two attempts is 45 s at most.
	const backoff = 2 * time.Minute
	for _, n := range []*node{s.orders, s.inventory} {
		n.Becomes(backoff, "finds the server again", func(st telemetry.Status) bool { return st.Agent.Reachable && st.Agent.Problem == "" })
	}
	t.Logf("found again %s after it was stopped", time.Since(stopped).Round(time.Millisecond))
	if got := s.orders.fetches(stage.Soon).ID.Path(); got != "/after" {
		t.Errorf("the entry made afterwards arrives as %s", got)
	}
	if got := late.fetches(backoff).ID.Path(); got != "/late" {
		t.Errorf("the late agent serves %s", got)
	}
	traffic.finish()
}

// TestKilledAgent kills the agent under `narthex run` while there is traffic,
// then all of it.
func TestKilledAgent(t *testing.T) {
	t.Parallel()
	s := newShop(t, shopOptions{})
	s.open()
	traffic := newTraffic(t, s.orders.bind(toInventory), "inventory")
	// A half that ends within seconds of its first start is a mistake of the
	// configuration and ends `narthex run`, so let it be a while.
	s.orders.Becomes(stage.Soon, "has been up for a while", func(st telemetry.Status) bool { return time.Since(st.Started) > 5*time.Second })

	first, err := s.orders.half("agent")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	stage.Eventually(t, stage.Soon, "another agent is started", func() error {
		pid, err := s.orders.half("agent")
		if err == nil && pid == first {
			err = fmt.Errorf("pid %d is still there", pid)
		}
		return err
	})
	s.orders.Becomes(stage.Soon, "the new agent serves", func(st telemetry.Status) bool {
		return st.Agent != nil && st.Agent.ID == s.ordersAgent && st.Agent.Problem == "" && st.Agent.Streams > 0
	})
	s.orders.Says(stage.Soon, "a half has ended and is started again", "took up the saved SVID")
	if n := s.orders.Count("attested: "); n != 1 {
		t.Errorf("the agent attested %d times; its token is good once, so it has to go on with what data_dir holds", n)
	}
	// Identities reach the proxy by the new agent: an entry made now arrives.
	s.server.add(entry{path: "/news", parent: s.ordersAgent, selector: proxyUser.selector()})
	s.orders.Becomes(stage.Soon, "the proxy hears of a new identity", func(st telemetry.Status) bool { return len(st.Proxy.Identities) == 3 })
	traffic.finish()

	// All of it: nothing of the old one stands in the way of the new one.
	live, err := dial(s.orders.bind(toInventory))
	if err == nil {
		err = live.ask("inventory")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	s.orders.Kill()
	if err := live.ends(stage.Soon); err != nil {
		t.Errorf("a connection of a proxy whose supervisor was killed: %v", err)
	}
	restarted(t, s.orders)
	stage.Eventually(t, stage.Soon, "orders calls inventory after all of `narthex run` was killed", func() error {
		return call(s.orders.bind(toInventory), "inventory")
	})
	if n := s.orders.Count("attested: "); n != 0 {
		t.Errorf("the agent attested %d times after the restart; its token was used before", n)
	}
	s.orders.Says(stage.Soon, "took up the saved SVID")
}

// restarted starts `narthex run` again, as a service manager does: at once,
// and once more where its predecessor has not let go of everything yet.
func restarted(t *testing.T, n *node) {
	t.Helper()
	n.start("run")
	stage.Eventually(t, stage.Soon, n.name+" is ready again", func() error {
		if err := n.Alive(); err != nil {
			n.start("run")
			return err
		}
		_, err := n.half("agent")
		if err == nil {
			_, _, err = n.Get("/readyz")
		}
		return err
	})
}
