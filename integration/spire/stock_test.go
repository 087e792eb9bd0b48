//go:build integration

package spire_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

const stockConf = `
agent {
  data_dir = "%[1]s/data"
  log_level = "INFO"
  server_address = "%[2]s"
  server_port = "%[3]s"
  socket_path = "%[4]s"
  trust_bundle_path = "%[1]s/bundle.pem"
  trust_domain = "%[5]s"
  join_token = "%[6]s"
}
plugins {
  KeyManager "memory" { plugin_data {} }
  NodeAttestor "join_token" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data {} }
}
`

// startStockAgent runs the spire-agent of SPIRE itself, and returns its
// Workload API socket once it is healthy. The server gets the entries, with
// the agent for their parent, before.
func startStockAgent(t *testing.T, s *server, entries ...entry) (socket string) {
	t.Helper()
	dir := stage.Folder(t, "stock")
	token, id := s.token()
	for i := range entries {
		entries[i].parent = id
	}
	s.add(entries...)
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "public", "api.sock")
	stage.WriteFile(t, filepath.Join(dir, "bundle.pem"), s.bundlePEM(), 0o644)
	conf := filepath.Join(dir, "agent.conf")
	stage.WriteFile(t, conf, fmt.Sprintf(stockConf, dir, host, port, socket, s.td.Name(), token), 0o600)
	p := stage.Start(t, "spire-agent", filepath.Join(tools, "spire-agent"), []string{"run", "-config", conf})
	stage.Eventually(t, stage.Soon, "spire-agent is healthy", func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		out, err := stage.Tell(t, filepath.Join(tools, "spire-agent"), "healthcheck", "-socketPath", socket)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return socket
}

// TestProxyBesideStockAgent runs the proxy alone, as a user without
// privileges, on identities of SPIRE's own agent.
func TestProxyBesideStockAgent(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second})
	socket := startStockAgent(t, server,
		entry{path: "/inventory", selector: otherProxyUser.selector()},
		entry{path: "/orders", selector: proxyUser.selector()},
		entry{path: "/audit", selector: proxyUser.selector()},
	)
	service := newService(t, "inventory")
	inventory := newNode(t, "inventory", otherProxyUser)
	inventory.listeners = []listener{{name: inventoryIn, bind: stage.FreeAddress(t), target: service.address}}
	inventory.rules(nil, rule{id: "orders-reads", from: server.id("/orders"), to: server.id("/inventory"), at: "inbound"})
	orders := newNode(t, "orders", proxyUser)
	for name, identity := range map[string]string{toInventory: "/orders", asAudit: "/audit"} {
		orders.listeners = append(orders.listeners, listener{
			name: name, target: inventory.bind(inventoryIn), identity: server.id(identity), expect: server.id("/inventory"),
		})
	}
	orders.rules(nil, rule{id: "all-out", from: server.id("/**"), at: "outbound"})
	for _, n := range []*node{inventory, orders} {
		n.api = socket
		n.start("proxy", as(n.user))
		n.ready()
	}

	if err := call(orders.bind(toInventory), "inventory"); err != nil {
		t.Errorf("orders calls inventory: %v", err)
	}
	refused(t, orders.bind(asAudit), service)
	inventory.Record(0, "allowed", func(a telemetry.Access) bool {
		return a.From == server.id("/orders") && a.Rule == "orders-reads" && a.Decision == "allow"
	})
	inventory.Record(0, "denied", func(a telemetry.Access) bool {
		return a.From == server.id("/audit") && a.Rule == "" && a.Decision == "deny"
	})
}

// TestForeignClients has SPIRE's own command line and go-spiffe ask our
// Workload API.
func TestForeignClients(t *testing.T) {
	t.Parallel()
	s := newShop(t, shopOptions{})
	// An SVID this short is replaced within seconds.
	s.server.add(entry{path: "/native", parent: s.ordersAgent, selector: "unix:uid:0", ttl: 15 * time.Second, hint: "internal"})
	s.inventory.rules(nil, rule{id: "native-reads", from: s.id("native"), to: s.id("inventory"), at: "inbound"})
	s.open()

	t.Run("spire-agent", func(t *testing.T) {
		agent := filepath.Join(tools, "spire-agent")
		dir := stage.Folder(t, "fetched")
		out := stage.Must(t, agent, "api", "fetch", "x509", "-socketPath", s.orders.api, "-write", dir)
		for _, want := range []string{"Received 1 svid", s.id("native"), "internal"} {
			if !strings.Contains(out, want) {
				t.Errorf("`spire-agent api fetch x509` does not say %q:\n%s", want, out)
			}
		}
		s.server.verify(certificatesIn(t, filepath.Join(dir, "svid.0.pem")), s.id("native"))
		if out := stage.Must(t, agent, "healthcheck", "-socketPath", s.orders.api); !strings.Contains(out, "healthy") {
			t.Errorf("`spire-agent healthcheck` says %q", out)
		}
	})

	t.Run("go-spiffe", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+s.orders.api)))
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		first, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		s.server.verify(first.Certificates, s.id("native"))
		if err := callNatively(source, s); err != nil {
			t.Errorf("a go-spiffe client calls inventory: %v", err)
		}
		select {
		case <-source.Updated():
		case <-ctx.Done():
			t.Fatal("the source was not told of a renewed SVID")
		}
		second, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if first.Certificates[0].SerialNumber.Cmp(second.Certificates[0].SerialNumber) == 0 {
			t.Error("the update holds the same SVID")
		}
		if err := callNatively(source, s); err != nil {
			t.Errorf("a go-spiffe client with its renewed SVID calls inventory: %v", err)
		}
	})
}

// callNatively calls inventory's proxy with an SVID of one's own.
func callNatively(source *workloadapi.X509Source, s *shop) error {
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(s.id("inventory"))))
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: callTime}, "tcp", s.inventory.bind(inventoryIn), config)
	if err != nil {
		return err
	}
	defer c.Close()
	return newCaller(c).ask("inventory")
}
