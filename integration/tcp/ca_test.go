//go:build integration

package tcp_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// authority signs the SVIDs of one trust domain.
type authority struct {
	t     *testing.T
	td    string
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // what those it signs for have to send along: itself and those above it but the root
}

// newAuthority makes the root of a trust domain. Two of the same domain have
// nothing in common but the name.
func newAuthority(t *testing.T, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: td, key: newKey(t)}
	a.cert = a.sign(a.template("root of "+td, 24*time.Hour), nil, a.key.Public())
	return a
}

// intermediate makes an authority that is signed by a.
func (a *authority) intermediate(how ...func(*x509.Certificate)) *authority {
	a.t.Helper()
	i := &authority{t: a.t, td: a.td, key: newKey(a.t)}
	i.cert = a.sign(a.template("intermediate of "+a.td, 12*time.Hour, how...), a.cert, i.key.Public())
	i.chain = append([]*x509.Certificate{i.cert}, a.chain...)
	return i
}

func (a *authority) template(name string, ttl time.Duration, how ...func(*x509.Certificate)) *x509.Certificate {
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:  x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:      []*url.URL{{Scheme: "spiffe", Host: a.td}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl),
	}
	for _, h := range how {
		h(c)
	}
	return c
}

func (a *authority) sign(template, parent *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	a.t.Helper()
	var err error
	if template.SerialNumber == nil {
		if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
			a.t.Fatal(err)
		}
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// id returns a SPIFFE ID of the trust domain.
func (a *authority) id(path string) string { return "spiffe://" + a.td + path }

// pem returns the bundle of authorities.
func bundlePEM(authorities ...*authority) string {
	var text []byte
	for _, a := range authorities {
		text = append(text, certificatesPEM(a.cert)...)
	}
	return string(text)
}

func certificatesPEM(certs ...*x509.Certificate) []byte {
	var text bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a bytes.Buffer takes all
	}
	return text.Bytes()
}

// crl returns a list in PEM of what the authority takes back.
func (a *authority) crl(number int64, nextUpdate time.Time, revoked ...*svid) string {
	a.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: nextUpdate}
	for _, s := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: s.chain[0].SerialNumber, RevocationTime: time.Now().Add(-time.Minute),
		})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
}

// svid is a certificate with its key, as a value and as PEM files.
type svid struct {
	id    string
	chain []*x509.Certificate // leaf first
	key   crypto.Signer

	dir      string
	certFile string // the whole chain
	keyFile  string
	bothFile string // chain and key
}

// leaf signs an X.509-SVID of an hour, for both ends of a connection.
func (a *authority) leaf(path string, how ...func(*x509.Certificate)) *svid {
	a.t.Helper()
	return a.leafWith(newKey(a.t), path, how...)
}

// leafRSA signs one with an RSA key.
func (a *authority) leafRSA(path string, how ...func(*x509.Certificate)) *svid {
	a.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.leafWith(key, path, how...)
}

func (a *authority) leafWith(key crypto.Signer, path string, how ...func(*x509.Certificate)) *svid {
	a.t.Helper()
	template := &x509.Certificate{
		Subject:     pkix.Name{Organization: []string{"tests"}},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: a.td, Path: path}},
		NotBefore:   time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	for _, h := range how {
		h(template)
	}
	s := &svid{id: a.id(path), key: key, dir: stage.Folder(a.t, "svid")}
	s.chain = append([]*x509.Certificate{a.sign(template, a.cert, key.Public())}, a.chain...)
	s.certFile, s.keyFile = filepath.Join(s.dir, "svid.pem"), filepath.Join(s.dir, "svid.key")
	s.bothFile = filepath.Join(s.dir, "both.pem")
	stage.WriteFile(a.t, s.certFile, s.certPEM(), 0o644)
	stage.WriteFile(a.t, s.keyFile, s.keyPEM(a.t), 0o644) // any user may be who runs a peer
	stage.WriteFile(a.t, s.bothFile, s.certPEM()+s.keyPEM(a.t), 0o644)
	return s
}

// lasting makes a certificate end so long from now.
func lasting(d time.Duration) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotAfter = time.Now().Add(d) }
}

// withURIs replaces the URI SANs.
func withURIs(uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.URIs = nil
		for _, u := range uris {
			parsed, err := url.Parse(u)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, parsed)
		}
	}
}

// usedFor replaces the extended key usages.
func usedFor(usages ...x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = usages }
}

func (s *svid) certPEM() string { return string(certificatesPEM(s.chain...)) }

func (s *svid) keyPEM(t *testing.T) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// tls returns the certificate as Go's TLS takes it.
func (s *svid) tls() tls.Certificate {
	c := tls.Certificate{PrivateKey: s.key, Leaf: s.chain[0]}
	for _, cert := range s.chain {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// client returns a TLS client configuration that presents s. It believes
// every server: the tests that care look at the peer themselves.
func (s *svid) client() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{s.tls()}, InsecureSkipVerify: true}
}

// server returns a TLS server configuration that presents s and asks for a
// client's certificate.
func (s *svid) server() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{s.tls()}, ClientAuth: tls.RequireAnyClientCert}
}
