package importer

import (
	"fmt"
	"slices"
	"strings"
)

// ConsulOptions says what intentions leave to the mesh.
type ConsulOptions struct {
	// Template is the SPIFFE ID of a service, with {namespace} and {name} for
	// whole segments. Other segments may be "*", as the datacenter is to
	// Consul. Empty: spiffe://TrustDomain/ns/{namespace}/dc/*/svc/{name}.
	Template string
	// TrustDomain is needed without a Template.
	TrustDomain string
	// InboundOnly leaves out the rule for the calling end.
	InboundOnly bool
}

// Consul imports intentions: configuration entries of kind service-intentions
// in HCL or JSON, and ServiceIntentions objects of Kubernetes.
//
// It takes what no intention names for denied, as Consul does where its ACLs
// deny by default.
func Consul(files []Input, o ConsulOptions) *Result {
	c := catalog{draft: &draft{}, template: o.Template, seen: map[service]place{}}
	if c.template == "" {
		c.template = scheme + o.TrustDomain + "/ns/{namespace}/dc/*/svc/{name}"
	}
	c.note("Consul decides at the end that is called, and so do these rules (at: inbound). Services are %s.", clip(c.template))
	c.note("What no intention names is denied here. Where Consul's default is to allow, it passes there.")
	if c.checkTemplate() && c.fits(files) {
		for i := range files {
			for _, doc := range c.read(&files[i], true) {
				c.entry(&doc, 0)
			}
		}
		c.write()
		if !o.InboundOnly {
			domain, _, _ := strings.Cut(c.template[len(scheme):], "/")
			c.rules = append(c.rules, outbound("consul/outbound", domain))
		}
	}
	return c.result("Consul")
}

// maxIntentions bounds the pairs that are compared.
const maxIntentions = 5000

// catalog is an import from Consul.
type catalog struct {
	*draft
	template   string
	seen       map[service]place // destinations
	intentions []intention
}

// service is one that calls or is called; "*" is any name, or any namespace.
type service struct{ namespace, name string }

// wild counts the wildcards: a wild namespace has a wild name.
func (s service) wild() int {
	switch {
	case s.namespace == one:
		return 2
	case s.name == one:
		return 1
	}
	return 0
}

func (s service) overlaps(t service) bool {
	same := func(a, b string) bool { return a == b || a == one || b == one }
	return same(s.namespace, t.namespace) && same(s.name, t.name)
}

func (s service) String() string { return s.namespace + "/" + s.name }

// intention is what is said of one source and one destination.
type intention struct {
	*piece
	at       place
	path     string
	from, to service
	// allow is true for an L4 intention that allows; permissions are those of
	// an L7 one. Neither: it denies.
	allow       bool
	permissions []permission
}

func (i *intention) denies() bool { return !i.allow && i.permissions == nil }

// precedence is Consul's: the destination counts before the source, and what
// is exact before what is wild.
func (i *intention) precedence() int { return 9 - 3*i.to.wild() - i.from.wild() }

func (i *intention) overlaps(j *intention) bool {
	return i.from.overlaps(j.from) && i.to.overlaps(j.to)
}

func (c *catalog) checkTemplate() bool {
	problem := ""
	filled := c.pattern(service{"namespace", "name"})
	domain, _, _ := strings.Cut(strings.TrimPrefix(c.template, scheme), "/")
	switch {
	case checkDomain(domain) != nil:
		problem = checkDomain(domain).Error()
	case strings.Count(c.template+"/", "/{name}/") != 1 || strings.Count(c.template, "{name}") != 1:
		problem = "must have {name} once, as a whole segment"
	case strings.Count(c.template, "{namespace}") > 1 || strings.Count(c.template+"/", "/{namespace}/") != strings.Count(c.template, "{namespace}"):
		problem = "may have {namespace} once, as a whole segment"
	case strings.Contains(c.template, many):
		problem = `"**" would cover more than one service`
	case checkPattern(filled) != nil:
		problem = checkPattern(filled).Error()
	}
	if problem != "" {
		c.refuse(Refusal{Msg: fmt.Sprintf("template %q: %s; write it like spiffe://example.org/ns/{namespace}/sa/{name}, or give the trust domain alone", clip(c.template), problem), Widens: true})
	}
	return problem == ""
}

