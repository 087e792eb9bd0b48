package suggest

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math/rand/v2"
	"slices"
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

// sightings are what New saw of the records.
func sightings(t *testing.T, o Options, records ...telemetry.Access) (*Sightings, string) {
	t.Helper()
	s := New(o)
	if _, err := Read(logOf(records...), s.Add); err != nil {
		t.Fatal(err)
	}
	text := s.Text(s.Rules())
	if err := s.Check(text); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return s, text
}

func suggested(t *testing.T, o Options, records ...telemetry.Access) string {
	t.Helper()
	_, text := sightings(t, o, records...)
	return text
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
  # seen once, refused by the rules of that time
  - id: cron-speaks-to-orders
    effect: allow
    on: [orders]
    at: inbound
    from: ["spiffe://example.org/ns/shop/sa/cron"]
    to: ["spiffe://example.org/ns/shop/sa/orders"]
`},
		"what was denied": {Options{Denied: true, Shadow: true}, []telemetry.Access{denied, denied}, `
  # seen 2 times, refused by the rules of that time
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
    http:
      methods: [GET]
      paths: ["/", "/healthz", "/v1/orders/{order_id}", "/v1/orders/{order_id}/lines"]

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
		o := Options{MinCount: r.IntN(3)}
		s, text := sightings(t, o, records...)
		if sum := s.Taken + s.Rare + s.Idle + s.Odd; sum != len(records) {
			t.Errorf("seed %d: %d records became %d", seed, len(records), sum)
		}
		p, err := policy.Parse("suggested.yaml", []byte(text))
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, text)
		}
		taken := 0
		for i := range records {
			q, err := Request(&records[i])
			if err != nil {
				continue // such as a path with raw UTF-8, which no proxy passes on
			}
			var d policy.Decision
			if p.Decide(q, &d); d.Allow {
				taken++
			}
			q.From = policy.Peer{Unauthenticated: true}
			if p.Decide(q, &d); d.Allow {
				t.Fatalf("seed %d: somebody else is allowed by\n%s", seed, text)
			}
			q.From, q.Listener = policy.Peer{ID: q.To.ID}, "other"
			if p.Decide(q, &d); d.Allow {
				t.Fatalf("seed %d: elsewhere is allowed by\n%s", seed, text)
			}
		}
		if taken < s.Taken || taken > s.Taken && o.MinCount <= 1 { // {name} covers its rare neighbours too
			t.Errorf("seed %d: %d records are allowed, %d were taken", seed, taken, s.Taken)
		}
	}
}

func TestNothingForWhatIsAllowed(t *testing.T) {
	p, err := policy.Parse("p.yaml", []byte("version: 1\nrules:\n- {id: a, effect: allow, from: ['"+web+"']}\n- {id: d, effect: deny, from: ['"+cron+"']}\n"))
	if err != nil {
		t.Fatal(err)
	}
	s, got := sightings(t, Options{Policy: p, Denied: true}, connection(web), connection(cron))
	if strings.Contains(got, "- id:") || s.Allowed != 1 || s.Barred != 1 {
		t.Errorf("suggested\n%s\n%+v", got, s)
	}
	if _, err := policy.Parse("suggested.yaml", []byte(got)); err != nil {
		t.Error(err)
	}
}

// TestIDs: none is too long, taken twice, or taken by a rule that is there.
func TestIDs(t *testing.T) {
	p, err := policy.Parse("p.yaml", []byte("version: 1\nrules:\n- {id: web-speaks-to-orders, effect: deny, from: ['spiffe://example.org/x']}\n- {id: web-speaks-to-orders-3, effect: deny, from: ['spiffe://example.org/x']}\n"))
	if err != nil {
		t.Fatal(err)
	}
	on := func(listener, from string) telemetry.Access {
		a := connection(from)
		a.Listener = listener
		return a
	}
	long := "spiffe://example.org/" + strings.Repeat("a", 300)
	got := suggested(t, Options{Policy: p}, on("a", web), on("b", web), on("on", web), on("7", long), connection("spiffe://example.org/7"))
	for _, want := range []string{"- id: web-speaks-to-orders-2\n", "- id: web-speaks-to-orders-4\n", "- id: web-speaks-to-orders-5\n", "- id: " + strings.Repeat("a", 40) + "-speaks-to-orders\n", "- id: \"7-speaks-to-orders\"\n", "on: [\"on\"]", "on: [\"7\"]"} {
		if strings.Count(got, want) != 1 {
			t.Errorf("want once %q in\n%s", want, got)
		}
	}
}

