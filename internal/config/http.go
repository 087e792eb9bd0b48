package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/policy"
)

// validateHTTP checks what is for requests.
func (l *Listener) validateHTTP(f *findings, key string) {
	if l.Protocol != "http" {
		l.refuseHTTP(f, key)
		return
	}
	if l.ProxyProtocol.Send != "off" {
		f.addf(key+".proxy_protocol.send", "has no use with protocol: http, where requests of several clients share a connection to the target; http.forwarded tells of them")
	}
	l.HTTP.validate(f, key+".http", l.Direction)
	l.HTTP.validateVersions(f, key+".http")
	l.validateALPN(f, key)
	l.Upstream.validateProtocol(f, key+".upstream.protocol", l.Direction)
	if h := l.IdentityHeader; h != nil {
		h.validate(f, key+".identity_header", l.Direction)
	}
	if h := l.Upstream.Health; h != nil {
		h.validateAsked(f, key+".upstream.health", l.Direction)
	}
}

// validateProtocol finds the word of the other direction.
func (u *Upstream) validateProtocol(f *findings, key, direction string) {
	switch {
	case direction == "inbound" && u.Protocol == "h2":
		f.addf(key, "h2 is for outbound listeners, whose HTTP/2 goes over mTLS; write h2c: a service is spoken to in plaintext")
	case direction == "outbound" && u.Protocol == "h2c":
		f.addf(key, "h2c is for inbound listeners, whose HTTP/2 goes in plaintext; write h2: what leaves is always mTLS")
	}
}

// maxHealthService bounds the name of a service, as package upstream does.
const maxHealthService = 255 // bytes

// validateAsked checks what a health check asks for.
func (h *Health) validateAsked(f *findings, key, direction string) {
	const why = "is for inbound listeners; the far end's own proxy would refuse a request without a caller"
	if h.Path != "" {
		if direction == "outbound" {
			f.addf(key+".path", why)
		}
		if _, err := canonical.ParseTarget("GET", h.Path, canonical.Options{}); err != nil {
			f.addf(key+".path", "%q is no path that can be asked for: %v", clip(h.Path), err)
		}
	}
	if h.GRPC == nil {
		return
	}
	switch s := h.GRPC.Service; {
	case h.Path != "":
		f.addf(key+".grpc", "cannot stand beside path; keep the one that the service answers")
	case direction == "outbound":
		f.addf(key+".grpc", why)
	case len(s) > maxHealthService || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }):
		f.addf(key+".grpc.service", "%q is no name of a service; write at most %d visible ASCII characters, for example shop.v1.Orders", clip(s), maxHealthService)
	}
}

// refuseHTTP finds what has no use where bytes are carried.
func (l *Listener) refuseHTTP(f *findings, key string) {
	const why = "is for protocol: http"
	if l.IdentityHeader != nil {
		f.addf(key+".identity_header", why+": a service that is sent bytes has no headers; proxy_protocol.send: v2 tells it who calls")
	}
	for _, name := range []string{
		".http", ".timeouts.head", ".timeouts.response", ".timeouts.stall",
		".upstream.protocol", ".upstream.max_requests", ".upstream.max_connections", ".upstream.max_pending", ".upstream.health.path", ".upstream.health.grpc", ".upstream.ejection.on_5xx",
	} {
		if _, given := f.pos[key+name]; given {
			f.addf(key+name, why)
		}
	}
}

func (h *HTTP) validate(f *findings, key, direction string) {
	if _, err := canonical.HeaderName(h.RequestID); err != nil || h.RequestID == "" {
		f.addf(key+".request_id", "%q is no header's name; write for example x-request-id", clip(h.RequestID))
	}
	if h.JWT == nil {
		return
	}
	for i, a := range h.JWT.Audience {
		if a == "" || slices.Contains(h.JWT.Audience[:i], a) {
			f.addf(fmt.Sprintf("%s.jwt.audience[%d]", key, i), "%q is empty or in the list already", clip(a))
		}
	}
	if direction == "outbound" && len(h.JWT.Audience) > 1 {
		f.addf(key+".jwt.audience", "has %d entries; outbound, one token for one audience is attached", len(h.JWT.Audience))
	}
	if direction == "outbound" && h.JWT.Required {
		f.addf(key+".jwt.required", "is for inbound listeners")
	}
}

