package importer

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// everyone is the group of all identities that the mesh trusts.
const everyone = "everyone"

const clusterLocal = "cluster.local"

// IstioOptions says what the policies leave to the mesh.
type IstioOptions struct {
	// TrustDomains are those that the proxies trust, the mesh's own first. At
	// least one is required.
	TrustDomains []string
	// MeshTrustDomain is the name that the mesh's own has in Istio, and in the
	// policies; cluster.local if empty.
	MeshTrustDomain string
	// RootNamespace is the one whose policies apply to all; istio-system if
	// empty.
	RootNamespace string
	// Namespace is that of policies which name none. Empty: they are refused.
	Namespace string
	// To says who the workloads are that a policy selects by labels or
	// targetRefs: SPIFFE IDs by namespace/name of the policy.
	To map[string][]string
	// InboundOnly leaves out the rule for the calling end.
	InboundOnly bool
}

// Istio imports AuthorizationPolicy objects of security.istio.io/v1 and
// v1beta1.
//
// It takes identities for Istio's, spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT.
// Where others exist, an allow admits fewer of them than Istio does, and a
// deny more.
func Istio(files []Input, o IstioOptions) *Result {
	m := mesh{draft: &draft{}, IstioOptions: o, seen: map[string]place{}, used: map[string]bool{}}
	if m.RootNamespace == "" {
		m.RootNamespace = "istio-system"
	}
	if m.MeshTrustDomain == "" {
		m.MeshTrustDomain = clusterLocal
	}
	m.note("Istio decides at the end that is called, and so do these rules (at: inbound). Identities are spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT.")
	m.note("A workload that no ALLOW policy selects is open to all in Istio, but for DENY policies; here it is closed.")
	if m.options() && m.fits(files) {
		for i := range files {
			for _, doc := range m.read(&files[i], false) {
				m.object(&doc, 0)
			}
		}
		m.finish()
	}
	return m.result("Istio")
}

// mesh is an import from Istio.
type mesh struct {
	*draft
	IstioOptions
	seen     map[string]place // policies, by namespace/name
	used     map[string]bool  // of To
	policies []scope
	ported   bool // a rule asks for ports
	pathed   bool // a rule asks for paths
}

// scope is what a policy applies to.
type scope struct {
	namespace string
	selects   bool // some workloads of it alone
	allow     bool
}

func (m *mesh) options() bool {
	good := len(m.TrustDomains) > 0 && len(m.TrustDomains) <= 64
	for _, domain := range append(slices.Clone(m.TrustDomains), m.MeshTrustDomain) {
		good = good && checkDomain(domain) == nil
	}
	if !good {
		m.refuse(Refusal{Msg: "trust domains: name those that the proxies trust, the mesh's own first, at most 64", Widens: true})
	}
	for name, ids := range m.To {
		for _, id := range ids {
			if err := checkPattern(id); err != nil {
				m.refuse(Refusal{Msg: fmt.Sprintf("--to %s=%s: %v", clip(name), clip(id), err), Widens: true})
				good = false
			}
		}
	}
	return good
}

// object takes in one Kubernetes object.
func (m *mesh) object(n *node, depth int) {
	version, kind := n.child("apiVersion").text, n.child("kind").text
	fail := func(format string, args ...any) {
		m.refuse(Refusal{File: n.at.file, Line: n.at.line, Column: n.at.column, Msg: fmt.Sprintf(format, args...), Widens: true})
	}
	switch {
	case n.kind == nothing:
	case n.kind != block || kind == "":
		fail("not a Kubernetes object: apiVersion and kind are missing")
	case strings.HasSuffix(kind, "List") && n.child("items").kind == list:
		if depth > 0 {
			fail("a list in a list")
			return
		}
		for i := range n.child("items").items {
			m.object(&n.child("items").items[i], depth+1)
		}
	case kind == "AuthorizationPolicy" && (version == "security.istio.io/v1" || version == "security.istio.io/v1beta1"):
		m.policy(n)
	case kind == "AuthorizationPolicy":
		fail("AuthorizationPolicy of %q is not known; security.istio.io/v1 and v1beta1 are", clip(version))
	case kind == "RequestAuthentication":
		fail("RequestAuthentication: requests with a bad token are refused by Istio, and tokens cannot be asked for here; take it out if nobody relies on it")
	case kind == "PeerAuthentication":
		m.note("PeerAuthentication is no rule: a listener takes mutual TLS alone, unless its mode is permissive.")
	default:
		m.note("%s objects were passed over: they are no authorization policies.", clip(kind))
	}
}

