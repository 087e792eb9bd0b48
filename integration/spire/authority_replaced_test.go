//go:build integration

package spire_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// localAuthority is an X.509 or JWT authority of a server, as `spire-server
// localauthority x509 show` names them.
type localAuthority struct {
	ID string `json:"authority_id"`
}

// localAuthorities are the authorities of a server by their state.
type localAuthorities struct {
	Active, Prepared, Old localAuthority
}

// localAuthorities returns the authorities of a kind: x509 or jwt.
func (s *server) localAuthorities(kind string) localAuthorities {
	s.t.Helper()
	var all localAuthorities
	text := s.cli("localauthority", kind, "show", "-output", "json")
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		s.t.Fatalf("%v in:\n%s", err, text)
	}
	return all
}

// TestAuthorityReplaced replaces the server's CA before its time, as after a
// theft of its key: a new one is prepared and activated, the old one tainted,
// then revoked. Neither calls nor agents are lost, not even one whose join
// token was good only once.
func TestAuthorityReplaced(t *testing.T) {
	t.Parallel()
	s := newShop(t, shopOptions{})
	s.server.add(entry{path: "/root", parent: s.ordersAgent, selector: "unix:uid:0"})
	s.open()
	nodes := []*node{s.orders, s.inventory}
	agents := map[string]string{}
	for _, id := range []string{s.ordersAgent, s.inventoryAgent} {
		agents[id] = s.agentSerial(t, id)
	}
	serials := s.presented(t)
	traffic := newTraffic(t, s.orders.bind(toInventory), "inventory")

	old := s.server.localAuthorities("x509").Active.ID
	s.server.cli("localauthority", "x509", "prepare")
	for _, n := range nodes {
		n.Says(stage.Soon, "the trust bundle changed: authorities=2")
	}
	s.server.cli("localauthority", "x509", "activate", "-authorityID", s.server.localAuthorities("x509").Prepared.ID)
	s.server.cli("localauthority", "x509", "taint", "-authorityID", old)
	stage.Eventually(t, stage.Soon, "all SVIDs are signed anew", func() error {
		for name, serial := range s.presented(t) {
			if serial == serials[name] {
				return fmt.Errorf("%s still presents the SVID that the old authority signed", name)
			}
		}
		for id, serial := range agents {
			if s.agentSerial(t, id) == serial {
				return fmt.Errorf("%s still has the SVID that the old authority signed", id)
			}
		}
		return nil
	})
	traffic.finish()

	// What is connected now was proven by the new authority.
	traffic = newTraffic(t, s.orders.bind(toInventory), "inventory")
	s.server.cli("localauthority", "x509", "revoke", "-authorityID", old)
	for _, n := range nodes {
		n.Says(stage.Soon, "the trust bundle changed: authorities=1")
	}
	checkBundleWithout(t, s, old)
	s.server.add(entry{path: "/news", parent: s.ordersAgent, selector: proxyUser.selector()})
	s.orders.Becomes(stage.Soon, "hears of an entry made afterwards", func(st telemetry.Status) bool {
		return len(st.Proxy.Identities) == 3 && st.Agent.Problem == ""
	})
	if n := s.orders.Count("attested: "); n != 1 {
		t.Errorf("the agent with a join token attested %d times", n)
	}
	traffic.finish()
}

func (s *shop) agentSerial(t *testing.T, id string) string {
	t.Helper()
	agent, err := s.server.agent(id)
	if err != nil {
		t.Fatal(err)
	}
	return agent.X509SvidSerialNumber
}

// presented returns the serial numbers of what the proxies present.
func (s *shop) presented(t *testing.T) map[string]string {
	t.Helper()
	serials := map[string]string{}
	for _, n := range []*node{s.orders, s.inventory} {
		status, err := n.Status()
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range status.Proxy.Identities {
			serials[id.SPIFFEID] = id.Serial
		}
	}
	return serials
}

// checkBundleWithout waits until workloads no longer trust an authority.
func checkBundleWithout(t *testing.T, s *shop, authority string) {
	t.Helper()
	stage.Eventually(t, stage.Soon, "workloads no longer trust the old authority", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), callTime)
		defer cancel()
		fetched, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+s.orders.api))
		if err != nil {
			return err
		}
		bundle, err := fetched.Bundles.GetX509BundleForTrustDomain(s.server.td)
		if err != nil {
			return err
		}
		for _, a := range bundle.X509Authorities() {
			if hex.EncodeToString(a.SubjectKeyId) == authority {
				return fmt.Errorf("authority %s is in the bundle", authority)
			}
		}
		if got := hex.EncodeToString(fetched.DefaultSVID().Certificates[0].AuthorityKeyId); got == authority {
			return fmt.Errorf("authority %s signed the SVID", authority)
		}
		return nil
	})
}
