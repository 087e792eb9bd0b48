package policy

import (
	"slices"
	"strings"
)

// httpCond is the http block of a rule, or its grpc block in the same terms.
// What is left out is nil.
type httpCond struct {
	methods []string
	hosts   []hostPattern
	paths   []pathPattern
	headers []headerCond
	grpc    bool // the paths come from services and methods

	subjects *speakers
}

// match reports whether a request meets all of the conditions for an allow,
// or the wider ones of a deny, but for subjects: see ofSubject. Where byPath is set, the path has been found to
// match.
func (c *httpCond) match(h *HTTP, allow, byPath bool) bool {
	switch {
	case c.methods != nil && !slices.Contains(c.methods, h.Method),
		c.hosts != nil && !matchHost(c.hosts, h.Host),
		c.paths != nil && !byPath && !c.matchPath(h.Path, !allow),
		c.grpc && allow && !h.GRPC():
		return false
	}
	for i := range c.headers {
		if !c.headers[i].match(h, allow) {
			return false
		}
	}
	return true
}

func (c *httpCond) matchPath(path string, deny bool) bool {
	for i := range c.paths {
		if c.paths[i].match(path, deny) {
			return true
		}
	}
	return false
}

const grpcType = "application/grpc"

// GRPC reports whether the request is a gRPC call: a POST whose one content
// type is application/grpc, or that with a suffix such as +proto (the gRPC
// protocol over HTTP/2, "Requests").
func (h *HTTP) GRPC() bool {
	if h.Method != "POST" {
		return false
	}
	found := false
	for i := range h.Headers {
		if h.Headers[i].Name != "content-type" {
			continue
		}
		rest, ok := strings.CutPrefix(h.Headers[i].Value, grpcType)
		if !ok || rest != "" && rest[0] != '+' && rest[0] != ';' || found {
			return false
		}
		found = true
	}
	return found
}

// headerCond is one entry of headers.
type headerCond struct {
	name   string
	want   presence
	values []string // of wantValue
}

// presence is what is asked of a header.
type presence uint8

const (
	wantValue presence = iota
	wantPresent
	wantAbsent
)

// match: an allow needs the header, and every value of it to be one of the
// list. A deny needs any, be it one of several that commas part: a service
// takes "a, b" for two lines (RFC 9110, section 5.3).
func (c *headerCond) match(h *HTTP, allow bool) bool {
	present := false
	for i := range h.Headers {
		if h.Headers[i].Name != c.name {
			continue
		}
		present = true
		if c.want != wantValue {
			break
		}
		switch is := c.holds(h.Headers[i].Value, !allow); {
		case is && !allow:
			return true
		case !is && allow:
			return false
		}
	}
	switch c.want {
	case wantPresent:
		return present
	case wantAbsent:
		return !present
	}
	return present && allow
}

func (c *headerCond) holds(value string, elements bool) bool {
	if slices.Contains(c.values, value) {
		return true
	}
	for elements && value != "" {
		var element string
		element, value, _ = strings.Cut(value, ",")
		if slices.Contains(c.values, strings.Trim(element, " \t")) {
			return true
		}
	}
	return false
}
