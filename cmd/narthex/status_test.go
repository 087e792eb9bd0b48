package main

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestStatusSaysWhatIsOpen: who reads the status sees which listeners take
// plaintext or only audit, and who would be turned away.
func TestStatusSaysWhatIsOpen(t *testing.T) {
	data, err := json.Marshal(telemetry.Status{Proxy: &telemetry.ProxyStatus{Listeners: []telemetry.ListenerStatus{{
		Name: "orders", Mode: "permissive", Enforcement: "audit", WouldDeny: 7, Unauthenticated: 12,
		Sources:     []telemetry.SourceStatus{{Source: "10.0.0.1", Connections: 11, AtMostOver: 2, Last: time.Now()}, {Source: "unix", Connections: 1, Last: time.Now()}},
		Connections: []telemetry.ConnectionStatus{{From: "unauthenticated", To: "spiffe://example.org/orders", WouldDeny: "policy: no rule allows it", Since: time.Now()}},
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
		" unauthenticated -> spiffe://example.org/orders rule - for 0s would be refused: policy: no rule allows it\n",
	} {
		if strings.Count(text, want) != 1 {
			t.Errorf("want once %q in\n%s", want, text)
		}
	}
}