// pattern returns the identities of a service.
func (c *catalog) pattern(s service) string {
	return strings.NewReplacer("{namespace}", s.namespace, "{name}", s.name).Replace(c.template)
}

// name makes the ways in which Consul takes a key one: PathExact, path_exact
// and pathExact.
func name(key string) string { return strings.ReplaceAll(strings.ToLower(key), "_", "") }

// fold returns a copy of a tree with the names of its keys made one.
func fold(n *node) node {
	out := *n
	out.items, out.pairs = nil, nil
	for i := range n.items {
		out.items = append(out.items, fold(&n.items[i]))
	}
	for i := range n.pairs {
		p := &n.pairs[i]
		out.pairs = append(out.pairs, pair{name(p.key), p.at, fold(&p.value)})
	}
	return out
}

// asList returns a block as a list of it alone: HCL writes one element so.
func asList(n *node) *node {
	if n != nil && n.kind == block {
		return &node{kind: list, at: n.at, items: []node{*n}}
	}
	return n
}

// entry takes in one configuration entry or object.
func (c *catalog) entry(raw *node, depth int) {
	n := fold(raw)
	fail := func(format string, args ...any) {
		c.refuse(Refusal{File: n.at.file, Line: n.at.line, Column: n.at.column, Msg: fmt.Sprintf(format, args...), Widens: true})
	}
	version, kind := n.child("apiversion").text, n.child("kind").text
	switch {
	case n.kind == nothing:
	case n.kind != block || kind == "":
		fail("not a configuration entry: Kind is missing")
	case version != "" && strings.HasSuffix(kind, "List") && n.child("items").kind == list && depth == 0:
		for i := range raw.child("items").items {
			c.entry(&raw.child("items").items[i], 1)
		}
	case kind == "ServiceIntentions" && version == "consul.hashicorp.com/v1alpha1":
		p := &piece{draft: c.draft, object: "ServiceIntentions " + clip(n.child("metadata").child("name").text), widens: true}
		keys := p.keys(n.child("spec"), "spec", "destination", "sources", "jwt")
		if keys["destination"] == nil {
			p.refuse(n.at, "spec.destination", "is missing")
		}
		if p.refused {
			return
		}
		dest := p.keys(keys["destination"], "spec.destination", "name", "namespace")
		c.destination(p, &n, dest["name"], dest["namespace"], keys, "spec.")
	case version != "":
		c.note("%s objects were passed over: they are no intentions.", clip(kind))
	case kind == "service-intentions":
		p := &piece{draft: c.draft, object: "service-intentions " + clip(n.child("name").text), widens: true}
		keys := p.keys(&n, "", "kind", "name", "namespace", "partition", "sources", "jwt", "meta", "hash", "createindex", "modifyindex")
		if partition := keys["partition"]; partition != nil && partition.text != "default" {
			p.widens = false // nobody of the partition imported here is meant
			p.refuse(partition.at, "partition", "other partitions have other identities; import each by itself, with its own template")
			return
		}
		c.destination(p, &n, keys["name"], keys["namespace"], keys, "")
	default:
		c.note("Entries of kind %s were passed over: they are no intentions.", clip(kind))
	}
}

// destination takes in the sources of one destination.
func (c *catalog) destination(p *piece, n *node, name, namespace *node, keys map[string]*node, path string) {
	to := service{p.word(namespace, path+"namespace"), p.word(name, path+"name")}
	if to.namespace == "" {
		to.namespace = "default"
	}
	if p.refused || !c.service(p, to, n.at, path+"name") {
		return
	}
	if first, again := c.seen[to]; again {
		p.refuse(n.at, "", "%s is here twice; first at %s:%d", to, first.file, first.line)
		return
	}
	c.seen[to] = n.at
	sources := p.items(asList(keys["sources"]), path+"sources")
	if len(sources) == 0 {
		p.refuse(n.at, path+"sources", "is missing: an entry has a source at least")
	}
	seen := map[service]bool{}
	for i := range sources {
		at := fmt.Sprintf("%ssources[%d]", path, i)
		source := intention{piece: &piece{draft: c.draft, object: p.object, widens: true}, at: sources[i].at, path: at, to: to}
		known := c.source(&source, &sources[i])
		if keys["jwt"] != nil && !source.denies() {
			source.widens = !known
			source.refuse(keys["jwt"].at, path+"jwt", "tokens (JWT) cannot be asked for here")
		}
		if !known {
			continue
		}
		if seen[source.from] {
			source.widens = true
			source.refuse(source.at, at, "%s is here twice", source.from)
		}
		seen[source.from] = true
		if source.refused { // it still stands between others and what they allow
			source.allow, source.permissions = false, nil
		}
		if len(c.intentions) == maxIntentions {
			source.widens = true
			source.refuse(source.at, at, "more than %d intentions; import them in parts", maxIntentions)
			return
		}
		c.intentions = append(c.intentions, source)
	}
}

