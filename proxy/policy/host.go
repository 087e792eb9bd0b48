package policy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/narthex-id/narthex/proxy/canonical"
)

// hostPattern matches host names, as the authority of a request and as the
// server name of a handshake.
type hostPattern struct {
	name   string // in lower case; of "*.suffix" the suffix with its dot
	suffix bool
	port   string // empty: any
}

// parseHost reads a pattern such as orders.shop.svc, *.example.org or, where
// ports are known, orders.shop.svc:8080.
func parseHost(s string, ports bool) (hostPattern, error) {
	rest, suffix := strings.CutPrefix(s, "*.")
	switch {
	case s == "":
		return hostPattern{}, errors.New("empty")
	case s == one || rest == "":
		return hostPattern{}, errors.New("every host: leave the key out")
	case strings.Contains(rest, one):
		return hostPattern{}, fmt.Errorf("%q: \"*.\" at the beginning stands for one label or more, and nothing else does", clip(s))
	}
	if strings.Contains(s, "/") {
		return hostPattern{}, fmt.Errorf("%q: write the host alone, like orders.shop.svc", clip(s))
	}
	host, err := canonical.Host(rest)
	if err != nil {
		return hostPattern{}, fmt.Errorf("%q: %w", clip(s), err)
	}
	name, port := splitPort(host)
	switch {
	case port != "" && !ports:
		return hostPattern{}, fmt.Errorf("%q: a server name has no port", clip(s))
	case suffix && strings.HasPrefix(name, "["):
		return hostPattern{}, fmt.Errorf("%q: an address has no labels that \"*.\" could stand for", clip(s))
	case suffix:
		name = "." + name
	}
	return hostPattern{name: name, suffix: suffix, port: port}, nil
}

// String returns the pattern in its canonical form.
func (h hostPattern) String() string {
	s := h.name
	if h.suffix {
		s = "*" + s
	}
	if h.port != "" {
		s += ":" + h.port
	}
	return s
}

// match reports whether the pattern covers a host in lower case, with or
// without a port.
func (h hostPattern) match(host string) bool {
	name, port := splitPort(host)
	if h.port != "" && h.port != port {
		return false
	}
	if h.suffix {
		return len(name) > len(h.name) && strings.HasSuffix(name, h.name)
	}
	return name == h.name
}

func matchHost(patterns []hostPattern, host string) bool {
	for i := range patterns {
		if patterns[i].match(host) {
			return true
		}
	}
	return false
}

// splitPort cuts the port off a host; an IPv6 address stands in brackets.
func splitPort(host string) (name, port string) {
	i := strings.LastIndexByte(host, ':')
	if i < 0 || strings.HasSuffix(host, "]") {
		return host, ""
	}
	return host[:i], host[i+1:]
}
