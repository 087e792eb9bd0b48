//go:build integration

package spire_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// shop is the stage most tests play on: orders calls inventory, each on a
// node of its own, both of one SPIRE Server. The node of orders also has the
// identity audit, which nobody lets in.
type shop struct {
	server            *server
	orders, inventory *node
	service           *service // behind inventory's proxy
	ordersAgent       string   // SPIFFE IDs of the agents
	inventoryAgent    string
}

// shopOptions are what tests vary of a shop.
type shopOptions struct {
	server serverOptions
	ttl    time.Duration // of the workloads' SVIDs; default: the server's
}

const (
	toInventory = "to-inventory" // orders' listener, as orders
	asAudit     = "as-audit"     // orders' listener, as audit
	inventoryIn = "inventory"    // inventory's listener
)

// newShop prepares a shop: the server runs, the nodes do not yet. orders
// attests with a join token, inventory with a certificate.
func newShop(t *testing.T, o shopOptions) *shop {
	t.Helper()
	if o.server.cacheReload == 0 {
		o.server.cacheReload = time.Second
	}
	s := &shop{server: newServer(t, o.server), service: newService(t, "inventory")}
	s.inventory = newNode(t, "inventory", otherProxyUser)
	s.inventoryAgent = s.inventory.proves(s.server)
	s.inventory.listeners = []listener{{name: inventoryIn, bind: stage.FreeAddress(t), target: s.service.address}}
	s.orders = newNode(t, "orders", proxyUser)
	s.ordersAgent = s.orders.joins(s.server)
	s.orders.listeners = []listener{
		{name: toInventory, target: s.inventory.bind(inventoryIn), identity: s.id("orders"), expect: s.id("inventory")},
		{name: asAudit, target: s.inventory.bind(inventoryIn), identity: s.id("audit"), expect: s.id("inventory")},
	}
	s.server.add(
		entry{path: "/inventory", parent: s.inventoryAgent, selector: otherProxyUser.selector(), ttl: o.ttl},
		entry{path: "/orders", parent: s.ordersAgent, selector: proxyUser.selector(), ttl: o.ttl},
		entry{path: "/audit", parent: s.ordersAgent, selector: proxyUser.selector(), ttl: o.ttl},
	)
	s.inventory.rules(nil, rule{id: "orders-reads", from: s.id("orders"), to: s.id("inventory"), at: "inbound"})
	s.orders.rules(nil, rule{id: "all-out", from: s.server.id("/**"), at: "outbound"})
	return s
}

func (s *shop) id(name string) string { return s.server.id("/" + name) }

// open runs both nodes and waits until they are ready.
func (s *shop) open() {
	s.inventory.start("run")
	s.orders.start("run")
	s.inventory.ready()
	s.orders.ready()
}

func TestTwoNodes(t *testing.T) {
	t.Parallel()
	s := newShop(t, shopOptions{})
	s.open()

	if err := call(s.orders.bind(toInventory), "inventory"); err != nil {
		t.Fatalf("orders calls inventory: %v", err)
	}
	refused(t, s.orders.bind(asAudit), s.service)

	checkAccessRecords(t, s)
	checkServerKnowsAgents(t, s)
	checkMintedByServer(t, s)
	checkStatusCommand(t, s)
	checkPrivileges(t, s)
}

// checkAccessRecords looks at both ends of the allowed and of the denied call.
func checkAccessRecords(t *testing.T, s *shop) {
	t.Helper()
	for _, want := range []struct {
		node                                *node
		listener, from, rule, decision, out string
	}{
		{s.orders, toInventory, "orders", "all-out", "allow", "success"},
		{s.inventory, inventoryIn, "orders", "orders-reads", "allow", "success"},
		{s.orders, asAudit, "audit", "all-out", "allow", ""},
		{s.inventory, inventoryIn, "audit", "", "deny", "failure"},
	} {
		got := want.node.Record(0, want.from+" on "+want.listener, func(a telemetry.Access) bool {
			return a.Listener == want.listener && a.From == s.id(want.from)
		})
		if got.To != s.id("inventory") || got.Rule != want.rule || got.Decision != want.decision || want.out != "" && got.Outcome != want.out {
			t.Errorf("%s on %s: to %s, rule %q, decision %q, outcome %q; want %+v\n%+v", want.from, want.listener, got.To, got.Rule, got.Decision, got.Outcome, want, got)
		}
		if got.Serial == "" || got.TLSVersion != "1.3" || got.Source == "" {
			t.Errorf("%s on %s: the record lacks serial, source or TLS 1.3: %+v", want.from, want.listener, got)
		}
	}
}

