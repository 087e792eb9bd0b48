package importer

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// rule takes in one rule of a policy. A rule is a disjunction of sources, and
// one of operations, and a conjunction of conditions: it becomes one rule for
// each source with each operation.
func (p *istioPolicy) rule(n *node, index int) {
	r := istioRule{istioPolicy: p, piece: &piece{draft: p.mesh.draft, object: p.object, widens: p.widens}, path: fmt.Sprintf("spec.rules[%d]", index)}
	keys := r.keys(n, r.path, "from", "to", "when")
	if n.kind == nothing {
		r.refuse(n.at, r.path, "is empty: write {} for a rule that always matches")
	}
	base := match{}
	if keys["when"] != nil {
		r.conditions(&base, keys["when"])
	}
	sources, operations := []match{base}, []match{{}}
	if keys["from"] != nil {
		sources = r.sources(&base, keys["from"])
	}
	if keys["to"] != nil {
		operations = r.operations(keys["to"])
	}
	if r.refused {
		return
	}
	r.write(n.at, fmt.Sprintf("%s/%s/%d", p.namespace, p.name, index), sources, operations)
}

// istioRule is a rule while it is read.
type istioRule struct {
	*istioPolicy
	*piece
	path string
}

func (r *istioRule) write(at place, id string, sources, operations []match) {
	if len(sources)*len(operations)+len(r.mesh.rules) > maxRules {
		r.refuse(at, r.path, "more than %d rules come out of all this; import it in parts", maxRules)
		return
	}
	var out []rule
	http := false
	for i := range sources {
		for j := range operations {
			m := both(&sources[i], &operations[j])
			http = http || m.asksHTTP()
		}
	}
	for i := range sources {
		for j := range operations {
			m := both(&sources[i], &operations[j])
			if m.never() {
				continue
			}
			// Where requests cannot be seen, Istio drops an ALLOW rule as a
			// whole for one condition on them.
			m.http = http && r.allow
			made := rule{source: at, object: r.istioPolicy.object, path: r.path, id: id, allow: r.allow, shadow: r.shadow, at: "inbound", to: r.to}
			if problem := m.fill(&made); problem != "" {
				r.refuse(at, r.path, "%s", problem)
				return
			}
			out = append(out, made)
		}
	}
	if len(out) == 0 {
		r.mesh.note("%s, %s, matches nothing: its conditions exclude each other.", r.istioPolicy.object, r.path)
	}
	for i := range out {
		if len(out) > 1 {
			out[i].id += "/" + strconv.Itoa(i)
		}
		out[i].id = shortID(out[i].id)
		r.mesh.rules = append(r.mesh.rules, out[i])
	}
}

// both returns the conjunction of a source and an operation. Both have their
// conditions at different keys.
func both(source, operation *match) match {
	m := source.clone()
	m.http = m.http || operation.http
	m.methods, m.hosts, m.paths = operation.methods, operation.hosts, operation.paths
	if operation.ports != nil {
		m.ports = m.ports.and(operation.ports)
	}
	m.httpTerms = append(m.httpTerms, operation.httpTerms...)
	return m
}

// sources returns a match for each source; those that ask for identities alone
// are one.
func (r *istioRule) sources(base *match, n *node) []match {
	path := r.path + ".from"
	items := r.items(n, path)
	if n.kind == list && len(items) == 0 {
		r.refuse(n.at, path, "an empty list asks for nothing: take the key out, if that is meant")
	}
	var out []match
	var ids []string
	for i := range items {
		path := fmt.Sprintf("%s[%d].source", path, i)
		entry := r.keys(&items[i], strings.TrimSuffix(path, ".source"), "source")
		m := base.clone()
		m.who, m.ids = anybody, nil
		alone := r.source(&m, entry["source"], items[i].at, path)
		if alone && m.who == listed {
			ids = append(ids, m.ids...)
			continue
		}
		out = append(out, m.meeting(base))
	}
	if len(ids) > 0 {
		m := base.clone()
		m.only(ids)
		out = append([]match{m}, out...)
	}
	return out
}

// meeting narrows the match by whom the conditions of the rule ask for.
func (m *match) meeting(base *match) match {
	switch base.who {
	case identified:
		m.authenticated()
	case listed:
		m.only(base.ids)
	case plaintext:
		m.unauthenticated()
	}
	return *m
}

