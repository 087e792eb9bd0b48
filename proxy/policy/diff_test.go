package policy

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestAskAround(t *testing.T) {
	const web2 = "spiffe://example.org/ns/any/sa/web"
	for name, tt := range map[string]struct {
		was, is string
		want    []string
	}{
		"the same": {"rules: [{id: a, effect: allow, from: ['" + web + "']}]", "rules: [{id: a, effect: allow, from: ['" + web + "']}]", nil},
		"a new allow": {"", "rules: [{id: a, effect: allow, at: inbound, from: ['" + web + "']}]", []string{
			`allow: no rule allows it -> rule a: from ` + web + ` to nobody, inbound on ""`,
		}},
		"a wider one": {"rules: [{id: a, effect: allow, at: inbound, from: ['" + web + "']}]", "rules: [{id: a, effect: allow, at: inbound, from: ['spiffe://example.org/ns/*/sa/web']}]", []string{
			`allow: no rule allows it -> rule a: from ` + web2 + ` to nobody, inbound on ""`,
		}},
		"a deny that takes from an allow": {"rules: [{id: a, effect: allow, at: inbound, from: ['spiffe://example.org/**'], to: ['" + orders + "']}]", "rules: [{id: a, effect: allow, at: inbound, from: ['spiffe://example.org/**'], to: ['" + orders + "']}, {id: d, effect: deny, from: ['" + web + "']}]", []string{
			`deny: rule a -> rule d: from ` + web + ` to ` + orders + `, inbound on ""`,
		}},
		"a revocation": {"rules: [{id: a, effect: allow, at: inbound, from: ['spiffe://example.org/**'], to: ['" + orders + "']}]", "rules: [{id: a, effect: allow, at: inbound, from: ['spiffe://example.org/**'], to: ['" + orders + "']}]\nrevoked: ['" + web + "']", []string{
			`deny: rule a -> the identity it comes from is revoked: from ` + web + ` to ` + orders + `, inbound on ""`,
		}},
		"a ceiling": {"rules: [{id: a, effect: allow, on: [x], at: inbound, from: ['spiffe://partner.example/**']}]", "trust_domains: {partner.example: {ids: [/exports/**]}}\nrules: [{id: a, effect: allow, on: [x], at: inbound, from: ['spiffe://partner.example/**']}]", []string{
			`deny: rule a -> an identity is outside the ceiling of its trust domain: from spiffe://partner.example/any to nobody, inbound on "x"`,
		}},
		"paths": {"rules: [{id: a, effect: allow, at: inbound, from: ['" + web + "'], http: {methods: [GET], paths: [/v1/a]}}]", "rules: [{id: a, effect: allow, at: inbound, from: ['" + web + "'], http: {methods: [GET], paths: ['/v1/{x}'], headers: {x-env: [prod]}}}]", []string{
			`allow: no rule allows it -> rule a: GET /v1/any from ` + web + ` to nobody, inbound on ""`,
			`deny: rule a -> no rule allows it: GET /v1/a from ` + web + ` to nobody, inbound on ""`,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			parse := func(text string) *Policy {
				p, err := Parse("p.yaml", []byte("version: 1\n"+text+"\n"))
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			c := NewComparison(parse(tt.was), parse(tt.is))
			c.AskAround()
			var got []string
			for _, change := range c.Changes() {
				word := map[bool]string{true: "allow", false: "deny"}[change.Is.Allow]
				got = append(got, fmt.Sprintf("%s: %s -> %s: %s", word, by(&change.Was), by(&change.Is), change.Examples[0].describe()))
			}
			if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// TestCommon: what two patterns that meet have in common matches both.
func TestCommon(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	met := 0
	for range 20000 {
		p, err := ParsePattern("spiffe://a.org" + worldPath(r, 50))
		if err != nil {
			continue
		}
		q, err := ParsePattern("spiffe://a.org" + worldPath(r, 50))
		if err != nil || !p.meets(q) {
			continue
		}
		met++
		for _, text := range idsOf(p, q) {
			id, err := parsePeer(text)
			if err != nil || !p.Match(id.ID) || !q.Match(id.ID) {
				t.Errorf("%s and %s have %s in common: %v", p, q, text, err)
			}
		}
	}
	if met < 1000 {
		t.Errorf("only %d pairs met", met)
	}
}

func by(d *Decision) string {
	if d.Rule != "" {
		return "rule " + d.Rule
	}
	return d.Reason.String()
}

// TestComparisonOfLongLists: lists of a hundred thousand are not compared each
// with each, which would take hours, and that is said.
func TestComparisonOfLongLists(t *testing.T) {
	t.Parallel()
	const n = 100_000
	p, err := parseAll("version: 1\ngroups:\n  a:\n" + numbered(n, "  - spiffe://a/%d\n") + "  b:\n" + numbered(n, "  - spiffe://a/b%d\n") +
		"rules:\n- {id: a, effect: allow, from: [group:a]}\n- {id: b, effect: allow, from: [group:b]}\n")
	if err != nil {
		t.Fatal(err)
	}
	c := NewComparison(nil, p)
	c.AskAround()
	if !c.Incomplete || c.Asked == 0 {
		t.Errorf("asked %d, incomplete %v", c.Asked, c.Incomplete)
	}
}

// TestLimitsAndShadowThatDiffer: what no request shows is told of by name.
func TestLimitsAndShadowThatDiffer(t *testing.T) {
	const (
		was = "rules: [{id: s, effect: deny, shadow: true}, {id: now, effect: deny, shadow: true}]\nlimits: [{id: a, rps: 5}, {id: gone, rps: 1}, {id: whom, rps: 1}, {id: same, rps: 1}]"
		is  = "rules: [{id: s, effect: deny, shadow: true, on: [x]}, {id: now, effect: deny}, {id: new, effect: deny, shadow: true}]\nlimits: [{id: a, rps: 6}, {id: new, connections: 2}, {id: whom, rps: 1, on: [x]}, {id: same, rps: 1}]"
	)
	c := comparison(t, was, is)
	var got []string
	for _, l := range c.Limits() {
		text := l.ID
		for _, one := range []*Limit{l.Was, l.Is} {
			if text += " | "; one != nil {
				text += one.String()
			}
		}
		got = append(got, text)
	}
	want := []string{
		"a | 5 a second per identity, 5 at once | 6 a second per identity, 6 at once",
		"gone | 1 a second per identity, 1 at once | ",
		"new |  | 2 connections per identity",
		"whom | 1 a second per identity, 1 at once | 1 a second per identity, 1 at once",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
	if got := strings.Join(c.Reported(), " "); got != "new s" {
		t.Errorf("reported only: %s", got)
	}
	none := NewComparison(nil, nil)
	if len(none.Limits()) != 0 || len(none.Reported()) != 0 {
		t.Error("no policies differ")
	}
}
