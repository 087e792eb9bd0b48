package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// Bounds of what one rule may list, beyond the size of a file.
const (
	maxMethod      = 64   // bytes
	maxDescription = 1024 // bytes
	maxHeaders     = 128  // each is looked for among all of a request
)

// conditions returns those of a rule, made when the first is read.
func (r *rule) conditions() *conditions {
	if r.more == nil {
		r.more = &conditions{}
	}
	return r.more
}

// condition takes in a key of a rule that is no identity and no listener; it
// reports whether the key is one.
func (l *loader) condition(r *rule, p *pair, path func() string) bool {
	n := &p.value
	switch p.key {
	case "http":
		l.http(r, n, path)
	case "grpc":
		l.grpc(r, n, path)
	case "source_ip":
		r.conditions().networks = l.networks(n, path)
	case "not_source_ip":
		r.conditions().notNetworks = l.networks(n, path)
	case "ports":
		r.conditions().ports = l.ports(n, path)
	case "sni":
		r.conditions().sni = l.hosts(n, path, false)
	case "when":
		l.when(r, n, path)
	default:
		return false
	}
	return true
}

// eachText calls f for the text of each item of a list.
func (l *loader) eachText(n *node, path func() string, f func(s string, at place, path func() string)) {
	if !l.isList(n, path) {
		return
	}
	for i := range n.items {
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path(), i) }
		if s, ok := l.text(&n.items[i], itemPath); ok {
			f(s, n.items[i].at, itemPath)
		}
	}
}

// parseEach reads each item of a list by one function.
func parseEach[T any](l *loader, n *node, path func() string, parse func(string) (T, error)) []T {
	out := make([]T, 0, len(n.items)) // not nil: that would be a condition left out
	l.eachText(n, path, func(s string, at place, path func() string) {
		v, err := parse(s)
		if err != nil {
			l.findings.add(at, path(), "%v", err)
			return
		}
		out = append(out, v)
	})
	return out
}

func (l *loader) networks(n *node, path func() string) []netip.Prefix {
	return parseEach(l, n, path, parsePrefix)
}

func (l *loader) hosts(n *node, path func() string, ports bool) []hostPattern {
	return parseEach(l, n, path, func(s string) (hostPattern, error) { return parseHost(s, ports) })
}

func (l *loader) ports(n *node, path func() string) []portRange {
	out := make([]portRange, 0, len(n.items))
	if !l.isList(n, path) {
		return out
	}
	for i := range n.items {
		item := &n.items[i]
		r, err := parsePorts(item.text)
		if err != nil || item.kind != number && item.kind != text {
			l.findings.add(item.at, fmt.Sprintf("%s[%d]", path(), i), `must be a port from 1 to 65535, or a range like "9000-9100", not %s`, item.describe())
			continue
		}
		out = append(out, r)
	}
	return out
}

func parsePorts(s string) (portRange, error) {
	low, high, ranged := strings.Cut(s, "-")
	first, err := strconv.ParseUint(low, 10, 16)
	if err != nil || first == 0 || low[0] < '1' {
		return portRange{}, strconv.ErrRange
	}
	last := first
	if ranged {
		if last, err = strconv.ParseUint(high, 10, 16); err != nil || last < first || high[0] < '1' {
			return portRange{}, strconv.ErrRange
		}
	}
	return portRange{uint16(first), uint16(last)}, nil
}

func (l *loader) when(r *rule, n *node, path func() string) {
	s, ok := l.text(n, path)
	if !ok {
		return
	}
	w, problem := l.whens.compile(s, n.start())
	if problem != nil {
		problem.Path = path()
		l.findings.take(problem)
		return
	}
	r.conditions().when = w
}

// block calls f for each key of a block, and refuses those that are there twice
// or that f does not know.
func (l *loader) block(n *node, path func() string, known []string, f func(p *pair, path func() string)) (seen []string, ok bool) {
	if n.kind != block || len(n.pairs) == 0 {
		what := n.describe()
		if n.kind == block {
			what = "an empty one"
		}
		l.findings.add(n.at, path(), "must be a block with %s, not %s", orList(known), what)
		return nil, false
	}
	for i := range n.pairs {
		p := &n.pairs[i]
		keyPath := func() string { return path() + "." + clip(p.key) }
		switch {
		case slices.Contains(seen, p.key):
			l.findings.add(p.at, keyPath(), "is here twice")
		case !slices.Contains(known, p.key):
			l.unknown(p, keyPath(), known)
		default:
			seen = append(seen, p.key)
			f(p, keyPath)
		}
	}
	return seen, true
}

