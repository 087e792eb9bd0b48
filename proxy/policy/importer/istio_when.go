package importer

import (
	"fmt"
	"strconv"
	"strings"
)

// operations returns a match for each operation.
func (r *istioRule) operations(n *node) []match {
	path := r.path + ".to"
	items := r.items(n, path)
	if n.kind == list && len(items) == 0 {
		r.refuse(n.at, path, "an empty list asks for nothing: take the key out, if that is meant")
	}
	var out []match
	for i := range items {
		path := fmt.Sprintf("%s[%d].operation", path, i)
		entry := r.keys(&items[i], strings.TrimSuffix(path, ".operation"), "operation")
		m := match{}
		r.operation(&m, entry["operation"], items[i].at, path)
		out = append(out, m)
	}
	return out
}

func (r *istioRule) operation(m *match, n *node, at place, path string) {
	if n == nil {
		r.refuse(at, path, "is empty: an operation asks for something")
		return
	}
	keys := r.keys(n, path, "hosts", "notHosts", "ports", "notPorts", "methods", "notMethods", "paths", "notPaths")
	if len(keys) == 0 {
		r.refuse(n.at, path, "is empty: an operation asks for something")
	}
	for _, a := range []struct {
		key string
		is  attribute
	}{{"ports", port}, {"methods", method}, {"hosts", host}, {"paths", requestPath}} {
		not := "not" + strings.ToUpper(a.key[:1]) + a.key[1:]
		a.is(r, m, r.words(keys[a.key], path+"."+a.key), false, path+"."+a.key)
		a.is(r, m, r.words(keys[not], path+"."+not), true, path+"."+not)
	}
}

func port(r *istioRule, m *match, values []word, not bool, path string) {
	var numbers []int
	for _, v := range values {
		n, err := strconv.Atoi(v.text)
		if err != nil || n < 1 || n > 65535 || strconv.Itoa(n) != v.text {
			r.refuse(v.at, path, "%q is no port: want a number from 1 to 65535", clip(v.text))
			continue
		}
		numbers = append(numbers, n)
	}
	if len(values) == 0 {
		return
	}
	r.mesh.ported = true
	set := portSet(numbers)
	if not {
		set = set.but()
	}
	m.ports = m.ports.and(set)
}

// texts reads values of an attribute of requests, each with a function that
// returns it as CEL. It returns those texts; none where one of the values is
// "*", which every request has.
func (r *istioRule) texts(m *match, values []word, not bool, path string, cel func(string) (string, string)) []string {
	for _, v := range values {
		if v.text == one && !not {
			m.http = true
			return nil
		}
	}
	var terms []string
	for _, v := range values {
		if v.text == one {
			r.refuse(v.at, path, "* stands for anything, so that the rule matches nothing where requests can be seen; what is meant?")
			continue
		}
		term, problem := cel(v.text)
		if problem != "" {
			r.refuse(v.at, path, "%q: %s", clip(v.text), problem)
		}
		terms = append(terms, term)
	}
	return terms
}

func method(r *istioRule, m *match, values []word, not bool, path string) {
	var methods []string
	r.texts(m, values, not, path, func(value string) (string, string) {
		for i := range len(value) {
			if (value[i] < 'A' || value[i] > 'Z') && value[i] != '-' {
				return "", "want a whole method in upper case: methods are compared by case, and parts of them cannot be asked for"
			}
		}
		methods = append(methods, value)
		return "", ""
	})
	switch {
	case len(methods) == 0:
	case not:
		m.httpTerms = append(m.httpTerms, "!(request.method in "+celList(methods)+")")
	default:
		m.methods = unique(methods)
	}
}