// istioPolicy is one AuthorizationPolicy.
type istioPolicy struct {
	*piece
	mesh      *mesh
	at        place
	namespace string
	name      string
	allow     bool
	shadow    bool
	to        []string
}

// policy takes in one policy: its rules one by one.
func (m *mesh) policy(n *node) {
	p := istioPolicy{piece: &piece{draft: m.draft, widens: true}, mesh: m, at: n.at}
	meta, spec := n.child("metadata"), n.child("spec")
	p.name, p.namespace = p.word(optional(meta.child("name")), "metadata.name"), p.word(optional(meta.child("namespace")), "metadata.namespace")
	if p.namespace == "" {
		p.namespace = m.Namespace
	}
	p.object = "AuthorizationPolicy " + clip(p.namespace+"/"+p.name)
	keys := p.keys(spec, "spec", "action", "rules", "selector", "targetRef", "targetRefs", "provider")
	if !p.head(meta, spec, keys) {
		return
	}
	p.widens = !p.allow && !p.shadow
	m.policies = append(m.policies, scope{p.namespace, keys["selector"] != nil || keys["targetRef"] != nil || keys["targetRefs"] != nil, p.allow && !p.shadow})
	if !p.target(keys) {
		return
	}
	rules := p.items(keys["rules"], "spec.rules")
	if len(rules) == 0 && !p.refused {
		what := "allows nothing, which closes the workloads it selects: they are closed here anyhow"
		if !p.allow {
			what = "matches nothing, because it has no rules"
		}
		m.note("%s %s.", p.object, what)
	}
	for i := range rules {
		p.rule(&rules[i], i)
	}
}

// optional returns nil for a value that is not there.
func optional(n *node) *node {
	if n.kind == nothing {
		return nil
	}
	return n
}

// head reads who the policy is and what it does.
func (p *istioPolicy) head(meta, spec *node, keys map[string]*node) bool {
	key := p.namespace + "/" + p.name
	first, again := p.mesh.seen[key]
	switch {
	case p.refused:
		return false
	case p.name == "" || strings.ContainsAny(key[len(p.namespace)+1:], "/ "):
		p.refuse(meta.at, "metadata.name", "a name is required")
	case p.namespace == "":
		p.refuse(meta.at, "metadata.namespace", "is missing: it says where the policy applies; give --namespace for policies without one")
	case checkPattern("spiffe://x/ns/"+p.namespace) != nil || strings.Contains(p.namespace, one):
		p.refuse(meta.at, "metadata.namespace", "%q is no namespace", clip(p.namespace))
	case again:
		p.refuse(p.at, "", "is here twice; first at %s:%d", first.file, first.line)
	}
	p.mesh.seen[key] = p.at
	if value := meta.child("annotations").child("istio.io/dry-run"); value.kind != nothing {
		dry, err := strconv.ParseBool(value.text)
		if err != nil {
			p.refuse(value.at, "metadata.annotations", "istio.io/dry-run must be true or false")
		}
		p.shadow = dry
	}
	switch action := p.word(keys["action"], "spec.action"); action {
	case "", "ALLOW":
		p.allow = true
	case "DENY":
	case "AUDIT":
		p.mesh.note("%s was left out: AUDIT decides nothing, it marks requests for a log; the access log has them all.", p.object)
		return false
	case "CUSTOM":
		p.refuse(spec.at, "spec.action", "CUSTOM asks a service of its own, which cannot be said in rules")
	default:
		p.refuse(keys["action"].at, "spec.action", "must be ALLOW, DENY, AUDIT or CUSTOM, not %q", clip(action))
	}
	if keys["provider"] != nil && !p.refused {
		p.refuse(keys["provider"].at, "spec.provider", "belongs to CUSTOM alone")
	}
	return !p.refused
}

