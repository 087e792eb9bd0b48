package policy

import (
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// speaking is the request with a valid JWT-SVID for that ID.
func (a ask) speaking(id string) ask {
	http := *a.HTTP
	http.Subject = spiffeid.RequireFromString(id)
	a.HTTP = &http
	return a
}

// unproven is the request where nobody looked for a JWT-SVID.
func (a ask) unproven() ask {
	http := *a.HTTP
	http.NoProof = true
	a.HTTP = &http
	return a
}

const anna = "spiffe://example.org/users/anna"

// subjectConditions: web asks, for itself, for anna, or without a JWT-SVID.
var subjectConditions = []conditionTest{
	{"no subjects", "ports: [8443]", []conditionCase{
		{get("/"), both},
		{get("/").speaking(web), both},
		{get("/").speaking(anna), denies}, // who is allowed itself is not allowed for everybody
		{get("/").speaking(anna).unproven(), both},
		{get("/").speaking(anna).outbound(), both}, // the token is for the far end
		{get("/").plaintext().speaking(web), denies},
		{get("/").plaintext(), both},
	}},
	{"methods alone", "http: {methods: [GET]}", []conditionCase{
		{get("/").speaking(web), both},
		{get("/").speaking(anna), denies},
		{do("PUT", "/").speaking(anna), neither},
	}},
	{"subjects", "http: {subjects: ['spiffe://example.org/users/*', 'group:partners']}", []conditionCase{
		{get("/").speaking(anna), both},
		{get("/").speaking(other), both},
		{get("/").plaintext().speaking(anna), both},
		{get("/").speaking(orders), neither},
		{get("/").speaking(web), neither},
		{get("/").speaking("spiffe://example.org/users"), neither},
		{get("/"), neither},
		{get("/").unproven(), denies},
		{get("/").outbound(), both},
		{get("/").speaking(orders).outbound(), both},
		{tcp(), denies},
		{tcp().outbound(), both},
	}},
	{"the peer itself", "http: {subjects: ['" + web + "']}", []conditionCase{
		{get("/").speaking(web), both},
		{get("/"), neither},
		{get("/").from(orders).speaking(web), both}, // orders speaks for web
		{get("/").from(orders).speaking(orders), neither},
	}},
	{"subjects beside the rest of http", "http: {methods: [GET], paths: [/a], subjects: ['" + anna + "']}", []conditionCase{
		{get("/a").speaking(anna), both},
		{get("/b").speaking(anna), neither},
		{do("PUT", "/a").speaking(anna), neither},
		{get("/a/").speaking(anna), denies},
		{get("/a"), neither},
		{get("/b").outbound(), neither},
		{get("/b").unproven(), neither},
		{get("/a").unproven(), denies},
	}},
	{"subjects beside ports", "http: {subjects: ['" + anna + "']}\nports: [8443]", []conditionCase{
		{get("/").speaking(anna), both},
		{get("/").speaking(anna).port(1), neither},
		{get("/").unproven().port(1), neither},
		{tcp().port(1), neither},
	}},
	{"subjects of gRPC", "grpc: {services: [shop.Orders], subjects: ['" + anna + "']}", []conditionCase{
		{call("/shop.Orders/Get").speaking(anna), both},
		{call("/shop.Orders/Get").speaking(web), neither},
		{call("/shop.Orders/Get"), neither},
		{call("/shop.Stock/Get").speaking(anna), neither},
		{get("/shop.Orders/Get").speaking(anna), denies},
	}},
	{"subjects of any gRPC", "grpc: {subjects: ['" + anna + "']}", []conditionCase{
		{call("/shop.Orders/Get").speaking(anna), both},
		{get("/").speaking(anna), neither},
	}},
	{"many subjects", "http: {subjects: [" + strings.Repeat("'spiffe://example.org/u', ", fewPatterns) + "'" + anna + "', 'spiffe://example.org/g/**']}", []conditionCase{
		{get("/").speaking(anna), both},
		{get("/").speaking("spiffe://example.org/g/1"), both},
		{get("/").speaking("spiffe://example.org/users/anne"), neither},
	}},
}

func TestSubjectConditions(t *testing.T) {
	t.Parallel()
	for _, c := range subjectConditions {
		t.Run(c.name, c.run)
	}
}

// TestSubjectBars: whom a request speaks for may be revoked, or outside of a
// ceiling, whatever rules say.
func TestSubjectBars(t *testing.T) {
	t.Parallel()
	const rules = "trust_domains: {partner.example: {ids: [/exports/**]}}\nrevoked: ['" + anna + "', 'spiffe://example.org/old/**']\n" +
		"rules: [{id: a, effect: allow, from: ['" + web + "', 'spiffe://partner.example/**'], http: {subjects: ['spiffe://example.org/**', 'spiffe://partner.example/**']}}]"
	for _, e := range evaluatorsOf(t, rules) {
		for _, tt := range []struct {
			ask  ask
			want string
		}{
			{get("/").speaking(web), "allow:a"},
			{get("/").speaking(anna), RevokedSubject.String()},
			{get("/").speaking("spiffe://example.org/old/x"), RevokedSubject.String()},
			{get("/").speaking(other), "allow:a"},
			{get("/").speaking("spiffe://partner.example/imports"), Ceiling.String()},
			{get("/").from("spiffe://partner.example/imports").speaking(anna), RevokedSubject.String()},
			{get("/").from("spiffe://partner.example/imports").speaking(web), Ceiling.String()},
			{get("/").from(anna).speaking(anna), RevokedFrom.String()},
			{get("/").speaking(anna).outbound(), "allow:a"},
			{get("/").speaking(anna).unproven(), NoRule.String()},
			{get("/"), NoRule.String()},
		} {
			if got := inShort(e.decide(&tt.ask.Request)); got != tt.want {
				t.Errorf("%s: %s: %s, want %s", e.name, described(&tt.ask.Request), got, tt.want)
			}
		}
	}
	if !RevokedSubject.Revoked() || RevokedSubject.Code() != "revoked" {
		t.Error("a revoked subject is no revocation")
	}
}

// TestNeedsSubject: who could be allowed with a JWT-SVID is told apart from who
// could not.
func TestNeedsSubject(t *testing.T) {
	t.Parallel()
	const rules = "rules:\n" +
		"- {id: a, effect: allow, on: [orders], from: ['" + web + "'], http: {paths: [/a], subjects: ['" + anna + "']}}\n" +
		"- {id: b, effect: allow, on: [orders], from: ['" + web + "'], http: {paths: [/b], subjects: ['" + anna + "']}, shadow: true}\n" +
		"- {id: c, effect: allow, on: [orders], from: ['" + web + "'], http: {paths: [/c]}, when: 'request.subject == from.id'}\n" +
		"- {id: d, effect: allow, on: [orders], from: ['" + web + "'], http: {paths: [/d]}}\n" +
		"- {id: e, effect: deny, from: ['" + web + "'], http: {paths: [/e]}}\n" +
		"- {id: f, effect: allow, from: ['" + web + "'], http: {paths: [/e], subjects: ['" + anna + "']}}"
	for _, e := range evaluatorsOf(t, rules) {
		for _, tt := range []struct {
			ask  ask
			want bool
		}{
			{get("/a"), true},
			{get("/a").speaking(orders), false}, // it has one, and is not allowed
			{get("/a").speaking(anna), false},
			{get("/a").unproven(), false}, // nobody would look
			{get("/a").outbound(), false},
			{get("/a").on("billing"), false},
			{get("/a").from(orders), false},
			{get("/x"), false},
			{get("/b"), false},
			{get("/c"), true},
			{get("/c").speaking(web), false},
			{get("/d"), false},
			{get("/e"), false},
			{tcp(), false},
		} {
			if d := e.decide(&tt.ask.Request); d.NeedsSubject != tt.want || d.Allow && d.NeedsSubject {
				t.Errorf("%s: %s: %+v, want that it needs a subject: %t", e.name, described(&tt.ask.Request), d, tt.want)
			}
		}
	}
}

// TestSubjectOfManyRules: rules in buckets, and those that ask for identities
// alone, all step back for who speaks for another.
func TestSubjectOfManyRules(t *testing.T) {
	t.Parallel()
	var rules strings.Builder
	rules.WriteString("rules:\n- {id: plain, effect: allow, on: [plain], from: ['" + web + "']}\n")
	for _, id := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		rules.WriteString("- {id: " + id + ", effect: allow, on: [orders], from: ['" + web + "'], http: {paths: [/" + id + "]}}\n")
	}
	rules.WriteString("- {id: z, effect: allow, on: [orders], from: ['" + web + "'], http: {paths: [/c], subjects: ['" + anna + "']}}\n")
	for _, e := range evaluatorsOf(t, rules.String()) {
		for _, tt := range []struct {
			ask  ask
			want string
		}{
			{get("/c"), "allow:c"},
			{get("/c").speaking(web), "allow:c"},
			{get("/c").speaking(anna), "allow:z"},
			{get("/d").speaking(anna), NoRule.String()},
			{get("/").on("plain"), "allow:plain"},
			{get("/").on("plain").speaking(anna), NoRule.String()},
		} {
			if got := inShort(e.decide(&tt.ask.Request)); got != tt.want {
				t.Errorf("%s: %s: %s, want %s", e.name, described(&tt.ask.Request), got, tt.want)
			}
		}
	}
}

