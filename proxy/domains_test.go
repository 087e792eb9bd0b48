package proxy

import (
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/testca"
)

// TestTrustDomainsThatDoNotFit are warned of once, until it is otherwise.
func TestTrustDomainsThatDoNotFit(t *testing.T) {
	const partners = `
version: 1
rules:
  - {id: partners, effect: allow, from: ["spiffe://partner.example/**", "spiffe://example.org/web"], to: ["spiffe://example.org/**"]}
  - {id: tried, effect: allow, shadow: true, from: ["spiffe://shadow.example/**"]}
  - {id: elsewhere, effect: allow, on: [b], from: ["spiffe://other.example/**"]}
  - {id: not-them, effect: deny, from: ["spiffe://denied.example/**"]}
`
	ca, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
	ids, svid := source(t, ca.SVID("/orders"), ca), ca.SVID("/orders")
	log := &lines{}
	c := Config{
		Listeners: []Listener{inbound("a", "127.0.0.1:1")}, Policy: rulesOf(t, partners), Identities: ids,
		Log: hclog.New(&hclog.LoggerOptions{Output: log}),
	}
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	right, wrong := spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("example.com")
	for n, step := range []struct {
		change                  func()
		foreign, partner, other int // warnings so far
	}{
		{func() {}, 0, 1, 0},
		{func() { c.TrustDomain = right }, 0, 1, 0},
		{func() { c.TrustDomain = wrong }, 1, 1, 0},
		{func() { c.Policy = rulesOf(t, partners) }, 1, 1, 0},
		{func() { give(t, ids, svid, ca, partner) }, 1, 1, 0},
		{func() { give(t, ids, svid, ca) }, 1, 2, 0},
		{func() { c.TrustDomain = right }, 1, 2, 0},
		{func() { c.TrustDomain = wrong }, 2, 2, 0},
		{func() { c.Listeners = append(c.Listeners, inbound("b", "127.0.0.1:1")) }, 2, 2, 1},
		{func() { c.Policy = rulesOf(t, allowWeb) }, 2, 2, 1},
	} {
		step.change()
		if _, err := p.Apply(c); err != nil {
			t.Fatal(err)
		}
		foreign, partner, other := log.count("our identity is of another trust domain"), log.count("trust_domain=partner.example"), log.count("trust_domain=other.example")
		if foreign != step.foreign || partner != step.partner || other != step.other {
			t.Fatalf("step %d: %d, %d and %d warnings, want %d, %d and %d\n%s", n, foreign, partner, other, step.foreign, step.partner, step.other, log.text.String())
		}
	}
	if n := log.count("shadow.example") + log.count("denied.example"); n != 0 {
		t.Errorf("%d warnings of domains that no rule lets in", n)
	}
}
