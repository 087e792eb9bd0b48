package importer

import (
	"fmt"
	"slices"
	"strings"
)

// permission is one of an L7 intention. They are asked in order.
type permission struct {
	allow   bool
	methods []string
	path    *pathValue
	headers []headerPresence
	equal   []string // CEL texts for headers with a value
}

// permission reads one.
func (i *intention) permission(n *node, path string) {
	keys := i.keys(n, path, "action", "http", "jwt")
	p := permission{}
	switch action := i.word(keys["action"], path+".action"); action {
	case "allow":
		p.allow = true
	case "deny":
	default:
		i.refuse(n.at, path+".action", "must be allow or deny, not %q", clip(action))
	}
	if keys["jwt"] != nil {
		i.refuse(keys["jwt"].at, path+".jwt", "tokens (JWT) cannot be asked for here")
	}
	if keys["http"] == nil {
		i.refuse(n.at, path+".http", "is missing")
		return
	}
	http := i.keys(keys["http"], path+".http", "pathexact", "pathprefix", "pathregex", "methods", "header")
	i.paths(&p, http, path+".http")
	for _, m := range i.words(http["methods"], path+".http.methods") {
		method := strings.ToUpper(m.text)
		if strings.Trim(method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "" {
			i.refuse(m.at, path+".http.methods", "%q is no method", clip(m.text))
		}
		p.methods = append(p.methods, method)
	}
	headers := i.items(asList(http["header"]), path+".http.header")
	for k := range headers {
		i.header(&p, &headers[k], fmt.Sprintf("%s.http.header[%d]", path, k))
	}
	if p.path == nil && len(p.methods)+len(p.headers)+len(p.equal) == 0 && !i.refused {
		i.refuse(n.at, path+".http", "is empty: it asks for something")
	}
	i.permissions = append(i.permissions, p)
}

func (i *intention) paths(p *permission, http map[string]*node, path string) {
	if n := http["pathregex"]; n != nil && n.text != "" {
		i.refuse(n.at, path+".pathregex", "regular expressions are not asked here")
	}
	for _, key := range []string{"pathexact", "pathprefix"} {
		value := i.word(http[key], path+"."+key)
		if value == "" {
			continue
		}
		if p.path != nil {
			i.refuse(http[key].at, path, "pathExact, pathPrefix and pathRegex exclude each other")
		}
		if problem := checkPathText(value); problem != "" {
			i.refuse(http[key].at, path+"."+key, "%q: %s", clip(value), problem)
		}
		p.path = &pathValue{value, key == "pathprefix"}
	}
}

func (i *intention) header(p *permission, n *node, path string) {
	keys := i.keys(n, path, "name", "present", "exact", "prefix", "suffix", "contains", "regex", "invert", "ignorecase")
	name, problem := headerName(i.word(keys["name"], path+".name"))
	if problem != "" {
		i.refuse(n.at, path+".name", "%s", problem)
	}
	for _, key := range []string{"prefix", "suffix", "contains", "regex"} {
		if v := keys[key]; v != nil && v.text != "" {
			i.refuse(v.at, path+"."+key, "parts of a header's value cannot be asked for: present and exact can")
		}
	}
	present, invert := i.truth(keys["present"], path+".present"), i.truth(keys["invert"], path+".invert")
	exact := i.word(keys["exact"], path+".exact")
	switch {
	case i.refused:
	case present && exact != "" || !present && exact == "":
		i.refuse(n.at, path, "want one of present and exact")
	case present && slices.ContainsFunc(p.headers, func(h headerPresence) bool { return h.name == name }):
		i.refuse(n.at, path, "%q is asked for twice", name)
	case present:
		p.headers = append(p.headers, headerPresence{name, invert})
	case invert:
		i.refuse(n.at, path+".invert", "Envoys differ in what an inverted value says of requests without the header; only present can be inverted")
	case i.truth(keys["ignorecase"], path+".ignorecase"):
		i.refuse(n.at, path+".ignorecase", "values are compared by case here")
	case headerValue(exact) != "":
		i.refuse(n.at, path+".exact", "%s", headerValue(exact))
	default:
		p.equal = append(p.equal, headerIs(name, exact))
	}
}

func (p *piece) truth(n *node, path string) bool {
	if n == nil {
		return false
	}
	if n.kind != number || n.text != "true" && n.text != "false" {
		p.refuse(n.at, path, "must be true or false, not %s", n.describe())
	}
	return n.text == "true"
}

// cel returns all of the permission as one CEL text.
func (p *permission) cel() string {
	var terms []string
	if len(p.methods) > 0 {
		terms = append(terms, "request.method in "+celList(p.methods))
	}
	if p.path != nil {
		terms = append(terms, p.path.cel())
	}
	for _, h := range p.headers {
		term := quote(h.name) + " in request.headers"
		if h.absent {
			term = "!(" + term + ")"
		}
		terms = append(terms, term)
	}
	return strings.Join(append(terms, p.equal...), " && ")
}

// permissions writes those that allow, each without what denies before it
// match.
func (c *catalog) permissions(i *intention, terms []string) {
	var denied []string
	first := len(c.rules)
	for k := range i.permissions {
		p := &i.permissions[k]
		if !p.allow {
			denied = append(denied, p.cel())
			continue
		}
		m := match{who: listed, ids: []string{c.pattern(i.from)}, terms: terms, http: true}
		m.methods, m.headers = unique(slices.Clone(p.methods)), p.headers
		if p.path != nil {
			m.onPaths([]pathValue{*p.path}, true)
		}
		m.httpTerms = append(m.httpTerms, p.equal...)
		if len(denied) > 0 {
			m.httpTerms = append(m.httpTerms, noneOf(denied))
		}
		if c.allow(i, &m, k); i.refused {
			c.rules = c.rules[:first]
			return
		}
	}
}
