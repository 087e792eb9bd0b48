// Package rulemix makes the rules and requests that decisions are measured on:
// any number of rules, always the same for the same seed, as plain data that
// every program under measurement writes in its own language.
//
//	m := rulemix.Generate(rulemix.HTTP, 1000, 1)
//	m.WriteYAML(file)          // as Narthex reads them
//	for _, q := range m.Requests(1024, 1) { … }
//
// Of the rules
//
//	65 %  allow one workload to one workload
//	10 %  do so on one named listener, at the inbound end
//	10 %  allow a namespace (/ns/x/**) to one workload
//	 5 %  allow a service account of any namespace (/ns/*/sa/x) to one workload
//	 5 %  allow a group of ten workloads to one
//	 2 %  deny one workload, whatever it asks for
//	 2 %  deny one workload to one workload
//	 1 %  deny a namespace to a namespace
//
// There are as many namespaces as the tenth part of the rules, ten service
// accounts in each, a group for every twentieth rule, a ceiling on another trust
// domain, and five revoked identities.
//
// In the mix HTTP every second rule also names methods and paths. They come in
// fours for the same workload, as a service has several rules: of two the path is
// one, of one a path and one below it with {id}, of one everything below (**).
// One in five names a host as well, every fourth of these as *.suffix, and one in
// seven asks a header for one of two values. Of the denies, those of one
// workload to one have such conditions.
//
// Of the requests
//
//	58 %  are what some rule is about (in the mix HTTP one in five of them asks
//	      for something else than that rule)
//	20 %  are from a random workload to a random one
//	15 %  are from a workload that no rule names
//	 5 %  are from the other trust domain, half of them outside its ceiling
//	 2 %  are from a revoked identity
//
// Requests of the mix HTTP have seven headers, each once, and no path ends in a
// slash or has an empty segment: there all languages agree on what their
// wildcards mean.
package rulemix

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Kind is one of the two mixes.
type Kind string

// The mixes.
const (
	Identity Kind = "identity" // from, to, on and at alone
	HTTP     Kind = "http"     // half of the rules have conditions on HTTP
)

// Mix is a policy.
type Mix struct {
	Kind    Kind
	Groups  []Group
	Ceiling Ceiling
	Revoked []string // SPIFFE IDs
	Rules   []Rule

	seed       uint64
	namespaces int
}

// Group is a named list of SPIFFE IDs.
type Group struct {
	Name string
	IDs  []string
}

// Ceiling is all that a trust domain may ever do.
type Ceiling struct {
	Domain string
	Path   string // with ** at its end
}

// Rule is one rule. What is empty does not matter to it.
type Rule struct {
	ID    string
	Allow bool
	On    string // a listener
	At    string // inbound
	From  string // a SPIFFE ID, a pattern with * or ** in place of segments, or group:NAME; never empty
	To    string // a SPIFFE ID or a pattern

	Methods, Hosts, Paths []string // as Narthex writes them; any of them
	Header                string   // a name in lower case
	Values                []string // that the header may have
}

// Conditions reports whether the rule asks for anything of HTTP.
func (r *Rule) Conditions() bool { return r.Methods != nil }

// Request is one request in its canonical form.
type Request struct {
	Kind     string // which part of the mix it is
	Listener string
	Outbound bool
	From, To string // SPIFFE IDs

	Method, Host, Path string // empty in the mix Identity
	Headers            []Header
}

// Direction returns inbound or outbound.
func (q *Request) Direction() string {
	if q.Outbound {
		return "outbound"
	}
	return "inbound"
}

// Header is one field of a request.
type Header struct{ Name, Value string }

const (
	domain     = "spiffe://example.org"
	partner    = "partner.example"
	tenant     = "x-tenant"
	listeners  = 8
	accounts   = 10 // in a namespace
	groupSize  = 10
	resources  = 50 // of a service
	tenants    = 20
	revocation = 5
)

func workload(namespace, account int) string {
	return fmt.Sprintf("%s/ns/n%d/sa/s%d", domain, namespace, account)
}

// ruleKinds are the parts of the mix, in percent.
var ruleKinds = []struct {
	share int
	name  string
	set   func(*generator, *Rule)
}{
	{65, "allow one workload to one", func(*generator, *Rule) {}},
	{10, "do so on one listener", func(g *generator, r *Rule) { r.On, r.At = g.listener(), "inbound" }},
	{10, "allow a namespace (`/ns/x/**`) to one workload", func(g *generator, r *Rule) { r.From = g.namespace() }},
	{5, "allow a service account of any namespace (`/ns/*/sa/x`) to one", func(g *generator, r *Rule) {
		r.From = fmt.Sprintf("%s/ns/*/sa/s%d", domain, g.IntN(accounts))
	}},
	{5, "allow a group of ten workloads to one", func(g *generator, r *Rule) {
		r.From = "group:" + g.mix.Groups[g.IntN(len(g.mix.Groups))].Name
	}},
	{2, "deny one workload everything", func(_ *generator, r *Rule) { r.Allow, r.To = false, "" }},
	{2, "deny one workload to one", func(_ *generator, r *Rule) { r.Allow = false }},
	{1, "deny a namespace to a namespace", func(g *generator, r *Rule) {
		r.Allow, r.From, r.To = false, g.namespace(), g.namespace()
	}},
}

