//go:build integration

package spire_test

import (
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestEvictedAndBanned has an administrator evict an agent that can attest
// again, then ban it.
func TestEvictedAndBanned(t *testing.T) {
	t.Parallel()
	const ttl = 10 * time.Minute // far longer than the test: a ban does not wait for it
	s := newShop(t, shopOptions{ttl: ttl})
	s.open()
	traffic := newTraffic(t, s.orders.bind(toInventory), "inventory")
	before := s.agentSerial(t, s.inventoryAgent)

	s.server.cli("agent", "evict", "-spiffeID", s.inventoryAgent)
	stage.Eventually(t, stage.Soon, "inventory's agent attests again", func() error {
		_, err := s.server.agent(s.inventoryAgent)
		return err
	})
	if s.agentSerial(t, s.inventoryAgent) == before {
		t.Error("the agent has the SVID it had before it was evicted")
	}
	s.inventory.Becomes(stage.Soon, "is well again", func(st telemetry.Status) bool { return st.Agent.Problem == "" && st.Agent.ID == s.inventoryAgent })
	traffic.finish()

	// A banned agent stops serving and takes back what it gave.
	s.server.cli("agent", "ban", "-spiffeID", s.inventoryAgent)
	s.inventory.Becomes(stage.Soon, "says that it is banned", func(st telemetry.Status) bool {
		return strings.Contains(st.Agent.Problem, "banned") && len(st.Agent.Identities) == 0
	})
	stage.Eventually(t, stage.Soon, "a caller is told", func() error { return s.inventory.tells("banned") })
	s.inventory.Says(stage.Soon, "spire-server agent evict")
	s.inventory.Becomes(stage.Soon, "the proxy has no identity left", func(st telemetry.Status) bool {
		return strings.Contains(st.Proxy.Listeners[0].Problem, "taken back")
	})
	refused(t, s.orders.bind(toInventory), s.service)
	s.inventory.Record(0, "refused for want of an identity", func(a telemetry.Access) bool {
		return a.Outcome == "failure" && strings.Contains(a.Reason, "cannot present an identity")
	})
}
