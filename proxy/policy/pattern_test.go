package policy

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestPatternMatch(t *testing.T) {
	tests := []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://a.org/x", "spiffe://a.org/x", true},
		{"spiffe://a.org/x", "spiffe://a.org/x/y", false},
		{"spiffe://a.org/x/y", "spiffe://a.org/x", false},
		{"spiffe://a.org/x", "spiffe://a.org/xy", false},
		{"spiffe://a.org/x", "spiffe://a.org/X", false},
		{"spiffe://a.org/x", "spiffe://b.org/x", false},
		{"spiffe://a.org/x", "spiffe://a.org.evil/x", false},
		{"spiffe://a.org/x", "spiffe://a.org", false},
		{"spiffe://a.org/*", "spiffe://a.org/x", true},
		{"spiffe://a.org/*", "spiffe://a.org/x/y", false},
		{"spiffe://a.org/*", "spiffe://a.org", false},
		{"spiffe://a.org/*", "spiffe://a.or/x", false},
		{"spiffe://a.org/*", "spiffe://a.orgs/x", false},
		{"spiffe://a.org/ns/*/sa/web", "spiffe://a.org/ns/shop/sa/web", true},
		{"spiffe://a.org/ns/*/sa/web", "spiffe://a.org/ns/shop/sa/web2", false},
		{"spiffe://a.org/ns/*/sa/web", "spiffe://a.org/ns/shop/x/sa/web", false},
		{"spiffe://a.org/ns/*/sa/web", "spiffe://a.org/ns/sa/web", false},
		{"spiffe://a.org/ns/*/sa/*", "spiffe://a.org/ns/shop/sa/web", true},
		{"spiffe://a.org/ns/**", "spiffe://a.org/ns/shop", true},
		{"spiffe://a.org/ns/**", "spiffe://a.org/ns/shop/sa/web", true},
		{"spiffe://a.org/ns/**", "spiffe://a.org/ns", false},
		{"spiffe://a.org/ns/**", "spiffe://a.org/nsx/shop", false},
		{"spiffe://a.org/**", "spiffe://a.org/x", true},
		{"spiffe://a.org/**", "spiffe://a.org", false},
		{"spiffe://a.org/**", "spiffe://b.org/x", false},
		{"spiffe://a.org/**", "spiffe://a.org/spire/agent/x509pop/1", false},
		{"spiffe://a.org/**", "spiffe://a.org/spire", false},
		{"spiffe://a.org/**", "spiffe://a.org/spires/x", true},
		{"spiffe://a.org/**", "spiffe://a.org/x/spire", true},
		{"spiffe://a.org/spire/**", "spiffe://a.org/spire/server", true},
		{"spiffe://a.org/*/**", "spiffe://a.org/x/y", true},
		{"spiffe://a.org/*/**", "spiffe://a.org/x", false},
	}
	for _, tt := range tests {
		p, err := ParsePattern(tt.pattern)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Match(spiffeid.RequireFromString(tt.id)); got != tt.want {
			t.Errorf("%s matches %s: %v, want %v", tt.pattern, tt.id, got, tt.want)
		}
		if got := slowMatch(tt.pattern, tt.id); got != tt.want {
			t.Errorf("slow: %s matches %s: %v, want %v", tt.pattern, tt.id, got, tt.want)
		}
		if p.String() != tt.pattern || p.TrustDomain() != "a.org" {
			t.Errorf("%s reads back as %s of %s", tt.pattern, p, p.TrustDomain())
		}
		if p.Match(spiffeid.ID{}) {
			t.Errorf("%s matches the zero ID", tt.pattern)
		}
	}
	if (Pattern{}).Match(spiffeid.ID{}) || (Pattern{}).Match(spiffeid.RequireFromString("spiffe://a.org/x")) || (Pattern{}).TrustDomain() != "" {
		t.Error("the zero pattern matches")
	}
}

// TestPatternCharacters tries every byte in the trust domain and in the path,
// and agrees with go-spiffe, wildcards apart.
func TestPatternCharacters(t *testing.T) {
	for i := range 256 {
		c := string([]byte{byte(i)})
		for _, s := range []string{"spiffe://a" + c + "b/x", "spiffe://ab/x" + c + "y", "spiffe://ab/" + c, c + "spiffe://ab/x", "spiffe:/" + c + "ab/x", "spiffe://ab/x" + c} {
			_, err := spiffeid.FromString(s)
			want := err == nil && strings.Count(s, "/") > 2
			if s == "spiffe://ab/*" {
				want = true
			}
			p, err := ParsePattern(s)
			if (err == nil) != want {
				t.Errorf("%q: %v, want accepted %v", s, err, want)
			}
			if err == nil && !p.wild && !p.Match(spiffeid.RequireFromString(s)) {
				t.Errorf("%q does not match itself", s)
			}
		}
	}
}

func TestPatternBounds(t *testing.T) {
	long := "spiffe://a.org/" + strings.Repeat("x", maxIDLength)
	if _, err := ParsePattern(long[:maxIDLength]); err != nil {
		t.Error(err)
	}
	if _, err := ParsePattern(long[:maxIDLength+1]); err == nil {
		t.Error("an ID above the bound is accepted")
	}
	if _, err := ParsePattern("spiffe://" + strings.Repeat("a", maxDomainLength) + "/x"); err != nil {
		t.Error(err)
	}
	if _, err := ParsePattern("spiffe://" + strings.Repeat("a", maxDomainLength+1) + "/x"); err == nil {
		t.Error("a trust domain above the bound is accepted")
	}
}

func FuzzPattern(f *testing.F) {
	for _, s := range []string{"spiffe://a.org/x", "spiffe://a.org/ns/*/sa/**", "spiffe://a.org/**", "spiffe://a.org/spire/*", "spiffe://", "spiffe://a.org//", "", "x"} {
		f.Add(s, "spiffe://a.org/ns/x/sa/y")
		f.Add(s, "spiffe://a.org/spire/server")
	}
	f.Fuzz(func(t *testing.T, pattern, id string) {
		p, err := ParsePattern(pattern)
		if err != nil {
			if p != (Pattern{}) {
				t.Errorf("%q: an error, and a pattern", pattern)
			}
			return
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil {
			return
		}
		if got, want := p.Match(parsed), slowMatch(pattern, id); got != want {
			t.Errorf("%q matches %q: %v, the slow way %v", pattern, id, got, want)
		}
		// The trie finds what the pattern matches.
		tree := trie{}
		tree.root.add(p.text[p.path:])
		var found identity
		if parsed.TrustDomain().Name() == p.TrustDomain() {
			tree.find(parsed.Path(), &found)
		}
		if got := found.n > 0; got != p.Match(parsed) {
			t.Errorf("%q finds %q: %v, matches %v", pattern, id, got, p.Match(parsed))
		}
	})
}
