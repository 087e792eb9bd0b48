package config

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
)

// ServerName is the name of a server as TLS clients send it (SNI), or *.suffix
// for all names below it, in lower case and without a dot at the end.
type ServerName string

// UnmarshalText reads and checks a name.
func (n *ServerName) UnmarshalText(text []byte) error {
	name := strings.ToLower(strings.TrimSuffix(string(text), "."))
	host := strings.TrimPrefix(name, "*.")
	_, notAddress := netip.ParseAddr(host)
	switch {
	case notAddress == nil:
		return fmt.Errorf("%q is an IP address, which no client sends as a server name", clip(name))
	case host == "" || !validHost(host):
		return fmt.Errorf("%q is no server name; write db.example.org, or *.example.org for all names below it (xn--… for what is not ASCII)", clip(string(text)))
	}
	*n = ServerName(name)
	return nil
}

// What the routes of one listener may have, as package proxy takes them.
const (
	maxRoutes     = 256
	maxRouteNames = 1024
	maxProtocol   = 255 // bytes (RFC 7301 §3.1)
)

// pair is a server name and a protocol; either may be empty for any.
type pair struct {
	name     ServerName
	protocol string
}

// pairs returns what a route takes, and the key of each within the route.
func (r *Route) pairs() (all []pair, keys []string) {
	names, protocols := r.SNI, r.ALPN
	if len(names) == 0 {
		names = []ServerName{""}
	}
	if len(protocols) == 0 {
		protocols = []string{""}
	}
	for i, name := range names {
		for _, protocol := range protocols {
			all = append(all, pair{name, protocol})
			keys = append(keys, fmt.Sprintf(".sni[%d]", i))
		}
	}
	if len(r.SNI) == 0 {
		clear(keys) // it is the route's own key
	}
	return all, keys
}

// covers reports whether the route takes all that p can be.
func (r *Route) covers(p pair) bool {
	if len(r.ALPN) > 0 && !slices.Contains(r.ALPN, p.protocol) {
		return false
	}
	return len(r.SNI) == 0 || slices.ContainsFunc(r.SNI, func(name ServerName) bool {
		suffix, below := strings.CutPrefix(string(name), "*")
		return name == p.name || below && strings.HasSuffix(strings.TrimPrefix(string(p.name), "*"), suffix)
	})
}

// ofRequests reports whether it takes only some of the requests of a
// connection.
func (r *Route) ofRequests() bool { return len(r.Hosts)+len(r.Paths) > 0 }

// same reports whether the route names p in so many words.
func (r *Route) same(p pair) bool {
	all, _ := r.pairs()
	return slices.Contains(all, p)
}

func (p pair) String() string {
	switch {
	case p.protocol == "":
		return string(p.name)
	case p.name == "":
		return p.protocol
	}
	return string(p.name) + " with " + p.protocol
}

// Targets yields the addresses that the listener and its routes lead to.
func (l *Listener) Targets() iter.Seq[Address] {
	lists := []Targets{l.Target}
	for i := range l.Routes {
		lists = append(lists, l.Routes[i].Target)
	}
	return slices.Values(slices.Concat(lists...))
}

// validateRoutes checks where a listener leads its connections.
func (l *Listener) validateRoutes(f *findings, key string) {
	if len(l.Target) == 0 && len(l.Routes) == 0 && !f.isBad(key+".routes") {
		f.addf(key+".target", "is required")
	}
	if l.Direction == "inbound" && l.ServerName != "" {
		f.addf(key+".server_name", "has no use on an inbound listener; the client names the server")
	}
	if l.Direction == "outbound" && len(l.Routes) > 0 {
		f.addf(key+".routes", "have no use on an outbound listener; give each target a listener of its own")
	}
	if strings.HasPrefix(string(l.ServerName), "*.") {
		f.addf(key+".server_name", "%s is many names; one is sent", l.ServerName)
	}
	validateProtocols(f, key, l.ALPN)
	if len(l.Routes) > maxRoutes {
		f.addf(key+".routes", "has %d routes; at most %d", len(l.Routes), maxRoutes)
		return
	}
	names := 0
	for i := range l.Routes {
		r := &l.Routes[i]
		r.validate(f, fmt.Sprintf("%s.routes[%d]", key, i), l.Bind)
		l.validateRequests(f, r, fmt.Sprintf("%s.routes[%d]", key, i))
		names += len(r.SNI) + len(r.ALPN) + len(r.Hosts) + len(r.Paths)
	}
	if names > maxRouteNames {
		f.addf(key+".routes", "have %d names, protocols, hosts and paths; at most %d", names, maxRouteNames)
		return
	}
	for i := range l.Routes {
		l.duplicates(f, key, i)
	}
}

// duplicates finds what an earlier route names too.
func (l *Listener) duplicates(f *findings, key string, i int) {
	all, keys := l.Routes[i].pairs()
	for n, p := range all {
		at := slices.IndexFunc(l.Routes[:i], func(r Route) bool { return r.same(p) })
		if at >= 0 && p != (pair{}) && !l.Routes[at].ofRequests() {
			f.addf(fmt.Sprintf("%s.routes[%d]%s", key, i, keys[n]), "%s is led elsewhere by routes[%d] already; the first route that matches wins", p, at)
		}
	}
}

func (r *Route) validate(f *findings, key string, bind Address) {
	if len(r.SNI)+len(r.ALPN)+len(r.Hosts)+len(r.Paths) == 0 && !f.isBad(key+".sni") && !f.isBad(key+".alpn") && !f.isBad(key+".hosts") && !f.isBad(key+".paths") {
		f.addf(key, "needs sni or alpn, or with protocol: http hosts or paths; what takes everything is the listener's target")
	}
	for i, name := range r.SNI {
		if name != "" && slices.Contains(r.SNI[:i], name) {
			f.addf(fmt.Sprintf("%s.sni[%d]", key, i), "%s is in the list already", name)
		}
	}
	validateProtocols(f, key, r.ALPN)
	r.Target.validate(f, key+".target", bind)
}

func validateProtocols(f *findings, key string, protocols []string) {
	for i, p := range protocols {
		at := fmt.Sprintf("%s.alpn[%d]", key, i)
		if len(p) > maxProtocol {
			f.addf(at, "has %d bytes; a protocol's name has at most %d", len(p), maxProtocol)
		}
		if p != "" && slices.Contains(protocols[:i], p) {
			f.addf(at, "%s is in the list already", clip(p))
		}
	}
}

// warnRoutes finds names that no connection is led by.
func (c *Config) warnRoutes(l *Listener, key string) {
	for i := 1; i < len(l.Routes); i++ {
		all, keys := l.Routes[i].pairs()
		reached := map[string]bool{} // keys of a name some of whose pairs come here
		first := map[string]int{}
		for n, p := range all {
			at := slices.IndexFunc(l.Routes[:i], func(r Route) bool { return !r.ofRequests() && r.covers(p) })
			reached[keys[n]] = reached[keys[n]] || at < 0
			first[keys[n]] = at
		}
		for n, p := range all {
			if reached[keys[n]] {
				continue
			}
			reached[keys[n]] = true // said once
			c.warnf(fmt.Sprintf("%s.routes[%d]%s", key, i, keys[n]), "%s never comes here: routes[%d] takes it before", p, first[keys[n]])
		}
	}
}
