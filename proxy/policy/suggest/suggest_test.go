package suggest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

const (
	web    = "spiffe://example.org/ns/shop/sa/web"
	cron   = "spiffe://example.org/ns/shop/sa/cron"
	orders = "spiffe://example.org/ns/shop/sa/orders"
)

var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func connection(from string) telemetry.Access {
	return telemetry.Access{Time: noon, Action: "connection", Listener: "orders", Direction: "inbound", From: from, To: orders, Decision: "allow", Plaintext: from == policy.Unauthenticated}
}

func request(from, method, path string) telemetry.Access {
	a := connection(from)
	a.Action, a.HTTP = "request", &telemetry.AccessHTTP{Method: method, Host: "orders.shop", Path: path, Status: 200}
	return a
}

func logOf(records ...telemetry.Access) *bytes.Buffer {
	var b bytes.Buffer
	for i := range records {
		b.Write(append(records[i].AppendJSON(nil), '\n'))
	}
	return &b
}

func suggested(t *testing.T, o Options, records ...telemetry.Access) string {
	t.Helper()
	var s Sightings
	if _, err := Read(logOf(records...), func(a *telemetry.Access) { s.Add(a, &o) }); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := s.Write(&b, s.Rules(o), o); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestSuggest(t *testing.T) {
	denied := connection(cron)
	denied.Decision = "deny"
	would := connection(cron)
	would.Decision = "would_deny"
	for name, tt := range map[string]struct {
		options Options
		records []telemetry.Access
		want    string
	}{
		"connections": {Options{}, []telemetry.Access{connection(web), connection(web), connection(cron), denied}, `
  # seen 3 times
  - id: cron-and-1-speaks-to-orders
    effect: allow
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/cron", "spiffe://example.org/ns/shop/sa/web"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
`},
		"what an audit let pass": {Options{}, []telemetry.Access{would}, `
  # seen once, 1 of them refused by the rules of that time
  - id: cron-speaks-to-orders
    effect: allow
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/cron"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
`},
		"what was denied": {Options{Denied: true, Shadow: true}, []telemetry.Access{denied, denied}, `
  # seen 2 times, 2 of them refused by the rules of that time
  - id: cron-speaks-to-orders
    effect: allow
    shadow: true
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/cron"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
`},
		"plaintext": {Options{}, []telemetry.Access{connection(policy.Unauthenticated), connection(web)}, `
  # seen once
  - id: web-speaks-to-orders
    effect: allow
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/web"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
  # seen once
  - id: unauthenticated-speaks-to-orders
    effect: allow
    on: [orders]
    at: inbound
    from: [unauthenticated]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
`},
		"requests": {Options{}, []telemetry.Access{
			request(web, "GET", "/v1/orders/7"), request(web, "GET", "/v1/orders/8"), request(web, "GET", "/v1/orders/0190163d-8694-739b-aea5-966c26f8ad90/lines"),
			request(web, "GET", "/healthz"), request(web, "POST", "/v1/orders"), request(web, "GET", "/v1/orders"), request(web, "GET", "/"),
		}, `
  # seen 5 times; 5 different requests, like GET /
  - id: web-reads-orders
    effect: allow
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/web"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
    http: {methods: [GET], paths: ["/", "/healthz", "/v1/orders/{order_id}", "/v1/orders/{order_id}/lines"]}
  # seen 2 times; 2 different requests, like GET /v1/orders
  - id: web-speaks-to-orders
    effect: allow
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/web"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
    http: {methods: [GET, POST], paths: ["/v1/orders"]}
`},
	} {
		t.Run(name, func(t *testing.T) {
			got := suggested(t, tt.options, tt.records...)
			if _, err := policy.Parse("suggested.yaml", []byte(got)); err != nil {
				t.Error(err)
			}
			_, rules, _ := strings.Cut(got, "rules:")
			if rules != tt.want {
				t.Errorf("got\n%s\nwant\n%s", rules, tt.want)
			}
		})
	}
}

// TestSuggestedRulesAllowWhatWasSeen, and nothing of who was not seen.
func TestSuggestedRulesAllowWhatWasSeen(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	words := []string{"v1", "orders", "items", "7", "42", "0190163d8694739b", "a*b", "**", "%7Bx%7D", "é", "", "deadbeefcafe", "A-1"}
	for seed := range 200 {
		var records []telemetry.Access
		for range 1 + r.IntN(60) {
			path := ""
			for range 1 + r.IntN(5) {
				path += "/" + words[r.IntN(len(words))]
			}
			if r.IntN(3) == 0 {
				path += fmt.Sprintf("/n%d", r.IntN(30))
			}
			records = append(records, request([]string{web, cron}[r.IntN(2)], []string{"GET", "POST"}[r.IntN(2)], path))
			if r.IntN(10) == 0 {
				records = append(records, connection(web))
			}
		}
		text := suggested(t, Options{}, records...)
		if !strings.Contains(text, "- id:") {
			continue
		}
		p, err := policy.Parse("suggested.yaml", []byte(text))
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, text)
		}
		for i := range records {
			q, err := Request(&records[i])
			if q != nil && q.HTTP == nil {
				q.HTTP = &policy.HTTP{} // of a connection
			}
			if err != nil || strings.Contains(q.HTTP.Path, "//") {
				continue // such as a path with raw UTF-8, which no proxy passes on
			}
			var d policy.Decision
			if p.Decide(q, &d); !d.Allow {
				t.Fatalf("seed %d: %+v is not allowed by\n%s", seed, q.HTTP, text)
			}
			q.From = policy.Peer{Unauthenticated: true}
			if p.Decide(q, &d); d.Allow {
				t.Fatalf("seed %d: somebody else is allowed by\n%s", seed, text)
			}
		}
	}
}

func TestNothingForWhatIsAllowed(t *testing.T) {
	p, err := policy.Parse("p.yaml", []byte("version: 1\nrules:\n- {id: a, effect: allow, from: ['"+web+"']}\n- {id: d, effect: deny, from: ['"+cron+"']}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got := suggested(t, Options{Policy: p, Denied: true}, connection(web), connection(cron)); strings.Contains(got, "- id:") {
		t.Errorf("suggested\n%s", got)
	}
}

func TestReadCounts(t *testing.T) {
	failed := connection(web)
	failed.Decision = ""
	log := logOf(connection(web), failed)
	log.WriteString("{\"@timestamp\":\"2026-\n\nnginx: hello\n" + strings.Repeat("x", 3*maxLine) + "\n{}\n")
	last := connection(web)
	log.Write(last.AppendJSON(nil)) // without a line end
	n := 0
	stats, err := Read(log, func(*telemetry.Access) { n++ })
	if err != nil || n != 2 || stats != (Stats{Records: 2, Other: 1, Strange: 4}) {
		t.Errorf("%d records, %+v, %v", n, stats, err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(logOf(request(web, "GET", "/v1/orders/7"), connection(cron)).Bytes())
	f.Fuzz(func(t *testing.T, log []byte) {
		var s Sightings
		if _, err := Read(bytes.NewReader(log), func(a *telemetry.Access) { s.Add(a, &Options{Denied: true}) }); err != nil {
			t.Fatal(err)
		}
		rules := s.Rules(Options{})
		var b strings.Builder
		if err := s.Write(&b, rules, Options{}); err != nil {
			t.Fatal(err)
		}
		if len(rules) == 0 {
			return
		}
		if _, err := policy.Parse("suggested.yaml", []byte(b.String())); err != nil {
			t.Fatalf("%v\n%s", err, b.String())
		}
	})
}
