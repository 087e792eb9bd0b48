package importer

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/policy"
)

// field is a condition of Istio on one attribute: one of the values, and none
// of the others.
type field struct {
	key         string // of the attribute in requestText
	http        bool
	values, not []string
}

// oracleRequest is a request as texts, by the names of fields.
type oracleRequest struct {
	from  string
	http  bool
	texts map[string]string // what is not there is not in it
}

func (f *field) match(q *oracleRequest) bool {
	text, there := q.texts[f.key]
	is := func(value string) bool {
		switch {
		case !there:
			return false
		case f.key == "source.ip":
			prefix, err := netip.ParsePrefix(value)
			return err == nil && prefix.Masked().Contains(netip.MustParseAddr(text))
		case f.key == "hosts":
			value = strings.ToLower(value)
		case strings.Contains(value, "{*}"):
			return templateMatches(value, text)
		}
		return textMatches(value, text)
	}
	return (f.values == nil || slices.ContainsFunc(f.values, is)) && !slices.ContainsFunc(f.not, is)
}

// templateMatches knows templates with one {*} alone.
func templateMatches(template, path string) bool {
	before, after, _ := strings.Cut(template, "{*}")
	middle, ok := strings.CutPrefix(path, before)
	middle, ok2 := strings.CutSuffix(middle, after)
	return ok && ok2 && middle != "" && !strings.Contains(middle, "/")
}

// oracleRule is a rule of Istio, as it takes it.
type oracleRule struct {
	sources    []*istioSource
	operations [][]*field
	conditions []*field
}

func (r *oracleRule) asksHTTP() bool {
	return slices.ContainsFunc(slices.Concat(append(slices.Clone(r.operations), r.conditions)...), func(f *field) bool { return f.http })
}

func (r *oracleRule) match(q *oracleRequest, deny bool) bool {
	if !q.http && !deny && r.asksHTTP() {
		return false // it is not there for TCP
	}
	holds := func(fields []*field) bool {
		return !slices.ContainsFunc(fields, func(f *field) bool { return (q.http || !f.http) && !f.match(q) })
	}
	return (len(r.sources) == 0 || slices.ContainsFunc(r.sources, func(s *istioSource) bool { return s.match(q.from, "shop") })) &&
		(len(r.operations) == 0 || slices.ContainsFunc(r.operations, holds)) && holds(r.conditions)
}

