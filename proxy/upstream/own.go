package upstream

import (
	"fmt"
	"net"
	"net/netip"
)

// A connection to the listener it came from would be accepted there and dialled
// again, until there can be no more. No operator writes that, but a resolver
// that answers with an address of this host does it to every listener which has
// the port of its target. It is seen before the dial: one that was dialled is
// accepted, however soon it is closed.

// loopError is an endpoint that is not dialled.
type loopError struct{ name string }

func (e *loopError) Error() string {
	return fmt.Sprintf("dial %s: it is the listener itself; name the service's own address, or see to what the name resolves to", e.name)
}

// leadsTo reports whether own, the address of a listener or nil, is what
// answers at p.
func (p place) leadsTo(own net.Addr) bool {
	switch own := own.(type) {
	case *net.UnixAddr:
		return p.path != "" && p.path == own.Name
	case *net.TCPAddr:
		if p.path != "" || int(p.ip.Port()) != own.Port {
			return false
		}
		to, at := p.ip.Addr(), own.AddrPort().Addr().Unmap()
		if to.IsUnspecified() { // which connect(2) takes for the loopback address
			return at.IsUnspecified() || at.IsLoopback()
		}
		return to == at || at.IsUnspecified() && (to.IsLoopback() || ofThisHost(to))
	}
	return false
}

// ofThisHost reports whether ip is an address of this host: what is sent there
// comes from there. Nothing is sent to find out.
func ofThisHost(ip netip.Addr) bool {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, 9)))
	if err != nil {
		return false
	}
	defer func() { _ = c.Close() }()
	from, ok := c.LocalAddr().(*net.UDPAddr)
	return ok && from.AddrPort().Addr().Unmap() == ip
}
