package importer

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/policy"
)

// The oracles are the products' own semantics, written down a second time and
// in the plainest way, on text and not on segments. What an import says is
// compared with them, on requests by chance.

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// some returns at least one of the values.
func some[T any](r *rand.Rand, from []T) []T {
	out := []T{pick(r, from)}
	for r.IntN(3) == 0 {
		out = append(out, pick(r, from))
	}
	return out
}

func jsonList(values []string) string { return celList(values) }

func peer(id string) policy.Peer {
	if id == "" {
		return policy.Peer{Unauthenticated: true}
	}
	return policy.Peer{ID: spiffeid.RequireFromString(id)}
}

var (
	meshNamespaces = []string{"shop", "shopping", "a", "istio-system"}
	meshAccounts   = []string{"web", "web2", "orders"}
	meshDomains    = []string{"example.org", "partner.example"}
)

// anyIdentity returns an identity as Istio gives it, or "" for plaintext.
func anyIdentity(r *rand.Rand) string {
	if r.IntN(8) == 0 {
		return ""
	}
	return "spiffe://" + pick(r, meshDomains) + "/ns/" + pick(r, meshNamespaces) + "/sa/" + pick(r, meshAccounts)
}

// istioSource is a source, as Istio takes it: every field that is there must
// hold.
type istioSource struct {
	principals, namespaces, accounts       []string
	notPrincipals, notNamespaces, notAccts []string
}

func (s *istioSource) String() string {
	var parts []string
	for _, f := range []struct {
		key    string
		values []string
	}{
		{"principals", s.principals},
		{"namespaces", s.namespaces},
		{"serviceAccounts", s.accounts},
		{"notPrincipals", s.notPrincipals},
		{"notNamespaces", s.notNamespaces},
		{"notServiceAccounts", s.notAccts},
	} {
		if f.values != nil {
			parts = append(parts, f.key+": "+jsonList(f.values))
		}
	}
	return "{source: {" + strings.Join(parts, ", ") + "}}"
}

func anyPrincipal(r *rand.Rand) string {
	ns, sa := pick(r, meshNamespaces), pick(r, meshAccounts)
	return pick(r, []string{
		"cluster.local/ns/" + ns + "/sa/" + sa, "partner.example/ns/" + ns + "/sa/" + sa,
		"cluster.local/ns/" + ns + "/*", "cluster.local/ns/" + ns + "/sa/*", "*/ns/" + ns + "/sa/" + sa, "*/sa/" + sa, "partner.example/*",
	})
}

func anySource(r *rand.Rand) *istioSource {
	s := &istioSource{}
	switch r.IntN(4) {
	case 0:
		s.principals, s.namespaces = []string{anyPrincipal(r), anyPrincipal(r)}, some(r, meshNamespaces)
	case 1:
		s.namespaces = some(r, meshNamespaces)
	case 2:
		s.accounts = []string{pick(r, meshNamespaces) + "/" + pick(r, meshAccounts), pick(r, meshAccounts)}
	default:
		s.principals = []string{anyPrincipal(r)}
	}
	return s
}

// matches compares texts: all of them, a beginning or an ending.
func textMatches(pattern, value string) bool {
	switch {
	case value == "":
		return false
	case pattern == "*":
		return true
	case strings.HasPrefix(pattern, "*"):
		return strings.HasSuffix(value, pattern[1:])
	case strings.HasSuffix(pattern, "*"):
		return strings.HasPrefix(value, pattern[:len(pattern)-1])
	}
	return pattern == value
}

func (s *istioSource) match(id, ownNamespace string) bool {
	principal := strings.TrimPrefix(id, "spiffe://")
	namespace, account := "", ""
	if parts := strings.Split(principal, "/"); len(parts) == 5 {
		namespace, account = parts[2], parts[2]+"/"+parts[4]
	}
	local := func(p string) bool {
		return textMatches(strings.Replace(p, "cluster.local/", "example.org/", 1), principal)
	}
	in := func(a string) bool {
		if !strings.Contains(a, "/") {
			a = ownNamespace + "/" + a
		}
		return a == account
	}
	for _, f := range []struct {
		values, not []string
		is          func(string) bool
	}{
		{s.principals, s.notPrincipals, local},
		{s.namespaces, s.notNamespaces, func(n string) bool { return textMatches(n, namespace) }},
		{s.accounts, s.notAccts, in},
	} {
		if f.values != nil && !slices.ContainsFunc(f.values, f.is) || slices.ContainsFunc(f.not, f.is) {
			return false
		}
	}
	return true
}

