// Package testca makes the credentials that tests need: authorities of trust
// domains, intermediates, SVIDs and CRLs, and JWT-SVIDs. Only tests import it.
package testca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Authority is an in-memory CA of one trust domain.
type Authority struct {
	T           testing.TB
	TrustDomain spiffeid.TrustDomain
	Cert        *x509.Certificate
	Key         *ecdsa.PrivateKey
}

// NewKey makes a P-256 key.
func NewKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// NewSerial makes a random serial number.
func NewSerial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// New returns a root authority of a trust domain.
func New(t testing.TB, td string) *Authority {
	t.Helper()
	a := &Authority{T: t, TrustDomain: spiffeid.RequireTrustDomainFromString(td), Key: NewKey(t)}
	a.signedBy(a)
	return a
}

// Intermediate returns an authority that a has signed.
func (a *Authority) Intermediate() *Authority {
	a.T.Helper()
	m := &Authority{T: a.T, TrustDomain: a.TrustDomain, Key: NewKey(a.T)}
	m.signedBy(a)
	return m
}

func (a *Authority) signedBy(by *Authority) {
	a.T.Helper()
	t, now := a.T, time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: NewSerial(t), Subject: pkix.Name{CommonName: NewSerial(t).Text(16)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{a.TrustDomain.ID().URL()},
	}
	parent := tmpl
	if by != a {
		parent = by.Cert
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, a.Key.Public(), by.Key)
	if err != nil {
		t.Fatal(err)
	}
	if a.Cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
}

// SVID issues an SVID that lives an hour, after edit changed its template.
func (a *Authority) SVID(path string, edit ...func(*x509.Certificate)) tls.Certificate {
	a.T.Helper()
	id := spiffeid.RequireFromPath(a.TrustDomain, path)
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: NewSerial(a.T), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{id.URL()},
	}
	for _, e := range edit {
		e(tmpl)
	}
	key := NewKey(a.T)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.Cert, key.Public(), a.Key)
	if err != nil {
		a.T.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.T.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// Bundles maps the given authorities by their trust domain.
func Bundles(as ...*Authority) map[spiffeid.TrustDomain][]*x509.Certificate {
	m := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for _, a := range as {
		m[a.TrustDomain] = append(m[a.TrustDomain], a.Cert)
	}
	return m
}

// CertPEM encodes certificates.
func CertPEM(certs ...[]byte) []byte {
	var out []byte
	for _, der := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// KeyPEM encodes the key of an SVID.
func KeyPEM(t testing.TB, cert tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// CRL issues a CRL that is good for a day, after edit changed its template.
func (a *Authority) CRL(number int64, edit func(*x509.RevocationList), revoked ...*x509.Certificate) []byte {
	a.T.Helper()
	now := time.Now()
	tmpl := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(24 * time.Hour)}
	for _, c := range revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: now, ReasonCode: 1})
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, a.Cert, a.Key)
	if err != nil {
		a.T.Fatal(err)
	}
	return der
}

// CRLPEM encodes CRLs.
func CRLPEM(lists ...[]byte) []byte {
	var out []byte
	for _, der := range lists {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return out
}
