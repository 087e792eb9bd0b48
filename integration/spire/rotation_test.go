//go:build integration

package spire_test

import (
	"fmt"
	"regexp"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestRotation runs traffic through SVIDs of 20 s, between agents whose own
// last 30 s, and loses no request.
func TestRotation(t *testing.T) {
	t.Parallel()
	const watched = 75 * time.Second
	s := newShop(t, shopOptions{server: serverOptions{agentTTL: 30 * time.Second}, ttl: 20 * time.Second})
	s.open()
	seen := newSerials(s)
	traffic := newTraffic(t, s.orders.bind(toInventory), "inventory")
	for end := time.Now().Add(watched); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		seen.look(t)
	}
	traffic.finish()

	for what, serials := range seen.of {
		// Three serials are two rotations.
		if len(serials) < 3 {
			t.Errorf("%s had %d serials in %s, want 3 or more", what, len(serials), watched)
		}
		t.Logf("%s: %d serials", what, len(serials))
	}
	// A node with a join token renews; one with a certificate attests again.
	if n := s.orders.Count("renewed the agent's SVID"); n < 2 {
		t.Errorf("orders renewed its agent's SVID %d times, want 2 or more", n)
	}
	if n := s.orders.Count("attested: "); n != 1 {
		t.Errorf("orders attested %d times, want once: its token is good once", n)
	}
	if n := s.inventory.Count("attested: "); n < 3 {
		t.Errorf("inventory attested %d times, want 3 or more", n)
	}
	if n := s.inventory.Count("renewed the agent's SVID"); n != 0 {
		t.Errorf("inventory renewed its agent's SVID %d times; it has to attest again", n)
	}
	// The server tells the same.
	const attestation = `Agent attestation request completed.*agent_id="?%s`
	for id, want := range map[string]func(int) bool{
		s.ordersAgent:    func(n int) bool { return n == 1 },
		s.inventoryAgent: func(n int) bool { return n >= 3 },
	} {
		pattern := regexp.MustCompile(fmt.Sprintf(attestation, regexp.QuoteMeta(id)))
		if n := len(pattern.FindAllString(s.server.Said(), -1)); !want(n) {
			t.Errorf("the server attested %s %d times", id, n)
		}
	}
	for _, n := range []*node{s.orders, s.inventory} {
		if errors := n.Metric(`narthex_agent_svid_renewals_total{result="error"}`); errors != 0 {
			t.Errorf("%s: %g renewals of the agent's SVID failed", n.name, errors)
		}
	}
	// The long connection was one connection, and the peer's certificate in
	// its record is the one it began with.
	s.inventory.Record(0, "of the long connection", func(a telemetry.Access) bool { return a.Duration > watched-5*time.Second })
}

// serials are the serial numbers that were seen in force.
type serials struct {
	shop *shop
	of   map[string]map[string]bool // by what they are of
}

func newSerials(s *shop) *serials { return &serials{s, map[string]map[string]bool{}} }

func (s *serials) note(what, serial string) {
	if serial == "" {
		return
	}
	if s.of[what] == nil {
		s.of[what] = map[string]bool{}
	}
	s.of[what][serial] = true
}

// look notes what the proxies present and what the server holds for current
// of the agents.
func (s *serials) look(t *testing.T) {
	t.Helper()
	for _, n := range []*node{s.shop.orders, s.shop.inventory} {
		status, err := n.Status()
		if err != nil {
			t.Errorf("%s: %v", n.name, err)
			continue
		}
		for _, id := range status.Proxy.Identities {
			s.note("the SVID of "+id.SPIFFEID, id.Serial)
			if left := time.Until(id.NotAfter); left <= 0 {
				t.Errorf("%s presents an SVID of %s that expired %s ago", n.name, id.SPIFFEID, -left)
			}
		}
	}
	for name, id := range map[string]string{"orders": s.shop.ordersAgent, "inventory": s.shop.inventoryAgent} {
		agent, err := s.shop.server.agent(id)
		if err != nil {
			t.Errorf("ask the server for %s: %v", id, err)
			continue
		}
		s.note(fmt.Sprintf("the agent of %s", name), agent.X509SvidSerialNumber)
	}
}
