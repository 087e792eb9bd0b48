package policy

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

func TestExplain(t *testing.T) {
	data, err := os.ReadFile("testdata/good/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse("shop.yaml", data)
	if err != nil {
		t.Fatal(err)
	}
	certificate := request(web, orders)
	certificate.To.Issuer, certificate.To.Serial = "a1b2c3d4e5f6071", "C0FFEE"
	outbound := request("spiffe://partner.example/exports/a", orders)
	outbound.Direction, outbound.Listener = Outbound, "delivery"
	tests := []struct {
		name    string
		request Request
		allow   bool
		detail  string
		notes   string // of each rule, by id
	}{
		{"allowed", request(web, orders), true, `allowed by a rule "web-speaks-to-orders" (shop.yaml:10:5)`, `orders-reads-stock: from: wants spiffe://example.org/ns/shop/sa/orders, not spiffe://example.org/ns/shop/sa/web
partner-delivers: on: wants listener delivery, not "orders"
probes-in-plaintext: on: wants listener health, not "orders"
staging-stays-out: from: wants spiffe://example.org/ns/staging/**, not spiffe://example.org/ns/shop/sa/web
web-speaks-to-orders: matches`},
		{"denied", request("spiffe://example.org/ns/staging/sa/web", web), false, `denied by a rule "staging-stays-out" (shop.yaml:29:5)`, `orders-reads-stock: from: wants spiffe://example.org/ns/shop/sa/orders, not spiffe://example.org/ns/staging/sa/web
partner-delivers: on: wants listener delivery, not "orders"
probes-in-plaintext: on: wants listener health, not "orders"
staging-stays-out: matches
web-speaks-to-orders: to: wants spiffe://example.org/ns/shop/sa/orders, not spiffe://example.org/ns/shop/sa/web`},
		{"other end", outbound, false, `no rule allows it: from spiffe://partner.example/exports/a to spiffe://example.org/ns/shop/sa/orders, outbound on "delivery"`, `partner-delivers: at: is for the other end, not outbound`},
		{"unauthenticated", request("", orders), false, `no rule allows it: from unauthenticated to spiffe://example.org/ns/shop/sa/orders, inbound on "orders"`, `web-speaks-to-orders: from: wants group:web, not unauthenticated`},
		{"revoked", request("spiffe://example.org/ns/shop/sa/old", orders), false, `from spiffe://example.org/ns/shop/sa/old is revoked by spiffe://example.org/ns/shop/sa/old (shop.yaml:33:5)`, ""},
		{"certificate", certificate, false, `to spiffe://example.org/ns/shop/sa/orders: its certificate c0ffee of authority a1b2c3d4e5f6071 is revoked (shop.yaml:34:6)`, ""},
		{"ceiling", request(web, "spiffe://partner.example/imports/a"), false, `to spiffe://partner.example/imports/a is outside the ceiling of partner.example: /exports/** (shop.yaml:4:3)`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := p.Explain(&tt.request)
			if e.Decision.Allow != tt.allow || e.Detail != tt.detail {
				t.Errorf("allow %v: %s\nwant %v: %s", e.Decision.Allow, e.Detail, tt.allow, tt.detail)
			}
			var notes []string
			for _, n := range e.Rules {
				if n.Matched {
					notes = append(notes, n.ID+": matches")
				} else {
					notes = append(notes, fmt.Sprintf("%s: %s: %s", n.ID, n.Misses[0].Condition, n.Misses[0].Why))
				}
			}
			got := strings.Join(notes, "\n")
			if strings.Count(tt.notes, "\n") > 0 && got != tt.notes || !strings.Contains(got, tt.notes) {
				t.Errorf("got\n%s\nwant\n%s", got, tt.notes)
			}
		})
	}
}

// TestExplainAgrees finds the rule that decided among those that match.
func TestExplainAgrees(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	for range 100 {
		slow := worldPolicy(r)
		p, err := parseAll(slow.yaml(r, 2)...)
		if err != nil {
			t.Fatal(err)
		}
		for range 30 {
			q := worldRequest(r)
			e := p.Explain(&q)
			var first [2]string // by effect, of those enforced
			for _, n := range e.Rules {
				i := 0
				if n.Allow {
					i = 1
				}
				if n.Matched && !n.Shadow && first[i] == "" {
					first[i] = n.ID
				}
				if n.Matched != (len(n.Misses) == 0) {
					t.Fatalf("%+v", n)
				}
			}
			want := first[0]
			if want == "" {
				want = first[1]
			}
			if e.Decision.Reason >= DenyRule && e.Decision.Rule != want {
				t.Fatalf("%+v: decided by %q, rules that match say %q", q, e.Decision.Rule, want)
			}
		}
	}
}
