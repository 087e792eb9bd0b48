package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// conditions are those of a rule that the index does not find by identities
// and listeners. What is left out is nil.
type conditions struct {
	networks, notNetworks []netip.Prefix
	ports                 []portRange
	sni                   []hostPattern
	http                  *httpCond
	when                  *when
}

// empty reports whether nothing is asked.
func (c *conditions) empty() bool {
	return c.networks == nil && c.notNetworks == nil && c.ports == nil && c.sni == nil && c.http == nil && c.when == nil
}

// answer is whether a condition holds.
type answer uint8

const (
	no       answer = iota
	unproven        // it would hold, or may, if there were a JWT-SVID on the request
	open            // it depends on an HTTP request, or a subject of it, that is not known
	yes
)

func (a answer) and(b answer) answer { return min(a, b) }

func certain(b bool) answer {
	if b {
		return yes
	}
	return no
}

// aboutHTTP reports whether the conditions ask for HTTP, and whether they ask
// for anything else.
func (c *conditions) aboutHTTP() (asks, alone bool) {
	asks = c.http != nil || c.when != nil && c.when.usesHTTP
	alone = c.networks == nil && c.notNetworks == nil && c.ports == nil && c.sni == nil && (c.when == nil || c.when.usesHTTP)
	return asks, asks && alone
}

// ask asks all conditions. Nothing fails open: what cannot be told keeps an
// allow from matching and not a deny.
func (c *conditions) ask(q *Request, h *HTTP, allow, byPath bool) answer {
	if c.networks != nil && !c.source(q, allow) || c.notNetworks != nil && !c.notSource(q, allow) ||
		c.ports != nil && !c.port(q, allow) || c.sni != nil && !c.serverName(q, allow) {
		return no
	}
	a := yes
	if c.http != nil {
		if h == nil {
			a = open
		} else if !c.http.match(h, allow, byPath) {
			return no
		}
	}
	if a = a.and(c.ofSubject(q, h, allow)); a != no && c.when != nil {
		a = a.and(c.ofWhen(q, h, allow))
	}
	return a
}

func (c *conditions) ofWhen(q *Request, h *HTTP, allow bool) answer {
	if c.when.usesHTTP && h == nil || c.when.usesSubject && q.proof(h) == proofUnknown {
		return open
	}
	holds, err := c.when.eval(q)
	switch {
	case err != nil && !allow, err == nil && holds:
		return yes
	case allow && c.when.usesSubject && q.proof(h) == proofMissing:
		return unproven
	}
	return no
}

func (c *conditions) source(q *Request, allow bool) bool {
	addr := q.Source.Addr()
	if !addr.IsValid() {
		return !allow
	}
	return inNetworks(c.networks, addr)
}

func (c *conditions) notSource(q *Request, allow bool) bool {
	addr := q.Source.Addr()
	if !addr.IsValid() {
		return !allow
	}
	return !inNetworks(c.notNetworks, addr)
}

func inNetworks(networks []netip.Prefix, addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	for _, n := range networks {
		if n.Contains(addr) {
			return true
		}
	}
	return false
}

func (c *conditions) port(q *Request, allow bool) bool {
	if q.Port == 0 {
		return !allow
	}
	return slices.ContainsFunc(c.ports, func(r portRange) bool { return r.low <= q.Port && q.Port <= r.high })
}

func (c *conditions) serverName(q *Request, allow bool) bool {
	if q.SNI == "" {
		return !allow
	}
	return matchHost(c.sni, q.SNI)
}

// portRange is a range of ports, both ends included.
type portRange struct{ low, high uint16 }

// String returns the range as rules write it.
func (r portRange) String() string {
	if r.low == r.high {
		return fmt.Sprint(r.low)
	}
	return fmt.Sprintf("%d-%d", r.low, r.high)
}

// parsePrefix reads an address or a network.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%q: an address in a rule has no zone", clip(s))
		}
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil && strings.Contains(s, "/"):
		return netip.Prefix{}, fmt.Errorf("%q is no network; write it like 10.0.0.0/8 or 2001:db8::/32", clip(s))
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("%q is no address; write it like 10.1.2.3, or a network like 10.0.0.0/8", clip(s))
	case p.Masked() != p:
		return netip.Prefix{}, fmt.Errorf("%q has bits behind its length; write %s", clip(s), p.Masked())
	case p.Addr().Is4In6() && p.Bits() >= 96:
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96), nil
	case p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q: write networks of IPv4 addresses as such", clip(s))
	}
	return p, nil
}