func (r *oracleRule) String() string {
	var parts []string
	if len(r.sources) > 0 {
		var sources []string
		for _, s := range r.sources {
			sources = append(sources, s.String())
		}
		parts = append(parts, "from: ["+strings.Join(sources, ", ")+"]")
	}
	if len(r.operations) > 0 {
		var operations []string
		for _, fields := range r.operations {
			var keys []string
			for _, f := range fields {
				keys = append(keys, f.lists(f.key, "not"+strings.ToUpper(f.key[:1])+f.key[1:])...)
			}
			operations = append(operations, "{operation: {"+strings.Join(keys, ", ")+"}}")
		}
		parts = append(parts, "to: ["+strings.Join(operations, ", ")+"]")
	}
	if len(r.conditions) > 0 {
		var conditions []string
		for _, f := range r.conditions {
			conditions = append(conditions, "{"+strings.Join(append([]string{"key: " + quote(f.key)}, f.lists("values", "notValues")...), ", ")+"}")
		}
		parts = append(parts, "when: ["+strings.Join(conditions, ", ")+"]")
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

func (f *field) lists(values, not string) (lists []string) {
	if f.values != nil {
		lists = append(lists, values+": "+jsonList(f.values))
	}
	if f.not != nil {
		lists = append(lists, not+": "+jsonList(f.not))
	}
	return lists
}

var (
	operationFields = []field{
		{"methods", true, []string{"GET", "POST", "*"}, nil},
		{"paths", true, []string{"/", "/v1", "/v1/", "/v1/*", "/v1*", "/v1/orders", "/v1/{*}", "/*"}, nil},
		{"hosts", true, []string{"a.example", "a.example:*", "A.example:80", "*.example", "*"}, nil},
		{"ports", false, []string{"8080", "8443", "1", "65535"}, nil},
	}
	conditionFields = []field{
		{"request.headers[x-env]", true, []string{"prod", "test", "*"}, nil},
		{"connection.sni", false, []string{"a.example", "*.example", "*"}, nil},
		{"source.ip", false, []string{"10.0.0.0/8", "10.1.2.0/24", "192.0.2.0/24", "2001:db8::/32"}, nil},
		{"destination.port", false, []string{"8080", "8443"}, nil},
	}
)

// anyField returns a condition out of a field whose values are all it may
// have.
func anyField(r *rand.Rand, of field) *field {
	f := &field{key: of.key, http: of.http}
	if r.IntN(3) > 0 {
		f.values = some(r, of.values)
	} else {
		for _, v := range some(r, of.values) {
			if (v != "*" || of.key == "request.headers[x-env]") && !strings.Contains(v, "{") {
				f.not = append(f.not, v)
			}
		}
	}
	if f.values == nil && f.not == nil {
		f.values = of.values[:1]
	}
	return f
}

func anyOracleRule(r *rand.Rand) *oracleRule {
	rule := &oracleRule{}
	for range r.IntN(3) {
		s := anySource(r)
		switch r.IntN(4) {
		case 0:
			s = &istioSource{notPrincipals: []string{pick(r, []string{"*", anyPrincipal(r)})}}
		case 1:
			s.notNamespaces = some(r, meshNamespaces)
		}
		rule.sources = append(rule.sources, s)
	}
	for range r.IntN(3) {
		first := r.IntN(len(operationFields))
		operation := []*field{anyField(r, operationFields[first])}
		if second := r.IntN(len(operationFields)); second != first {
			operation = append(operation, anyField(r, operationFields[second]))
		}
		rule.operations = append(rule.operations, operation)
	}
	for range r.IntN(3) {
		rule.conditions = append(rule.conditions, anyField(r, pick(r, conditionFields)))
	}
	return rule
}

// anyRequest returns the same request for both.
func anyRequest(r *rand.Rand) (*oracleRequest, *policy.Request) {
	q := &oracleRequest{from: anyIdentity(r), texts: map[string]string{}}
	ip, port := pick(r, []string{"10.1.2.3", "10.9.9.9", "192.0.2.1", "2001:db8::1", "203.0.113.1"}), pick(r, []uint16{1, 8080, 8443, 9, 65535})
	p := &policy.Request{From: peer(q.from), To: peer("spiffe://example.org/ns/shop/sa/orders"), Source: netip.AddrPortFrom(netip.MustParseAddr(ip), 1), Port: port}
	q.texts["source.ip"] = ip
	q.texts["ports"], q.texts["destination.port"] = fmt.Sprint(port), fmt.Sprint(port)
	if p.SNI = pick(r, []string{"", "a.example", "b.a.example", "other"}); p.SNI != "" {
		q.texts["connection.sni"] = p.SNI
	}
	if q.http = r.IntN(4) > 0; !q.http {
		return q, p
	}
	p.HTTP = &policy.HTTP{
		Method: pick(r, []string{"GET", "POST", "PUT"}),
		Path:   pick(r, []string{"/", "/v1", "/v1/", "/v10", "/v1/orders", "/v1/orders/", "/v1/orders/7", "/other", "*"}),
		Host:   pick(r, []string{"a.example", "a.example:80", "a.example:81", "b.example", "example"}),
	}
	q.texts["methods"], q.texts["paths"], q.texts["hosts"] = p.HTTP.Method, p.HTTP.Path, p.HTTP.Host
	var values []string
	for range r.IntN(3) {
		value := pick(r, []string{"prod", "test", "prod,test", "Prod"})
		values = append(values, value)
		p.HTTP.Headers = append(p.HTTP.Headers, policy.Header{Name: "x-env", Value: value})
	}
	if len(values) > 0 {
		q.texts["request.headers[x-env]"] = strings.Join(values, ",")
	}
	return q, p
}

// TestIstioRequestsOracle compares requests and connections, of all conditions
// there are.
func TestIstioRequestsOracle(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 8))
	compared := 0
	for range 150 {
		rules := map[string][]*oracleRule{"ALLOW": {anyOracleRule(r), anyOracleRule(r)}, "DENY": {anyOracleRule(r)}}
		var text strings.Builder
		for _, action := range []string{"ALLOW", "DENY"} {
			fmt.Fprintf(&text, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: shop}\nspec:\n  action: %s\n  rules:\n", strings.ToLower(action), action)
			for _, rule := range rules[action] {
				fmt.Fprintf(&text, "  - %s\n", rule)
			}
		}
		result := Istio([]Input{{"p.yaml", []byte(text.String())}}, IstioOptions{TrustDomains: meshDomains})
		if result.Refused(false) {
			for i := range result.Refusals { // what cannot be said, and nothing else
				if msg := result.Refusals[i].Msg; !strings.Contains(msg, "one `when`") && !strings.Contains(msg, "template") {
					t.Fatalf("%s\n%s", refusals(result), text.String())
				}
			}
			continue
		}
		compared++
		p := loads(t, result)
		for range 100 {
			q, request := anyRequest(r)
			match := func(action string) bool {
				return slices.ContainsFunc(rules[action], func(rule *oracleRule) bool { return rule.match(q, action == "DENY") })
			}
			compare(t, p, request, match("ALLOW") && !match("DENY"), text.String(), result)
		}
	}
	if compared < 60 {
		t.Errorf("only %d could be compared", compared)
	}
}

