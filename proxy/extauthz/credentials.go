package extauthz

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// cipherSuites are those of TLS 1.2 that HTTP/2 can be spoken over (RFC 9113,
// section 9.2.2). TLS 1.3 has no others.
var cipherSuites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// mutual are the credentials of a service that speaks mTLS: as of the moment of
// each handshake.
type mutual struct{ v *service }

// ServerHandshake proves who the client is. A client that may not ask does not
// get in; one that may is looked at again with each call.
func (m *mutual) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	s := m.v.settings.Load()
	conn, c, err := m.handshake(raw, s)
	result := "ok"
	if err != nil {
		result = "error"
		if pe := (*identity.PeerError)(nil); errors.As(err, &pe) {
			result = pe.Result
		}
		m.v.logRefusal("ext_authz: connection refused", "source", raw.RemoteAddr(), "reason", telemetry.Tidy(err.Error()))
	}
	m.v.set.meters.handshakes.With(s.Name, result).Inc()
	if err != nil {
		_ = raw.Close()
		return nil, nil, err
	}
	return conn, c, nil
}

func (m *mutual) handshake(raw net.Conn, s *settings) (net.Conn, *client, error) {
	own, err := s.lease.Current()
	if err != nil {
		return nil, nil, err
	}
	trust := s.lease.Trust()
	conn := tls.Server(raw, &tls.Config{
		Certificates:           []tls.Certificate{own.Certificate},
		MinVersion:             tls.VersionTLS12,
		CipherSuites:           cipherSuites,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequireAnyClientCert,
		// It is called for every handshake, which VerifyPeerCertificate is not.
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := trust.Verify(cs.PeerCertificates, time.Now())
			if err != nil {
				return err
			}
			if !s.names(policy.PeerOf(id, cs.PeerCertificates[0])) {
				return &identity.PeerError{ID: id, Result: "unexpected", Err: errors.New("valid, but none of `clients`")}
			}
			return nil
		},
	})
	if err := conn.Handshake(); err != nil { // grpc has set the deadline
		return nil, nil, err
	}
	chain := conn.ConnectionState().PeerCertificates
	id, err := trust.Verify(chain, time.Now())
	if err != nil { // verified a moment ago, or expired since
		return nil, nil, err
	}
	c := &client{peer: policy.PeerOf(id, chain[0])}
	c.SecurityLevel = credentials.PrivacyAndIntegrity
	if c.standing, err = trust.Stand(id, chain, time.Now()); err != nil {
		return nil, nil, err
	}
	return conn, c, nil
}

// names reports whether a peer is one of the clients.
func (s *settings) names(peer policy.Peer) bool {
	for _, p := range s.Clients {
		if p.Match(peer.ID) {
			return true
		}
	}
	return false
}

// client is who a connection is from.
type client struct {
	credentials.CommonAuthInfo
	peer policy.Peer

	mu       sync.Mutex // guards the following
	standing *identity.Standing
}

// AuthType implements credentials.AuthInfo.
func (*client) AuthType() string { return "spiffe" }

// stands says whether the client is still who it was, by the bundles, CRLs and
// clients of now.
func (c *client) stands(s *settings, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.standing.Recheck(s.lease.Trust(), now); err != nil {
		return err
	}
	if end := c.standing.NotAfter(); now.After(end) {
		return fmt.Errorf("the SVID of %s expired at %s: connect anew", c.peer.ID, end.UTC().Format(time.RFC3339))
	}
	if !s.names(c.peer) {
		return fmt.Errorf("%s is none of `clients`", c.peer.ID)
	}
	return nil
}

// ClientHandshake implements credentials.TransportCredentials for a side that
// there is not.
func (*mutual) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a server's")
}

// Info implements credentials.TransportCredentials.
func (*mutual) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (m *mutual) Clone() credentials.TransportCredentials { return m }

// OverrideServerName implements credentials.TransportCredentials.
func (*mutual) OverrideServerName(string) error { return nil }
