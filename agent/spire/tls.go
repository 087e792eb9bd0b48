package spire

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
)

// tlsConfig is the client's side of a handshake, as nobody.
func tlsConfig(v *verifier, requirePQKEM bool) *tls.Config {
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The standard verification wants a DNS name, which an X509-SVID
		// need not have. VerifyConnection stands in for it, and unlike
		// VerifyPeerCertificate it runs for resumed sessions as well.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection:   v.verify,
		// Every connection is verified against the bundle of its day. Go
		// resumes only with a ClientSessionCache, so this says it twice.
		SessionTicketsDisabled: true,
	}
	if requirePQKEM {
		config.MinVersion = tls.VersionTLS13
		config.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	return config
}

// verifier decides whether the other end is the SPIRE Server of our trust
// domain.
type verifier struct {
	serverID spiffeid.ID
	insecure bool
	roots    func() []*x509.Certificate

	// failure is why the latest handshake was refused here, nil if it was
	// not: gRPC passes on no more than its text.
	failure atomic.Pointer[error]
}

func (v *verifier) verify(cs tls.ConnectionState) error {
	err := v.check(cs.PeerCertificates)
	if err != nil {
		v.failure.Store(&err)
	} else {
		v.failure.Store(nil)
	}
	return err
}

func (v *verifier) check(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("server presented no certificate")
	}
	// The ID comes first, though nothing vouches for it yet: a server of
	// another trust domain is better named than called an unknown authority.
	id, err := x509svid.IDFromCert(chain[0])
	switch {
	case err != nil:
		return fmt.Errorf("%w: its certificate is no X509-SVID: %w", ErrWrongServer, err)
	case id != v.serverID:
		return fmt.Errorf("%w: it is %s, want %s", ErrWrongServer, id, v.serverID)
	case v.insecure:
		return nil
	}
	return verifyChain(chain, v.serverID.TrustDomain(), v.roots(), "the server's certificate", time.Now())
}

// verifyChain checks an X509-SVID's chain (SPIFFE X509-SVID §5) against the
// authorities of its trust domain, at a time. What names the chain in errors,
// which wrap a *ClockError where it is the time that is wrong.
func verifyChain(chain []*x509.Certificate, td spiffeid.TrustDomain, roots []*x509.Certificate, what string, at time.Time) error {
	if len(roots) == 0 {
		return fmt.Errorf("verify %s: the trust bundle has no X.509 authority", what)
	}
	_, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(at))
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown):
		return fmt.Errorf("verify %s: %w: %w", what, ErrUnknownAuthority, err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return &ClockError{What: what, Now: at, NotBefore: invalid.Cert.NotBefore, NotAfter: invalid.Cert.NotAfter}
	}
	return fmt.Errorf("verify %s: %w", what, err)
}

// parseSVID reads a chain that the server has signed for us, and fails unless
// its leaf is an X509-SVID for key.
func parseSVID(chain [][]byte, key crypto.PublicKey) (spiffeid.ID, []*x509.Certificate, error) {
	if len(chain) == 0 {
		return spiffeid.ID{}, nil, errors.New("it has no certificate")
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return spiffeid.ID{}, nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		certs[i] = cert
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	public, ok := certs[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(key) {
		return spiffeid.ID{}, nil, fmt.Errorf("the certificate of %s is for another key than the one in the request", id)
	}
	return id, certs, nil
}

// csrKey returns the public key of a certificate request, the one thing in it
// that the server uses.
func csrKey(csr []byte) (crypto.PublicKey, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	return req.PublicKey, nil
}

// alertCredentials let a TLS alert over the client's certificate through. In
// TLS 1.3 the client is done with the handshake when its Finished is sent
// (RFC 8446 §2), and hears of a refusal while gRPC writes already: the write
// then fails with a broken pipe, and the alert that explains it is never read.
type alertCredentials struct {
	credentials.TransportCredentials
}

func (a alertCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := a.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return &alertConn{Conn: c}, info, nil
}

func (a alertCredentials) Clone() credentials.TransportCredentials {
	return alertCredentials{a.TransportCredentials.Clone()}
}

// alertGrace is how long a failed write looks for an alert, which the failure
// shows to have been sent before.
const alertGrace = 100 * time.Millisecond

type alertConn struct {
	net.Conn
	heard atomic.Bool // the server has spoken, so it has accepted us
}

func (c *alertConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.heard.Store(true)
	}
	return n, err
}

func (c *alertConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err == nil || c.heard.Load() {
		return n, err
	}
	// The connection is lost: neither the deadline nor the byte matters.
	if c.SetReadDeadline(time.Now().Add(alertGrace)) == nil {
		if _, alert := c.Conn.Read(make([]byte, 1)); alert != nil && containsAny(alert.Error(), refusedAlerts) {
			return n, alert
		}
	}
	return n, err
}
