package main

import (
	"strings"
	"testing"

	"github.com/narthex-id/narthex/agent/endpoint"
)

// What others have registered, or called their programs, does not steer the
// terminal of whoever asks.
func TestExplanationIsPrintable(t *testing.T) {
	t.Parallel()
	const evil = "a\x1b[2Jb\nc"
	for _, e := range []endpoint.Explanation{
		{
			MatchedCount: 1, Problem: evil, Server: endpoint.ServerState{Problem: evil},
			Attestors: []endpoint.AttestorFinding{{Type: "unix", Selectors: []string{evil}}, {Type: "k8s", Problem: evil}},
			Matched:   []endpoint.MatchedEntry{{ID: evil, SPIFFEID: "spiffe://example.org/a", Hint: evil, Problem: evil}},
		},
		{Nearest: []endpoint.NearEntry{{ID: evil, SPIFFEID: "spiffe://example.org/a", Selectors: []string{evil}, Missing: []string{evil}}}},
	} {
		for _, format := range []string{"text", "json"} {
			var b strings.Builder
			if err := printExplanation(&b, &e, format); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(b.String(), "\x1b") || strings.Contains(b.String(), "\nc") {
				t.Errorf("%s: %q", format, b.String())
			}
		}
	}
}
