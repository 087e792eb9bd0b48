package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy"
	"github.com/narthex-id/narthex/proxy/policy"
)

// TestStatusSaysWhatIsOpen: who reads the status sees which listeners take
// plaintext or only audit, and who would be turned away.
func TestStatusSaysWhatIsOpen(t *testing.T) {
	data, err := json.Marshal(telemetry.Status{Proxy: &telemetry.ProxyStatus{Listeners: []telemetry.ListenerStatus{{
		Name: "orders", Mode: "permissive", Enforcement: "audit", WouldDeny: 7, Unauthenticated: 12,
		Sources:     []telemetry.SourceStatus{{Source: "10.0.0.1", Connections: 11, AtMostOver: 2, Last: time.Now()}, {Source: "unix", Connections: 1, Last: time.Now()}},
		Connections: []telemetry.ConnectionStatus{{From: "unauthenticated", To: "spiffe://example.org/orders", WouldDeny: "policy: no rule allows it", Shadow: []string{"a", "b"}, Since: time.Now()}},
	}, {Name: "closed", Mode: "strict", Enforcement: "enforce"}}}})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := printStatus(&out, data, "text"); err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(` {2,}`).ReplaceAllString(out.String(), " ")
	for _, want := range []string{
		" audit rules refuse nothing would have 7 times\n", " permissive takes plaintext too 12 connections of it\n",
		" plaintext from 10.0.0.1 11 connections (counted too high by at most 2) last 0s ago\n", " plaintext from unix 1 connections last 0s ago\n",
		" unauthenticated -> spiffe://example.org/orders rule - for 0s would be refused: policy: no rule allows it otherwise by rules in shadow: a, b\n",
	} {
		if strings.Count(text, want) != 1 {
			t.Errorf("want once %q in\n%s", want, text)
		}
	}
}

