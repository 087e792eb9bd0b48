package policy

import (
	"slices"
	"strings"
	"testing"
)

// TestShadow: what shadow rules would have changed is told, and nothing is
// changed.
func TestShadow(t *testing.T) {
	t.Parallel()
	const (
		allow       = "\n- {id: a, effect: allow, from: ['" + web + "']}"
		shadowDeny  = "\n- {id: sd, effect: deny, shadow: true}"
		shadowAllow = "\n- {id: sa, effect: allow, shadow: true, from: ['spiffe://example.org/**']}"
		deny        = "\n- {id: d, effect: deny, http: {paths: [/secret]}}"
	)
	type asked struct {
		ask  ask
		want string // the decision, and the shadow rules
	}
	noRule, revoked, ceiling := NoRule.String(), RevokedFrom.String(), Ceiling.String()
	many := ""
	for _, id := range []string{"s9", "s1", "s5", "s10", "s3", "s7", "s2", "s8", "s6", "s4"} {
		many += "\n- {id: " + id + ", effect: deny, shadow: true}"
	}
	for _, tt := range []struct {
		name, policy string
		asked        []asked
	}{
		{"shadow: false is as without", "rules: [{id: a, effect: allow, shadow: false, from: ['" + web + "']}]", []asked{
			{tcp(), "allow:a"},
			{tcp().from(orders), noRule},
		}},
		{"an allow in shadow allows nothing", "rules:" + shadowAllow, []asked{
			{tcp(), noRule + " sa"},
			{get("/"), noRule + " sa"},
			{tcp().outbound(), noRule + " sa"},
			{tcp().from(other), noRule},
			{tcp().plaintext(), noRule},
		}},
		{"a deny in shadow denies nothing", "rules:" + allow + shadowDeny, []asked{
			{tcp(), "allow:a sd"},
			{get("/").outbound(), "allow:a sd"},
			{tcp().from(orders), noRule}, // it would have changed nothing
		}},
		{"of both effects", "rules:" + allow + shadowDeny + shadowAllow + deny, []asked{
			{get("/"), "allow:a sd"},
			{get("/").from(orders), noRule + " sa"},
			{get("/secret"), "deny:d"}, // neither would have changed it
			{get("/secret/"), "deny:d"},
			{tcp(), "deny:d"},
		}},
		{"the conditions of shadow rules count", "rules:" + allow + "\n- {id: sd, effect: deny, shadow: true, http: {methods: [PUT]}}\n- {id: sa, effect: allow, shadow: true, from: ['" + orders + "'], http: {methods: [GET]}}", []asked{
			{do("PUT", "/"), "allow:a sd"},
			{get("/"), "allow:a"},
			{tcp(), "allow:a sd"}, // not visible: a deny matches
			{get("/").from(orders), noRule + " sa"},
			{do("PUT", "/").from(orders), noRule},
			{tcp().from(orders), noRule}, // not visible: an allow does not match, inbound
			{tcp().from(orders).outbound(), noRule + " sa"},
		}},
		{"not past what rules cannot change", "trust_domains: {partner.example: {ids: [/exports/**]}}\nrevoked: ['" + orders + "']\nrules:" + shadowDeny + "\n- {id: sa, effect: allow, shadow: true, from: ['spiffe://partner.example/**', 'spiffe://example.org/**']}", []asked{
			{tcp().from(orders), revoked},
			{tcp().from("spiffe://partner.example/x").to(web), ceiling},
			{tcp().from(other).to(web), noRule + " sa"},
			{get("/").from(orders), revoked},
			{get("/").from("spiffe://partner.example/x").to(web), ceiling},
		}},
		{"the first eight by id", "rules:" + allow + many, []asked{
			{tcp(), "allow:a s1 s10 s2 s3 s4 s5 s6 s7"},
			{tcp().from(orders), noRule},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, e := range evaluatorsOf(t, tt.policy) {
				for _, a := range tt.asked {
					q := &a.ask.Request
					d := e.decide(q)
					if got := strings.Join(append([]string{inShort(d)}, d.Shadow...), " "); got != a.want {
						t.Errorf("%s: %s: %s, want %s", e.name, described(q), got, a.want)
					}
				}
			}
		})
	}
}

