package policy

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestReview(t *testing.T) {
	for name, tt := range map[string]struct {
		policy string
		want   []string
	}{
		"good": {"rules: [{id: a, effect: allow, from: ['" + web + "']}, {id: d, effect: deny, from: ['" + web + "'], to: ['" + orders + "']}]", nil},
		"a deny covers an allow": {"rules:\n- {id: a, effect: allow, from: ['" + web + "'], http: {methods: [GET]}}\n- {id: d, effect: deny, from: ['spiffe://example.org/ns/**']}", []string{
			`p.yaml:3:4: unreachable-rule: rule "a" never allows anything: deny "d" covers all that it is about (rule "d" p.yaml:4:4)`,
		}},
		"the same, contradicted": {"rules:\n- {id: a, effect: allow, on: [x], at: inbound, from: ['" + web + "'], to: ['" + orders + "']}\n- {id: d, effect: deny, on: [x, y], from: ['" + web + "'], to: ['" + orders + "', '" + web + "']}", []string{
			`p.yaml:3:4: unreachable-rule: rule "a" never allows anything: deny "d" covers all that it is about (rule "d" p.yaml:4:4)`,
		}},
		"a deny that covers a part": {"rules:\n- {id: a, effect: allow, from: ['" + web + "', '" + other + "']}\n- {id: d, effect: deny, from: ['" + web + "']}\n- {id: e, effect: deny, on: [x], from: ['" + other + "']}\n- {id: f, effect: deny, at: inbound, from: ['" + other + "', '" + web + "']}\n- {id: g, effect: deny, from: ['" + other + "', '" + web + "'], ports: [1]}\n- {id: h, effect: deny, shadow: true}", nil},
		"a deny of everybody": {"rules:\n- {id: a, effect: allow, from: [unauthenticated]}\n- {id: d, effect: deny}", []string{
			`p.yaml:3:4: unreachable-rule: rule "a" never allows anything: deny "d" covers all that it is about (rule "d" p.yaml:4:4)`,
		}},
		"revoked": {"rules:\n- {id: a, effect: allow, from: ['" + web + "'], to: ['" + orders + "']}\nrevoked: ['spiffe://example.org/ns/shop/sa/orders']", []string{
			`p.yaml:3:4: unreachable-rule: rule "a" never allows anything: the revocation of spiffe://example.org/ns/shop/sa/orders covers all that it is about (the revocation of spiffe://example.org/ns/shop/sa/orders p.yaml:4:11)`,
		}},
		"outside of the ceiling": {"trust_domains: {partner.example: {ids: [/exports/**]}}\nrules:\n- {id: a, effect: allow, from: ['spiffe://partner.example/imports/*']}\n- {id: b, effect: allow, from: ['spiffe://partner.example/*/stock']}", []string{
			`p.yaml:4:4: unreachable-rule: rule "a" never allows anything: the ceiling of partner.example covers all that it is about (the ceiling of partner.example p.yaml:2:17)`,
		}},
		"duplicates": {"groups: {g: ['" + web + "']}\nrules:\n- {id: a, effect: allow, from: ['" + web + "', '" + orders + "']}\n- {id: b, effect: allow, from: ['" + orders + "', '" + web + "']}", []string{
			`p.yaml:2:10: unused-group: group "g": no rule and no limit names it`,
			`p.yaml:5:4: duplicate-rule: rule "b" says what rule "a" says (rule "a" p.yaml:4:4)`,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Parse("p.yaml", []byte("version: 1\n"+tt.policy+"\n"))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, r := range p.Review() {
				line := fmt.Sprintf("%s:%d:%d: %s: %s", r.File, r.Line, r.Column, r.Kind, r.Msg)
				if r.Other.File != "" {
					line += fmt.Sprintf(" (%s %s:%d:%d)", r.Other.What, r.Other.File, r.Other.Line, r.Other.Column)
				}
				got = append(got, line)
				if RemarkKinds[r.Kind] == "" {
					t.Errorf("kind %q is not in the list", r.Kind)
				}
			}
			if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// TestCoversAndMeets holds what is said of two patterns against the IDs of a
// small world.
func TestCoversAndMeets(t *testing.T) {
	segments := []string{"a", "b", "spire"}
	var ids []spiffeid.ID
	for n := 1; n <= 3; n++ {
		for i := range 27 {
			path := ""
			for range n {
				path += "/" + segments[i%3]
				i /= 3
			}
			ids = append(ids, spiffeid.RequireFromString("spiffe://x.org"+path))
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	pattern := func() Pattern {
		path := ""
		words := []string{"a", "b", "spire", "*", "**"}
		for n := 1 + r.IntN(3); n > 0; n-- {
			word := words[r.IntN(5)]
			if word == many && n > 1 {
				word = one
			}
			path += "/" + word
		}
		p, err := ParsePattern("spiffe://x.org" + path)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for range 5000 {
		p, q := pattern(), pattern()
		covers, meets := true, false
		for _, id := range ids {
			meets = meets || p.Match(id) && q.Match(id)
			covers = covers && (p.Match(id) || !q.Match(id))
		}
		if p.meets(q) != meets {
			t.Errorf("%s meets %s: %v, want %v", p, q, p.meets(q), meets)
		}
		// In a world of three segments "/*/*/**" has no more IDs than "/*/*/*".
		if p.covers(q) && !covers {
			t.Errorf("%s covers %s is said, and is not so", p, q)
		}
		if covers && !p.covers(q) && !strings.HasSuffix(q.text, many) {
			t.Errorf("%s covers %s is not said", p, q)
		}
	}
}

// TestReviewOfLongLists: lists of a hundred thousand are not compared each with
// each, which would take hours, and that is said.
func TestReviewOfLongLists(t *testing.T) {
	t.Parallel()
	const n = 100_000
	list := "version: 1\ngroups:\n  a:\n" + numbered(n, "  - spiffe://a/%d\n") + "  b:\n" + numbered(n, "  - spiffe://a/b%d\n")
	for name, rest := range map[string]string{
		"deny":   "rules:\n- {id: d, effect: deny, from: [spiffe://a/0, group:b]}\n- {id: a, effect: allow, from: [spiffe://a/0, group:a]}\n",
		"revoke": "rules:\n- {id: a, effect: allow, from: [group:a, group:b]}\nrevoked:\n" + numbered(n, "- spiffe://a/%d\n"),
	} {
		p, err := parseAll(list + rest)
		if err != nil {
			t.Fatal(err)
		}
		incomplete := false
		for _, r := range p.Review() {
			incomplete = incomplete || r.Kind == "incomplete"
		}
		if !incomplete {
			t.Errorf("%s: %+v", name, p.Review())
		}
	}
}

// TestAllowingGRPC: an allow is named where it is meant for the listener, and a
// deny never is.
func TestAllowingGRPC(t *testing.T) {
	t.Parallel()
	const grpc = ", grpc: {services: [shop.v1.Orders]}}\n"
	p, err := parseAll("version: 1\nrules:\n" +
		"- {id: any, effect: allow, from: ['" + web + "']" + grpc +
		"- {id: 'on', effect: allow, on: [x], from: ['" + web + "']" + grpc +
		"- {id: 'to', effect: allow, from: ['" + web + "'], to: ['" + orders + "']" + grpc +
		"- {id: in, effect: allow, at: inbound, on: [x], from: ['" + web + "']" + grpc +
		"- {id: shadow, effect: allow, shadow: true, on: [x], from: ['" + web + "']" + grpc +
		"- {id: http, effect: allow, on: [x], from: ['" + web + "'], http: {methods: [POST]}}\n" +
		"- {id: plain, effect: allow, on: [x], from: ['" + web + "']}\n" +
		"- {id: deny, effect: deny, on: [x]" + grpc)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		listener string
		d        Direction
		own      string
		want     string
	}{
		{"x", Inbound, "", "in on"},
		{"x", Inbound, orders, "in on to"},
		{"y", Inbound, orders, "to"},
		{"y", Inbound, web, ""},
		{"x", Outbound, orders, "on"},
		{"y", Outbound, orders, ""},
	} {
		own, err := spiffeid.FromString(tt.own)
		if err != nil && tt.own != "" {
			t.Fatal(err)
		}
		var got []string
		for _, r := range p.AllowingGRPC(tt.listener, tt.d, own) {
			got = append(got, r.ID)
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s, %s, own %q: %v, want %s", tt.listener, tt.d, tt.own, got, tt.want)
		}
	}
}

// TestBlind: a rule is named for a listener that it is about, as far as is
// known of it.
func TestBlind(t *testing.T) {
	t.Parallel()
	const http = ", http: {methods: [GET]}}\n"
	p, err := parseAll("version: 1\nrules:\n" +
		"- {id: allow, effect: allow, from: ['" + web + "']" + http +
		"- {id: allow-on, effect: allow, on: [x], from: ['" + web + "']" + http +
		"- {id: allow-to, effect: allow, from: ['" + web + "'], to: ['" + orders + "']" + http +
		"- {id: allow-on-to, effect: allow, on: [x], from: ['" + web + "'], to: ['" + orders + "']" + http +
		"- {id: deny, effect: deny" + http +
		"- {id: deny-to, effect: deny, to: ['" + orders + "']" + http +
		"- {id: deny-in, effect: deny, at: inbound, on: [x, y]" + http +
		"- {id: shadow, effect: deny, shadow: true" + http +
		"- {id: plain, effect: deny}\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		listener string
		d        Direction
		own      string
		want     string
	}{
		{"x", Inbound, "", "allow-on allow-on-to deny deny-in deny-to"},
		{"x", Inbound, orders, "allow-on allow-on-to allow-to deny deny-in deny-to"},
		{"x", Inbound, web, "allow-on deny deny-in"},
		{"y", Inbound, "", "deny deny-in deny-to"},
		{"y", Inbound, orders, "allow-to deny deny-in deny-to"},
		{"z", Inbound, web, "deny"},
		{"x", Outbound, "", "deny deny-to"},
		{"x", Outbound, web, "deny deny-to"},
	} {
		own, err := spiffeid.FromString(tt.own)
		if err != nil && tt.own != "" {
			t.Fatal(err)
		}
		var got []string
		for _, r := range p.Blind(tt.listener, tt.d, own) {
			got = append(got, r.ID)
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s, %s, own %q: %v, want %s", tt.listener, tt.d, tt.own, got, tt.want)
		}
	}
}
