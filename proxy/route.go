package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// Route leads connections of an inbound listener, or with HTTP its requests, to
// targets of their own: the first one that takes it does.
type Route struct {
	// SNI are server names, or *.suffix for all names below it, however deep.
	// Upper and lower case are one, and a dot at the end is none. Empty takes
	// every connection, also one that names no server.
	SNI []string
	// ALPN are protocols of which one was negotiated. Empty takes every
	// connection, also one without a protocol.
	ALPN []string
	// Hosts and Paths are those of requests, with HTTP alone. Empty takes every
	// request.
	Hosts []policy.Host
	Paths []policy.Path
	// Targets are as those of Listener.
	Targets []string
	// Response is, with HTTP, in place of Timeouts.Response; 0: that.
	Response time.Duration
}

// What a listener's routes may have, all together.
const (
	maxRoutes   = 256
	maxNames    = 1024
	maxProtocol = 255 // bytes of an ALPN protocol's name (RFC 7301 §3.1)
)

// takes reports whether the route is for what is bound that way.
func (r *Route) takes(b *bound) bool {
	return r.takesName(b.serverName) && (len(r.ALPN) == 0 || slices.Contains(r.ALPN, b.protocol)) && r.takesRequest(b.host, b.path)
}

func (r *Route) takesRequest(host, path string) bool {
	return (len(r.Hosts) == 0 || slices.ContainsFunc(r.Hosts, func(h policy.Host) bool { return h.Match(host) })) &&
		(len(r.Paths) == 0 || slices.ContainsFunc(r.Paths, func(p policy.Path) bool { return p.Match(path) }))
}

func (r *Route) takesName(serverName string) bool {
	return len(r.SNI) == 0 || slices.ContainsFunc(r.SNI, func(pattern string) bool { return matchName(pattern, serverName) })
}

// matchName matches a server name in lower case. A name with an empty label
// is none.
func matchName(pattern, name string) bool {
	suffix, below := strings.CutPrefix(pattern, "*")
	if !below {
		return name == pattern
	}
	labels, ok := strings.CutSuffix(name, suffix)
	return ok && labels != "" && !slices.Contains(strings.Split(labels, "."), "")
}