// TestConnectionsOfRequests: what came to a listener of requests is suggested
// by its requests alone.
func TestConnectionsOfRequests(t *testing.T) {
	refused := request(cron, "GET", "/")
	refused.Decision = "deny"
	s, got := sightings(t, Options{}, connection(web), request(web, "GET", "/"), connection(cron), refused)
	if strings.Count(got, "- id:") != 1 || strings.Count(got, "http: {") != 1 || s.Idle != 2 || s.Taken != 1 || s.Denied != 1 {
		t.Errorf("suggested\n%s\n%+v", got, s)
	}
}

func TestMinCount(t *testing.T) {
	s, got := sightings(t, Options{MinCount: 2}, request(web, "GET", "/a"), request(web, "GET", "/a"), request(web, "DELETE", "/a"), request(web, "GET", "/b"), request(cron, "GET", "/a"))
	if !strings.Contains(got, "http: {methods: [GET], paths: [\"/a\"]}\n") || strings.Contains(got, "cron") || s.Taken != 2 || s.Rare != 3 {
		t.Errorf("suggested\n%s\n%+v", got, s)
	}
}

// TestOdd: what nobody can write a rule for, or a rule could not be read with,
// is counted and left out.
func TestOdd(t *testing.T) {
	for name, change := range map[string]func(*telemetry.Access){
		"a listener":      func(a *telemetry.Access) { a.Listener = "x]\n    from: [unauthenticated" },
		"a direction":     func(a *telemetry.Access) { a.Direction = "inbound\n    shadow: true" },
		"no direction":    func(a *telemetry.Access) { a.Direction = "" },
		"from a domain":   func(a *telemetry.Access) { a.From = "spiffe://example.org" },
		"from nobody":     func(a *telemetry.Access) { a.From = "" },
		"to nobody":       func(a *telemetry.Access) { a.To = "" },
		"to plaintext":    func(a *telemetry.Access) { a.To = policy.Unauthenticated },
		"outbound, plain": func(a *telemetry.Access) { a.Plaintext, a.Direction = true, "outbound" },
		"a method":        func(a *telemetry.Access) { a.HTTP.Method = "GET], paths: [\"/**\"" },
		"a small method":  func(a *telemetry.Access) { a.HTTP.Method = "get" },
		"dots":            func(a *telemetry.Access) { a.HTTP.Path = "/a/../b" },
		"a line":          func(a *telemetry.Access) { a.HTTP.Path = "/a\n  - id: x" },
		"two slashes":     func(a *telemetry.Access) { a.HTTP.Path = "//a" },
		"asterisk":        func(a *telemetry.Access) { a.HTTP.Method, a.HTTP.Path = "OPTIONS", "*" },
		"a long path":     func(a *telemetry.Access) { a.HTTP.Path = strings.Repeat("/a/7", 200) },
		"a host":          func(a *telemetry.Access) { a.HTTP.Host = "a b" },
	} {
		a := request(web, "GET", "/")
		change(&a)
		if s, got := sightings(t, Options{}, a); s.Odd != 1 || strings.Contains(got, "- id") {
			t.Errorf("%s: %+v\n%s", name, s, got)
		}
	}
	// The longest that is taken becomes no pattern that is too long.
	if s, got := sightings(t, Options{}, request(web, "GET", strings.Repeat("/abcdefghij/7", 59))); s.Odd != 0 {
		t.Errorf("%+v\n%s", s, got)
	}
	// OPTIONS * can be asked about.
	asterisk := request(web, "OPTIONS", "*")
	if q, err := Request(&asterisk); err != nil || q.HTTP.Path != "*" {
		t.Errorf("%+v, %v", q, err)
	}
}

