package proxy

import (
	"net/http"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/policy"
)

const answerRules = `version: 1
rules:
  - {id: web-reads, effect: allow, on: [envoy], from: ["spiffe://example.org/web"], http: {methods: [GET], paths: ["/v1/**"]}}
  - {id: batch, effect: allow, on: [envoy], from: ["spiffe://example.org/batch"]}
  - {id: old, effect: allow, on: [envoy], from: ["spiffe://example.org/old"]}
  - {id: no-admin, effect: deny, http: {paths: ["/v1/admin"]}}
  - {id: later, effect: deny, shadow: true, from: ["spiffe://example.org/batch"]}
  - {id: spoken-for, effect: allow, on: [envoy], from: ["spiffe://example.org/gateway"], http: {subjects: ["spiffe://example.org/user"]}}
limits:
  - {id: few, on: [envoy], from: ["spiffe://example.org/batch"], rps: 0.01, burst: 2}
revoked: ["spiffe://example.org/old"]
`

// askedOf returns a question of Envoy.
func askedOf(from, method, path string) *policy.Request {
	return &policy.Request{
		Listener: "envoy",
		From:     policy.Peer{ID: spiffeid.RequireFromString("spiffe://example.org/" + from)},
		To:       policy.Peer{ID: spiffeid.RequireFromString("spiffe://example.org/orders")},
		HTTP:     &policy.HTTP{Method: method, Host: "orders", Path: path, NoProof: true},
	}
}

func answering(t *testing.T, rules string, m *telemetry.Metrics) *Proxy {
	t.Helper()
	ca := testca.New(t, "example.org")
	compiled, err := policy.Parse("rules.yaml", []byte(rules))
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Config{Policy: compiled, Identities: source(t, ca.SVID("/orders"), ca), Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func TestAnswer(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		q        *policy.Request
		audit    bool
		status   int
		decision outcome
		rule     string
		shadow   []string
	}{
		"allowed":                     {q: askedOf("web", "GET", "/v1/orders"), decision: allowed, rule: "web-reads"},
		"by nobody":                   {q: askedOf("web", "PUT", "/v1/orders"), status: http.StatusForbidden, decision: denied},
		"denied":                      {q: askedOf("web", "GET", "/v1/admin"), status: http.StatusForbidden, decision: denied, rule: "no-admin"},
		"denied, audited":             {q: askedOf("web", "GET", "/v1/admin"), audit: true, decision: audited, rule: "no-admin"},
		"revoked":                     {q: askedOf("old", "GET", "/v1/orders"), status: http.StatusForbidden, decision: denied},
		"revoked, audited":            {q: askedOf("old", "GET", "/v1/orders"), audit: true, status: http.StatusForbidden, decision: denied},
		"in shadow":                   {q: askedOf("batch", "GET", "/"), decision: allowed, rule: "batch", shadow: []string{"later"}},
		"a subject that nobody knows": {q: askedOf("gateway", "GET", "/"), status: http.StatusForbidden, decision: denied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := answering(t, answerRules, nil)
			var r telemetry.Access
			status, after := p.Answer(c.q, c.audit, &r)
			if status != c.status || after != "" {
				t.Errorf("status %d, after %q, want %d", status, after, c.status)
			}
			if r.Decision != string(c.decision) || r.Rule != c.rule || !slices.Equal(r.Shadow, c.shadow) || r.Generation != 1 {
				t.Errorf("recorded %+v", r)
			}
			if (r.Reason != "") != (c.status != 0) || (r.WouldDeny != "") != (c.decision == audited) {
				t.Errorf("reason %q, would deny %q", r.Reason, r.WouldDeny)
			}
		})
	}
}

func TestAnswerWithoutPolicy(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	p, err := New(Config{Identities: source(t, ca.SVID("/orders"), ca)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if status, _ := p.Answer(askedOf("web", "GET", "/"), true, &telemetry.Access{}); status != http.StatusForbidden {
		t.Errorf("an audit without rules answers %d", status)
	}
}

func TestAnswerLimits(t *testing.T) {
	t.Parallel()
	m := telemetry.NewMetrics()
	p := answering(t, answerRules, m)
	for n, want := range []int{0, 0, http.StatusTooManyRequests} {
		var r telemetry.Access
		status, after := p.Answer(askedOf("batch", "GET", "/"), false, &r)
		if status != want || (after == "100") != (want != 0) {
			t.Errorf("request %d: status %d, after %q, want %d", n, status, after, want)
		}
		if (r.Limit == "few") != (want != 0) || r.Decision != string(allowed) {
			t.Errorf("request %d: recorded %+v", n, r)
		}
	}
	counts := map[string]float64{}
	m.Each(func(s telemetry.Sample) {
		if len(s.LabelValues) > 0 && s.LabelValues[0] == "envoy" {
			counts[s.Name+" "+s.LabelValues[1]] += s.Value
		}
	})
	for name, want := range map[string]float64{"narthex_policy_decisions_total batch": 3, "narthex_policy_decisions_total later": 3, "narthex_limited_total few": 1} {
		if counts[name] != want {
			t.Errorf("%s is %g, want %g", name, counts[name], want)
		}
	}
}

func TestBars(t *testing.T) {
	t.Parallel()
	p := answering(t, answerRules+"trust_domains: {partner.example: {ids: [/exports/**]}}\n", nil)
	for id, barred := range map[string]bool{
		"spiffe://example.org/web": false, "spiffe://example.org/old": true,
		"spiffe://partner.example/exports/a": false, "spiffe://partner.example/other": true,
	} {
		if why := p.Bars(policy.Peer{ID: spiffeid.RequireFromString(id)}); (why != "") != barred {
			t.Errorf("%s: %q, want barred: %t", id, why, barred)
		}
	}
}