// TestStatusOfAnAgent: a long SPIFFE ID does not push apart what is short.
func TestStatusOfAnAgent(t *testing.T) {
	since := time.Date(2026, 11, 27, 10, 6, 33, 0, time.UTC)
	data, err := json.Marshal(telemetry.Status{Version: "dev", TrustDomain: "example.org", Started: time.Now(), Agent: &telemetry.AgentStatus{
		ID: "spiffe://example.org/spire/agent/join_token/96fcebf7", ExpiresAt: time.Now().Add(time.Hour), Server: "spire:8081", Since: since,
		Problem: "sync entries: unreachable", Entries: 2, Streams: 7,
		Identities: []telemetry.Identity{{SPIFFEID: "spiffe://example.org/a"}, {SPIFFEID: "spiffe://example.org/orders", Hint: "internal"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := printStatus(&out, data, "text"); err != nil {
		t.Fatal(err)
	}
	const want = `narthex dev  trust domain example.org  up 0s

agent    spiffe://example.org/spire/agent/join_token/96fcebf7  expires in 1h0m0s
server   spire:8081  not reachable since 10:06:33
entries  2
streams  7
problem  sync entries: unreachable
  spiffe://example.org/a       expires in -
  spiffe://example.org/orders  expires in -  hint "internal"
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

// TestStatusSaysWhichAttestorIsAway: and why.
func TestStatusSaysWhichAttestorIsAway(t *testing.T) {
	data, err := json.Marshal(telemetry.Status{Agent: &telemetry.AgentStatus{Attestors: []telemetry.AttestorStatus{
		{Type: "unix"}, {Type: "k8s", Problem: "ask the kubelet: 403 Forbidden"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := printStatus(&out, data, "text"); err != nil {
		t.Fatal(err)
	}
	if text := regexp.MustCompile(` {2,}`).ReplaceAllString(out.String(), " "); !strings.Contains(text, "\nattestor k8s problem: ask the kubelet: 403 Forbidden\n") || strings.Contains(text, "unix") {
		t.Errorf("it says\n%s", text)
	}
}

// TestStatusSaysWhatAReloadDid: what the last one came to.
func TestStatusSaysWhatAReloadDid(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for want, reload := range map[string]*telemetry.ReloadStatus{
		"last reload 03:04:05 rules: 2 added, 1 changed, 0 removed connections: 9000 asked, 14 refused, 13 closed\n": reloadStatus(&proxy.Applied{
			Rules: policy.Changes{Added: []string{"a", "b"}, Changed: []string{"c"}}, Asked: 9000, NowRefused: 14, Closed: 13,
		}, nil),
		"last reload 03:04:05 failed\n": reloadStatus(&proxy.Applied{Asked: 1}, errors.New("no")),
		"":                              nil,
	} {
		if reload != nil {
			reload.Time = at
		}
		var out strings.Builder
		w := tabwriter.NewWriter(&out, 0, 8, 2, ' ', 0)
		printReload(w, reload)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := regexp.MustCompile(` {2,}`).ReplaceAllString(out.String(), " "); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestStatusSaysWhereConnectionsGo: routes, and the endpoints that are left
// out, with the reason.
func TestStatusSaysWhereConnectionsGo(t *testing.T) {
	data, err := json.Marshal(telemetry.Status{Proxy: &telemetry.ProxyStatus{Listeners: []telemetry.ListenerStatus{
		{
			Name: "front", Direction: "inbound", Bind: ":8443", SPIFFEID: "spiffe://example.org/front", ExpiresAt: time.Now().Add(time.Hour + time.Second/3),
			Targets: []string{"127.0.0.1:1", "127.0.0.1:2"},
			Routes: []telemetry.RouteStatus{
				{SNI: []string{"db.example.org", "*.db.example.org"}, ALPN: []string{"postgresql"}, Targets: []string{"127.0.0.1:1"}},
				{ALPN: []string{"h2"}, Targets: []string{"127.0.0.1:1", "127.0.0.1:2"}},
			},
			Endpoints: []telemetry.EndpointStatus{
				{Target: "127.0.0.1:1", Address: "127.0.0.1:1", Healthy: true},
				{Target: "127.0.0.1:2", Address: "127.0.0.1:2", Problem: "health check: connection refused"},
			},
		},
		{
			Name: "rest", Routes: []telemetry.RouteStatus{{SNI: []string{"a"}, Targets: []string{"unix:/a"}}, {Targets: []string{"unix:/b"}}},
			Endpoints: []telemetry.EndpointStatus{{Target: "gone.example:1", Problem: "no such host"}},
		},
		{Name: "plain", Targets: []string{"127.0.0.1:3"}, Endpoints: []telemetry.EndpointStatus{{Target: "127.0.0.1:3", Address: "127.0.0.1:3", Healthy: true}}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := printStatus(&out, data, "text"); err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(` {2,}`).ReplaceAllString(out.String(), " ")
	for want, times := range map[string]int{
		"front inbound :8443 -> by its routes as spiffe://example.org/front (expires in 1h0m0s) 0 live": 1,
		" route sni db.example.org, *.db.example.org, alpn postgresql -> 127.0.0.1:1\n":                 1,
		" route alpn h2 -> 127.0.0.1:1, 127.0.0.1:2\n":                                                  1,
		" route the rest -> refused\n":                                                                  1,
		" route the rest -> unix:/b\n":                                                                  1,
		" endpoints 1 of 2 healthy\n":                                                                   1,
		" endpoint 127.0.0.1:2 left out: health check: connection refused\n":                            1,
		" endpoint gone.example:1 (no address) tried, as all are unhealthy: no such host\n":             1,
		" endpoints ":                     2,
		" endpoint ":                      2,
		"-> 127.0.0.1:3 as (no identity)": 1,
	} {
		if strings.Count(text, want) != times {
			t.Errorf("want %d times %q in\n%s", times, want, text)
		}
	}
}

func TestWhomStatusAsks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "narthex.yaml")
	if err := os.WriteFile(file, []byte("trust_domain: example.org\ntelemetry: {listen: 127.0.0.1:7}\nproxy: {source: workload_api, workload_api: {socket: /x.sock}, policies: [/x.yaml], listeners: []}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ address, config, variable, want string }{
		{want: defaultTelemetry},
		{variable: "127.0.0.1:9904", want: "127.0.0.1:9904"},
		{variable: "127.0.0.1:9904", address: "unix:/x.sock", want: "unix:/x.sock"},
		{variable: "127.0.0.1:9904", config: file, want: "127.0.0.1:7"},
		{address: "127.0.0.1:9", config: file, want: "127.0.0.1:9"},
	}
	for _, tt := range tests {
		t.Setenv(addressEnv, tt.variable)
		if got, err := (asker{&tt.address, &tt.config}).where(); err != nil || got != tt.want {
			t.Errorf("%+v: %q, %v", tt, got, err)
		}
	}
}
