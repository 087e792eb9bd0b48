package importer

import (
	"fmt"
	"strings"
)

// pathValue is one value for a path.
type pathValue struct {
	text   string
	prefix bool // else the whole path
}

// checkPathText refuses what the two sides would not normalise alike, or what
// no request can have here.
func checkPathText(s string) string {
	if !strings.HasPrefix(s, "/") {
		return "a path begins with a slash"
	}
	for i := range len(s) {
		if c := s[i]; c >= 0x80 || c <= ' ' || strings.IndexByte("%;?#\\\"<>[]^`{|}*\x7f", c) >= 0 {
			return fmt.Sprintf("%q in a path: proxies normalise it differently, so that it cannot be said to mean the same", s[i:i+1])
		}
	}
	if strings.Contains(s, "//") {
		return `"//" in a path: requests with it are refused here`
	}
	for segment := range strings.SplitSeq(s[1:], "/") {
		if segment == "." || segment == ".." {
			return fmt.Sprintf("%q in a path: no request has it after normalisation", segment)
		}
	}
	return ""
}

// pattern returns the value as a pattern of http.paths that means exactly the
// same; "" if there is none. In a deny such a pattern covers a slash at the end
// as well, which only ** has anyhow.
func (v pathValue) pattern(allow bool) string {
	switch slash := strings.HasSuffix(v.text, "/"); {
	case v.prefix && slash:
		return v.text + many
	case !v.prefix && !slash && allow:
		return v.text
	}
	return ""
}

// cel returns the value as a CEL text.
func (v pathValue) cel() string {
	if v.prefix {
		return "request.path.startsWith(" + quote(v.text) + ")"
	}
	return "request.path == " + quote(v.text)
}

// onPaths narrows the match to requests for one of the paths.
func (m *match) onPaths(values []pathValue, allow bool) {
	var patterns, terms []string
	for _, v := range values {
		patterns, terms = append(patterns, v.pattern(allow)), append(terms, v.cel())
	}
	for _, p := range patterns {
		if p == "" {
			m.httpTerms = append(m.httpTerms, anyOf(terms))
			return
		}
	}
	m.paths = patterns
}

// anyOf joins CEL texts of which one must hold.
func anyOf(terms []string) string {
	if len(terms) == 1 {
		return terms[0]
	}
	return "(" + strings.Join(terms, " || ") + ")"
}

// noneOf joins CEL texts of which none may hold.
func noneOf(terms []string) string { return "!(" + strings.Join(terms, " || ") + ")" }

// headerIs returns the CEL text for a header that is there once, with that
// value. Envoy joins repeated fields by commas before it compares, so that only
// one field can equal a value without a comma.
func headerIs(name, value string) string {
	return fmt.Sprintf("%s in request.headers && request.headers[%s] == [%s]", quote(name), quote(name), quote(value))
}

// headerName returns the name as requests have it here.
func headerName(s string) (name, problem string) {
	name = strings.ToLower(s)
	for i := range len(name) {
		if c := name[i]; c >= 0x80 || c <= ' ' || strings.IndexByte("\"(),/:;<=>?@[\\]{}\x7f", c) >= 0 {
			return "", fmt.Sprintf("%q is no name of a header", clip(s))
		}
	}
	if name == "" || name == "host" {
		return "", fmt.Sprintf("%q is no name of a header; a host is asked for by hosts", clip(s))
	}
	return name, ""
}

// headerValue says why a value cannot be compared exactly.
func headerValue(s string) string {
	switch {
	case strings.Contains(s, ","):
		return "a comma in the value: Envoy joins repeated fields by it before it compares, and that cannot be said here"
	case s == "" || strings.TrimSpace(s) != s:
		return "white space around the value, or none: no field equals it"
	}
	for i := range len(s) {
		if s[i] >= 0x7f || s[i] < ' ' {
			return "a value that is not printable ASCII"
		}
	}
	return ""
}

// onHeader narrows the match to requests that have the header, or not.
func (m *match) onHeader(name string, absent bool) {
	for _, h := range m.headers {
		if h.name == name && h.absent == absent {
			return
		}
		if h.name == name { // both: nothing is like that
			m.httpTerms = append(m.httpTerms, "false")
			return
		}
	}
	m.headers = append(m.headers, headerPresence{name, absent})
}