// validateVersions checks what clients may speak.
func (h *HTTP) validateVersions(f *findings, key string) {
	for i, v := range h.Versions {
		if v != "" && slices.Contains(h.Versions[:i], v) {
			f.addf(fmt.Sprintf("%s.versions[%d]", key, i), "%s is in the list already", v)
		}
	}
	_, given := f.pos[key+".max_streams"]
	if given && slices.Equal(h.Versions, []HTTPVersion{HTTP1}) {
		f.addf(key+".max_streams", "has no use without h2 in versions: it is for HTTP/2")
	}
}

// validateALPN checks that what TLS may negotiate is spoken then.
func (l *Listener) validateALPN(f *findings, key string) {
	if l.Direction == "outbound" {
		if len(l.ALPN) > 0 {
			f.addf(key+".alpn", "has no use on an outbound listener with protocol: http; upstream.protocol says what the far end is offered")
		}
		return
	}
	if f.isBad(key+".http.versions") || slices.Contains(l.HTTP.Versions, "") { // it is not known what was meant
		return
	}
	l.HTTP.validateSpoken(f, key+".alpn", l.ALPN)
	for i := range l.Routes {
		l.HTTP.validateSpoken(f, fmt.Sprintf("%s.routes[%d].alpn", key, i), l.Routes[i].ALPN)
	}
}

// http10 is the ALPN protocol of HTTP/1.0, which goes with HTTP1.
const http10 = "http/1.0"

// validateSpoken finds protocols of alpn that are not among the versions.
func (h *HTTP) validateSpoken(f *findings, key string, alpn []string) {
	for i, p := range alpn {
		version := HTTPVersion(p)
		if p == http10 {
			version = HTTP1
		}
		at := fmt.Sprintf("%s[%d]", key, i)
		switch {
		case p == "" || slices.Contains(h.Versions, version):
		case version == HTTP1 || version == HTTP2:
			f.addf(at, "%q is not spoken without %s in http.versions; name it there, or leave it out here", p, version)
		default:
			f.addf(at, "%q is not served with protocol: http; leave it out, or carry it with protocol: tcp", clip(p))
		}
	}
}

// reservedHeaders frame or route a message, or are set by other keys.
var reservedHeaders = []string{
	"host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect", "keep-alive", "authorization", "cookie",
	"x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "forwarded", "traceparent", "tracestate",
}

func (h *IdentityHeader) validate(f *findings, key, direction string) {
	if direction == "outbound" {
		f.addf(key, "is for inbound listeners: the far end learns who calls from our certificate")
	}
	name, err := canonical.HeaderName(h.Name)
	switch {
	case err != nil || h.Name == "":
		f.addf(key+".name", "%q is no header's name; write for example x-spiffe-id", clip(h.Name))
	case slices.Contains(reservedHeaders, strings.ReplaceAll(name, "_", "-")):
		f.addf(key+".name", "%s has a meaning of its own; choose another name", name)
	}
	believes := h.XFCC == "append" || h.XFCC == "forward"
	if believes && len(h.Trusted) == 0 {
		f.addf(key+".trusted", "is required with xfcc: %s: the peers whose header is believed", h.XFCC)
	}
	if !believes && len(h.Trusted) > 0 {
		f.addf(key+".trusted", "has no use with xfcc: %s", h.XFCC)
	}
}

// validateRequests checks what of a route is for requests.
func (l *Listener) validateRequests(f *findings, r *Route, key string) {
	if l.Protocol != "http" && (r.ofRequests() || r.Response != 0) {
		f.addf(key, "hosts, paths and response are for protocol: http")
		return
	}
	for i, h := range r.Hosts {
		if _, err := policy.ParseHost(h); err != nil {
			f.addf(fmt.Sprintf("%s.hosts[%d]", key, i), "%v", err)
		}
	}
	for i, p := range r.Paths {
		if _, err := policy.ParsePath(p); err != nil {
			f.addf(fmt.Sprintf("%s.paths[%d]", key, i), "%v", err)
		}
	}
}
