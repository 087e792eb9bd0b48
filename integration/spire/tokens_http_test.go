//go:build integration

package spire_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestTokensInRequests: JWT-SVIDs of the agent are attached by one proxy and
// validated by the other one, as a second proof of who calls.
func TestTokensInRequests(t *testing.T) {
	t.Parallel()
	for name, start := range agents {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testTokensInRequests(t, start)
		})
	}
}

func testTokensInRequests(t *testing.T, start func(*testing.T, *server, ...entry) string) {
	server := newServer(t, serverOptions{cacheReload: time.Second})
	socket := start(t, server,
		entry{path: "/inventory", selector: otherProxyUser.selector()},
		entry{path: "/orders", selector: proxyUser.selector()},
		entry{path: "/audit", selector: proxyUser.selector()},
	)
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s", r.Header.Get("X-Spiffe-Id"), r.Header.Get("Authorization"))
	}))
	t.Cleanup(service.Close)
	const audience = "spiffe://narthex.test/inventory"
	inventory := newNode(t, "inventory", otherProxyUser)
	inventory.listeners = []listener{{
		name: inventoryIn, bind: stage.FreeAddress(t), target: strings.TrimPrefix(service.URL, "http://"),
		more: "protocol: http\n      identity_header: {}\n      http: {jwt: {audience: [\"" + audience + "\"], required: true}}",
	}}
	inventory.rules(nil, rule{id: "all-in", from: server.id("/**"), at: "inbound"})
	orders := newNode(t, "orders", proxyUser)
	out := func(name, identity, more string) listener {
		return listener{name: name, target: inventory.bind(inventoryIn), identity: server.id(identity), expect: server.id("/inventory"), more: "protocol: http" + more}
	}
	attach := func(audience string) string {
		return "\n      http: {jwt: {audience: [\"" + audience + "\"]}}"
	}
	orders.listeners = []listener{
		out(toInventory, "/orders", attach(audience)),
		out("without", "/orders", ""),
		out("for-another", "/orders", attach("somebody-else")),
		out(asAudit, "/audit", attach(audience)),
	}
	orders.rules(nil, rule{id: "all-out", from: server.id("/**"), at: "outbound"})
	for _, n := range []*node{inventory, orders} {
		n.api = socket
		n.start("proxy", as(n.user))
		n.ready()
	}
	ask := func(listener, authorization string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, "http://"+orders.bind(listener)+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}

	status, body := ask(toInventory, "")
	caller, token, _ := strings.Cut(body, " ")
	if status != http.StatusOK || caller != server.id("/orders") || !strings.HasPrefix(token, "Bearer ey") {
		t.Fatalf("with a token: %d, from %q", status, caller)
	}
	if status, body := ask(asAudit, ""); status != http.StatusOK || !strings.HasPrefix(body, server.id("/audit")+" Bearer ey") {
		t.Errorf("with a token of audit: %d", status)
	}
	for _, test := range []struct {
		name, listener, authorization string
		status                        int
	}{
		{"no token", "without", "", http.StatusUnauthorized},
		{"for another audience", "for-another", "", http.StatusUnauthorized},
		{"changed", "without", token + "x", http.StatusUnauthorized},
		{"the right one, by hand", "without", token, http.StatusOK},
		{"of somebody else", asAudit, token, http.StatusForbidden}, // no rule lets audit speak for orders
	} {
		if status, _ := ask(test.listener, test.authorization); status != test.status {
			t.Errorf("%s: %d, want %d", test.name, status, test.status)
		}
	}
	inventory.Record(0, "somebody else's token", func(a telemetry.Access) bool {
		return a.From == server.id("/audit") && a.HTTP != nil && a.HTTP.Status == http.StatusForbidden
	})
}