// TestExplainSubjects says why rules are not for whom a request speaks for.
func TestExplainSubjects(t *testing.T) {
	t.Parallel()
	p, err := Parse("p.yaml", []byte("version: 1\ntrust_domains: {partner.example: {ids: [/exports/**]}}\nrevoked: ['spiffe://example.org/old']\nrules:\n"+
		"- {id: a, effect: allow, from: ['"+web+"']}\n"+
		"- {id: b, effect: allow, from: ['"+web+"'], grpc: {subjects: ['"+anna+"']}}\n"+
		"- {id: c, effect: deny, http: {subjects: ['spiffe://example.org/x']}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		ask  ask
		want []string // parts of the detail and of the misses
	}{
		{call("/a/b").speaking(orders), []string{
			"from " + web + " for " + orders + " to",
			"http.subjects wants a request for the peer itself, and it speaks for " + orders,
			"grpc.subjects wants a JWT-SVID for " + anna + ", not " + orders,
			"http.subjects wants a JWT-SVID for spiffe://example.org/x, not " + orders,
		}},
		{call("/a/b"), []string{"grpc.subjects wants a JWT-SVID for " + anna + ", and there is none"}},
		{call("/a/b").unproven(), []string{"grpc.subjects wants a JWT-SVID for " + anna + ", and none is looked for here"}},
		{call("/a/b").speaking("spiffe://example.org/old"), []string{"subject spiffe://example.org/old is revoked by spiffe://example.org/old (p.yaml:3:11)"}},
		{call("/a/b").speaking("spiffe://partner.example/x"), []string{"subject spiffe://partner.example/x is outside the ceiling of partner.example"}},
	} {
		e := p.Explain(&tt.ask.Request)
		said := []string{e.Detail}
		for _, n := range e.Rules {
			for _, m := range n.Misses {
				said = append(said, m.Condition+" "+m.Why)
			}
		}
		for _, want := range tt.want {
			if !slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, want) }) {
				t.Errorf("%s: want %q in\n%s", described(&tt.ask.Request), want, strings.Join(said, "\n"))
			}
		}
	}
	q := call("/a/b").outbound().Request
	if e := p.Explain(&q); !e.Rules[1].Granted || !e.Rules[2].Granted || e.Rules[0].Granted {
		t.Errorf("%+v: what is not known at the outbound end is granted to b and c", e.Rules)
	}
}

