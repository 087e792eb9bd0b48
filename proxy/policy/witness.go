package policy

import (
	"net/netip"
	"strings"
)

// This file makes HTTP requests that rules ask for.

// maxPaths is how many of a rule's paths are tried.
const maxPaths = 8

// sourceIn returns an address of a network.
func sourceIn(n netip.Prefix) netip.AddrPort { return netip.AddrPortFrom(n.Addr(), 0) }

// instance returns a host that the pattern covers.
func (h hostPattern) instance() string {
	s := h.name
	if h.suffix {
		s = somewhere + s
	}
	if h.port != "" {
		s += ":" + h.port
	}
	return s
}

// instance returns a path that the pattern covers.
func (p *pathPattern) instance() string {
	var b strings.Builder
	for _, s := range p.segments {
		b.WriteByte('/')
		if s.any {
			b.WriteString(somewhere)
		} else {
			b.WriteString(s.literal)
		}
	}
	if p.below {
		b.WriteString("/" + somewhere)
	}
	return b.String()
}

// requestsOf returns requests that meet what the rules ask of HTTP: one after
// the other has the last word, so that some meet both where that can be.
func requestsOf(rules ...*rule) []*HTTP {
	base := HTTP{Method: "GET"}
	paths := []string{"/"}
	for _, r := range rules {
		if r.more == nil || r.more.http == nil {
			continue
		}
		c := r.more.http
		if c.methods != nil {
			base.Method = c.methods[0]
		}
		if c.grpc {
			base.Method = "POST"
			base.Headers = append(base.Headers, Header{"content-type", grpcType})
		}
		if c.hosts != nil {
			base.Host = c.hosts[0].instance()
		}
		for i := range c.paths[:min(len(c.paths), maxPaths)] {
			paths = append(paths, c.paths[i].instance())
		}
		for i := range c.headers {
			switch h := &c.headers[i]; h.want {
			case wantValue:
				base.Headers = append(base.Headers, Header{h.name, h.values[0]})
			case wantPresent:
				base.Headers = append(base.Headers, Header{h.name, somewhere})
			}
		}
	}
	var out []*HTTP
	for _, path := range paths {
		h := base
		h.Path = path
		out = append(out, &h)
		for _, r := range rules { // another method
			if r.more != nil && r.more.http != nil && r.more.http.methods != nil && r.more.http.methods[0] != h.Method {
				other := h
				other.Method = r.more.http.methods[0]
				out = append(out, &other)
			}
		}
	}
	return out
}
