//go:build integration

package http_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"path/filepath"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/testca"
)

// domain is the trust domain of all tests here.
const domain = "example.org"

// id returns a SPIFFE ID of the trust domain.
func id(path string) string { return "spiffe://" + domain + path }

// authority signs the SVIDs of the trust domain.
type authority struct {
	*testca.Authority
	t      *testing.T
	bundle string // file
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{testca.New(t, domain), t, filepath.Join(stage.Folder(t, "ca"), "bundle.pem")}
	stage.WriteFile(t, a.bundle, string(testca.CertPEM(a.Cert.Raw)), 0o644)
	return a
}

// svid is an X.509-SVID with its key, as a value and as PEM files.
type svid struct {
	id       string
	cert     tls.Certificate
	ca       *authority
	certFile string
	keyFile  string
}

// leaf signs an SVID. It is good for clients that look at names, too.
func (a *authority) leaf(path string) *svid {
	a.t.Helper()
	dir := stage.Folder(a.t, "svid")
	s := &svid{id: id(path), ca: a, certFile: filepath.Join(dir, "svid.pem"), keyFile: filepath.Join(dir, "svid.key")}
	s.cert = a.SVID(path, func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	})
	stage.WriteFile(a.t, s.certFile, string(testca.CertPEM(s.cert.Certificate...)), 0o644)
	stage.WriteFile(a.t, s.keyFile, string(testca.KeyPEM(a.t, s.cert)), 0o644)
	return s
}

// client returns a TLS client configuration that presents s and believes its
// authority.
func (s *svid) client() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(s.ca.Cert)
	return &tls.Config{Certificates: []tls.Certificate{s.cert}, RootCAs: roots, ServerName: "localhost"}
}