// orList lists words as a person does.
func orList(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

func (l *loader) http(r *rule, n *node, path func() string) {
	c := &httpCond{}
	_, ok := l.block(n, path, httpKeyNames, func(p *pair, path func() string) {
		switch p.key {
		case "methods":
			c.methods = parseEach(l, &p.value, path, parseMethod)
		case "hosts":
			c.hosts = l.hosts(&p.value, path, true)
		case "paths":
			c.paths = parseEach(l, &p.value, path, parsePath)
		case "headers":
			c.headers = l.headers(&p.value, path)
		case "subjects":
			c.subjects = l.speakers(&p.value, path)
		}
	})
	if ok {
		l.setHTTP(r, c, n, path)
	}
}

func (l *loader) setHTTP(r *rule, c *httpCond, n *node, path func() string) {
	if r.more != nil && r.more.http != nil {
		l.findings.add(n.at, path(), "a rule has http or grpc, not both: gRPC is HTTP; use two rules")
		return
	}
	r.conditions().http = c
}

// speakers takes in http.subjects, or that of grpc.
func (l *loader) speakers(n *node, path func() string) *speakers {
	s := &speakers{}
	l.subjects(&s.subjects, groupRef{of: &s.subjects, side: sideTo}, n, path)
	l.speaking = append(l.speaking, s)
	return s
}

func parseMethod(s string) (string, error) {
	name, err := canonical.HeaderName(s) // both are tokens (RFC 9110, section 5.6.2)
	switch {
	case s == one:
		return "", errors.New("every method: leave methods out")
	case err != nil || len(s) > maxMethod:
		return "", fmt.Errorf("%q is no HTTP method", clip(s))
	case s != strings.ToUpper(name):
		return "", fmt.Errorf("%q: methods are compared letter by letter; did you mean %s?", clip(s), strings.ToUpper(s))
	}
	return s, nil
}

// The words for headers that are to be there, or not.
const (
	wordPresent = "present"
	wordAbsent  = "absent"
)

func (l *loader) headers(n *node, path func() string) []headerCond {
	if n.kind != block || len(n.pairs) == 0 {
		l.findings.add(n.at, path(), "must be a block of header names, not %s", n.describe())
		return nil
	}
	if len(n.pairs) > maxHeaders {
		l.findings.add(n.at, path(), "%d headers; at most %d are allowed", len(n.pairs), maxHeaders)
		return nil
	}
	var out []headerCond
	for i := range n.pairs {
		p := &n.pairs[i]
		keyPath := func() string { return path() + "." + clip(p.key) }
		name, err := headerName(p.key)
		switch {
		case err != nil:
			l.findings.add(p.at, keyPath(), "%v", err)
			continue
		case slices.ContainsFunc(out, func(c headerCond) bool { return c.name == name }):
			l.findings.add(p.at, keyPath(), "is here twice; names of headers have no case")
			continue
		}
		c := headerCond{name: name}
		switch v := &p.value; {
		case v.kind == text && v.text == wordPresent:
			c.want = wantPresent
		case v.kind == text && v.text == wordAbsent:
			c.want = wantAbsent
		case v.kind == list:
			c.values = parseEach(l, v, keyPath, headerValue)
		default:
			l.findings.add(v.at, keyPath(), "must be a list of values, present or absent, not %s", v.describe())
		}
		out = append(out, c)
	}
	return out
}

func headerName(s string) (string, error) {
	name, err := canonical.HeaderName(s)
	switch {
	case name == "host" || s == ":authority":
		return "", fmt.Errorf("%q: use hosts", s)
	case strings.HasPrefix(s, ":"):
		return "", fmt.Errorf("%q: use methods, hosts and paths", clip(s))
	case err != nil:
		return "", fmt.Errorf("%q is no name of a header: %w", clip(s), err)
	}
	return name, nil
}

func headerValue(s string) (string, error) {
	value, err := canonical.HeaderValue(s)
	if err != nil {
		return "", fmt.Errorf("%q: no header can have this value: %w", clip(s), err)
	}
	return value, nil
}

// grpc takes in a grpc block as the paths that its calls have.
func (l *loader) grpc(r *rule, n *node, path func() string) {
	var services, methods []string
	var subjects *speakers
	_, ok := l.block(n, path, grpcKeyNames, func(p *pair, path func() string) {
		switch p.key {
		case "services":
			services = parseEach(l, &p.value, path, parseService)
		case "methods":
			methods = parseEach(l, &p.value, path, parseCall)
		case "subjects":
			subjects = l.speakers(&p.value, path)
		}
	})
	if !ok {
		return
	}
	calls := max(len(services), 1) * max(len(methods), 1)
	if calls > maxCalls && services != nil && methods != nil {
		l.findings.add(n.at, path(), "%d services with %d methods each; use several rules", len(services), len(methods))
		return
	}
	if l.calls += calls; l.calls > maxAllCalls {
		l.findings.add(n.at, path(), "services times methods are more than %d in all rules together; leave methods out where a rule is about all", maxAllCalls)
		return
	}
	l.setHTTP(r, &httpCond{grpc: true, paths: callPaths(services, methods), subjects: subjects}, n, path)
}

const (
	maxCalls    = 4096    // services times methods of one rule
	maxAllCalls = 1 << 20 // of all: each takes some 150 bytes of memory, and next to none of the file
)

// callPaths are the paths of gRPC calls: /service/method.
func callPaths(services, methods []string) []pathPattern {
	segments := func(words []string) []pathSegment {
		if words == nil {
			return []pathSegment{{any: true}}
		}
		var out []pathSegment
		for _, w := range words {
			out = append(out, pathSegment{literal: w})
		}
		return out
	}
	var paths []pathPattern
	for _, s := range segments(services) {
		for _, m := range segments(methods) {
			p := pathPattern{segments: []pathSegment{s, m}}
			p.text = p.spell()
			p.written = cmp.Or(s.literal, "{service}") + "/" + cmp.Or(m.literal, "{method}")
			paths = append(paths, p)
		}
	}
	return paths
}

func parseService(s string) (string, error) {
	for _, word := range strings.Split(s, ".") {
		if !isIdentifier(word) {
			return "", fmt.Errorf("%q is no gRPC service; write its full name, like shop.v1.Orders", clip(s))
		}
	}
	return s, nil
}

func parseCall(s string) (string, error) {
	if !isIdentifier(s) {
		return "", fmt.Errorf("%q is no gRPC method; write its name alone, like GetOrder", clip(s))
	}
	return s, nil
}

// isIdentifier reports whether s is a name of the protobuf language.
func isIdentifier(s string) bool {
	for i := range len(s) {
		c := s[i] | 0x20
		if (c < 'a' || c > 'z') && s[i] != '_' && (i == 0 || s[i] < '0' || s[i] > '9') {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}
