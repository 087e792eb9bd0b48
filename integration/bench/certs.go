package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// The identities of the proxies' rows.
const (
	trustDomain = "bench.example"
	serverID    = "spiffe://" + trustDomain + "/server"
	clientID    = "spiffe://" + trustDomain + "/client"
	otherID     = "spiffe://" + trustDomain + "/other"
)

// makeCertificates writes the certificates of an authority, a server and two
// clients into dir, the keys too, and returns those of the clients. All keys are
// ECDSA P-256; the leaves are X.509-SVIDs signed by the root, as SPIRE Server
// signs them.
func makeCertificates(dir string) (client, other tls.Certificate, err error) {
	ca := &x509.Certificate{
		Subject: pkix.Name{CommonName: "benchmark"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:     []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
	caKey, caDER, err := sign(ca, nil, nil)
	if err != nil {
		return client, other, err
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		return client, other, err
	}
	if err := writePEM(dir, "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})); err != nil {
		return client, other, err
	}
	var server tls.Certificate
	for name, to := range map[string]*tls.Certificate{"server": &server, "client": &client, "other": &other} {
		key, der, err := sign(leaf("/"+name), ca, caKey)
		if err != nil {
			return client, other, err
		}
		*to = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
		if err := writeLeaf(dir, name, key, der); err != nil {
			return client, other, err
		}
	}
	return client, other, nil
}

// writeLeaf writes a certificate and its key, each by itself and both in one
// file.
func writeLeaf(dir, name string, key *ecdsa.PrivateKey, der []byte) error {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	return errors.Join(
		writePEM(dir, name+".pem", certPEM),
		writePEM(dir, name+".key", keyPEM),
		writePEM(dir, name+"-and-key.pem", append(append([]byte{}, certPEM...), keyPEM...)),
	)
}

func writePEM(dir, name string, text []byte) error {
	return os.WriteFile(filepath.Join(dir, name), text, 0o600)
}

func leaf(path string) *x509.Certificate {
	return &x509.Certificate{
		Subject:     pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: trustDomain, Path: path}},
	}
}

// sign makes a key and signs its certificate: by the parent, or by itself
// where there is none.
func sign(template, parent *x509.Certificate, by *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		return nil, nil, fmt.Errorf("make a serial number: %w", err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(24*time.Hour)
	if parent == nil {
		parent, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		return nil, nil, fmt.Errorf("sign a certificate: %w", err)
	}
	return key, der, nil
}
