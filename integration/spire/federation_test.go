//go:build integration

package spire_test

import (
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestFederation lets a workload of a second trust domain, with a server of
// its own, in: by a bundle and a rule, and by neither alone.
func TestFederation(t *testing.T) {
	t.Parallel()
	home := newServer(t, serverOptions{trustDomain: "home.example", cacheReload: time.Second})
	partner := newServer(t, serverOptions{trustDomain: "partner.example", cacheReload: time.Second})
	service := newService(t, "stock")
	stock := newNode(t, "stock", otherProxyUser)
	stockAgent := stock.joins(home)
	stock.listeners = []listener{{name: "stock", bind: stage.FreeAddress(t), target: service.address}}
	buyer := newNode(t, "buyer", proxyUser)
	buyerAgent := buyer.joins(partner)
	buyer.listeners = []listener{{name: "to-stock", target: stock.bind("stock"), expect: home.id("/stock")}}

	// The partner knows home from the start; home does not know the partner.
	partner.trust(home.bundle())
	partner.add(entry{path: "/buyer", parent: buyerAgent, selector: proxyUser.selector(), federates: []string{"home.example"}})
	stockEntry := entry{path: "/stock", parent: stockAgent, selector: otherProxyUser.selector()}
	stockEntry.identifier = home.add(stockEntry)[0]
	buyer.rules(nil, rule{id: "out", from: partner.id("/**"), at: "outbound"})
	letIn := rule{id: "partner-buys", from: partner.id("/buyer"), to: home.id("/stock"), at: "inbound"}
	stock.rules(nil, letIn)
	for _, n := range []*node{stock, buyer} {
		n.start("run")
		n.ready()
	}

	// A rule without a bundle.
	refused(t, buyer.bind("to-stock"), service)
	stock.Record(0, "refused without a bundle", func(a telemetry.Access) bool {
		return a.Outcome == "failure" && strings.Contains(a.Reason, "no bundle for trust domain partner.example") && a.Decision == ""
	})

	// A rule and a bundle.
	home.trust(partner.bundle())
	stockEntry.federates = []string{"partner.example"}
	home.change(stockEntry)
	stage.Eventually(t, stage.Soon, "the buyer is let in once home has the partner's bundle", func() error {
		return call(buyer.bind("to-stock"), "stock")
	})
	stock.Record(0, "let in", func(a telemetry.Access) bool {
		return a.From == partner.id("/buyer") && a.To == home.id("/stock") && a.Rule == "partner-buys" && a.Decision == "allow"
	})

	// A bundle without a rule.
	stock.rules(nil, rule{id: "home-only", from: home.id("/**"), at: "inbound"})
	stock.Becomes(stage.Soon, "new policy in force", func(s telemetry.Status) bool { return s.Proxy.Policy.Generation > 1 })
	refused(t, buyer.bind("to-stock"), service)
	stock.Record(0, "refused without a rule", func(a telemetry.Access) bool {
		return a.From == partner.id("/buyer") && a.Decision == "deny" && a.Rule == ""
	})

	// The bundle is taken back: a live connection ends, though its rule holds.
	stock.rules(nil, letIn)
	var live *caller
	stage.Eventually(t, stage.Soon, "the buyer is let in again", func() (err error) {
		if live, err = dial(buyer.bind("to-stock")); err == nil {
			if err = live.ask("stock"); err != nil {
				_ = live.Close()
			}
		}
		return err
	})
	defer live.Close()
	home.distrust("partner.example")
	if err := live.ends(stage.Soon); err != nil {
		t.Errorf("a live connection of a trust domain that is no longer federated: %v", err)
	}
	refused(t, buyer.bind("to-stock"), service)
}
