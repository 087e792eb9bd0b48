package proxy

import (
	"cmp"
	"reflect"
	"slices"
	"time"

	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// settings is a listener's configuration with its defaults filled in, as it
// stands in a world. It is immutable.
type settings struct {
	Listener
	lease  identity.Lease   // on Identity
	tokens identity.Tokens  // nil where the source knows none
	ways   []way            // of Routes, then of Targets
	told   *forwarded.Rules // what services are told of who calls; nil without HTTP
}

// Defaults of Listener and Timeouts.
const (
	defaultHandshake      = 10 * time.Second
	defaultConnect        = 5 * time.Second
	defaultIdle           = 5 * time.Minute
	defaultDrain          = 30 * time.Second
	defaultHead           = 10 * time.Second
	defaultResponse       = time.Minute
	defaultStall          = 30 * time.Second
	defaultMaxConnections = 10_000
	defaultUnixMode       = 0o660
)

// newSettings fills in the defaults, and the lease and ways that were had.
func newSettings(l Listener, was *settings) *settings {
	t := &l.Timeouts
	t.Handshake = cmp.Or(t.Handshake, defaultHandshake)
	t.Connect = cmp.Or(t.Connect, defaultConnect)
	t.Idle = cmp.Or(t.Idle, defaultIdle)
	t.Drain = max(0, cmp.Or(t.Drain, defaultDrain))
	t.Head, t.Response, t.Stall = cmp.Or(t.Head, defaultHead), cmp.Or(t.Response, defaultResponse), cmp.Or(t.Stall, defaultStall)
	l.OnPolicyChange = cmp.Or(l.OnPolicyChange, ActionClose)
	expiry := ActionKeep
	if l.HTTP != nil {
		expiry = ActionDrain
		l.HTTP = l.HTTP.withDefaults()
	}
	l.Upstream.Protocol = l.UpstreamProtocol.String() // or what changes it would lead to the targets there were
	l.Upstream.Health.HTTP2 = l.UpstreamProtocol == ProtocolHTTP2
	l.OnPeerExpiry = cmp.Or(l.OnPeerExpiry, expiry)
	l.MaxConnections = cmp.Or(l.MaxConnections, defaultMaxConnections)
	l.MaxHandshakes = cmp.Or(l.MaxHandshakes, defaultMaxHandshakes())
	l.UnixMode = cmp.Or(l.UnixMode, defaultUnixMode)
	l.Expect, l.Targets = slices.Clone(l.Expect), slices.Clone(l.Targets)
	l.ProxyProtocol.AcceptFrom = slices.Clone(l.ProxyProtocol.AcceptFrom)
	l.Routes, l.ALPN, l.ServerName = normalRoutes(l.Routes), slices.Clone(l.ALPN), normalName(l.ServerName)
	if l.HTTP != nil && l.Direction == policy.Inbound && len(l.ALPN) == 0 { // outbound, each request has its offer
		l.ALPN = slices.Clone(l.HTTP.Versions)
		if slices.Contains(l.ALPN, protocolHTTP) {
			l.ALPN = append(l.ALPN, protocolHTTP10)
		}
	}
	s := &settings{Listener: l}
	if l.HTTP != nil {
		s.told, _ = forwarded.Compile(l.HTTP.Forwarded) // which check did before
	}
	if was != nil {
		s.lease, s.tokens, s.ways = was.lease, was.tokens, was.ways
	}
	return s
}

// wantsTokens reports whether requests need JWT-SVIDs.
func (s *settings) wantsTokens() bool { return s.HTTP != nil && s.HTTP.JWT != nil }

// generationOfTokens tells one set of JWT bundles from the next.
func (s *settings) generationOfTokens() uint64 {
	if s == nil || !s.wantsTokens() || s.tokens == nil {
		return 0
	}
	return s.tokens.JWTGeneration()
}

// give gives back what the settings hold.
func (s *settings) give() {
	s.lease.Close()
	s.giveWays()
}

// bound is where a connection or request is bound for: what it asked for, and
// the target it came to, which is empty before that.
type bound struct{ serverName, protocol, host, path, target string }

// replaced says what makes next another way in than s to a connection that
// began under s; it is empty when nothing does. A nil next is a listener that
// is no more.
func (s *settings) replaced(next *settings, b bound) string {
	switch {
	case next == nil:
		return "listener was removed"
	case !next.keeps(s, b):
		return "listener's target changed"
	case s.Identity != next.Identity:
		return "listener's identity changed"
	case !reflect.DeepEqual(s.Expect, next.Expect):
		return "listener's expect changed"
	}
	return ""
}

// keeps reports whether a connection that began under was can go on with the
// target it came to, or, where it came to none yet, with any that it may come
// to. Routes count as they are now: where they lead it elsewhere, its target
// is that of others. What is spoken to the target is part of it, and outbound
// the server name that was asked for.
func (s *settings) keeps(was *settings, b bound) bool {
	if s.ServerName != was.ServerName || s.UpstreamProtocol != was.UpstreamProtocol {
		return false
	}
	now := s.targetsFor(b)
	if b.target != "" {
		return slices.Contains(now, b.target)
	}
	for _, t := range was.targetsFor(b) {
		if !slices.Contains(now, t) {
			return false
		}
	}
	return true
}