// host narrows by the host. Istio compares all of the authority, so that a host
// without port means requests that name none; here it means any port. Only the
// pair "host" and "host:*" is the same.
func host(r *istioRule, m *match, values []word, not bool, path string) {
	seen := map[string]bool{}
	terms := r.texts(m, values, not, path, func(value string) (string, string) {
		value = strings.ToLower(value)
		seen[value] = true
		rest, suffix := strings.CutPrefix(value, one)
		rest, prefix := strings.CutSuffix(rest, one)
		switch {
		case strings.Contains(rest, one) || suffix && prefix:
			return "", "a * in the middle is a plain character to Istio, which no host has"
		case strings.Trim(rest, "abcdefghijklmnopqrstuvwxyz0123456789.-_:[]") != "":
			return "", "no host of a request is like this"
		case suffix:
			return "request.host.endsWith(" + quote(rest) + ")", ""
		case prefix:
			return "request.host.startsWith(" + quote(rest) + ")", ""
		}
		return "request.host == " + quote(rest), ""
	})
	if len(terms) == 0 {
		return
	}
	var pairs []string
	for value := range seen {
		name, ports := strings.CutSuffix(value, ":*")
		if !ports && seen[value+":*"] && !strings.ContainsAny(value, ":*") {
			pairs = append(pairs, value)
		} else if !ports || !seen[name] {
			pairs = nil
			break
		}
	}
	switch {
	case not:
		m.httpTerms = append(m.httpTerms, noneOf(terms))
	case 2*len(pairs) == len(seen):
		m.hosts = unique(pairs)
	default:
		m.httpTerms = append(m.httpTerms, anyOf(terms))
	}
}

const (
	templateOne  = "{*}"
	templateMany = "{**}"
)

func requestPath(r *istioRule, m *match, values []word, not bool, path string) {
	r.mesh.pathed = r.mesh.pathed || len(values) > 0
	var plain []pathValue
	var templates []string
	terms := r.texts(m, values, not, path, func(value string) (string, string) {
		if strings.Contains(value, templateOne) || strings.Contains(value, templateMany) {
			pattern, problem := template(value)
			switch {
			case problem != "":
				return "", problem
			case not:
				return "", "a template among notPaths cannot be said: only whole paths and beginnings"
			case !r.allow && !strings.HasSuffix(pattern, "/**"):
				return "", "a template in a deny covers a slash at the end as well here, so that it would deny more; only those that end with /{**} are the same"
			}
			templates = append(templates, pattern)
			return "", ""
		}
		rest, prefix := strings.CutSuffix(value, one)
		if strings.HasPrefix(value, one) {
			return "", "an ending of a path cannot be said: paths are matched by segments from the beginning"
		}
		if problem := checkPathText(rest); problem != "" {
			return "", problem
		}
		v := pathValue{rest, prefix}
		plain = append(plain, v)
		return v.cel(), ""
	})
	switch {
	case len(terms) == 0:
	case not:
		m.httpTerms = append(m.httpTerms, noneOf(terms))
	case len(templates) == 0:
		m.onPaths(plain, r.allow)
	default:
		m.onPaths(plain, r.allow)
		if len(plain) > 0 && len(m.paths) == 0 {
			r.refuse(values[0].at, path, "templates beside paths that no pattern means exactly; put them into rules of their own")
			return
		}
		m.paths = append(m.paths, templates...)
	}
}

// template turns an Envoy URI template into a pattern of http.paths.
func template(value string) (pattern, problem string) {
	segments := strings.Split(value, "/")
	for i, s := range segments {
		switch {
		case i == 0 && s != "":
			return "", "a path begins with a slash"
		case s == templateMany && i == len(segments)-1:
			segments[i] = many
		case s == templateMany:
			return "", "{**} before the end cannot be said"
		case s == templateOne:
			segments[i] = "{s" + strconv.Itoa(i) + "}"
		case i > 0 && s == "":
			return "", "a slash at the end of a template, or two in a row, cannot be said"
		case i > 0:
			if problem := checkPathText("/" + s); problem != "" {
				return "", problem
			}
		}
	}
	return strings.Join(segments, "/"), ""
}