func TestRequestIsOfItsBeginning(t *testing.T) {
	a := connection(web)
	a.Duration, a.Source, a.Port, a.ServerName, a.Serial = 90*time.Minute, "10.1.2.3:4", 8443, "orders.shop", "1f"
	q, err := Request(&a)
	if err != nil || !q.Time.Equal(noon.Add(-90*time.Minute)) || q.Source.String() != "10.1.2.3:4" || q.Port != 8443 || q.SNI != "orders.shop" || q.From.Serial != "1f" {
		t.Errorf("%+v, %v", q, err)
	}
}

func TestShadowRules(t *testing.T) {
	strict, loose := connection(web), connection(cron)
	strict.Shadow = []string{"no-web"}
	loose.Decision, loose.Shadow = "would_deny", []string{"cron-too", "no-web"}
	s, _ := sightings(t, Options{}, strict, strict, loose)
	rules, complete := s.ShadowRules()
	if got := fmt.Sprint(rules); !complete || got != fmt.Sprint([]ShadowRule{{"no-web", 1, 2, noon}, {"cron-too", 1, 0, noon}}) {
		t.Errorf("%s", got)
	}
}

// TestBounds: who writes endless records gets no endless memory.
func TestBounds(t *testing.T) {
	s := New(Options{})
	for i := range maxCalls + 10 {
		a := request(web, "GET", fmt.Sprintf("/x%d", i))
		a.Shadow = []string{fmt.Sprint(i)}
		s.Add(&a)
	}
	if rules, complete := s.ShadowRules(); s.Taken != maxCalls || s.Beyond != 10 || len(rules) != maxShadows || complete {
		t.Errorf("%d taken, %d beyond, %d shadow rules", s.Taken, s.Beyond, len(rules))
	}
	text := s.Text(s.Rules())
	if err := s.Check(text); err != nil || !strings.Contains(text, `paths: ["/{id}"]`) {
		t.Errorf("%v\n%.1000s", err, text)
	}
}

func TestReadCounts(t *testing.T) {
	failed := connection(web)
	failed.Decision = ""
	log := logOf(connection(web), failed)
	strange := connection(web)
	strange.Decision = "perhaps"
	log.Write(append(strange.AppendJSON(nil), '\n'))
	log.WriteString("{\"@timestamp\":\"2026-\n\nnginx: hello\n" + strings.Repeat("x", 3*maxLine) + "\n{}\n" + strings.Repeat(" ", 3*maxLine) + "\n")
	last := connection(web)
	log.Write(last.AppendJSON(nil)) // without a line end
	n := 0
	stats, err := Read(log, func(*telemetry.Access) { n++ })
	if err != nil || n != 2 || stats != (Stats{Records: 2, Other: 1, Strange: 5}) {
		t.Errorf("%d records, %+v, %v", n, stats, err)
	}
}

func TestReadPacked(t *testing.T) {
	log := logOf(connection(web), connection(cron)).Bytes()
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, _ = w.Write(log)
	_ = w.Close()
	double := append(slices.Clone(packed.Bytes()), packed.Bytes()...) // as logs that were put together
	if stats, err := Read(bytes.NewReader(double), func(*telemetry.Access) {}); err != nil || stats.Records != 4 {
		t.Errorf("%+v, %v", stats, err)
	}
	for name, broken := range map[string][]byte{"cut": packed.Bytes()[:packed.Len()-4], "only the beginning": packed.Bytes()[:2], "not packed": append([]byte{0x1f, 0x8b}, log...)} {
		if _, err := Read(bytes.NewReader(broken), func(*telemetry.Access) {}); err == nil || !strings.HasPrefix(err.Error(), "read access log: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(logOf(request(web, "GET", "/v1/orders/7"), connection(cron)).Bytes())
	f.Fuzz(func(t *testing.T, log []byte) {
		s := New(Options{Denied: true})
		_, _ = Read(bytes.NewReader(log), s.Add) // fails where gzip does
		text := s.Text(s.Rules())
		if err := s.Check(text); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
	})
}