// service checks a name and its namespace.
func (c *catalog) service(p *piece, s service, at place, path string) bool {
	var problem string
	switch {
	case s.name == "":
		problem = "a name is required"
	case s.namespace == one && s.name != one:
		problem = "a name cannot follow a wild namespace"
	case s.name != one && checkPattern("spiffe://x/"+strings.ReplaceAll(s.name, one, "%")) != nil, strings.Contains(s.name, "/"):
		problem = fmt.Sprintf("%q is no name of a service; * stands for a whole name", clip(s.name))
	case s.namespace != one && checkPattern("spiffe://x/"+strings.ReplaceAll(s.namespace, one, "%")) != nil, strings.Contains(s.namespace, "/"):
		problem = fmt.Sprintf("%q is no namespace; * stands for a whole one", clip(s.namespace))
	case s.namespace != "default" && s.namespace != one && !strings.Contains(c.template, "{namespace}"):
		problem = fmt.Sprintf("namespace %q: the template has no {namespace}, so that services of two namespaces would be one", s.namespace)
	default:
		return true
	}
	p.refuse(at, path, "%s", problem)
	return false
}

// source reads one source. It reports whether it is known whom it means.
func (c *catalog) source(i *intention, n *node) bool {
	keys := i.keys(n, i.path, "name", "namespace", "partition", "peer", "samenessgroup", "action", "permissions",
		"precedence", "type", "description", "legacyid", "legacymeta", "legacycreatetime", "legacyupdatetime")
	i.from = service{i.word(keys["namespace"], i.path+".namespace"), i.word(keys["name"], i.path+".name")}
	if i.from.namespace == "" {
		i.from.namespace = i.to.namespace
		if i.to.namespace == one {
			i.from.namespace = "default"
		}
	}
	action := i.word(keys["action"], i.path+".action")
	if i.refused || !c.service(i.piece, i.from, n.at, i.path+".name") {
		return false
	}
	for key, why := range map[string]string{
		"peer":          "services of a peer have identities of another trust domain; write their rules by hand",
		"partition":     "services of other partitions have other identities; import each partition by itself, with its own template",
		"samenessgroup": "whom a sameness group means is said elsewhere; name the services",
	} {
		if keys[key] != nil && keys[key].text != "" && (key != "partition" || keys[key].text != "default") {
			i.widens = key == "samenessgroup" && action != "allow" // the others are nobody of whom rules are made here
			i.refuse(keys[key].at, i.path+"."+key, "%s", why)
			return false
		}
	}
	if t := keys["type"]; t != nil && t.text != "" && t.text != "consul" {
		i.refuse(t.at, i.path+".type", "must be consul, not %s", t.describe())
	}
	i.widens = false // from here on it is taken for a deny, if it is refused
	permissions := i.items(asList(keys["permissions"]), i.path+".permissions")
	switch {
	case len(permissions) > 0 && action != "":
		i.refuse(keys["action"].at, i.path+".action", "action and permissions exclude each other")
	case len(permissions) > 0 && i.to.wild() > 0:
		i.refuse(n.at, i.path+".permissions", "belong to an exact destination alone")
	case len(permissions) > 0:
		i.permissions = []permission{}
		for k := range permissions {
			i.permission(&permissions[k], fmt.Sprintf("%s.permissions[%d]", i.path, k))
		}
	case action == "allow":
		i.allow = true
	case action != "deny":
		i.refuse(n.at, i.path+".action", "must be allow or deny, not %q", clip(action))
	}
	return true
}

