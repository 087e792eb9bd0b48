package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/proxyproto"
)

// This file is about whose connection it is when other proxies stand before
// us or behind us.

// ProxyProtocol is what a listener does with the header of the PROXY protocol.
type ProxyProtocol struct { //nolint:revive // PROXY protocol is its name
	// Send is the header the target is sent before the first byte of each
	// connection. Outbound it goes before TLS, where the protocol has its place.
	Send proxyproto.Version

	// AcceptFrom are the networks of the proxies that stand before the
	// listener. A client whose own address is in one of them must send a
	// header, and is taken for whom the header names; nobody else may.
	AcceptFrom []netip.Prefix
	// AcceptUnix says the same of every client of a Unix socket, which has no
	// address: who may connect is trusted.
	AcceptUnix bool
}

// trusts reports whether the far end of an accepted connection is one that
// must send a header.
func (p *ProxyProtocol) trusts(c net.Conn) bool {
	if !p.AcceptUnix && len(p.AcceptFrom) == 0 {
		return false
	}
	switch remote := c.RemoteAddr().(type) {
	case *net.TCPAddr:
		ip := remote.AddrPort().Addr().Unmap().WithZone("")
		for _, prefix := range p.AcceptFrom {
			if prefix.Contains(ip) {
				return true
			}
		}
	case *net.UnixAddr:
		return p.AcceptUnix
	}
	return false
}

func checkProxyProtocol(p ProxyProtocol) error {
	if p.Send < proxyproto.Off || p.Send > proxyproto.V2 {
		return fmt.Errorf("proxy_protocol: version %d to send: want off, v1 or v2", p.Send)
	}
	for _, prefix := range p.AcceptFrom {
		if !prefix.IsValid() || prefix != prefix.Masked() || prefix.Addr().Is4In6() {
			return fmt.Errorf("proxy_protocol: %s to accept from is no network", prefix)
		}
	}
	return nil
}

// readHeader takes the PROXY header of a client that must send one, within the
// time a client has for its hello, and takes the client for whom it names.
// Nothing behind the header is read.
func (c *conn) readHeader() error {
	s := c.began
	if !s.ProxyProtocol.trusts(c.down) {
		return nil
	}
	within := min(helloWithin, s.Timeouts.Handshake)
	c.endBy(endHello, c.start.Add(within), closing{"error", fmt.Sprintf("accept_from names the client, but it sent no PROXY header within %s", within)})
	header, err := proxyproto.Read(c.down)
	if c.request.Direction == policy.Outbound { // inbound, hear does
		c.l.heard(c)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadlines[endHello] = deadline{}
	c.began = c.under(c.l.proxy.world.Load())
	switch {
	case c.closing != nil:
		return refuse("refused", "%s", c.closing.why)
	case errors.Is(err, io.EOF):
		return &handshakeError{refusal: refusal{"refused", "accept_from names the client, but it left without a PROXY header"}, err: err, left: true}
	case err != nil:
		return refuse("refused", "accept_from names the client, so it must send a PROXY header: %v", err)
	}
	c.via, c.header = c.source, &header
	switch {
	case header.Unix:
		c.source, c.request.Source = unixPrefix+telemetry.Tidy(header.SourcePath), netip.AddrPort{}
	case header.Source.IsValid():
		c.source, c.request.Source = header.Source.String(), header.Source
	}
	return nil
}

// believed reports whether what s says of PROXY headers is what the connection
// was taken in under.
func (c *conn) believed(s *settings) bool {
	return s.ProxyProtocol.trusts(c.down) == (c.header != nil)
}

// origin returns between which ends the client made its connection: as far as
// a header says, or else as our own socket does.
func (c *conn) origin() proxyproto.Header {
	if h := c.header; h != nil && (h.Unix || h.Source.IsValid()) {
		return *h
	}
	switch local := c.down.LocalAddr().(type) {
	case *net.TCPAddr:
		if remote, ok := c.down.RemoteAddr().(*net.TCPAddr); ok {
			return proxyproto.Header{Source: plain(remote), Destination: plain(local)}
		}
	case *net.UnixAddr:
		return proxyproto.Header{Unix: true, DestinationPath: local.Name}
	}
	return proxyproto.Header{}
}

// plain is the address as policies see it: IPv4 never as IPv6.
func plain(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// announce sends the target the PROXY header, if it wants one. It does so
// before any byte of the connection and without waiting for one: the target
// may be the side that speaks first. The client came over down, as we read it.
func (c *conn) announce(up net.Conn, s *settings, down end) error {
	var header []byte
	origin := c.origin()
	switch s.ProxyProtocol.Send {
	case proxyproto.Off:
		return nil
	case proxyproto.V1:
		header = origin.AppendV1(nil)
	case proxyproto.V2:
		header = origin.AppendV2(nil, c.found(down)...)
	}
	if _, err := up.Write(header); err != nil {
		if c.ended() != nil {
			return c.killedBefore()
		}
		return refuse("failed", "target: send the PROXY header: %v", err)
	}
	return nil
}

// found is what TLS found out about the client, for the target.
func (c *conn) found(down end) []proxyproto.TLV {
	secured, ok := down.(*secured)
	if !ok {
		return nil
	}
	t := secured.ConnectionState()
	c.mu.Lock()
	from, to, name := c.request.From.ID, c.request.To.ID, c.request.SNI
	c.mu.Unlock()
	return []proxyproto.TLV{
		proxyproto.Authority(name),
		proxyproto.ALPN(t.NegotiatedProtocol),
		proxyproto.MutualTLS("TLSv"+versionName(t.Version), opensslCipher(t.CipherSuite)),
		proxyproto.PeerID(from.String()),
		proxyproto.OwnID(to.String()),
	}
}

// opensslCipher is the name by which OpenSSL, and with it the protocol's
// examples, call a cipher suite. Those of TLS 1.3 have one name for all.
func opensslCipher(suite uint16) string {
	switch suite {
	case tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256:
		return "ECDHE-ECDSA-AES128-GCM-SHA256"
	case tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384:
		return "ECDHE-ECDSA-AES256-GCM-SHA384"
	case tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256:
		return "ECDHE-ECDSA-CHACHA20-POLY1305"
	case tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256:
		return "ECDHE-RSA-AES128-GCM-SHA256"
	case tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384:
		return "ECDHE-RSA-AES256-GCM-SHA384"
	case tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256:
		return "ECDHE-RSA-CHACHA20-POLY1305"
	}
	return cipherName(suite)
}
