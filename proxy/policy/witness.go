package policy

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// This file makes requests that rules ask for: each value that a condition
// names, its neighbours, and one that it does not name.

// variantsOf returns requests about what both rules ask beside listener, end
// and identities. The first meets both where that can be, and else r; each
// other one differs from it in one thing. With http the same follows with a
// request on it.
func variantsOf(http bool, r, s *rule) []Request {
	sides := []*rule{r, s}
	base := Request{
		Source: suited(sides, sourcesOf(sides), func(c *conditions, q *Request, allow bool) bool {
			return (c.networks == nil || c.source(q, allow)) && (c.notNetworks == nil || c.notSource(q, allow))
		}, func(q *Request, v netip.AddrPort) { q.Source = v }),
		Port: suited(sides, portsOf(sides), func(c *conditions, q *Request, allow bool) bool {
			return c.ports == nil || c.port(q, allow)
		}, func(q *Request, v uint16) { q.Port = v }),
		SNI: suited(sides, namesOf(sides), func(c *conditions, q *Request, allow bool) bool {
			return c.sni == nil || c.serverName(q, allow)
		}, func(q *Request, v string) { q.SNI = v }),
		Time: DefaultTime,
	}
	out := connectionVariants(base, sides)
	if !http {
		return out
	}
	requests := requestsOf(sides)
	base.HTTP = requests[0]
	out = append(out, connectionVariants(base, sides)...)
	for _, h := range requests[1:] {
		q := base
		q.HTTP = h
		out = append(out, q)
	}
	return out
}

// connectionVariants are those of a base that differ in what is known without
// HTTP.
func connectionVariants(base Request, sides []*rule) []Request {
	out := []Request{base}
	for _, v := range sourcesOf(sides) {
		q := base
		q.Source = v
		out = append(out, q)
	}
	for _, v := range portsOf(sides) {
		q := base
		q.Port = v
		out = append(out, q)
	}
	for _, v := range namesOf(sides) {
		q := base
		q.SNI = v
		out = append(out, q)
	}
	if slices.ContainsFunc(sides, func(r *rule) bool { return r.more != nil && r.more.when != nil && r.more.when.usesTime }) {
		for hour := range 24 {
			q := base
			q.Time = base.Time.Add(time.Duration(hour) * time.Hour)
			out = append(out, q)
		}
		for day := range 7 {
			q := base
			q.Time = base.Time.AddDate(0, 0, day).Add(12 * time.Hour)
			out = append(out, q)
		}
	}
	return out
}

// suited returns the first value for which the condition of all rules holds, or
// that of the first of them; otherwise the first value.
func suited[T any](sides []*rule, values []T, holds func(*conditions, *Request, bool) bool, set func(*Request, T)) T {
	for n := len(sides); n > 0; n-- {
		for _, v := range values {
			var q Request
			set(&q, v)
			if !slices.ContainsFunc(sides[:n], func(r *rule) bool { return r.more != nil && !holds(r.more, &q, r.allow) }) {
				return v
			}
		}
	}
	return values[0]
}

// sourcesOf returns the ends of all networks, an address that is in none, and
// that of a unix socket.
func sourcesOf(sides []*rule) []netip.AddrPort {
	var networks []netip.Prefix
	for _, r := range sides {
		if r.more != nil {
			networks = append(append(networks, r.more.networks...), r.more.notNetworks...)
		}
	}
	var out []netip.AddrPort
	add := func(a netip.Addr) { out = append(out, netip.AddrPortFrom(a, 0)) }
	for _, n := range networks {
		add(n.Addr())
		if last := lastOf(n); last != n.Addr() {
			add(last)
		}
	}
	if len(networks) > 0 {
		for _, outside := range []string{"192.0.2.1", "198.51.100.1", "10.1.2.3", "2001:db8::1"} {
			if a := netip.MustParseAddr(outside); !inNetworks(networks, a) {
				add(a)
				break
			}
		}
	}
	return append(out, netip.AddrPort{})
}

// lastOf returns the last address of a network.
func lastOf(n netip.Prefix) netip.Addr {
	bytes := n.Addr().AsSlice()
	for bit := n.Bits(); bit < 8*len(bytes); bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(bytes)
	return last
}

// portsOf returns the ends of all ranges of ports, those beside them, and that
// of a unix socket.
func portsOf(sides []*rule) []uint16 {
	var out, beside []uint16
	for _, r := range sides {
		if r.more == nil {
			continue
		}
		for _, p := range r.more.ports {
			out = append(out, p.low)
			if p.high != p.low {
				out = append(out, p.high)
			}
			if p.low > 1 {
				beside = append(beside, p.low-1)
			}
			if p.high < 1<<16-1 {
				beside = append(beside, p.high+1)
			}
		}
	}
	return append(append(out, beside...), 0)
}

// namesOf returns a server name for each pattern, one that none covers, and
// that of a client that sends none.
func namesOf(sides []*rule) []string {
	var out []string
	for _, r := range sides {
		if r.more == nil {
			continue
		}
		for _, h := range r.more.sni {
			out = append(out, h.instance())
		}
	}
	if len(out) > 0 {
		out = append(out, elsewhere)
	}
	return append(out, "")
}