// target finds out whose inbound end the policy is for.
func (p *istioPolicy) target(keys map[string]*node) bool {
	own := scheme + p.mesh.TrustDomains[0]
	selected := ""
	for _, key := range []string{"selector", "targetRef", "targetRefs"} {
		switch n := keys[key]; {
		case n == nil:
		case key == "selector" && len(p.keys(n, "spec.selector", "matchLabels")) == 0 && !p.refused,
			key == "selector" && n.child("matchLabels").kind == block && len(n.child("matchLabels").pairs) == 0 && !p.refused:
		default:
			selected = key
		}
	}
	name := p.namespace + "/" + p.name
	ids := p.mesh.To[name]
	switch {
	case p.refused:
		return false
	case selected != "" && len(ids) == 0:
		p.refuse(keys[selected].at, "spec."+selected, "labels and references name no identity; say who the workloads are: --to %s=%s/ns/%s/sa/…", name, own, p.namespace)
		return false
	case selected != "":
		p.mesh.used[name] = true
		p.to = unique(slices.Clone(ids))
	case p.namespace == p.mesh.RootNamespace && p.allow:
		p.to = []string{own + "/ns/*/sa/*"}
	case p.namespace == p.mesh.RootNamespace: // a deny for all
	case p.allow:
		p.to = []string{own + "/ns/" + p.namespace + "/sa/*"}
	default:
		p.to = []string{own + "/ns/" + p.namespace + "/**"}
	}
	return true
}

// finish adds what stands on all policies.
func (m *mesh) finish() {
	covered := map[string]bool{}
	for _, p := range m.policies {
		covered[p.namespace] = covered[p.namespace] || p.allow && !p.selects
	}
	for _, p := range m.policies {
		if !p.allow && !covered[p.namespace] && !covered[m.RootNamespace] {
			m.note("No ALLOW policy selects all workloads of %s: those that none selects lie open in Istio but for what DENY policies match, and are closed here. An ALLOW policy with `rules: [{}]` says in Istio that they should be open.", p.namespace)
		}
	}
	names := make([]string, 0, len(m.To))
	for name := range m.To {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if !m.used[name] {
			m.refuse(Refusal{Msg: fmt.Sprintf("--to %s: no policy of that name selects by labels or references", clip(name)), Widens: true})
		}
	}
	if m.ported {
		m.note("Ports are those of the listener here. In Istio they are the workload's own (targetPort): make them the same, or change them below.")
	}
	if m.pathed {
		m.note("Paths are compared by case on both sides, without the query, after each side's normalisation. Where Istio's is NONE or BASE it lets pass, and matches as they are, forms such as // that are refused here by default.")
	}
	if slices.ContainsFunc(m.rules, func(r rule) bool { return slices.Contains(r.from, "group:"+everyone) }) {
		var patterns []string
		for _, domain := range m.TrustDomains {
			patterns = append(patterns, scheme+domain+"/**")
		}
		m.groups = []group{{everyone, patterns}}
	}
	if !m.InboundOnly {
		m.rules = append(m.rules, outbound("istio/outbound", m.TrustDomains[0]))
	}
}

// outbound is the rule of the calling end, at which the meshes ask nothing.
func outbound(id, domain string) rule {
	return rule{
		object: "the calling end asks nothing: who may be called is said by `expect` and by the end that is called",
		id:     id, allow: true, at: "outbound", from: []string{scheme + domain + "/**"},
	}
}