// oraclePermission is one of Consul's, and the same in its HCL.
type oraclePermission struct {
	allow                        bool
	method, pathExact, pathStart string
	env                          string // header x-env; "*": there, "!": not there
}

func (p *oraclePermission) String() string {
	var http []string
	for _, f := range []struct{ key, value string }{{"PathExact", p.pathExact}, {"PathPrefix", p.pathStart}} {
		if f.value != "" {
			http = append(http, fmt.Sprintf("%s = %q", f.key, f.value))
		}
	}
	if p.method != "" {
		http = append(http, fmt.Sprintf("Methods = [%q]", p.method))
	}
	switch p.env {
	case "":
	case "*":
		http = append(http, `Header = [{Name = "x-env", Present = true}]`)
	case "!":
		http = append(http, `Header = [{Name = "x-env", Present = true, Invert = true}]`)
	default:
		http = append(http, fmt.Sprintf(`Header = [{Name = "x-env", Exact = %q}]`, p.env))
	}
	return fmt.Sprintf("{Action = %q, HTTP = {%s}}", map[bool]string{true: "allow", false: "deny"}[p.allow], strings.Join(http, ", "))
}

func (p *oraclePermission) match(q *oracleRequest) bool {
	env, there := q.texts["request.headers[x-env]"]
	return q.http && (p.method == "" || p.method == q.texts["methods"]) &&
		(p.pathExact == "" || p.pathExact == q.texts["paths"]) && strings.HasPrefix(q.texts["paths"], p.pathStart) &&
		(p.env == "" || p.env == "*" && there || p.env == "!" && !there || there && p.env == env)
}

func anyPermission(r *rand.Rand) *oraclePermission {
	p := &oraclePermission{allow: r.IntN(2) == 0}
	switch r.IntN(3) {
	case 0:
		p.pathExact = pick(r, []string{"/", "/v1", "/v1/", "/v1/orders"})
	case 1:
		p.pathStart = pick(r, []string{"/", "/v1", "/v1/"})
	default:
		p.method = "GET"
	}
	if r.IntN(3) == 0 {
		p.env = pick(r, []string{"*", "!", "prod"})
	}
	return p
}

// TestConsulRequestsOracle compares intentions on requests: the first that
// matches, and in it the first permission.
func TestConsulRequestsOracle(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(9, 10))
	names := []string{"web", "orders", "web2"}
	type source struct {
		allow       bool
		permissions []*oraclePermission
	}
	compared := 0
	for range 100 {
		entries := map[string]map[string]*source{}
		var texts []string
		for _, dest := range append([]string{"*"}, names...) {
			entries[dest] = map[string]*source{}
			var sources []string
			for _, name := range append([]string{"*"}, names...) {
				s := &source{allow: r.IntN(2) == 0}
				action := fmt.Sprintf("Action = %q", map[bool]string{true: "allow", false: "deny"}[s.allow])
				switch {
				case r.IntN(2) == 0:
					continue
				case dest != "*" && r.IntN(2) == 0:
					var all []string
					for range 1 + r.IntN(3) {
						s.permissions = append(s.permissions, anyPermission(r))
						all = append(all, s.permissions[len(s.permissions)-1].String())
					}
					action = "Permissions = [" + strings.Join(all, ", ") + "]"
				}
				entries[dest][name] = s
				sources = append(sources, fmt.Sprintf("{Name = %q, %s}", name, action))
			}
			if len(sources) > 0 {
				texts = append(texts, fmt.Sprintf("Name = %q\nSources = [%s]", dest, strings.Join(sources, ", ")))
			}
		}
		result := Consul(hcl(texts...), named)
		if result.Refused(false) {
			if !strings.Contains(refusals(result), "differ") {
				t.Fatalf("%s\n%s", refusals(result), strings.Join(texts, "\n---\n"))
			}
			continue
		}
		compared++
		p := loads(t, result)
		for range 100 {
			q, request := anyRequest(r)
			from, to := pick(r, append(names, "other")), pick(r, append(names, "other"))
			request.From, request.To = peer("spiffe://example.org/ns/default/sa/"+from), peer("spiffe://example.org/ns/default/sa/"+to)
			want := false
			for _, pair := range [][2]string{{to, from}, {to, "*"}, {"*", from}, {"*", "*"}} {
				s := entries[pair[0]][pair[1]]
				if s == nil {
					continue
				}
				want = s.allow && s.permissions == nil
				if first := slices.IndexFunc(s.permissions, func(p *oraclePermission) bool { return p.match(q) }); first >= 0 {
					want = s.permissions[first].allow
				}
				break
			}
			compare(t, p, request, want, strings.Join(texts, "\n---\n"), result)
		}
	}
	if compared < 30 {
		t.Errorf("only %d could be compared", compared)
	}
}