// source reads one source into m. It reports whether it asks for identities
// that it lists, and for nothing else.
func (r *istioRule) source(m *match, n *node, at place, path string) bool {
	if n == nil {
		r.refuse(at, path, "is empty: a source asks for something")
		return false
	}
	keys := r.keys(n, path, "principals", "notPrincipals", "requestPrincipals", "notRequestPrincipals",
		"namespaces", "notNamespaces", "serviceAccounts", "notServiceAccounts", "trustDomains", "notTrustDomains",
		"ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks")
	if len(keys) == 0 {
		r.refuse(n.at, path, "is empty: a source asks for something")
	}
	alone := true
	for _, key := range []string{"requestPrincipals", "notRequestPrincipals"} {
		if keys[key] != nil {
			r.refuse(keys[key].at, path+"."+key, "tokens (JWT) cannot be asked for here")
		}
	}
	for _, key := range []string{"remoteIpBlocks", "notRemoteIpBlocks"} {
		if keys[key] != nil {
			r.refuse(keys[key].at, path+"."+key, "addresses out of X-Forwarded-For cannot be asked for: only the client's own (ipBlocks)")
		}
	}
	for _, a := range []struct {
		key string
		is  attribute
	}{{"principals", principal}, {"namespaces", namespace}, {"serviceAccounts", account}, {"trustDomains", domain}, {"ipBlocks", address}} {
		not := "not" + strings.ToUpper(a.key[:1]) + a.key[1:]
		alone = alone && keys[not] == nil && (a.key != "ipBlocks" || keys[a.key] == nil)
		a.is(r, m, r.words(keys[a.key], path+"."+a.key), false, path+"."+a.key)
		a.is(r, m, r.words(keys[not], path+"."+not), true, path+"."+not)
	}
	return alone
}

// attribute narrows a match to requests of which an attribute has one of the
// values, or none of them. No values: any.
type attribute func(r *istioRule, m *match, values []word, not bool, path string)

// identity narrows a match by identities, each value as patterns and as CEL.
func (r *istioRule) identity(m *match, values []word, not bool, path string, patterns func(string) ([]string, string), cel func(string) (string, string)) {
	if len(values) == 0 {
		return
	}
	var ids, terms []string
	wild := false
	for _, v := range values {
		if v.text == one {
			wild = true
			continue
		}
		if not {
			term, problem := cel(v.text)
			if problem != "" {
				r.refuse(v.at, path, "%q: %s", clip(v.text), problem)
			}
			terms = append(terms, term)
			continue
		}
		found, problem := patterns(v.text)
		if problem != "" {
			r.refuse(v.at, path, "%q: %s", clip(v.text), problem)
		}
		ids = append(ids, found...)
	}
	switch {
	case wild && not:
		m.unauthenticated()
	case wild:
		m.authenticated()
	case not:
		m.terms = append(m.terms, noneOf(terms))
	default:
		m.only(ids)
	}
}

func principal(r *istioRule, m *match, values []word, not bool, path string) {
	r.identity(m, values, not, path, r.principalPatterns, r.principalCEL)
}

// principalPatterns returns the patterns that match what the value does.
func (r *istioRule) principalPatterns(value string) ([]string, string) {
	inner := strings.TrimSuffix(strings.TrimPrefix(value, one), one)
	switch suffix, prefix := strings.HasPrefix(value, one), strings.HasSuffix(value, one); {
	case strings.Contains(inner, one):
		return nil, "a * in the middle is a plain character to Istio, which no identity has; write * at the end or the beginning"
	case suffix && prefix:
		return nil, "* at both ends is not a pattern of Istio's"
	case suffix:
		return r.suffixPatterns(value)
	case prefix && !strings.HasSuffix(value, "/*"):
		return nil, "this is a prefix of text, and patterns match whole segments; end it with /*, or name the identities"
	case prefix:
		id, problem := r.id(value)
		if problem != "" {
			return nil, problem
		}
		return []string{id + one}, checked(id + one)
	}
	id, problem := r.id(value)
	if problem != "" {
		return nil, problem
	}
	return []string{id}, checked(id)
}

// suffixPatterns turns an ending of text into patterns, where it begins with a
// whole part of an Istio identity.
func (r *istioRule) suffixPatterns(value string) ([]string, string) {
	rest, ok := strings.CutPrefix(value, "*/")
	segments := strings.Split(rest, "/")
	var path string
	switch {
	case ok && len(segments) == 4 && segments[0] == "ns" && segments[2] == "sa":
		path = "/" + rest
	case ok && len(segments) == 2 && segments[0] == "sa":
		path = "/ns/*/" + rest
	default:
		return nil, "this is an ending of text, and patterns match whole segments; */ns/NAMESPACE/sa/ACCOUNT and */sa/ACCOUNT can be said"
	}
	var out []string
	for _, domain := range r.mesh.TrustDomains {
		out = append(out, scheme+domain+path)
	}
	return out, checked(out[0])
}

func (r *istioRule) principalCEL(value string) (string, string) {
	rest, suffix := strings.CutPrefix(value, one)
	rest, prefix := strings.CutSuffix(rest, one)
	switch {
	case strings.Contains(rest, one) || suffix && prefix:
		return "", "a * in the middle is a plain character to Istio, which no identity has"
	case !printable(rest):
		return "", "not a part of an identity"
	case suffix:
		return "from.id.endsWith(" + quote(rest) + ")", ""
	case prefix && !strings.Contains(rest, "/"):
		return "", "a part of a trust domain; name it whole"
	}
	id, problem := r.id(value)
	if prefix {
		return "from.id.startsWith(" + quote(strings.TrimSuffix(id, one)) + ")", problem
	}
	if problem == "" {
		problem = checked(id)
	}
	return "from.id == " + quote(id), problem
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c >= 0x7f })
}