// TestBlindToSubjects names the rules that a listener without JWT-SVIDs has no
// use for, or too much.
func TestBlindToSubjects(t *testing.T) {
	t.Parallel()
	p, err := Parse("p.yaml", []byte("version: 1\nrules:\n"+
		"- {id: a, effect: allow, on: [orders], from: ['"+web+"'], http: {subjects: ['"+anna+"']}}\n"+
		"- {id: b, effect: allow, on: [orders], from: ['"+web+"'], http: {methods: [GET]}}\n"+
		"- {id: c, effect: deny, when: 'request.subject == \"\"'}\n"))
	if err != nil {
		t.Fatal(err)
	}
	for d, want := range map[Direction]string{Inbound: "a c", Outbound: "c"} {
		var got []string
		for _, n := range p.BlindToSubjects("orders", d, spiffeid.ID{}) {
			got = append(got, n.ID)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %s", d, got, want)
		}
	}
}

// TestSubjectsAllocateNothing keeps a decision on a request with a JWT-SVID off
// the heap, be the list of subjects short or long.
func TestSubjectsAllocateNothing(t *testing.T) {
	long := strings.Repeat("'spiffe://example.org/u', ", fewPatterns) + "'" + anna + "'"
	p, err := Parse("p.yaml", []byte("version: 1\nrevoked: ['spiffe://example.org/old/*']\nrules:\n"+
		"- {id: a, effect: allow, from: ['"+web+"'], http: {paths: [/a], subjects: ['"+anna+"', 'spiffe://example.org/s/*']}}\n"+
		"- {id: b, effect: allow, from: ['"+web+"'], http: {paths: [/b], subjects: ["+long+"]}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	requests := []ask{get("/a").speaking(anna), get("/b").speaking(anna), get("/a"), get("/b").speaking(orders), get("/a").speaking("spiffe://example.org/old/1")}
	var d Decision
	i := 0
	if n := testing.AllocsPerRun(1000, func() {
		p.Decide(&requests[i%len(requests)].Request, &d)
		i++
	}); n != 0 {
		t.Errorf("%v allocations per decision, want none", n)
	}
}
