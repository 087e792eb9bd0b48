// Package mesh is what tests of requests stand on besides stage: an authority
// and the SVIDs it signs, a `narthex proxy` with listeners of `protocol:
// http`, and a service behind two of them.
//
//	p := mesh.NewPair(t, service)
//	… http.Get("http://" + p.Entry)
package mesh

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"path/filepath"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/testca"
)

// Domain is the trust domain of all tests here.
const Domain = "example.org"

// ID returns a SPIFFE ID of the trust domain.
func ID(path string) string { return "spiffe://" + Domain + path }

// Authority signs the SVIDs of the trust domain.
type Authority struct {
	*testca.Authority
	t      *testing.T
	Bundle string // file, PEM
}

// NewAuthority makes one, and the file of its bundle.
func NewAuthority(t *testing.T) *Authority {
	t.Helper()
	a := &Authority{testca.New(t, Domain), t, filepath.Join(stage.Folder(t, "ca"), "bundle.pem")}
	stage.WriteFile(t, a.Bundle, string(testca.CertPEM(a.Cert.Raw)), 0o644)
	return a
}

// SVID is an X.509-SVID with its key, as a value and as PEM files.
type SVID struct {
	ID       string
	Cert     tls.Certificate
	CA       *Authority
	CertFile string
	KeyFile  string
}

// Leaf signs an SVID. It is good for clients that look at names, too.
func (a *Authority) Leaf(path string) *SVID {
	a.t.Helper()
	dir := stage.Folder(a.t, "svid")
	s := &SVID{ID: ID(path), CA: a, CertFile: filepath.Join(dir, "svid.pem"), KeyFile: filepath.Join(dir, "svid.key")}
	s.Cert = a.SVID(path, func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	})
	stage.WriteFile(a.t, s.CertFile, string(testca.CertPEM(s.Cert.Certificate...)), 0o644)
	stage.WriteFile(a.t, s.KeyFile, string(testca.KeyPEM(a.t, s.Cert)), 0o644)
	return s
}

// Client returns a TLS client configuration that presents s and believes its
// authority.
func (s *SVID) Client() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(s.CA.Cert)
	return &tls.Config{Certificates: []tls.Certificate{s.Cert}, RootCAs: roots, ServerName: "localhost"}
}
