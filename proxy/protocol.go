package proxy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/narthex-id/narthex/proxy/policy"
)

// Protocol is what an HTTP listener speaks to its targets. Clients that speak
// either version are served with each.
type Protocol int

// The protocols.
const (
	// ProtocolAuto: inbound, gRPC calls go by HTTP/2 and all else by HTTP/1.1.
	// Outbound, the far end is offered both where the caller speaks HTTP/2,
	// and HTTP/1.1 alone where it does not.
	ProtocolAuto  Protocol = iota
	ProtocolHTTP1          // HTTP/1.1 for every request
	// ProtocolHTTP2: HTTP/2 for every request; inbound in plaintext with prior
	// knowledge (RFC 9113 §3.3), outbound over mTLS (RFC 9113 §3.2).
	ProtocolHTTP2
)

var protocolWords = [...]string{ProtocolAuto: "auto", ProtocolHTTP1: "http1", ProtocolHTTP2: "h2"}

// String returns the word configuration files use; of ProtocolHTTP2 the one for
// outbound listeners.
func (p Protocol) String() string { return protocolWords[p] }

// UnmarshalText reads auto, http1, h2 or h2c, which is the word for h2 on
// inbound listeners.
func (p *Protocol) UnmarshalText(text []byte) error {
	if string(text) == "h2c" {
		*p = ProtocolHTTP2
		return nil
	}
	for n, word := range protocolWords {
		if word == string(text) {
			*p = Protocol(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want auto, http1, h2c or h2", text)
}

// checkSpoken refuses ALPN protocols that TLS would negotiate on an HTTP listener
// and that it would not speak then.
func checkSpoken(l Listener) error {
	if l.HTTP == nil {
		return nil
	}
	if l.Direction == policy.Outbound {
		if len(l.ALPN) > 0 {
			return errors.New("alpn: outbound, what an HTTP listener offers follows from its upstream's protocol")
		}
		return nil
	}
	versions := l.HTTP.withDefaults().Versions
	for _, p := range (&settings{Listener: l}).everyProtocol() {
		if !slices.Contains(versions, p) && (p != protocolHTTP10 || !slices.Contains(versions, protocolHTTP)) {
			return fmt.Errorf("alpn: %q is not among the versions of HTTP that are spoken: %s", p, strings.Join(versions, ", "))
		}
	}
	return nil
}

// checkRequests refuses what is for requests where there are none, and checks
// of services where a far end would refuse them.
func checkRequests(l Listener) error {
	health := &l.Upstream.Health
	asks := health.Path != "" || health.GRPC
	switch {
	case l.UpstreamProtocol < 0 || int(l.UpstreamProtocol) >= len(protocolWords):
		return fmt.Errorf("upstream: protocol %d is not one", int(l.UpstreamProtocol))
	case l.HTTP == nil && l.UpstreamProtocol != ProtocolAuto:
		return fmt.Errorf("upstream: protocol %s is for HTTP listeners", l.UpstreamProtocol)
	case l.HTTP == nil && asks:
		return errors.New("upstream: health by a path or gRPC is for HTTP listeners")
	case l.Direction == policy.Outbound && asks:
		return errors.New("upstream: health by a path or gRPC is for inbound listeners: the far end's own proxy would refuse a request without a caller")
	}
	return nil
}