func checked(id string) string {
	if err := checkPattern(id); err != nil {
		return err.Error()
	}
	return ""
}

// id puts the trust domain's own name in place of the mesh's. Istio takes
// cluster.local for the mesh's own in full identities only.
func (r *istioRule) id(value string) (id, problem string) {
	domain, path, ok := strings.Cut(value, "/")
	switch {
	case strings.HasPrefix(value, scheme) || !ok || !printable(value):
		return "", "want DOMAIN/ns/NAMESPACE/sa/ACCOUNT"
	case domain == r.mesh.MeshTrustDomain, domain == clusterLocal && strings.Count(path, "/") == 3:
		domain = r.mesh.TrustDomains[0]
	case domain == clusterLocal:
		return "", fmt.Sprintf("Istio takes cluster.local for the mesh's own trust domain, %s, only in front of ns/NAMESPACE/sa/ACCOUNT, so that this names nobody", r.mesh.MeshTrustDomain)
	}
	if err := checkDomain(domain); err != nil {
		return "", err.Error()
	}
	return scheme + domain + "/" + path, ""
}

func namespace(r *istioRule, m *match, values []word, not bool, path string) {
	r.identity(m, values, not, path, func(value string) ([]string, string) {
		if problem := segment(value, "namespace"); problem != "" {
			return nil, problem
		}
		below := "/sa/*"
		if !r.allow {
			below = "/**"
		}
		return r.everywhere("/ns/" + value + below), ""
	}, func(value string) (string, string) {
		return "from.path.startsWith(" + quote("/ns/"+value+"/") + ")", segment(value, "namespace")
	})
}

func segment(value, what string) string {
	if strings.Contains(value, one) {
		return "a * in it is a part of text, and patterns match whole segments; name each " + what
	}
	return checked("spiffe://x/" + strings.ReplaceAll(value, "/", "%"))
}

// everywhere returns the path in each trust domain.
func (r *istioRule) everywhere(path string) []string {
	var out []string
	for _, domain := range r.mesh.TrustDomains {
		out = append(out, scheme+domain+path)
	}
	return out
}

func account(r *istioRule, m *match, values []word, not bool, path string) {
	name := func(value string) (string, string) {
		ns, sa, ok := strings.Cut(value, "/")
		if !ok {
			ns, sa = r.namespace, value
		}
		path := "/ns/" + ns + "/sa/" + sa
		if strings.Contains(value, one) || strings.Contains(sa, "/") {
			return "", "want NAMESPACE/ACCOUNT or ACCOUNT, without wildcards"
		}
		return path, checked("spiffe://x" + path)
	}
	for _, v := range values {
		if v.text == one {
			r.refuse(v.at, path, "want NAMESPACE/ACCOUNT or ACCOUNT, without wildcards")
		}
	}
	r.identity(m, values, not, path, func(value string) ([]string, string) {
		path, problem := name(value)
		return r.everywhere(path), problem
	}, func(value string) (string, string) {
		path, problem := name(value)
		return "from.path == " + quote(path), problem
	})
}

func domain(r *istioRule, m *match, values []word, not bool, path string) {
	name := func(value string) (string, string) {
		if value == r.mesh.MeshTrustDomain {
			return r.mesh.TrustDomains[0], ""
		}
		if err := checkDomain(value); err != nil {
			return "", err.Error() + "; name each whole"
		}
		return value, ""
	}
	r.identity(m, values, not, path, func(value string) ([]string, string) {
		td, problem := name(value)
		return []string{scheme + td + "/**"}, problem
	}, func(value string) (string, string) {
		td, problem := name(value)
		return "from.trust_domain == " + quote(td), problem
	})
}

func address(r *istioRule, m *match, values []word, not bool, path string) {
	var networks []netip.Prefix
	for _, v := range values {
		prefix, err := netip.ParsePrefix(v.text)
		if !strings.Contains(v.text, "/") {
			var addr netip.Addr
			addr, err = netip.ParseAddr(v.text)
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		if err != nil || prefix.Addr().Zone() != "" || prefix.Addr().Is4In6() {
			r.refuse(v.at, path, "%q is no address or network such as 10.0.0.0/8", clip(v.text))
			continue
		}
		networks = append(networks, prefix.Masked())
	}
	slices.SortFunc(networks, comparePrefix)
	networks = slices.Compact(networks)
	switch {
	case len(networks) == 0:
	case not:
		m.outside = append(m.outside, networks...)
		slices.SortFunc(m.outside, comparePrefix)
		m.outside = slices.Compact(m.outside)
	default:
		m.from(networks)
	}
}
