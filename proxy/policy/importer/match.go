package importer

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// who is the identity that a rule asks for.
type who uint8

const (
	anybody    who = iota // plaintext as well
	identified            // any identity
	listed                // those of a list
	plaintext             // no identity
)

// match is a conjunction of conditions on a request, as Istio and Consul know
// them, in the form that a rule takes.
type match struct {
	who  who
	ids  []string // patterns, where who is listed
	http bool     // holds where HTTP is visible, and there alone

	methods []string
	hosts   []string
	paths   []string
	headers []headerPresence
	inside  []netip.Prefix
	outside []netip.Prefix
	within  bool // inside is asked
	ports   ports
	sni     []string

	// terms and httpTerms are CEL texts that must hold. They are kept apart
	// because a deny on a connection without HTTP passes over all of a `when`
	// that asks for HTTP.
	terms, httpTerms []string
}

// clone returns a match that can be narrowed on its own.
func (m *match) clone() match {
	c := *m
	c.ids, c.headers = slices.Clone(m.ids), slices.Clone(m.headers)
	c.inside, c.outside = slices.Clone(m.inside), slices.Clone(m.outside)
	c.ports, c.sni = slices.Clone(m.ports), slices.Clone(m.sni)
	c.terms, c.httpTerms = slices.Clone(m.terms), slices.Clone(m.httpTerms)
	return c
}

// only narrows the match to identities that a pattern covers.
func (m *match) only(ids []string) {
	switch m.who {
	case anybody, identified:
		m.who, m.ids = listed, unique(slices.Clone(ids))
	case listed:
		m.ids = meetAll(m.ids, ids)
	case plaintext:
		m.who, m.ids = listed, nil
	}
}

// authenticated narrows the match to those with an identity.
func (m *match) authenticated() {
	switch m.who {
	case anybody:
		m.who = identified
	case plaintext:
		m.who, m.ids = listed, nil
	}
}

// unauthenticated narrows the match to those without one.
func (m *match) unauthenticated() {
	if m.who == anybody || m.who == plaintext {
		m.who = plaintext
		return
	}
	m.who, m.ids = listed, nil
}

// from narrows the match to addresses in one of the networks.
func (m *match) from(networks []netip.Prefix) {
	if !m.within {
		m.inside, m.within = networks, true
		return
	}
	var both []netip.Prefix
	for _, a := range m.inside {
		for _, b := range networks {
			switch { // two networks are apart, or one holds the other
			case a.Overlaps(b) && a.Bits() >= b.Bits():
				both = append(both, a)
			case a.Overlaps(b):
				both = append(both, b)
			}
		}
	}
	slices.SortFunc(both, comparePrefix)
	m.inside = slices.Compact(both)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// never reports whether no request can meet the conditions.
func (m *match) never() bool {
	return m.who == listed && len(m.ids) == 0 || m.within && len(m.inside) == 0 || m.ports != nil && len(m.ports) == 0
}

// asksHTTP reports whether there is a condition on requests.
func (m *match) asksHTTP() bool {
	return m.http || len(m.methods)+len(m.hosts)+len(m.paths)+len(m.headers)+len(m.httpTerms) > 0
}

// visible is the CEL text that every request meets, and a connection whose
// requests cannot be seen does not.
const visible = `request.method != ""`

// fill puts the conditions into a rule. The problem says why they cannot be.
func (m *match) fill(r *rule) (problem string) {
	terms, httpTerms := m.terms, m.httpTerms
	switch m.who {
	case anybody:
		if r.allow {
			r.from = []string{"group:" + everyone, unauthenticated}
		}
	case identified:
		if r.allow {
			r.from = []string{"group:" + everyone}
		} else {
			terms = append([]string{"from.authenticated"}, terms...)
		}
	case listed:
		r.from = m.ids
	case plaintext:
		r.from = []string{unauthenticated}
	}
	r.methods, r.hosts, r.paths, r.headers = m.methods, m.hosts, m.paths, m.headers
	if m.http && len(r.methods)+len(r.hosts)+len(r.paths)+len(r.headers)+len(httpTerms) == 0 {
		httpTerms = []string{visible}
	}
	if !r.allow && len(terms) > 0 && len(httpTerms) > 0 {
		return "this deny needs one `when` on the connection and on the request, and where requests cannot be seen it would then match more than it should; split the rule, or take one of the conditions out: " + strings.Join(terms, ", ")
	}
	r.when = strings.Join(append(slices.Clone(terms), httpTerms...), " && ")
	if len(r.when) > maxWhen {
		return "too many values: the condition in CEL would be longer than 4096 bytes"
	}
	for _, p := range m.inside {
		r.inside = append(r.inside, p.String())
	}
	for _, p := range m.outside {
		r.outside = append(r.outside, p.String())
	}
	r.ports, r.sni = m.ports.text(), m.sni
	return ""
}

// portRange is the ports from low to high.
type portRange struct{ low, high int }

// ports is a sorted set of ports; nil: any.
type ports []portRange

func portSet(numbers []int) ports {
	slices.Sort(numbers)
	set := ports{}
	for _, n := range slices.Compact(numbers) {
		set = append(set, portRange{n, n})
	}
	return set
}

// but returns all ports that are not in the set.
func (p ports) but() ports {
	out, next := ports{}, 1
	for _, r := range p {
		if r.low > next {
			out = append(out, portRange{next, r.low - 1})
		}
		next = r.high + 1
	}
	if next <= 65535 {
		out = append(out, portRange{next, 65535})
	}
	return out
}

func (p ports) and(q ports) ports {
	if p == nil {
		return q
	}
	out := ports{}
	for _, a := range p {
		for _, b := range q {
			if low, high := max(a.low, b.low), min(a.high, b.high); low <= high {
				out = append(out, portRange{low, high})
			}
		}
	}
	return out
}

func (p ports) text() []string {
	var out []string
	for _, r := range p {
		if r.low == r.high {
			out = append(out, strconv.Itoa(r.low))
		} else {
			out = append(out, strconv.Itoa(r.low)+"-"+strconv.Itoa(r.high))
		}
	}
	return out
}