type istioOraclePolicy struct {
	namespace string
	deny      bool
	rules     [][]*istioSource // one of the sources of one rule
}

func (p *istioOraclePolicy) match(from, to string) bool {
	if p.namespace != "istio-system" && !strings.Contains(to, "/ns/"+p.namespace+"/") {
		return false
	}
	return slices.ContainsFunc(p.rules, func(sources []*istioSource) bool {
		return len(sources) == 0 || slices.ContainsFunc(sources, func(s *istioSource) bool { return s.match(from, p.namespace) })
	})
}

func (p *istioOraclePolicy) write(b *strings.Builder, name int) {
	action := "ALLOW"
	if p.deny {
		action = "DENY"
	}
	fmt.Fprintf(b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: %s}\nspec:\n  action: %s\n", name, p.namespace, action)
	if len(p.rules) > 0 {
		b.WriteString("  rules:\n")
	}
	for _, sources := range p.rules {
		if len(sources) == 0 {
			b.WriteString("  - {}\n")
			continue
		}
		b.WriteString("  - from:\n")
		for _, s := range sources {
			fmt.Fprintf(b, "    - %s\n", s)
		}
	}
}

func anyOraclePolicy(r *rand.Rand) istioOraclePolicy {
	p := istioOraclePolicy{namespace: pick(r, meshNamespaces), deny: r.IntN(3) == 0}
	for range r.IntN(3) {
		var sources []*istioSource
		for range r.IntN(4) {
			sources = append(sources, anySource(r))
		}
		p.rules = append(p.rules, sources)
	}
	return p
}

// TestIstioOracle compares identities. A workload that no ALLOW policy selects
// is open in Istio and closed here, so that one for all is always there.
func TestIstioOracle(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for range 150 {
		policies := []istioOraclePolicy{{namespace: "istio-system"}}
		for range 1 + r.IntN(4) {
			policies = append(policies, anyOraclePolicy(r))
		}
		var text strings.Builder
		for i := range policies {
			policies[i].write(&text, i)
		}
		result := Istio([]Input{{"p.yaml", []byte(text.String())}}, IstioOptions{TrustDomains: meshDomains})
		if result.Refused(false) {
			t.Fatalf("%s\n%s", refusals(result), text.String())
		}
		p := loads(t, result)
		for range 100 {
			from := anyIdentity(r)
			to := "spiffe://example.org/ns/" + pick(r, meshNamespaces) + "/sa/" + pick(r, meshAccounts)
			allowed, denied := false, false
			for i := range policies {
				if policies[i].match(from, to) {
					denied, allowed = denied || policies[i].deny, allowed || !policies[i].deny
				}
			}
			compare(t, p, &policy.Request{From: peer(from), To: peer(to)}, allowed && !denied, text.String(), result)
		}
	}
}

func compare(t *testing.T, p *policy.Policy, q *policy.Request, want bool, input string, result *Result) {
	t.Helper()
	var d policy.Decision
	if p.Decide(q, &d); d.Allow != want {
		t.Fatalf("%s -> %s, %+v: allowed is %v, by %s %q, and should be %v\n%s\n%s", q.From.ID, q.To.ID, q.HTTP, d.Allow, d.Reason, d.Rule, want, input, result.Text)
	}
	out := policy.Request{Direction: policy.Outbound, From: peer("spiffe://example.org/ns/shop/sa/web"), To: q.To}
	if p.Decide(&out, &d); !d.Allow {
		t.Fatalf("the calling end is refused: %s %q\n%s", d.Reason, d.Rule, result.Text)
	}
}

