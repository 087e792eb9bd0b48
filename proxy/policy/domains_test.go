package policy

import (
	"slices"
	"testing"
)

func TestTrustDomains(t *testing.T) {
	p, err := Parse("rules.yaml", []byte(`version: 1
groups:
  partners: ["spiffe://partner.example/**", "spiffe://other.example/x"]
rules:
  - {id: b, effect: allow, from: [group:partners], to: ["spiffe://example.org/**"]}
  - {id: a, effect: allow, on: [x], from: ["spiffe://partner.example/a"]}
  - {id: c, effect: allow, on: [y], from: ["spiffe://elsewhere.example/**"]}
  - {id: d, effect: deny, from: ["spiffe://denied.example/**"]}
  - {id: e, effect: allow, shadow: true, from: ["spiffe://shadow.example/**"]}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []DomainMention{
		{"example.org", "b", "rules.yaml", 5, 6},
		{"other.example", "b", "rules.yaml", 5, 6},
		{"partner.example", "a", "rules.yaml", 6, 6},
	}
	if got := p.TrustDomains([]string{"x"}); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	want[2] = DomainMention{"partner.example", "b", "rules.yaml", 5, 6}
	if got := p.TrustDomains(nil); !slices.Equal(got, want) {
		t.Errorf("without listeners: got %v, want %v", got, want)
	}
	if got := (*Policy)(nil).TrustDomains(nil); got != nil {
		t.Errorf("no policy: got %v", got)
	}
}