// elsewhere is a host that nothing names (RFC 6761, section 6.4).
const elsewhere = somewhere + ".invalid"

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

// instances returns paths that the pattern covers, the plainest first, and
// what stands beside it.
func (p *pathPattern) instances() []string {
	var b strings.Builder
	for _, s := range p.segments {
		b.WriteByte('/')
		if s.any {
			b.WriteString(somewhere)
		} else {
			b.WriteString(s.literal)
		}
	}
	path := b.String()
	if p.below {
		below := path + "/" + somewhere
		return []string{below, below + "/" + somewhere, path + "/"}
	}
	if strings.HasSuffix(path, "/") {
		return []string{path}
	}
	return []string{path, path + "/"}
}

// requestsOf returns HTTP requests: the first meets what the rules ask, each
// other one differs from it in one thing.
func requestsOf(sides []*rule) []*HTTP {
	var m requestMaker
	for _, r := range sides {
		if r.more != nil && r.more.http != nil {
			m.conditions, m.rules = append(m.conditions, r.more.http), append(m.rules, r)
		}
	}
	if len(m.conditions) == 0 {
		return []*HTTP{{Method: "GET", Path: "/"}}
	}
	m.gather()
	out := []*HTTP{&m.base}
	vary := func(change func(*HTTP)) {
		h := m.base
		change(&h)
		out = append(out, &h)
	}
	for _, v := range m.methods {
		vary(func(h *HTTP) { h.Method = v })
	}
	for _, v := range m.hosts {
		vary(func(h *HTTP) { h.Host = v })
	}
	for _, v := range m.paths {
		vary(func(h *HTTP) { h.Path = v })
	}
	for _, v := range m.headers {
		vary(func(h *HTTP) { h.Headers = withHeader(h.Headers, v.Name, v.Value) })
	}
	for _, h := range m.base.Headers {
		name := h.Name
		vary(func(h *HTTP) { h.Headers = withHeader(h.Headers, name, "") })
	}
	return out
}

// requestMaker gathers what conditions name.
type requestMaker struct {
	conditions []*httpCond
	rules      []*rule // whose they are

	base                  HTTP
	methods, hosts, paths []string
	headers               []Header
}

func (m *requestMaker) gather() {
	for _, c := range m.conditions {
		m.methods = append(m.methods, c.methods...)
		if c.grpc {
			m.methods = append(m.methods, "POST")
			m.headers = append(m.headers, Header{"content-type", grpcType})
		}
		for _, h := range c.hosts {
			m.hosts = append(m.hosts, h.instance())
			if h.port != "" {
				h.port = ""
				m.hosts = append(m.hosts, h.instance())
			}
		}
		for i := range c.paths {
			m.paths = append(m.paths, c.paths[i].instances()...)
		}
		for i := range c.headers {
			for _, v := range c.headers[i].values {
				m.headers = append(m.headers, Header{c.headers[i].name, v})
			}
			m.headers = append(m.headers, Header{c.headers[i].name, somewhere})
		}
	}
	m.methods = append(m.methods, "GET", "POST", "DELETE")
	if len(m.hosts) > 0 {
		m.hosts = append(m.hosts, elsewhere)
	}
	m.hosts = append(m.hosts, "")
	m.paths = append(m.paths, "/", "/"+somewhere)
	m.choose()
}

// choose makes the base.
func (m *requestMaker) choose() {
	m.base.Method = m.first(m.methods, func(c *httpCond, allow bool, v string) bool {
		return (c.methods == nil || slices.Contains(c.methods, v)) && (!c.grpc || !allow || v == "POST")
	})
	m.base.Host = m.first(m.hosts, func(c *httpCond, _ bool, v string) bool { return c.hosts == nil || matchHost(c.hosts, v) })
	m.base.Path = m.first(m.paths, func(c *httpCond, allow bool, v string) bool { return c.paths == nil || c.matchPath(v, !allow) })
	for _, c := range slices.Backward(m.conditions) { // the first rule has the last word
		if c.grpc {
			m.base.Headers = withHeader(m.base.Headers, "content-type", grpcType)
		}
		for i := range c.headers {
			switch h := &c.headers[i]; h.want {
			case wantValue:
				m.base.Headers = withHeader(m.base.Headers, h.name, h.values[0])
			case wantPresent:
				m.base.Headers = withHeader(m.base.Headers, h.name, somewhere)
			case wantAbsent:
				m.base.Headers = withHeader(m.base.Headers, h.name, "")
			}
		}
	}
}

// first is suited for what conditions ask of HTTP.
func (m *requestMaker) first(values []string, holds func(c *httpCond, allow bool, v string) bool) string {
	for n := len(m.conditions); n > 0; n-- {
		for _, v := range values {
			met := true
			for i, c := range m.conditions[:n] {
				met = met && holds(c, m.rules[i].allow, v)
			}
			if met {
				return v
			}
		}
	}
	return values[0]
}

// withHeader returns the headers with that one alone under its name, or none
// where the value is empty.
func withHeader(headers []Header, name, value string) []Header {
	var out []Header
	for _, h := range headers {
		if h.Name != name {
			out = append(out, h)
		}
	}
	if value != "" {
		out = append(out, Header{name, value})
	}
	return out
}