// About says in a few sentences what the mixes are made of.
func About() string {
	var rules, requests []string
	for _, k := range ruleKinds {
		rules = append(rules, fmt.Sprintf("%d %% %s", k.share, k.name))
	}
	for _, k := range requestKinds {
		requests = append(requests, fmt.Sprintf("%d %% %s", k.share, k.name))
	}
	return "of the rules " + strings.Join(rules, ", ") + "; with HTTP every second one also names methods and paths " +
		"(one path, one with {id}, or all below it), one in five of these a host, one in seven the values of a header. " +
		"Of the requests " + strings.Join(requests, ", ") + "."
}

// generator makes the parts of a mix.
type generator struct {
	*rand.Rand
	mix  *Mix
	http int  // rules with conditions so far
	last Rule // of them
}

func (m *Mix) generator(stream uint64) *generator {
	return &generator{Rand: rand.New(rand.NewPCG(m.seed, stream)), mix: m}
}

func (g *generator) id() string { return workload(g.IntN(g.mix.namespaces), g.IntN(accounts)) }
func (g *generator) namespace() string {
	return fmt.Sprintf("%s/ns/n%d/**", domain, g.IntN(g.mix.namespaces))
}
func (g *generator) listener() string { return fmt.Sprintf("l%d", g.IntN(listeners)) }
func (g *generator) resource() string { return fmt.Sprintf("/v1/r%d", g.IntN(resources)) }
func (g *generator) tenant() string   { return tenantOf(g.IntN(tenants)) }

func tenantOf(n int) string { return fmt.Sprintf("t%d", n%tenants) }

// Generate makes n rules.
func Generate(kind Kind, n int, seed uint64) *Mix {
	m := &Mix{
		Kind: kind, Ceiling: Ceiling{partner, "/exports/**"},
		seed: seed, namespaces: max(n/accounts, 3),
	}
	g := m.generator(uint64(n))
	for i := range max(n/20, 1) {
		group := Group{Name: fmt.Sprintf("g%d", i)}
		for range groupSize {
			group.IDs = append(group.IDs, g.id())
		}
		m.Groups = append(m.Groups, group)
	}
	for i := range revocation {
		m.Revoked = append(m.Revoked, fmt.Sprintf("%s/ns/gone/sa/%d", domain, i))
	}
	m.Rules = make([]Rule, n)
	for i := range m.Rules {
		m.Rules[i] = g.rule(i)
	}
	return m
}

// rule makes the i-th rule. The kinds are spread evenly, so that small
// policies have a bit of everything.
func (g *generator) rule(i int) Rule {
	r := Rule{ID: fmt.Sprintf("r%06d", i), Allow: true, From: g.id(), To: g.id()}
	at := i * 37 % 100
	for _, kind := range ruleKinds {
		if at -= kind.share; at < 0 {
			kind.set(g, &r)
			break
		}
	}
	if g.mix.Kind == HTTP && (i%4 == 1 || i%4 == 2) { // every second, and none that denies all
		g.conditions(&r)
	}
	return r
}

// conditions gives a rule conditions on HTTP.
func (g *generator) conditions(r *Rule) {
	if g.http%4 != 0 {
		r.To = g.last.To
		if exact(r.From) && exact(g.last.From) {
			r.From = g.last.From
		}
	}
	path := g.resource()
	switch g.http % 4 {
	case 0:
		r.Methods, r.Paths = []string{"GET", "HEAD"}, []string{path, path + "/{id}"}
	case 1:
		r.Methods, r.Paths = []string{"POST"}, []string{path}
	case 2:
		r.Methods, r.Paths = []string{"GET"}, []string{path}
	case 3:
		r.Methods, r.Paths = []string{"GET", "PUT", "DELETE"}, []string{path + "/**"}
	}
	if g.http%5 == 4 {
		r.Hosts = []string{host(r.To)}
		if g.http%20 == 4 {
			r.Hosts = []string{"*.svc.example.org"}
		}
	}
	if g.http%7 == 6 {
		first := g.IntN(tenants)
		r.Header, r.Values = tenant, []string{tenantOf(first), tenantOf(first + 1)}
	}
	g.last = *r
	g.http++
}

