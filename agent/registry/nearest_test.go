package registry

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

// selectorsOf makes selectors of words such as "unix:uid:1".
func selectorsOf(words string) (selectors []attestor.Selector) {
	for _, w := range strings.Fields(words) {
		kind, value, _ := strings.Cut(w, ":")
		selectors = append(selectors, attestor.Selector{Type: kind, Value: value})
	}
	return selectors
}

func nearTo(entries ...string) *Registry {
	r := New(testOptions())
	var all []Entry
	for _, e := range entries {
		id, words, _ := strings.Cut(e, " ")
		all = append(all, Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(testDomain, "/"+id), Selectors: selectorsOf(words), StoreSVID: strings.HasPrefix(id, "store")})
	}
	r.Apply(Update{Entries: all, HasEntries: true})
	return r
}

func TestNearest(t *testing.T) {
	t.Parallel()
	r := nearTo(
		"a unix:uid:1 unix:gid:1",
		"b unix:uid:1 unix:gid:2",
		"c unix:uid:9",
		"d unix:uid:1 unix:gid:8 k8s:ns:shop",
		"e unix:uid:1 unix:user:web unix:gid:7",
		"f unix:uid:1 unix:gid:6",
		"none",
		"node spiffe_id:spiffe://example.org/spire/agent/x unix:uid:1",
		"store unix:uid:1 unix:gid:5",
	)
	for _, test := range []struct {
		has  string
		n    int
		want string // entries in order, each with what it misses
	}{
		{"unix:uid:1 unix:gid:1 unix:user:web", 10, "e[unix:gid:7] b[unix:gid:2] f[unix:gid:6] d[k8s:ns:shop unix:gid:8] c[unix:uid:9]"},
		{"unix:uid:1 unix:gid:1 unix:user:web", 2, "e[unix:gid:7] b[unix:gid:2]"},
		{"unix:uid:1 unix:gid:1 unix:user:web", 1, "e[unix:gid:7]"},
		{"unix:uid:3", 2, "c[unix:uid:9] a[unix:gid:1 unix:uid:1]"},
		{"", 1, "c[unix:uid:9]"},
		{"unix:uid:1", 0, ""},
		{"unix:uid:1", -1, ""},
	} {
		var got []string
		for _, near := range r.Nearest(selectorsOf(test.has), test.n) {
			var missing []string
			for _, s := range near.Missing {
				missing = append(missing, s.String())
			}
			got = append(got, near.Entry.ID+"["+strings.Join(missing, " ")+"]")
		}
		if got := strings.Join(got, " "); got != test.want {
			t.Errorf("%d nearest to %q: got %s, want %s", test.n, test.has, got, test.want)
		}
	}
}

func TestMatching(t *testing.T) {
	t.Parallel()
	r := nearTo("b unix:uid:1", "a unix:uid:1 unix:gid:1", "c unix:uid:2", "store unix:uid:1")
	if due := r.Matching(selectorsOf("unix:uid:3")); due != nil {
		t.Errorf("a stranger matches %v", due)
	}
	refused := errors.New("the server refuses")
	r.Apply(Update{Failed: map[string]error{"a": refused}})
	got := r.Matching(selectorsOf("unix:gid:1 unix:uid:1 unix:uid:1"))
	if len(got) != 2 || got[0].Entry.ID != "a" || got[1].Entry.ID != "b" {
		t.Fatalf("got %v, want a and b", got)
	}
	if !errors.Is(got[0].Err, refused) || got[0].SVID != nil || got[1].Err != nil {
		t.Errorf("got %v, want the reason why a has no SVID", got)
	}
}

func BenchmarkNearest(b *testing.B) {
	r := benchRegistry()
	for b.Loop() {
		r.Nearest(pod(7), 10)
	}
}

func TestWatchBundles(t *testing.T) {
	t.Parallel()
	r := New(testOptions())
	w, second := r.WatchBundles(), r.WatchBundles()
	defer second.Close()
	if v := nextView(t, w); v.Synced || v.Bundle != nil {
		t.Errorf("before the first sync: got %v", v)
	}
	own := &Bundle{TrustDomain: testDomain, DER: []byte("own")}
	partner := &Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.example"), DER: []byte("partner")}
	r.Apply(Update{HasEntries: true, Bundle: own})
	if v := nextView(t, w); !v.Synced || v.Bundle != own || len(v.Federated) != 0 {
		t.Errorf("after the sync: got %v", v)
	}
	r.Apply(Update{HasFederated: true, Federated: map[spiffeid.TrustDomain]*Bundle{partner.TrustDomain: partner}})
	v := nextView(t, w)
	if v.Federated[partner.TrustDomain] != partner || len(v.Identities) != 0 {
		t.Errorf("with a partner: got %v", v)
	}
	if other := nextView(t, second); other != v {
		t.Error("two watches of the bundles have two views")
	}
	r.Apply(Update{HasFederated: true})
	if v := nextView(t, w); len(v.Federated) != 0 {
		t.Errorf("without the partner: got %v", v)
	}
	w.Close()
	second.Close()
	if len(r.audiences) != 0 || r.everyBundle != nil {
		t.Error("something is left of closed watches")
	}
}

func nextView(t *testing.T, w *Watch) *View {
	t.Helper()
	v, err := w.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}
