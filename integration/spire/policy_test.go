//go:build integration

package spire_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestPolicyOfLiveConnections changes rules under two live connections: the
// one that is refused now ends, the other goes on.
func TestPolicyOfLiveConnections(t *testing.T) {
	t.Parallel()
	s := newShop(t, shopOptions{})
	both := []rule{
		{id: "audit-reads", from: s.id("audit"), to: s.id("inventory"), at: "inbound"},
		{id: "orders-reads", from: s.id("orders"), to: s.id("inventory"), at: "inbound"},
	}
	s.inventory.rules(nil, both...)
	s.open()
	orders, audit := s.live(t, toInventory), s.live(t, asAudit)

	// A rule is taken away.
	s.inventory.rules(nil, both[1])
	s.ends(t, audit, "audit", "policy")
	if err := orders.ask("inventory"); err != nil {
		t.Errorf("the connection that the new rules allow: %v", err)
	}
	refused(t, s.orders.bind(asAudit), s.service)

	// An identity is revoked, whatever the rules say.
	s.inventory.rules([]string{s.id("orders")}, both...)
	s.ends(t, orders, "orders", "revoked")
	refused(t, s.orders.bind(toInventory), s.service)
	stage.Eventually(t, stage.Soon, "audit is allowed again", func() error { return call(s.orders.bind(asAudit), "inventory") })

	// Rules that cannot be read change nothing, and say so.
	before, err := s.inventory.Status()
	if err != nil {
		t.Fatal(err)
	}
	stage.WriteFile(t, s.inventory.policyFile(), "version: 1\nrules:\n  - {id: bad, effect: allow}\n", 0o644)
	s.inventory.Becomes(stage.Soon, "says what is wrong with the rules", func(st telemetry.Status) bool {
		return strings.Contains(st.Proxy.Policy.Problem, s.inventory.policyFile()+":3")
	})
	if err := call(s.orders.bind(asAudit), "inventory"); err != nil {
		t.Errorf("the rules in force were lost: %v", err)
	}
	if after, err := s.inventory.Status(); err != nil || after.Proxy.Policy.Generation != before.Proxy.Policy.Generation {
		t.Errorf("the generation went from %d to %d", before.Proxy.Policy.Generation, after.Proxy.Policy.Generation)
	}
}

// TestHangup reloads by SIGHUP, sent to `narthex run` as a service manager
// does.
func TestHangup(t *testing.T) {
	t.Parallel()
	s := newShop(t, shopOptions{})
	s.open()
	live := s.live(t, toInventory)
	const reloads = `narthex_policy_reloads_total{result="ok"}`
	before := s.inventory.Metric(reloads)
	s.inventory.Signal(syscall.SIGHUP)
	stage.Eventually(t, stage.Soon, "the proxy reloads", func() error {
		if now := s.inventory.Metric(reloads); now != before+1 {
			return fmt.Errorf("%s is %g, want %g", reloads, now, before+1)
		}
		return nil
	})
	// Nothing has changed, so nobody is the worse for it.
	if err := live.ask("inventory"); err != nil {
		t.Errorf("a live connection after SIGHUP: %v", err)
	}
	if st, err := s.inventory.Status(); err != nil || st.Agent == nil || st.Agent.ID != s.inventoryAgent {
		t.Errorf("the agent after SIGHUP: %+v, %v", st.Agent, err)
	}

	// A new listener, and another rule, in one reload.
	s.inventory.listeners = append(s.inventory.listeners, listener{name: "second", target: s.service.address})
	s.inventory.configure()
	s.inventory.rules(nil, rule{id: "audit-reads", from: s.id("audit"), to: s.id("inventory"), at: "inbound"})
	s.inventory.Signal(syscall.SIGHUP)
	s.ends(t, live, "orders", "policy")
	s.inventory.Becomes(stage.Soon, "two listeners", func(st telemetry.Status) bool { return len(st.Proxy.Listeners) == 2 })
	if err := call(s.orders.bind(asAudit), "inventory"); err != nil {
		t.Errorf("who is allowed after SIGHUP: %v", err)
	}
}

// live opens a connection by one of orders' listeners and uses it.
func (s *shop) live(t *testing.T, name string) *caller {
	t.Helper()
	c, err := dial(s.orders.bind(name))
	if err == nil {
		err = c.ask("inventory")
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// ends waits until inventory has closed a live connection of a caller, and
// looks at the record it leaves.
func (s *shop) ends(t *testing.T, c *caller, from, closed string) {
	t.Helper()
	changed := time.Now()
	if err := c.ends(stage.Soon); err != nil {
		t.Errorf("the connection of %s: %v", from, err)
	}
	t.Logf("the connection of %s was closed %s after the change", from, time.Since(changed).Round(time.Millisecond))
	s.inventory.Record(0, "closed for "+from, func(a telemetry.Access) bool {
		return a.From == s.id(from) && a.Closed == closed && a.Outcome == "failure" && a.Decision == "deny" && a.BytesIn > 0
	})
}
