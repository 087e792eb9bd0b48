package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// writeIdentity makes the files of an identity, and a CRL, in dir.
func writeIdentity(t *testing.T, dir, id string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte("root"),
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: root.NotBefore, NotAfter: root.NotAfter, URIs: []*url.URL{uri}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	put := func(name, kind string, der []byte, err error) {
		t.Helper()
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	put("bundle.pem", "CERTIFICATE", der, err)
	der, err = x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), key)
	put("svid.pem", "CERTIFICATE", der, err)
	der, err = x509.MarshalPKCS8PrivateKey(key)
	put("svid.key", "PRIVATE KEY", der, err)
	der, err = x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now, NextUpdate: now.Add(time.Hour)}, root, key)
	put("crl.pem", "X509 CRL", der, err)
}

// TestCheckHostReadsWhatTheAgentBeginsWith: a bundle and a token that are there
// and no good are found before the agent asks a server with them.
func TestCheckHostReadsWhatTheAgentBeginsWith(t *testing.T) {
	dir := t.TempDir()
	writeIdentity(t, dir, "spiffe://example.org/orders")
	for name, content := range map[string]string{"token": "Token: 96fcebf7\n", "empty": "\n", "two": "96fcebf7\n96fcebf8\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ bundle, token, want string }{
		{"bundle.pem", "token", ""},
		{"svid.key", "token", "n.yaml:3:45: error: agent.server.bundle.file: "},
		{"empty", "token", "no PEM certificate in it"},
		{"none", "token", "none: no such file"},
		{"bundle.pem", "empty", "n.yaml:4:32: error: agent.node_attestor.join_token.token_file: "},
		{"bundle.pem", "two", "holds more than a token"},
	} {
		path := filepath.Join(dir, "n.yaml")
		text := fmt.Sprintf(`trust_domain: example.org
agent:
  server: {address: "127.0.0.1:1", bundle: {file: %s}}
  node_attestor: {join_token: {token_file: %s}}
`, c.bundle, c.token)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := checkHost(path); c.want == "" && len(got) != 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0].String(), c.want)) {
			t.Errorf("%s, %s: got %v\nwant %q", c.bundle, c.token, got, c.want)
		}
	}
}

// TestCheckHostReadsIdentities: what would keep every listener from serving is
// found before anything is started, at its place.
func TestCheckHostReadsIdentities(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	writeIdentity(t, dir, "spiffe://example.org/orders")
	writeIdentity(t, other, "spiffe://example.org/orders")
	const good = "cert: svid.pem, key: svid.key, bundle: bundle.pem"
	for _, c := range []struct{ files, crls, identity, want string }{
		{good, "crl.pem", "spiffe://example.org/orders", ""},
		{"cert: svid.pem, key: svid.key, bundle: svid.pem", "crl.pem", "spiffe://example.org/orders", "n.yaml:4:3: error: proxy.files.bundle "},
		{"cert: svid.pem, key: " + other + "/svid.key, bundle: bundle.pem", "crl.pem", "spiffe://example.org/orders", "private key does not match public key"},
		{"cert: svid.pem, key: svid.key, bundle: " + other + "/bundle.pem", "crl.pem", "spiffe://example.org/orders", "n.yaml:4:3: error: proxy.files.cert "},
		{"cert: svid.pem, key: none.key, bundle: bundle.pem", "crl.pem", "spiffe://example.org/orders", "n.yaml:4:27: error: proxy.files.key: open "},
		{good, "crl.pem", "spiffe://example.org/stock", "n.yaml:8:83: error: proxy.listeners[0].identity.spiffe_id: spiffe://example.org/stock is not whom the certificate is of, spiffe://example.org/orders"},
		{good, "svid.pem", "spiffe://example.org/orders", `holds "CERTIFICATE"; want CRLs alone`},
		{good, "none/*", "spiffe://example.org/orders", "n.yaml:5:10: error: proxy.crls.example.org: "},
	} {
		path := filepath.Join(dir, "n.yaml")
		text := fmt.Sprintf(`trust_domain: example.org
proxy:
  source: files
  files: {%s}
  crls: {example.org: [%s]}
  policies: [rules.yaml]
  listeners:
    - {name: a, direction: inbound, bind: ":1", target: "127.0.0.1:2", identity: {spiffe_id: "%s"}}
`, c.files, c.crls, c.identity)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got := checkHost(path)
		if c.want == "" && len(got) != 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0].String(), c.want)) {
			t.Errorf("got %v\nwant %q", got, c.want)
		}
		if c.want != "" {
			continue
		}
		if err := os.Chmod(filepath.Join(dir, "svid.key"), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := checkHost(path); len(got) != 1 || !strings.Contains(got[0].String(), "n.yaml:4:27: warning: proxy.files.key: every user of this host can read ") {
			t.Errorf("a key for everybody: %v", got)
		}
		if err := os.Chmod(filepath.Join(dir, "svid.key"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