// conditions reads `when` into m.
func (r *istioRule) conditions(m *match, n *node) {
	path := r.path + ".when"
	items := r.items(n, path)
	for i := range items {
		path := fmt.Sprintf("%s[%d]", path, i)
		keys := r.keys(&items[i], path, "key", "values", "notValues")
		key := r.word(keys["key"], path+".key")
		if keys["values"] == nil && keys["notValues"] == nil {
			r.refuse(items[i].at, path, "values or notValues is missing")
		}
		is, problem := r.condition(key)
		if problem != "" {
			r.refuse(items[i].at, path, "%s: %s", clip(key), problem)
			continue
		}
		is(r, m, r.words(keys["values"], path+".values"), false, path+".values")
		is(r, m, r.words(keys["notValues"], path+".notValues"), true, path+".notValues")
	}
}

func (r *istioRule) condition(key string) (attribute, string) {
	switch key {
	case "source.ip":
		return address, ""
	case "source.namespace":
		return namespace, ""
	case "source.principal":
		return principal, ""
	case "source.serviceAccount":
		return account, ""
	case "source.trustDomain":
		return domain, ""
	case "destination.port":
		return port, ""
	case "connection.sni":
		return serverName, ""
	case "remote.ip":
		return nil, "addresses out of X-Forwarded-For cannot be asked for: only the client's own (source.ip)"
	case "destination.ip":
		return nil, "the address that was called cannot be asked for; name the workload"
	}
	if name, ok := strings.CutPrefix(key, "request.headers["); ok {
		name, ok = strings.CutSuffix(name, "]")
		name, problem := headerName(name)
		if !ok || problem != "" {
			return nil, "want request.headers[NAME] with the name of a header, which is none of Envoy's own (:method)"
		}
		return header(name), ""
	}
	if strings.HasPrefix(key, "request.auth.") {
		return nil, "tokens (JWT) cannot be asked for here"
	}
	return nil, "unknown attribute, or one that cannot be asked for here"
}

func header(name string) attribute {
	return func(r *istioRule, m *match, values []word, not bool, path string) {
		var terms []string
		for _, v := range values {
			if v.text == one {
				m.onHeader(name, not)
				if !not {
					return // whatever the value
				}
				continue
			}
			problem := headerValue(v.text)
			if strings.HasPrefix(v.text, one) || strings.HasSuffix(v.text, one) {
				problem = "parts of a value cannot be asked for"
			}
			if problem != "" {
				r.refuse(v.at, path, "%q: %s", clip(v.text), problem)
			}
			terms = append(terms, headerIs(name, v.text))
		}
		switch {
		case len(terms) == 0:
		case not:
			m.httpTerms = append(m.httpTerms, noneOf(terms))
		default:
			m.httpTerms = append(m.httpTerms, anyOf(terms))
		}
	}
}

// serverName narrows by SNI. In a deny it is CEL: a rule's own `sni` takes a
// connection without a server name for one that matches.
func serverName(r *istioRule, m *match, values []word, not bool, path string) {
	var terms, names []string
	for _, v := range values {
		rest, suffix := strings.CutPrefix(v.text, one)
		switch {
		case v.text == one:
			terms = append(terms, `connection.sni != ""`)
		case strings.Contains(rest, one) || strings.Trim(rest, "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "":
			r.refuse(v.at, path, "%q: want a host name in lower case, or *.SUFFIX; Istio compares by case what clients send in lower case", clip(v.text))
		case suffix:
			terms = append(terms, "connection.sni.endsWith("+quote(rest)+")")
		default:
			terms = append(terms, "connection.sni == "+quote(rest))
		}
		if v.text != one && (!suffix || strings.HasPrefix(rest, ".")) {
			names = append(names, v.text)
		}
	}
	switch {
	case len(values) == 0:
	case not:
		m.terms = append(m.terms, noneOf(terms))
	case r.allow && len(names) == len(values) && m.sni == nil:
		m.sni = unique(names)
	default:
		m.terms = append(m.terms, anyOf(terms))
	}
}
