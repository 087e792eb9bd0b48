package proxy

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

// authority is an in-memory CA of one trust domain.
type authority struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newSerial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: spiffeid.RequireTrustDomainFromString(td), key: newKey(t)}
	a.signedBy(a)
	return a
}

// intermediate returns an authority that a has signed.
func (a *authority) intermediate() *authority {
	a.t.Helper()
	m := &authority{t: a.t, td: a.td, key: newKey(a.t)}
	m.signedBy(a)
	return m
}

func (a *authority) signedBy(by *authority) {
	a.t.Helper()
	t, now := a.t, time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: newSerial(t), Subject: pkix.Name{CommonName: newSerial(t).Text(16)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{a.td.ID().URL()},
	}
	parent := tmpl
	if by != a {
		parent = by.cert
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, a.key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
}

// svid issues an SVID that lives an hour, after edit changed its template.
func (a *authority) svid(path string, edit ...func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	id := spiffeid.RequireFromPath(a.td, path)
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: newSerial(a.t), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{id.URL()},
	}
	for _, e := range edit {
		e(tmpl)
	}
	key := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// bundles maps the given authorities by their trust domain.
func bundles(as ...*authority) map[spiffeid.TrustDomain][]*x509.Certificate {
	m := map[spiffeid.TrustDomain][]*x509.Certificate{}
	for _, a := range as {
		m[a.td] = append(m[a.td], a.cert)
	}
	return m
}

func certPEM(certs ...[]byte) []byte {
	var out []byte
	for _, der := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

func keyPEM(t testing.TB, cert tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// crl issues a CRL that is good for a day, after edit changed its template.
func (a *authority) crl(number int64, edit func(*x509.RevocationList), revoked ...*x509.Certificate) []byte {
	a.t.Helper()
	now := time.Now()
	tmpl := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(24 * time.Hour)}
	for _, c := range revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: now, ReasonCode: 1})
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

func crlPEM(lists ...[]byte) []byte {
	var out []byte
	for _, der := range lists {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return out
}