// normalName is a name or pattern as matchName compares it.
func normalName(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// normalRoutes returns a copy of the routes as they are compared.
func normalRoutes(routes []Route) []Route {
	out := make([]Route, len(routes))
	for i, r := range routes {
		out[i] = r
		out[i].ALPN, out[i].Targets = slices.Clone(r.ALPN), slices.Clone(r.Targets)
		out[i].Hosts, out[i].Paths = slices.Clone(r.Hosts), slices.Clone(r.Paths)
		out[i].SNI = nil
		for _, name := range r.SNI {
			out[i].SNI = append(out[i].SNI, normalName(name))
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// way is where a route or the listener's own target leads.
type way struct {
	targets []string
	group   *upstream.Group
}

// targetLists returns the targets of each route, then those of the listener
// where there are any.
func (s *settings) targetLists() [][]string {
	var lists [][]string
	for i := range s.Routes {
		lists = append(lists, s.Routes[i].Targets)
	}
	if len(s.Targets) > 0 {
		lists = append(lists, s.Targets)
	}
	return lists
}

// upstreamChanged reports whether next needs other ways than s has.
func (s *settings) upstreamChanged(next *settings) bool {
	return s.Upstream != next.Upstream || !slices.EqualFunc(s.targetLists(), next.targetLists(), slices.Equal)
}

func (s *settings) giveWays() {
	for _, w := range s.ways {
		w.group.Release()
	}
}

// wayFor returns the way of what is bound so, or nil where none of the routes
// takes it and the listener has no target of its own.
func (s *settings) wayFor(b bound) *way {
	if n := s.routeFor(b); n < len(s.ways) {
		return &s.ways[n]
	}
	return nil
}

// routeFor returns the number of the first route that takes it, or that of the
// listener's own target, which follows them.
func (s *settings) routeFor(b bound) int {
	for i := range s.Routes {
		if s.Routes[i].takes(&b) {
			return i
		}
	}
	return len(s.Routes)
}

// targetsFor returns the targets it may come to, if there are any.
func (s *settings) targetsFor(b bound) []string {
	if n := s.routeFor(b); n < len(s.Routes) {
		return s.Routes[n].Targets
	}
	return s.Targets
}

// responseWithin is how long a service may take to answer.
func (s *settings) responseWithin(b bound) time.Duration {
	if n := s.routeFor(b); n < len(s.Routes) && s.Routes[n].Response > 0 {
		return s.Routes[n].Response
	}
	return s.Timeouts.Response
}

// endpoints tells of the endpoints of all ways, each once, and whether there
// are more than it tells of.
func (s *settings) endpoints() (list []telemetry.EndpointStatus, more bool) {
	type endpoint struct{ target, address string }
	seen := map[endpoint]bool{}
	for _, w := range s.ways {
		found, cut := w.group.Status(maxStatusEndpoints)
		more = more || cut
		for _, e := range found {
			if at := (endpoint{e.Target, e.Address}); !seen[at] {
				seen[at] = true
				list = append(list, e)
			}
		}
	}
	return list[:min(len(list), maxStatusEndpoints)], more || len(list) > maxStatusEndpoints
}

// routeStatus tells of the routes, with the listener's own target as the last
// one, or of nothing where there are none.
func (s *settings) routeStatus() (list []telemetry.RouteStatus) {
	if len(s.Routes) == 0 {
		return nil
	}
	for i := range s.Routes {
		r := &s.Routes[i]
		route := telemetry.RouteStatus{SNI: r.SNI, ALPN: r.ALPN, Targets: r.Targets}
		for _, h := range r.Hosts {
			route.Hosts = append(route.Hosts, h.String())
		}
		for _, p := range r.Paths {
			route.Paths = append(route.Paths, p.String())
		}
		list = append(list, route)
	}
	if len(s.Targets) > 0 {
		list = append(list, telemetry.RouteStatus{Targets: s.Targets})
	}
	return list
}

// everyTarget returns the targets of the listener and its routes, each once.
func (s *settings) everyTarget() []string {
	all := slices.Clone(s.Targets)
	for _, t := range slices.Concat(s.targetLists()...) {
		if !slices.Contains(all, t) {
			all = append(all, t)
		}
	}
	return all
}

// protocolsFor returns the ALPN protocols that a client which asks for a
// server may speak, the preferred first: those of the listener, then those of
// the routes the name leads to, in their order.
func (s *settings) protocolsFor(serverName string) []string {
	all := slices.Clone(s.ALPN)
	for i := range s.Routes {
		r := &s.Routes[i]
		if !r.takesName(serverName) {
			continue
		}
		for _, p := range r.ALPN {
			if !slices.Contains(all, p) {
				all = append(all, p)
			}
		}
	}
	return all
}

// noneOfThem is longer than any protocol a client can offer.
var noneOfThem = strings.Repeat("-", maxProtocol+1)

// negotiate makes a server choose the ALPN protocol by the server name. A
// client that offers none goes on without; one that offers only others gets
// the alert no_application_protocol (RFC 7301 §3.2). crypto/tls, left to
// choose, knows nothing of names, and takes a client of http/1.1 for one of h2.
func (s *settings) negotiate(base *tls.Config) {
	choices := map[string]*tls.Config{}
	choice := func(protocol string) {
		c := base.Clone()
		c.NextProtos = []string{protocol}
		choices[protocol] = c
	}
	for _, p := range s.everyProtocol() {
		choice(p)
	}
	if len(choices) == 0 {
		return
	}
	choice(noneOfThem)
	base.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		ours := s.protocolsFor(normalSNI(hello.ServerName))
		if len(hello.SupportedProtos) == 0 || len(ours) == 0 {
			return nil, nil // as base has it
		}
		for _, p := range ours {
			if slices.Contains(hello.SupportedProtos, p) {
				return choices[p], nil
			}
		}
		return choices[noneOfThem], nil
	}
}

func (s *settings) everyProtocol() []string {
	all := slices.Clone(s.ALPN)
	for i := range s.Routes {
		all = append(all, s.Routes[i].ALPN...)
	}
	return all
}

// normalSNI is the server name of a handshake as routes and rules compare it. A
// name that no host has is none to them: a rule that denies by name holds where
// there is none.
func normalSNI(sni string) string {
	if sni = hostName(sni); sni == invalidServerName {
		return ""
	}
	return strings.ToLower(sni)
}

// checkRoutes refuses routes that cannot be, protocols that are none, and what
// is for the other direction.
func checkRoutes(l Listener, inbound bool) error {
	switch {
	case inbound && l.ServerName != "":
		return errors.New("server_name is for outbound listeners; inbound, the client names the server")
	case !inbound && len(l.Routes) > 0:
		return errors.New("routes are for inbound listeners")
	case len(l.Routes) > maxRoutes:
		return fmt.Errorf("%d routes are too many: want at most %d", len(l.Routes), maxRoutes)
	}
	if l.ServerName != "" {
		if err := checkName(l.ServerName); err != nil {
			return fmt.Errorf("server_name: %w", err)
		}
	}
	if err := checkProtocols(l.ALPN); err != nil {
		return err
	}
	names := 0
	for i, r := range l.Routes {
		names += len(r.SNI) + len(r.ALPN) + len(r.Hosts) + len(r.Paths)
		if l.HTTP == nil && (len(r.Hosts) > 0 || len(r.Paths) > 0 || r.Response != 0) {
			return fmt.Errorf("route %d: hosts, paths and the time of a response are for HTTP listeners", i+1)
		}
		if err := r.check(); err != nil {
			return fmt.Errorf("route %d: %w", i+1, err)
		}
	}
	if names > maxNames {
		return fmt.Errorf("routes: %d names, protocols, hosts and paths are too many: want at most %d", names, maxNames)
	}
	return nil
}

func (r *Route) check() error {
	if len(r.SNI)+len(r.ALPN)+len(r.Hosts)+len(r.Paths) == 0 {
		return errors.New("needs sni or alpn, or with HTTP hosts or paths: what takes everything is the listener's target")
	}
	if r.Response < 0 {
		return errors.New("the time of a response cannot be negative")
	}
	for _, name := range r.SNI {
		if err := checkName(strings.TrimPrefix(name, "*.")); err != nil {
			return fmt.Errorf("sni: %w", err)
		}
	}
	if err := checkProtocols(r.ALPN); err != nil {
		return err
	}
	if err := checkTargets(r.Targets); err != nil {
		return fmt.Errorf("target: %w", err)
	}
	return nil
}

// checkName refuses what no client can send as SNI (RFC 6066 §3).
func checkName(name string) error {
	name = normalName(name)
	_, isAddress := netip.ParseAddr(name)
	if name == "" || isAddress == nil || hostName(name) == invalidServerName || slices.Contains(strings.Split(name, "."), "") {
		return fmt.Errorf("%q is no host name", name)
	}
	return nil
}

func checkProtocols(protocols []string) error {
	for i, p := range protocols {
		if p == "" || len(p) > maxProtocol {
			return fmt.Errorf("alpn: %q: a protocol's name has 1 to %d bytes", p, maxProtocol)
		}
		if slices.Contains(protocols[:i], p) {
			return fmt.Errorf("alpn: %q is in the list twice", p)
		}
	}
	return nil
}