// TestEffectsMeet: rules on the same identities that differ in what they ask of
// a request.
func TestEffectsMeet(t *testing.T) {
	t.Parallel()
	const policy = `rules:
- {id: c-read, effect: allow, from: [WEB], http: {methods: [GET, HEAD], paths: ["/v1/orders/**", "/v1/orders"]}}
- {id: b-one, effect: allow, from: [WEB], http: {methods: [GET], paths: ["/v1/orders/{id}"]}}
- {id: a-literal, effect: allow, from: [WEB], http: {paths: ["/v1/orders/7"], headers: {x-env: [prod]}}}
- {id: x-secret, effect: deny, from: [WEB], http: {paths: ["/v1/orders/secret"]}}
- {id: w-secret, effect: deny, from: [WEB], http: {paths: ["/v1/{any}/secret"], headers: {x-env: [prod]}}}
- {id: y-debug, effect: deny, http: {headers: {x-debug: present}}}
- {id: g-call, effect: allow, from: [WEB], grpc: {services: [shop.Orders]}}
- {id: v-put, effect: deny, grpc: {services: [shop.Orders], methods: [Put]}}
`
	evaluators := evaluatorsOf(t, strings.ReplaceAll(policy, "WEB", `"`+web+`"`))
	for _, tt := range []struct {
		ask  ask
		want string
	}{
		{get("/v1/orders"), "allow:c-read"},
		{get("/v1/orders/"), "allow:c-read"},
		{get("/v1/orders/8"), "allow:b-one"},
		{do("HEAD", "/v1/orders/8"), "allow:c-read"},
		{do("POST", "/v1/orders/8"), NoRule.String()},
		{get("/v1/orders/7"), "allow:b-one"},
		{get("/v1/orders/7").header("x-env", "prod"), "allow:a-literal"},
		{do("POST", "/v1/orders/7").header("x-env", "prod"), "allow:a-literal"},
		{do("POST", "/v1/orders/7").header("x-env", "prod").header("x-env", "test"), NoRule.String()},
		{get("/v1/orders/7/lines"), "allow:c-read"},
		{get("/v1/orders/secret"), "deny:x-secret"},
		{get("/v1/orders/secret/"), "deny:x-secret"},
		{get("/v1/orders/secret").header("x-env", "prod"), "deny:w-secret"},
		{get("/v1/orders/secret").header("x-env", "test,prod"), "deny:w-secret"},
		{get("/v1/orders/secret/plan"), "allow:c-read"},
		{get("/v1/items/secret"), NoRule.String()},
		{get("/v1/items/secret").header("x-env", "prod"), "deny:w-secret"},
		{get("/v1/orders/8").header("x-debug", ""), "deny:y-debug"},
		{get("/v1/orders/8").header("x-debug", "1").from(orders), "deny:y-debug"},
		{get("/v1/orders/8").from(orders), NoRule.String()},
		{call("/shop.Orders/Get"), "allow:g-call"},
		{call("/shop.Orders/Put"), "deny:v-put"},
		{get("/shop.Orders/Put"), "deny:v-put"},
		{get("/shop.Orders/Get"), NoRule.String()},
		{do("OPTIONS", "*"), NoRule.String()},
		{do("OPTIONS", "*").header("x-debug", "1"), "deny:y-debug"},
		{tcp(), "deny:v-put"}, // every deny may be meant
		{tcp().outbound(), "deny:v-put"},
		{tcp().from(orders), "deny:v-put"},
	} {
		q := &tt.ask.Request
		for _, e := range evaluators {
			if d := e.decide(q); inShort(d) != tt.want {
				t.Errorf("%s: %s: %s, want %s", e.name, described(q), inShort(d), tt.want)
			}
		}
	}
}

// TestInvisibleAllows: an outbound allow takes its conditions on HTTP as met,
// an inbound one as not met.
func TestInvisibleAllows(t *testing.T) {
	t.Parallel()
	evaluators := evaluatorsOf(t, "rules:\n- {id: h, effect: allow, from: ['"+web+"'], http: {methods: [GET]}}\n- {id: z, effect: allow, from: ['"+web+"'], at: inbound, ports: [8443]}")
	for _, tt := range []struct {
		ask  ask
		want string
	}{
		{tcp(), "allow:z"},
		{tcp().port(1), NoRule.String()},
		{tcp().outbound(), "allow:h"},
		{get("/"), "allow:h"},
		{do("PUT", "/"), "allow:z"},
		{do("PUT", "/").outbound(), NoRule.String()},
	} {
		q := &tt.ask.Request
		for _, e := range evaluators {
			if d := e.decide(q); inShort(d) != tt.want {
				t.Errorf("%s: %s: %s, want %s", e.name, described(q), inShort(d), tt.want)
			}
		}
	}
}

