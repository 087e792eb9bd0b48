package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
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

// makeCertificates writes an authority and a server's certificate into dir
// and returns those of two clients. All keys are ECDSA P-256; both leaves are X.509-SVIDs
// signed by the root, as SPIRE Server signs them.
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
	serverKey, serverDER, err := sign(leaf("/server"), ca, caKey)
	if err != nil {
		return client, other, err
	}
	for path, to := range map[string]*tls.Certificate{"/client": &client, "/other": &other} {
		key, der, err := sign(leaf(path), ca, caKey)
		if err != nil {
			return client, other, err
		}
		*to = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	key, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		return client, other, err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: serverDER})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	for name, text := range map[string][]byte{
		"ca.pem":             pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}),
		"server.pem":         certPEM,
		"server.key":         keyPEM,
		"server-and-key.pem": append(append([]byte{}, certPEM...), keyPEM...),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return client, other, err
		}
	}
	return client, other, nil
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