// write makes rules of all intentions. Consul takes the first that matches, by
// precedence; rules have no order, and a deny wins. So each intention that
// allows is written for what those before it leave over.
func (c *catalog) write() {
	slices.SortStableFunc(c.intentions, func(a, b intention) int { return b.precedence() - a.precedence() })
	denies := map[int]bool{}
	clean := make([]bool, len(c.intentions))
	for i := range c.intentions {
		clean[i] = c.intentions[i].denies() && c.clean(i)
	}
	for i := range c.intentions {
		if !c.intentions[i].denies() {
			c.intention(i, clean, denies)
		}
	}
	for i := range c.intentions {
		if denies[i] {
			j := &c.intentions[i]
			c.rules = append(c.rules, rule{
				source: j.at, object: j.object, path: j.path, id: shortID(c.id(j) + "/deny"), at: "inbound",
				from: []string{c.pattern(j.from)}, to: []string{c.pattern(j.to)},
			})
		}
	}
}

func (c *catalog) id(i *intention) string {
	return "consul/" + i.to.String() + "/" + i.from.String()
}

// intention writes one that allows, and marks the denies that it needs.
func (c *catalog) intention(index int, clean []bool, denies map[int]bool) {
	i := &c.intentions[index]
	var terms []string
	for k := range index {
		j := &c.intentions[k]
		if j.allow || !j.overlaps(i) {
			continue // what it allows is allowed
		}
		if j.from.wild() > i.from.wild() {
			i.refuse(i.at, i.path, "%s at %s:%d comes before it by precedence but has the wider source, and there Consul's documentation and the rules that it gives to Envoy differ; say for %s alone what is meant", j.path, j.at.file, j.at.line, j.to)
			return
		}
		if clean[k] {
			denies[k] = true
			continue
		}
		term, problem := c.except(i, j)
		if problem != "" {
			i.refuse(i.at, i.path, "%s at %s:%d decides a part of it: %s", j.path, j.at.file, j.at.line, problem)
			return
		}
		if term == "" {
			return // nothing is left of it
		}
		terms = append(terms, term)
	}
	if i.permissions == nil {
		c.allow(i, &match{who: listed, ids: []string{c.pattern(i.from)}, terms: terms}, -1)
		return
	}
	c.permissions(i, terms)
}

// clean reports whether nobody whom a deny is about is allowed by what comes
// before it. Then it can be written as a deny.
func (c *catalog) clean(index int) bool {
	for k := range index {
		if j := &c.intentions[k]; !j.denies() && j.overlaps(&c.intentions[index]) {
			return false
		}
	}
	return true
}

// except returns the CEL text for those of i that are not of j; "" where there
// are none.
func (c *catalog) except(i, j *intention) (term, problem string) {
	var both []string
	for _, side := range []struct {
		id         string
		all, those service
	}{{"from.id", i.from, j.from}, {"to.id", i.to, j.to}} {
		if side.those.wild() >= side.all.wild() {
			continue // j has all of i on this side
		}
		pattern := c.pattern(side.those)
		beginning, wild := strings.CutSuffix(pattern, "/*")
		switch {
		case !wild && exact(pattern):
			both = append(both, side.id+" == "+quote(pattern))
		case wild && exact(beginning):
			both = append(both, side.id+".startsWith("+quote(beginning+"/")+")")
		default:
			return "", fmt.Sprintf("%s cannot be left out, because its identity is not one; give a template without wildcards, such as spiffe://example.org/ns/{namespace}/dc/dc1/svc/{name}", side.those)
		}
	}
	if len(both) == 0 {
		return "", ""
	}
	return "!(" + strings.Join(both, " && ") + ")", ""
}

// allow writes the rule of an intention, or of one of its permissions.
func (c *catalog) allow(i *intention, m *match, permission int) {
	r := rule{source: i.at, object: i.object, path: i.path, id: c.id(i), allow: true, at: "inbound", to: []string{c.pattern(i.to)}}
	if permission >= 0 {
		r.path += fmt.Sprintf(".permissions[%d]", permission)
		r.id += fmt.Sprintf("/%d", permission)
	}
	r.id = shortID(r.id)
	problem := m.fill(&r)
	if len(c.rules) >= maxRules {
		problem = fmt.Sprintf("more than %d rules come out of all this; import it in parts", maxRules)
	}
	if problem != "" {
		i.refuse(i.at, i.path, "%s", problem)
		return
	}
	c.rules = append(c.rules, r)
}