func TestAdmit(t *testing.T) {
	t.Parallel()
	const (
		all      = "\n- {id: all, effect: allow, from: ['spiffe://example.org/**']}"
		reads    = "\n- {id: reads, effect: allow, from: ['spiffe://example.org/**'], http: {methods: [GET]}}"
		noWrites = "\n- {id: no-writes, effect: deny, http: {methods: [PUT]}}"
		closed   = "\n- {id: closed, effect: deny, on: [orders]}"
	)
	for _, tt := range []struct {
		name, policy string
		ask          ask
		want         Admission
	}{
		{"no rule", "groups: {}", tcp(), Never},
		{"an allow", "rules:" + all, tcp(), Always},
		{"an allow, outbound", "rules:" + all, tcp().outbound(), Always},
		{"an allow of another", "rules:" + all, tcp().from(other), Never},
		{"an allow by HTTP", "rules:" + reads, tcp(), PerRequest},
		{"an allow by HTTP, outbound", "rules:" + reads, tcp().outbound(), PerRequest},
		{"an allow by HTTP of another", "rules:" + reads, tcp().from(other), Never},
		{"an allow by path", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], http: {paths: ['/x']}}", tcp(), PerRequest},
		{"an allow by host", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], http: {hosts: ['x']}}", tcp(), PerRequest},
		{"an allow by header", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], http: {headers: {x: absent}}}", tcp(), PerRequest},
		{"an allow by grpc", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], grpc: {methods: [Get]}}", tcp(), PerRequest},
		{"an allow by when", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], when: 'request.method == \"GET\"'}", tcp(), PerRequest},
		{"an allow by the time, then", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], when: 'request.time.getHours(\"UTC\") < 6'}", tcp().at("2026-01-01T05:00:00Z"), Always},
		{"an allow by the time, not then", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], when: 'request.time.getHours(\"UTC\") < 6'}", tcp(), Never},
		{"an allow whose when fails", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], when: '1000 / connection.port == 0'}", tcp().port(0), Never},
		{"two allows", "rules:" + all + reads, tcp(), Always},
		{"an allow by HTTP on another listener", "rules:\n- {id: a, effect: allow, on: [carts], from: ['" + web + "'], http: {methods: [GET]}}", tcp(), Never},
		{"an allow by HTTP at the other end", "rules:\n- {id: a, effect: allow, at: outbound, from: ['" + web + "'], http: {methods: [GET]}}", tcp(), Never},
		{"an allow by HTTP to another", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], to: ['" + web + "'], http: {methods: [GET]}}", tcp(), Never},
		{"an allow by HTTP from elsewhere", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], source_ip: [10.0.0.0/8], http: {methods: [GET]}}", tcp().source("11.0.0.1"), Never},
		{"an allow by HTTP from nowhere", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], source_ip: [10.0.0.0/8], http: {methods: [GET]}}", tcp().noSource(), Never},
		{"an allow by HTTP on another port", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], ports: [1], http: {methods: [GET]}}", tcp(), Never},
		{"an allow by HTTP for another name", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], sni: [x], http: {methods: [GET]}}", tcp(), Never},
		{"an allow by HTTP, when it is", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], when: 'from.authenticated', http: {methods: [GET]}}", tcp(), PerRequest},
		{"an allow by HTTP, when it is not", "rules:\n- {id: a, effect: allow, from: ['" + web + "'], when: 'connection.direction == \"inbound\"', http: {methods: [GET]}}", tcp().outbound(), Never},
		{"a deny", "rules:" + all + closed, tcp(), Never},
		{"a deny elsewhere", "rules:" + all + closed, tcp().on("carts"), Always},
		{"a deny beside an allow by HTTP", "rules:" + reads + closed, tcp(), Never},
		{"a deny by HTTP", "rules:" + all + noWrites, tcp(), PerRequest},
		{"a deny by HTTP, outbound", "rules:" + all + noWrites, tcp().outbound(), PerRequest},
		{"a deny by HTTP, and no allow", "rules:" + noWrites, tcp(), Never},
		{"a deny by HTTP, and no allow of this one", "rules:" + all + noWrites, tcp().plaintext(), Never},
		{"a deny by HTTP on another port", "rules:" + all + "\n- {id: d, effect: deny, ports: [1], http: {methods: [PUT]}}", tcp(), Always},
		{"a deny by HTTP on a port nobody knows", "rules:" + all + "\n- {id: d, effect: deny, ports: [1], http: {methods: [PUT]}}", tcp().port(0), PerRequest},
		{"a deny by when", "rules:" + all + "\n- {id: d, effect: deny, when: 'request.method == \"GET\"'}", tcp(), PerRequest},
		{"a deny by grpc", "rules:" + all + "\n- {id: d, effect: deny, grpc: {services: [shop.Orders]}}", tcp(), PerRequest},
		{"a deny whose when fails", "rules:" + all + "\n- {id: d, effect: deny, when: '1000 / connection.port == 0'}", tcp().port(0), Never},
		{"both by HTTP", "rules:" + reads + noWrites, tcp(), PerRequest},
		{"shadow rules alone", "rules:\n- {id: a, effect: allow, shadow: true, from: ['" + web + "'], http: {methods: [GET]}}", tcp(), Never},
		{"a deny in shadow", "rules:" + all + "\n- {id: d, effect: deny, shadow: true, http: {methods: [PUT]}}", tcp(), Always},
		{"revoked", "rules:" + reads + "\nrevoked: ['" + web + "']", tcp(), Never},
		{"to what is revoked", "rules:" + all + "\nrevoked: ['" + orders + "']", tcp(), Never},
		{"outside the ceiling", "rules:" + reads + "\ntrust_domains: {example.org: {ids: [/exports/**]}}", tcp(), Never},
	} {
		t.Run(tt.name, func(t *testing.T) {
			slow := slowRead(t, "version: 1\n"+tt.policy+"\n")
			q := tt.ask.Request
			if tt.want == PerRequest && !slow.dependsOnHTTP(&q) {
				t.Error("slow: no request can make a difference")
			}
			requests := []*HTTP{get("/").HTTP, do("PUT", "/x").HTTP, do("POST", "/v1/orders").HTTP, call("/shop.Orders/Get").HTTP, get("/").header("x", "1").HTTP}
			for _, q.HTTP = range requests {
				if d := slow.answer(&q); d.Allow && tt.want == Never || !d.Allow && tt.want == Always {
					t.Errorf("slow: %s: %+v, want %v", described(&q), d, tt.want)
				}
			}
			p, err := Parse("p.yaml", []byte("version: 1\n"+tt.policy+"\n"))
			if err != nil {
				t.Fatal(err)
			}
			for _, q.HTTP = range append(requests, nil) { // it is ignored
				if got := p.Admit(&q); got != tt.want {
					t.Errorf("%s: %v, want %v", described(&q), got, tt.want)
				}
			}
		})
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	const policy = `groups: {partners: ["spiffe://partner.example/**"]}
rules: [{id: all, effect: allow, from: ["spiffe://example.org/**"]}]
limits:
- {id: everyone, rps: 50}
- {id: all, per: all, connections: 3}
- {id: here, on: [orders, carts], from: ["spiffe://example.org/ns/*/sa/web"], per: identity, rps: 0.5, burst: 7, connections: 100}
- {id: partners, from: ["group:partners"], rps: 2.5}
- {id: plaintext, from: [unauthenticated], connections: 1}
- {id: to-web, to: ["` + web + `"], rps: 1000000}
`
	everyone := Limit{ID: "everyone", RPS: 50, Burst: 50}
	all := Limit{ID: "all", Per: PerAll, Connections: 3}
	here := Limit{ID: "here", RPS: 0.5, Burst: 7, Connections: 100}
	partners := Limit{ID: "partners", RPS: 2.5, Burst: 3}
	plaintext := Limit{ID: "plaintext", Connections: 1}
	toWeb := Limit{ID: "to-web", RPS: 1e6, Burst: 1e6}
	evaluators := evaluatorsOf(t, policy)
	for _, tt := range []struct {
		ask  ask
		want []Limit
	}{
		{tcp(), []Limit{all, everyone, here}},
		{get("/"), []Limit{all, everyone, here}},
		{tcp().on("carts"), []Limit{all, everyone, here}},
		{tcp().on("x"), []Limit{all, everyone}},
		{tcp().from(orders), []Limit{all, everyone}},
		{tcp().from(other), []Limit{all, everyone, partners}},
		{tcp().plaintext(), []Limit{all, everyone, plaintext}},
		{tcp().nobody(), []Limit{all, everyone}},
		{tcp().to(web), []Limit{all, everyone, here, toWeb}},
		{tcp().toNobody(), []Limit{all, everyone, here}},
		{tcp().outbound(), nil}, // at the inbound end only
		{get("/").to(web).outbound(), nil},
	} {
		q := &tt.ask.Request
		for _, e := range evaluators {
			got := e.limits(q)
			for i := range got {
				if got[i].RPS == 0 {
					got[i].Burst = 0 // means nothing
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%s: %s: %+v, want %+v", e.name, described(q), got, tt.want)
			}
		}
	}
	p, err := Parse("p.yaml", []byte("version: 1\n"+policy))
	if err != nil {
		t.Fatal(err)
	}
	q := tcp().Request
	before := &Limit{ID: "before"}
	if got := p.Limits(&q, []*Limit{before}); len(got) != 4 || got[0] != before {
		t.Errorf("%v, want three appended to the one that was there", got)
	}
	if (*Policy)(nil).Limits(&q, nil) != nil {
		t.Error("no policy has limits")
	}
}

// TestHashTellsPoliciesApart: policies that mean something else have another
// hash, be it by one key.
func TestHashTellsPoliciesApart(t *testing.T) {
	t.Parallel()
	seen := map[[32]byte]string{}
	for _, keys := range []string{
		"description: nothing", "shadow: true", "on: [x]", "on: [y]", "at: inbound", "at: outbound", "to: ['" + web + "']",
		"source_ip: [10.0.0.0/8]", "source_ip: [10.0.0.0/9]", "not_source_ip: [10.0.0.0/8]", "source_ip: [10.0.0.0]",
		"ports: [1]", "ports: [2]", "ports: ['1-2']", "ports: [1, 3]", "sni: [x]", "sni: ['*.x']", "sni: [y]",
		"http: {methods: [GET]}", "http: {methods: [PUT]}", "http: {methods: [GET, PUT]}", "http: {hosts: [x]}", "http: {hosts: ['*.x']}", "http: {hosts: ['x:1']}",
		"http: {paths: [/x]}", "http: {paths: [/x/]}", "http: {paths: ['/{x}']}", "http: {paths: ['/**']}", "http: {paths: ['/x/**']}", "http: {paths: [/GET]}",
		"http: {headers: {x: [a]}}", "http: {headers: {x: [b]}}", "http: {headers: {y: [a]}}", "http: {headers: {x: present}}", "http: {headers: {x: absent}}", "http: {headers: {x: [present]}}", "http: {headers: {x: [absent]}}",
		"http: {headers: {x: [a, b]}}", "http: {headers: {x: [a], b: present}}", "http: {methods: [GET], paths: [/x]}",
		"grpc: {services: [x]}", "grpc: {methods: [x]}", "grpc: {services: [x], methods: [x]}",
		"when: 'from.authenticated'", "when: '!from.authenticated'",
	} {
		p, err := Parse("p.yaml", []byte("version: 1\nrules:\n- {id: a, effect: allow, from: ['spiffe://example.org/**'], "+keys+"}\n"))
		if err != nil {
			t.Error(err)
			continue
		}
		if other, ok := seen[p.Hash()]; ok {
			t.Errorf("%s and %s have the same hash", other, keys)
		}
		seen[p.Hash()] = keys
	}
	for _, limits := range []string{"", "{id: a, rps: 1}", "{id: b, rps: 1}", "{id: a, rps: 2}", "{id: a, rps: 1, burst: 2}", "{id: a, connections: 1}", "{id: a, rps: 1, per: all}", "{id: a, on: [x], rps: 1}", "{id: a, from: ['" + web + "'], rps: 1}", "{id: a, to: ['" + web + "'], rps: 1}"} {
		p, err := Parse("p.yaml", []byte("version: 1\ngroups: {}\n"+strings.Repeat("limits: ["+limits+"]\n", min(1, len(limits)))))
		if err != nil {
			t.Error(err)
			continue
		}
		if other, ok := seen[p.Hash()]; ok {
			t.Errorf("%s and %s have the same hash", other, limits)
		}
		seen[p.Hash()] = "limits " + limits
	}
}