// checkServerKnowsAgents asks the server's own command line.
func checkServerKnowsAgents(t *testing.T, s *shop) {
	t.Helper()
	list := s.server.cli("agent", "list")
	for _, id := range []string{s.ordersAgent, s.inventoryAgent} {
		if !strings.Contains(list, id) {
			t.Errorf("`spire-server agent list` does not show %s:\n%s", id, list)
		}
	}
}

// checkMintedByServer verifies what inventory's proxy presents and what a
// workload is given against what `spire-server bundle show` prints.
func checkMintedByServer(t *testing.T, s *shop) {
	t.Helper()
	c, err := tls.Dial("tcp", s.inventory.bind(inventoryIn), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	s.server.verify(c.ConnectionState().PeerCertificates, s.id("inventory"))
	_ = c.Close() // refused, for we have presented nothing

	s.server.add(entry{path: "/root", parent: s.ordersAgent, selector: "unix:uid:0"})
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	var fetched *workloadapi.X509Context
	stage.Eventually(t, stage.Soon, "root is given its SVID", func() (err error) {
		fetched, err = workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+s.orders.api))
		return err
	})
	svid := fetched.DefaultSVID()
	s.server.verify(svid.Certificates, s.id("root"))
	own, err := fetched.Bundles.GetX509BundleForTrustDomain(s.server.td)
	if err != nil {
		t.Fatal(err)
	}
	for _, authority := range s.server.authorities() {
		if !own.HasX509Authority(authority) {
			t.Errorf("the Workload API's bundle lacks the server's authority %s", authority.Subject)
		}
	}
	for _, n := range []*node{s.orders, s.inventory} {
		status, err := n.Status()
		if err != nil {
			t.Fatal(err)
		}
		if len(status.Proxy.Identities) == 0 || len(status.Agent.Identities) == 0 {
			t.Errorf("%s: the status shows no identities: %+v", n.name, status)
		}
		for _, id := range status.Proxy.Identities {
			if !strings.HasPrefix(id.SPIFFEID, s.server.td.IDString()+"/") || id.Serial == "" {
				t.Errorf("%s: identity %+v", n.name, id)
			}
		}
	}
}

// checkStatusCommand looks at what a person sees.
func checkStatusCommand(t *testing.T, s *shop) {
	t.Helper()
	text := stage.Must(t, stage.Narthex, "status", "-c", s.orders.configFile())
	for _, want := range []string{s.ordersAgent, s.server.address, "  reachable since ", s.id("orders"), s.id("audit"), toInventory} {
		if !strings.Contains(text, want) {
			t.Errorf("`narthex status` does not show %q:\n%s", want, text)
		}
	}
	var status telemetry.Status
	if err := json.Unmarshal([]byte(stage.Must(t, stage.Narthex, "status", "-c", s.inventory.configFile(), "--format", "json")), &status); err != nil {
		t.Fatal(err)
	}
	if status.Agent == nil || status.Agent.ID != s.inventoryAgent || status.Proxy == nil {
		t.Errorf("`narthex status --format json`: %+v", status)
	}
	stage.Must(t, stage.Narthex, "health", "--ready", "-c", s.orders.configFile())
}

// checkPrivileges looks at who the halves are and who may read the agent's
// files.
func checkPrivileges(t *testing.T, s *shop) {
	t.Helper()
	for command, uid := range map[string]int{"agent": 0, "proxy": s.orders.user.uid} {
		pid, err := s.orders.half(command)
		if err != nil {
			t.Fatal(err)
		}
		if got := stage.UIDOf(t, pid); got != uid {
			t.Errorf("the %s runs as uid %d, want %d", command, got, uid)
		}
		status := stage.ReadFile(t, fmt.Sprintf("/proc/%d/status", pid))
		want := []string{"NoNewPrivs:\t1"}
		if command == "proxy" {
			want = append(want, "Seccomp:\t2", "CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000")
		}
		for _, line := range want {
			if !strings.Contains(status, line+"\n") {
				t.Errorf("the %s should have %q:\n%s", command, line, status)
			}
		}
	}
	err := filepath.Walk(s.orders.dataDir(), func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v: others may use it", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
