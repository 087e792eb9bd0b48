package endpoint

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
)

// Clauses of the SPIFFE standards that no other test shows: docs/conformance.md
// says which test shows which clause.

// TestSPIFFEIDs asks for identities by name (SPIFFE-ID §2). A name that is good is
// not the caller's, so that it is told from one that is none by the code.
func TestSPIFFEIDs(t *testing.T) {
	f := serveTokens(t)
	f.unsigned(f.entry("a", "/a"))
	domain := strings.Repeat("d", 255)
	for id, good := range map[string]bool{
		"spiffe://example.org":                       true,
		"spiffe://example.org/b":                     true,
		"spiffe://example.org/B_1.2-c/d":             true,
		"spiffe://example.org/...":                   true,
		"spiffe://trust_domain-1.example/b":          true,
		"spiffe://10.1.2.3/b":                        true,
		"spiffe://" + domain + "/b":                  true,
		longSPIFFEID(maxSPIFFEID):                    true,
		longSPIFFEID(maxSPIFFEID + 1):                false,
		"https://example.org/b":                      false,
		"spiffe:/b":                                  false,
		"spiffe:///b":                                false,
		"spiffe://example.org/b?x":                   false,
		"spiffe://example.org/b#x":                   false,
		"spiffe://user@example.org/b":                false,
		"spiffe://example.org:8443/b":                false,
		"spiffe://[::1]/b":                           false,
		"spiffe://EXAMPLE.org/b":                     false,
		"spiffe://ex%61mple.org/b":                   false,
		"spiffe://exämple.org/b":                     false,
		"spiffe://example.org/%62":                   false,
		"spiffe://example.org/ä":                     false,
		"spiffe://example.org//b":                    false,
		"spiffe://example.org/b/":                    false,
		"spiffe://example.org/":                      false,
		"spiffe://example.org/./b":                   false,
		"spiffe://example.org/a/../b":                false,
		"spiffe://example.org/b c":                   false,
		"spiffe://example.org/b\x00":                 false,
		"spiffe://example.org/a,spiffe://x.example/": false,
	} {
		_, err := f.fetchJWT(&workload.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: id})
		want := codes.InvalidArgument
		if good {
			want = codes.PermissionDenied
		}
		if status.Code(err) != want {
			t.Errorf("%q: %v; want %s", id, err, want)
		}
	}
}

// longSPIFFEID returns a SPIFFE ID of that many bytes.
func longSPIFFEID(n int) string {
	const start = "spiffe://example.org/"
	return start + strings.Repeat("a", n-len(start))
}

// TestLongestSPIFFEID is served to who has it, in each profile (SPIFFE-ID §2.3).
func TestLongestSPIFFEID(t *testing.T) {
	f := serveTokens(t)
	id := longSPIFFEID(maxSPIFFEID)
	f.register(f.entry("a", strings.TrimPrefix(id, "spiffe://example.org")))
	got, err := f.fetch(testContext(t)).Recv()
	must(t, err)
	if got.Svids[0].SpiffeId != id {
		t.Errorf("the X.509-SVID is of %s", got.Svids[0].SpiffeId)
	}
	ctx := withHeader(testContext(t))
	token, err := f.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: id})
	must(t, err)
	valid, err := f.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token.Svids[0].Svid})
	must(t, err)
	if valid.SpiffeId != id {
		t.Errorf("the JWT-SVID is of %s", valid.SpiffeId)
	}
}

// TestHintsAreUnique: in no profile do two SVIDs of an answer have one hint
// (SPIFFE Workload API §5.2.1, §6.2.1, §7.2.1). The oldest entry keeps it.
func TestHintsAreUnique(t *testing.T) {
	f := serveTokens(t)
	f.agent.onWIT = func(_ context.Context, e *registry.Entry) (*registry.Token, time.Time, error) {
		return &registry.Token{ID: e.SPIFFEID, Compact: "token", PrivateKey: "key"}, time.Now().Add(time.Hour), nil
	}
	f.agent.Apply(registry.Update{Bundle: withWIT(withJWT(f.ca.bundle(), f.jwt), "{}")})
	a, b, c := f.entry("a", "/a"), f.entry("b", "/b"), f.entry("c", "/c")
	a.Hint, b.Hint, c.Hint = "internal", "internal", "external"
	a.CreatedAt = a.CreatedAt.Add(time.Second)
	f.register(a, b, c)

	ctx := withHeader(testContext(t))
	x509, err := f.fetch(testContext(t)).Recv()
	must(t, err)
	jwt, err := f.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}})
	must(t, err)
	stream, err := f.client.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	must(t, err)
	wit, err := stream.Recv()
	must(t, err)
	for profile, hints := range map[string][]string{
		"X.509": hintsOf(x509.Svids), "JWT": hintsOf(jwt.Svids), "WIT": hintsOf(wit.Svids),
	} {
		if want := []string{"", "internal", "external"}; !slices.Equal(hints, want) {
			t.Errorf("%s: got %q, want %q", profile, hints, want)
		}
	}
}

func hintsOf[S interface{ GetHint() string }](svids []S) (hints []string) {
	for _, s := range svids {
		hints = append(hints, s.GetHint())
	}
	return hints
}

// TestEachAnswerIsWhole: what changes comes with all that did not, and what is
// left out has been taken back (SPIFFE Workload API §4.3, §4.4).
func TestEachAnswerIsWhole(t *testing.T) {
	f := serveTokens(t)
	a, b := f.entry("a", "/a"), f.entry("b", "/b")
	b.FederatesWith = append(b.FederatesWith, partner)
	f.register(a, b)
	ctx := withHeader(testContext(t))
	svids := f.fetch(testContext(t))
	bundles, err := f.client.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	must(t, err)
	for _, step := range []struct {
		name    string
		entries []registry.Entry
		ids     []string
		foreign int
	}{
		{"both", nil, []string{"spiffe://example.org/a", "spiffe://example.org/b"}, 1},
		{"one goes, and what it federates with", f.entries[:1], []string{"spiffe://example.org/a"}, 0},
	} {
		if step.entries != nil {
			f.agent.Apply(registry.Update{HasEntries: true, Entries: step.entries})
		}
		got, err := svids.Recv()
		must(t, err)
		var ids []string
		for _, s := range got.Svids {
			ids = append(ids, s.SpiffeId)
			if len(s.X509Svid) == 0 || len(s.X509SvidKey) == 0 || len(s.Bundle) == 0 {
				t.Errorf("%s: %s has fields that are empty (§4.5)", step.name, s.SpiffeId)
			}
		}
		if !slices.Equal(ids, step.ids) || len(got.FederatedBundles) != step.foreign {
			t.Errorf("%s: got %q with %d foreign bundles", step.name, ids, len(got.FederatedBundles))
		}
		all, err := bundles.Recv()
		must(t, err)
		if len(all.Bundles) != 1+step.foreign || all.Bundles["spiffe://example.org"] == nil {
			t.Errorf("%s: got %d bundles", step.name, len(all.Bundles))
		}
	}
}