type consulOracleSource struct {
	name  string
	allow bool
}

// consulFirst returns what Consul says: the first of its order that matches.
func consulFirst(entries map[string][]consulOracleSource, from, to string) (allow bool) {
	for _, dest := range []string{to, "*"} {
		for _, source := range []string{from, "*"} {
			for _, s := range entries[dest] {
				if s.name == source {
					return s.allow
				}
			}
		}
	}
	return false
}

// TestConsulOracle compares intentions on connections. Those that need CEL
// are for TestConsulRequestsOracle.
func TestConsulOracle(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 4))
	names := []string{"web", "api", "db", "web2"}
	compared := 0
	for range 300 {
		entries := map[string][]consulOracleSource{}
		var texts []string
		for _, dest := range append([]string{"*"}, names...) {
			if r.IntN(2) == 0 {
				continue
			}
			var sources []string
			for _, source := range append([]string{"*"}, names...) {
				if r.IntN(2) == 0 {
					s := consulOracleSource{source, r.IntN(2) == 0}
					entries[dest] = append(entries[dest], s)
					sources = append(sources, fmt.Sprintf("{Name = %q, Action = %q}", s.name, map[bool]string{true: "allow", false: "deny"}[s.allow]))
				}
			}
			if len(sources) > 0 {
				texts = append(texts, fmt.Sprintf("Name = %q\nSources = [%s]", dest, strings.Join(sources, ", ")))
			}
		}
		result := Consul(hcl(texts...), named)
		if result.Refused(false) || strings.Contains(string(result.Text), "when:") {
			continue
		}
		compared++
		p := loads(t, result)
		for _, from := range append(names, "other") {
			for _, to := range append(names, "other") {
				id := func(name string) policy.Peer { return peer("spiffe://example.org/ns/default/sa/" + name) }
				compare(t, p, &policy.Request{From: id(from), To: id(to)}, consulFirst(entries, from, to), strings.Join(texts, "\n---\n"), result)
			}
		}
	}
	if compared < 50 {
		t.Errorf("only %d could be compared", compared)
	}
}

// ghostunnelMatches is the wildcard of ghostunnel: "*" between two slashes is
// any text without one, and "**" at the end anything after what is before it, or
// nothing.
func ghostunnelMatches(pattern, id string) bool {
	want, have := strings.Split(strings.TrimSuffix(pattern, "/"), "/"), strings.Split(id, "/")
	for i, w := range want {
		switch {
		case w == "**":
			return true
		case i >= len(have) || w == "*" && have[i] == "", w != "*" && w != have[i]:
			return false
		}
	}
	return len(want) == len(have)
}

func TestGhostunnelOracle(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	segments := []string{"a", "b", "spire", "*"}
	for range 500 {
		var patterns []string
		for range 1 + r.IntN(3) {
			p := "spiffe://" + pick(r, append([]string{"*"}, meshDomains...)) + "/" + strings.Join(some(r, segments), "/")
			patterns = append(patterns, p+pick(r, []string{"", "/", "/**"}))
		}
		if r.IntN(10) == 0 {
			patterns = append(patterns, "spiffe://example.org/**")
		}
		var flags []string
		for _, p := range patterns {
			flags = append(flags, "--allow-uri", p)
		}
		result := Ghostunnel(CommandLine(append([]string{"server"}, flags...)), GhostunnelOptions{TrustDomains: meshDomains})
		if result.Refused(false) {
			t.Fatalf("%q: %s", patterns, refusals(result))
		}
		p := loads(t, result)
		for range 30 {
			id := "spiffe://" + pick(r, meshDomains) + "/" + strings.Join(some(r, segments[:3]), "/")
			want := slices.ContainsFunc(patterns, func(p string) bool { return ghostunnelMatches(p, id) })
			var d policy.Decision
			if p.Decide(&policy.Request{From: peer(id), To: peer("spiffe://example.org/x")}, &d); d.Allow != want {
				t.Fatalf("%q, %s: allowed is %v, and should be %v\n%s", patterns, id, d.Allow, want, result.Text)
			}
		}
	}
}