func exact(pattern string) bool {
	return !strings.Contains(pattern, "*") && !strings.HasPrefix(pattern, "group:")
}

// host is the name by which a workload is asked.
func host(id string) string {
	words := strings.Split(id, "/") // spiffe: "" example.org ns N sa S
	return words[6] + "." + words[4] + ".svc.example.org"
}

// requestKinds are the parts of the requests, in percent.
var requestKinds = []struct {
	share int
	name  string
	set   func(*generator, *Request)
}{
	{58, "are what a rule is about", (*generator).ofRule},
	{20, "are random", func(g *generator, q *Request) { q.From = g.id() }},
	{15, "come from a workload that no rule names", func(g *generator, q *Request) {
		q.From = fmt.Sprintf("%s/ns/n%d/sa/other%d", domain, g.IntN(g.mix.namespaces), g.IntN(100))
	}},
	{5, "come from another trust domain", func(g *generator, q *Request) {
		area := []string{"exports", "internal"}[g.IntN(2)]
		q.From = fmt.Sprintf("spiffe://%s/%s/e%d", partner, area, g.IntN(100))
	}},
	{2, "come from a revoked identity", func(g *generator, q *Request) { q.From = g.mix.Revoked[g.IntN(len(g.mix.Revoked))] }},
}

// Requests makes requests for the rules. Each has texts of its own, as each
// connection has.
func (m *Mix) Requests(count int, seed uint64) []Request {
	g := m.generator(seed + 1<<32)
	list := make([]Request, count)
	for i := range list {
		list[i] = g.request()
	}
	return list
}

func (g *generator) request() Request {
	q := Request{Listener: g.listener(), Outbound: g.IntN(2) == 1, To: g.id()}
	if g.mix.Kind == HTTP {
		g.ask(&q)
	}
	at := g.IntN(100)
	for _, kind := range requestKinds {
		if at -= kind.share; at < 0 {
			q.Kind = kind.name
			kind.set(g, &q)
			break
		}
	}
	if g.mix.Kind == HTTP && q.Host == "" {
		q.Host = host(q.To)
	}
	return q
}

// ask makes it a request for something or other. Its host is that of the
// workload it goes to, which is not known yet.
func (g *generator) ask(q *Request) {
	q.Method = []string{"GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE"}[g.IntN(7)]
	q.Path = g.resource()
	if g.IntN(2) == 1 {
		q.Path += fmt.Sprintf("/%d", g.IntN(1000))
	}
	q.Headers = []Header{
		{"user-agent", "bench/1.0 (linux; amd64)"},
		{"accept", "application/json"},
		{"content-type", "application/json"},
		{"x-request-id", fmt.Sprintf("%016x", g.Uint64())},
		{"traceparent", fmt.Sprintf("00-%016x%016x-%016x-01", g.Uint64(), g.Uint64(), g.Uint64())},
		{tenant, g.tenant()},
		{"x-forwarded-proto", "https"},
	}
}

// ofRule makes it a request that some rule is about.
func (g *generator) ofRule(q *Request) {
	r := &g.mix.Rules[g.IntN(len(g.mix.Rules))]
	if r.On != "" {
		q.Listener = strings.Clone(r.On)
	}
	if r.At != "" {
		q.Outbound = false
	}
	q.From = g.within(r.From)
	if r.To != "" {
		q.To = g.within(r.To)
	}
	if !r.Conditions() || g.IntN(5) == 0 {
		return
	}
	q.Method = r.Methods[g.IntN(len(r.Methods))]
	q.Path = strings.Replace(r.Paths[g.IntN(len(r.Paths))], "{id}", fmt.Sprint(g.IntN(1000)), 1)
	q.Path = strings.Replace(q.Path, "**", fmt.Sprintf("%d/parts/%d", g.IntN(1000), g.IntN(10)), 1)
	if r.Hosts != nil {
		q.Host = strings.Replace(r.Hosts[0], "*", "any", 1)
	}
	for i := range q.Headers {
		if q.Headers[i].Name == r.Header {
			q.Headers[i].Value = strings.Clone(r.Values[g.IntN(len(r.Values))])
		}
	}
}

// within returns a SPIFFE ID that a pattern or group covers, as a text of its
// own.
func (g *generator) within(pattern string) string {
	if name, ok := strings.CutPrefix(pattern, "group:"); ok {
		for i := range g.mix.Groups {
			if group := &g.mix.Groups[i]; group.Name == name {
				return strings.Clone(group.IDs[g.IntN(len(group.IDs))])
			}
		}
	}
	pattern = strings.Replace(pattern, "**", fmt.Sprintf("sa/s%d", g.IntN(accounts)), 1)
	pattern = strings.Replace(pattern, "*", fmt.Sprintf("n%d", g.IntN(g.mix.namespaces)), 1)
	return strings.Clone(pattern)
}
