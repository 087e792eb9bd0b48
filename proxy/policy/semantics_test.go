package policy

import (
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// request asks at the inbound end of listener "orders". An empty ID is an
// unauthenticated peer.
func request(from, to string) Request {
	peer := func(id string) Peer {
		if id == "" {
			return Peer{Unauthenticated: true}
		}
		return Peer{ID: spiffeid.RequireFromString(id), Serial: "1f", Issuer: "aabb"}
	}
	return Request{Listener: "orders", Direction: Inbound, From: peer(from), To: peer(to)}
}

const (
	web    = "spiffe://example.org/ns/shop/sa/web"
	orders = "spiffe://example.org/ns/shop/sa/orders"
	other  = "spiffe://partner.example/exports/stock"
)

func TestSemantics(t *testing.T) {
	allowWeb := "rules: [{id: a, effect: allow, from: ['" + web + "']}]"
	type asked struct {
		from, to, on string
		at           Direction
		want         string // "allow:rule", "deny:rule", or the reason
	}
	tests := []struct {
		name, policy string
		asked        []asked
	}{
		{"no rules allow nothing", "groups: {}", []asked{{web, orders, "", Inbound, NoRule.String()}}},
		{"an allow allows whom it names, at both ends, on every listener", allowWeb, []asked{
			{web, orders, "", Inbound, "allow:a"},
			{web, orders, "", Outbound, "allow:a"},
			{web, other, "billing", Inbound, "allow:a"},
			{orders, web, "", Inbound, NoRule.String()},
			{"", orders, "", Inbound, NoRule.String()},
			{web, "", "", Inbound, "allow:a"},
		}},
		{"to", "rules: [{id: a, effect: allow, from: ['" + web + "'], to: ['" + orders + "']}]", []asked{
			{web, orders, "", Inbound, "allow:a"},
			{web, web, "", Inbound, NoRule.String()},
			{web, "", "", Inbound, NoRule.String()},
		}},
		{"on", "rules: [{id: a, effect: allow, on: [orders, carts], from: ['" + web + "']}]", []asked{
			{web, orders, "orders", Inbound, "allow:a"},
			{web, orders, "carts", Outbound, "allow:a"},
			{web, orders, "order", Inbound, NoRule.String()},
			{web, orders, "elsewhere", Inbound, NoRule.String()},
		}},
		{"at inbound", "rules: [{id: a, effect: allow, at: inbound, from: ['" + web + "']}]", []asked{
			{web, orders, "", Inbound, "allow:a"},
			{web, orders, "", Outbound, NoRule.String()},
			{web, orders, "", Direction(7), NoRule.String()},
		}},
		{"at outbound", "rules: [{id: a, effect: allow, at: outbound, from: ['" + web + "']}]", []asked{
			{web, orders, "", Inbound, NoRule.String()},
			{web, orders, "", Outbound, "allow:a"},
		}},
		{"groups", "groups: {g: ['" + web + "', 'spiffe://example.org/ns/*/sa/cron']}\nrules: [{id: a, effect: allow, from: ['group:g'], to: ['group:g']}]", []asked{
			{web, web, "", Inbound, "allow:a"},
			{"spiffe://example.org/ns/x/sa/cron", web, "", Inbound, "allow:a"},
			{web, orders, "", Inbound, NoRule.String()},
		}},
		{"any deny that matches comes before any allow", "rules:\n- {id: a, effect: allow, from: ['" + web + "']}\n- {id: z, effect: deny, from: ['spiffe://example.org/**']}", []asked{
			{web, orders, "", Inbound, "deny:z"},
		}},
		{"a deny needs no from, and then covers plaintext", "rules:\n- {id: a, effect: allow, from: [unauthenticated, '" + web + "']}\n- {id: d, effect: deny, on: [closed]}", []asked{
			{web, orders, "open", Inbound, "allow:a"},
			{web, orders, "closed", Inbound, "deny:d"},
			{"", orders, "closed", Inbound, "deny:d"},
			{"", orders, "open", Inbound, "allow:a"},
		}},
		{"plaintext matches unauthenticated only", "rules:\n- {id: a, effect: allow, from: ['spiffe://example.org/**']}\n- {id: b, effect: allow, on: [p], from: [unauthenticated]}", []asked{
			{"", orders, "x", Inbound, NoRule.String()},
			{"", orders, "p", Inbound, "allow:b"},
			{"", orders, "p", Outbound, "allow:b"}, // asked nowhere: an outbound connection comes from our SVID
			{web, orders, "p", Inbound, "allow:a"},
			{other, orders, "p", Inbound, NoRule.String()},
		}},
		{"the smallest id is reported", "rules:\n- {id: c10, effect: allow, from: ['" + web + "']}\n- {id: c9, effect: allow, from: ['spiffe://example.org/**']}\n- {id: c1, effect: allow, from: ['spiffe://example.org/ns/*/sa/web'], to: ['" + orders + "']}\n- {id: b, effect: deny, at: outbound, from: ['" + web + "']}\n- {id: a, effect: deny, at: outbound, from: ['spiffe://example.org/ns/**']}", []asked{
			{web, orders, "", Inbound, "allow:c1"},
			{web, web, "", Inbound, "allow:c10"},
			{orders, web, "", Inbound, "allow:c9"},
			{web, web, "", Outbound, "deny:a"},
		}},
		{"revoked, before all rules", allowWeb + "\nrevoked: ['" + web + "', 'spiffe://example.org/ns/old/**']", []asked{
			{web, orders, "", Inbound, RevokedFrom.String()},
			{orders, web, "", Inbound, RevokedTo.String()},
			{web, web, "", Inbound, RevokedFrom.String()},
			{orders, "spiffe://example.org/ns/old/sa/x", "", Inbound, RevokedTo.String()},
			{orders, "spiffe://example.org/ns/older/sa/x", "", Inbound, NoRule.String()},
			{"", web, "", Inbound, RevokedTo.String()},
		}},
		{"a revoked certificate", allowWeb + "\nrevoked: [{issuer: 'AA:BB', serial: '00:1F'}]", []asked{
			{web, orders, "", Inbound, RevokedFrom.String()},
		}},
		{"a certificate of another authority", allowWeb + "\nrevoked: [{issuer: 'AA:BC', serial: 1F}, {issuer: aabb, serial: 1}]", []asked{
			{web, orders, "", Inbound, "allow:a"},
		}},
		{"a ceiling, before all rules, on both sides", "trust_domains: {partner.example: {ids: [/exports/**, /x/*/y]}}\nrules: [{id: a, effect: allow, from: ['spiffe://partner.example/**', '" + web + "']}, {id: d, effect: deny, from: ['spiffe://partner.example/imports/**']}]", []asked{
			{other, orders, "", Inbound, "allow:a"},
			{"spiffe://partner.example/x/1/y", orders, "", Inbound, "allow:a"},
			{"spiffe://partner.example/exports", orders, "", Inbound, Ceiling.String()},
			{"spiffe://partner.example/exportsx/1", orders, "", Inbound, Ceiling.String()},
			{"spiffe://partner.example/imports/1", orders, "", Inbound, Ceiling.String()},
			{"spiffe://partner.example", orders, "", Inbound, Ceiling.String()},
			{web, "spiffe://partner.example/imports/1", "", Outbound, Ceiling.String()},
			{web, other, "", Outbound, "allow:a"},
			{web, orders, "", Inbound, "allow:a"},
			{"", other, "", Inbound, NoRule.String()},
		}},
		{"revoked comes before the ceiling", "trust_domains: {partner.example: {ids: [/exports/**]}}\nrevoked: ['spiffe://partner.example/**']", []asked{
			{"spiffe://partner.example/imports/1", orders, "", Inbound, RevokedFrom.String()},
		}},
		{"a ceiling of all leaves out what is reserved", "trust_domains: {partner.example: {ids: ['/**']}}\nrules: [{id: a, effect: allow, from: ['spiffe://partner.example/spire/server', '" + other + "']}]", []asked{
			{other, orders, "", Inbound, "allow:a"},
			{"spiffe://partner.example/spire/server", orders, "", Inbound, Ceiling.String()},
		}},
		{"the reserved paths must be named", "rules: [{id: a, effect: allow, from: ['spiffe://example.org/**']}, {id: b, effect: allow, on: [admin], from: ['spiffe://example.org/spire/**']}]", []asked{
			{"spiffe://example.org/spire/server", orders, "", Inbound, NoRule.String()},
			{"spiffe://example.org/spire/agent/x509pop/1", orders, "", Inbound, NoRule.String()},
			{"spiffe://example.org/spire/server", orders, "admin", Inbound, "allow:b"},
			{"spiffe://example.org/spired/server", orders, "", Inbound, "allow:a"},
			{"spiffe://example.org/x/spire/server", orders, "", Inbound, "allow:a"},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			evaluators := evaluatorsOf(t, tt.policy)
			for _, a := range tt.asked {
				q := request(a.from, a.to)
				q.Direction = a.at
				if a.on != "" {
					q.Listener = a.on
				}
				// These rules ask for nothing of HTTP: seeing it changes nothing.
				for _, q.HTTP = range []*HTTP{nil, {Method: "GET", Host: "shop.example", Path: "/v1/orders"}} {
					for _, e := range evaluators {
						if d := e.decide(&q); inShort(d) != a.want || d.Allow != strings.HasPrefix(a.want, "allow:") {
							t.Errorf("%s: %s: %+v, want %s", e.name, described(&q), d, a.want)
						}
					}
				}
			}
		})
	}
}

// evaluator is one of the two that tables are held against.
type evaluator struct {
	name   string
	decide func(*Request) Decision
	limits func(*Request) []Limit
}

// evaluatorsOf reads a policy for both.
func evaluatorsOf(t *testing.T, text string) []evaluator {
	t.Helper()
	text = "version: 1\n" + text + "\n"
	slow := slowRead(t, text)
	out := []evaluator{{"slow", slow.answer, slow.limitsOf}}
	p, err := Parse("p.yaml", []byte(text))
	if err != nil {
		t.Errorf("%v\n%s", err, text)
		return out
	}
	return append(out, evaluator{"policy", func(q *Request) (d Decision) {
		p.Decide(q, &d)
		return d
	}, func(q *Request) (limits []Limit) {
		for _, l := range p.Limits(q, nil) {
			limits = append(limits, *l)
		}
		return limits
	}})
}

// inShort is "allow:rule", "deny:rule", or the reason.
func inShort(d Decision) string {
	switch d.Reason {
	case AllowRule:
		return "allow:" + d.Rule
	case DenyRule:
		return "deny:" + d.Rule
	}
	return d.Reason.String()
}

// described is a request with what its pointer points to.
func described(q *Request) string {
	shown := *q
	shown.HTTP = nil
	if q.HTTP == nil {
		return fmt.Sprintf("%+v", shown)
	}
	return fmt.Sprintf("%+v %+v", *q.HTTP, shown)
}

func TestNilPolicyDenies(t *testing.T) {
	var p *Policy
	q := request(web, orders)
	d := Decision{Allow: true, Rule: "x", Reason: AllowRule, Generation: 3}
	p.Decide(&q, &d)
	if d.Allow || d.Rule != "" || d.Reason != NoPolicy || d.Generation != 0 {
		t.Errorf("%+v, want a denial for want of a policy", d)
	}
	if p.Admit(&q) != Never || p.Rules() != 0 || p.Files() != nil || p.Listeners() != nil || p.Generation() != 0 {
		t.Error("a nil policy has something to say")
	}
	if e := p.Explain(&q); e.Decision.Reason != NoPolicy || e.Detail == "" || len(e.Rules) != 0 {
		t.Errorf("%+v, want the missing policy explained", e)
	}
	if (Decision{}).Reason != NoPolicy || (Decision{}).Allow {
		t.Error("the zero decision is no denial")
	}
}
