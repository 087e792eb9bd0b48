package attestor

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// popServer plays the server's part of x509pop as SPIRE v1.15.2 does: it
// knows nothing of the code under test but the JSON on the wire.
type popServer struct {
	roots *x509.CertPool
	leaf  *x509.Certificate
	nonce []byte
}

// challenge takes the payload and returns the challenge.
func (s *popServer) challenge(payload []byte) ([]byte, error) {
	var data map[string][][]byte
	if err := json.Unmarshal(payload, &data); err != nil {
		return nil, err
	}
	chain := data["certificates"]
	if len(data) != 1 || len(chain) == 0 || len(chain) > 5 {
		return nil, fmt.Errorf("%d keys, %d certificates", len(data), len(chain))
	}
	intermediates := x509.NewCertPool()
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			s.leaf = cert
		} else {
			intermediates.AddCert(cert)
		}
	}
	_, err := s.leaf.Verify(x509.VerifyOptions{Roots: s.roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, err
	}
	if s.leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, errors.New("certificate not intended for digital signature use")
	}
	s.nonce = make([]byte, 32)
	rand.Read(s.nonce)
	asked := map[string][]byte{"nonce": s.nonce}
	if _, ok := s.leaf.PublicKey.(*rsa.PublicKey); ok {
		return json.Marshal(map[string]any{"rsa_signature": asked, "ecdsa_signature": nil})
	}
	return json.Marshal(map[string]any{"rsa_signature": nil, "ecdsa_signature": asked})
}

// verify checks the response to the challenge.
func (s *popServer) verify(response []byte) error {
	var r map[string]map[string][]byte
	if err := json.Unmarshal(response, &r); err != nil {
		return err
	}
	digest := func(answer map[string][]byte) ([]byte, error) {
		own := answer["nonce"]
		if len(own) != 32 || bytes.Equal(own, s.nonce) {
			return nil, fmt.Errorf("response nonce %x", own)
		}
		sum := sha256.Sum256(append(bytes.Clone(s.nonce), own...))
		return sum[:], nil
	}
	if public, ok := s.leaf.PublicKey.(*rsa.PublicKey); ok {
		sum, err := digest(r["rsa_signature"])
		if err != nil {
			return err
		}
		return rsa.VerifyPSS(public, crypto.SHA256, sum, r["rsa_signature"]["signature"], nil)
	}
	answer := r["ecdsa_signature"]
	sum, err := digest(answer)
	if err != nil {
		return err
	}
	x, y := new(big.Int).SetBytes(answer["r"]), new(big.Int).SetBytes(answer["s"])
	if !ecdsa.Verify(s.leaf.PublicKey.(*ecdsa.PublicKey), sum, x, y) {
		return errors.New("ECDSA signature verify failed")
	}
	return nil
}

// pki is a root, an intermediate it signed, and what they sign.
type pki struct {
	t                  *testing.T
	dir                string
	root, issuer       *x509.Certificate
	rootKey, issuerKey crypto.Signer
	rootPool           *x509.CertPool
	issuerFile         string
	serial             int64
}

func newPKI(t *testing.T) *pki {
	p := &pki{t: t, dir: t.TempDir(), rootPool: x509.NewCertPool()}
	authority := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	p.rootKey = ecKey(t, elliptic.P256())
	p.root = p.sign(authority, p.rootKey.Public(), nil, p.rootKey)
	p.rootPool.AddCert(p.root)
	p.issuerKey = ecKey(t, elliptic.P256())
	p.issuer = p.sign(authority, p.issuerKey.Public(), p.root, p.rootKey)
	p.issuerFile = p.write("CERTIFICATE", p.issuer.Raw)
	return p
}

func (p *pki) sign(template *x509.Certificate, public crypto.PublicKey, parent *x509.Certificate, key crypto.Signer) *x509.Certificate {
	p.t.Helper()
	p.serial++
	c := *template
	c.SerialNumber = big.NewInt(p.serial)
	c.Subject.CommonName = fmt.Sprintf("certificate %d", p.serial)
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	if parent == nil {
		parent = &c
	}
	der, err := x509.CreateCertificate(rand.Reader, &c, parent, public, key)
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return cert
}

// leaf returns a certificate for a key, signed by the intermediate.
func (p *pki) leaf(key crypto.Signer) *x509.Certificate {
	return p.sign(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature}, key.Public(), p.issuer, p.issuerKey)
}

// write writes PEM blocks of one type, the last of them after an unrelated one.
func (p *pki) write(kind string, ders ...[]byte) string {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{5, 0}})...)
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	return p.writeText(string(out))
}

func (p *pki) writeText(text string) string {
	p.t.Helper()
	p.serial++
	path := filepath.Join(p.dir, fmt.Sprintf("%d.pem", p.serial))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return path
}

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func der(t *testing.T) func([]byte, error) []byte {
	return func(b []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

func TestX509PoP(t *testing.T) {
	p := newPKI(t)
	p256, p384 := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384())
	for name, test := range map[string]struct {
		key  crypto.Signer
		file string
	}{
		"RSA PKCS#1":   {rsaKey(), p.write("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey()))},
		"RSA PKCS#8":   {rsaKey(), p.write("PRIVATE KEY", der(t)(x509.MarshalPKCS8PrivateKey(rsaKey())))},
		"P-256 SEC 1":  {p256, p.write("EC PRIVATE KEY", der(t)(x509.MarshalECPrivateKey(p256)))},
		"P-384 PKCS#8": {p384, p.write("PRIVATE KEY", der(t)(x509.MarshalPKCS8PrivateKey(p384)))},
	} {
		leaf := p.leaf(test.key)
		for layout, node := range map[string]X509PoP{
			"intermediates apart": {Key: test.file, Certificate: p.write("CERTIFICATE", leaf.Raw), Intermediates: p.issuerFile},
			"one chain":           {Key: test.file, Certificate: p.write("CERTIFICATE", leaf.Raw, p.issuer.Raw)},
		} {
			t.Run(name+", "+layout, func(t *testing.T) { attestNode(t, node, p.rootPool) })
		}
	}
}

// attestNode plays one attestation against the server.
func attestNode(t *testing.T, node Node, roots *x509.CertPool) *x509.Certificate {
	t.Helper()
	if node.Type() != "x509pop" {
		t.Fatalf("type %q", node.Type())
	}
	attempt, err := node.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer attempt.Close()
	server := &popServer{roots: roots}
	challenge, err := server.challenge(attempt.Payload())
	if err != nil {
		t.Fatalf("the server refuses the payload: %v", err)
	}
	response, err := attempt.Answer(t.Context(), challenge)
	if err != nil {
		t.Fatal(err)
	}
	if err := server.verify(response); err != nil {
		t.Fatalf("the server refuses the response %s: %v", response, err)
	}
	if _, err := attempt.Answer(t.Context(), challenge); err == nil {
		t.Fatal("a second challenge was answered")
	}
	return server.leaf
}

func TestX509PoPFilesAreReadAtEachBegin(t *testing.T) {
	p := newPKI(t)
	key := ecKey(t, elliptic.P256())
	node := X509PoP{Key: p.write("EC PRIVATE KEY", der(t)(x509.MarshalECPrivateKey(key))), Certificate: filepath.Join(p.dir, "cert.pem"), Intermediates: p.issuerFile}
	for range 2 {
		leaf := p.leaf(key)
		if err := os.Rename(p.write("CERTIFICATE", leaf.Raw), node.Certificate); err != nil {
			t.Fatal(err)
		}
		if sent := attestNode(t, node, p.rootPool); !sent.Equal(leaf) {
			t.Fatal("an older certificate was sent")
		}
	}
}

func TestX509PoPBadFiles(t *testing.T) {
	p := newPKI(t)
	key, other := ecKey(t, elliptic.P256()), ecKey(t, elliptic.P256())
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keyFile := p.write("EC PRIVATE KEY", der(t)(x509.MarshalECPrivateKey(key)))
	certFile := p.write("CERTIFICATE", p.leaf(key).Raw)
	noSignature := p.sign(&x509.Certificate{KeyUsage: x509.KeyUsageKeyEncipherment}, key.Public(), p.issuer, p.issuerKey)
	const legacy = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n"
	for name, test := range map[string]struct {
		node X509PoP
		want string
	}{
		"no key":                {X509PoP{Certificate: certFile}, "are required"},
		"no certificate":        {X509PoP{Key: keyFile}, "are required"},
		"absent key":            {X509PoP{Key: filepath.Join(p.dir, "absent"), Certificate: certFile}, "no such file"},
		"absent certificate":    {X509PoP{Key: keyFile, Certificate: filepath.Join(p.dir, "absent")}, "no such file"},
		"another key":           {X509PoP{Key: p.write("EC PRIVATE KEY", der(t)(x509.MarshalECPrivateKey(other))), Certificate: certFile}, "does not match"},
		"swapped":               {X509PoP{Key: certFile, Certificate: keyFile}, "load key"},
		"encrypted PKCS#8":      {X509PoP{Key: p.write("ENCRYPTED PRIVATE KEY", []byte{1}), Certificate: certFile}, "is encrypted"},
		"encrypted PKCS#1":      {X509PoP{Key: p.writeText(legacy), Certificate: certFile}, "is encrypted"},
		"Ed25519":               {X509PoP{Key: p.write("PRIVATE KEY", der(t)(x509.MarshalPKCS8PrivateKey(edKey))), Certificate: p.write("CERTIFICATE", p.leaf(edKey).Raw)}, "neither RSA nor EC"},
		"no digital signature":  {X509PoP{Key: keyFile, Certificate: p.write("CERTIFICATE", noSignature.Raw)}, "digitalSignature"},
		"empty key":             {X509PoP{Key: p.writeText(""), Certificate: certFile}, "load key"},
		"huge certificate":      {X509PoP{Key: keyFile, Certificate: p.writeText(strings.Repeat("\n", maxPEMFile+1))}, "longer than"},
		"absent intermediates":  {X509PoP{Key: keyFile, Certificate: certFile, Intermediates: filepath.Join(p.dir, "absent")}, "no such file"},
		"empty intermediates":   {X509PoP{Key: keyFile, Certificate: certFile, Intermediates: p.writeText("")}, "no certificate"},
		"garbled intermediates": {X509PoP{Key: keyFile, Certificate: certFile, Intermediates: p.write("CERTIFICATE", []byte{1, 2})}, "certificate 1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := test.node.Begin(t.Context())
			if err == nil || !strings.HasPrefix(err.Error(), "x509pop: ") || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want %q", err, test.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (X509PoP{Key: keyFile, Certificate: certFile}).Begin(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

func TestX509PoPBadChallenges(t *testing.T) {
	nonce := `{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`
	for name, test := range map[string]struct{ challenge, want string }{
		"not JSON":      {"nonce", "parse"},
		"empty":         {"", "parse"},
		"nothing asked": {"{}", "not one for an ECDSA key"},
		"null":          {"null", "not one for an ECDSA key"},
		"RSA":           {`{"rsa_signature":` + nonce + `}`, "not one for an ECDSA key"},
		"no nonce":      {`{"ecdsa_signature":{}}`, "has 0 bytes"},
		"short nonce":   {`{"ecdsa_signature":{"nonce":"AAAA"}}`, "has 3 bytes"},
		"not base64":    {`{"ecdsa_signature":{"nonce":"!"}}`, "parse"},
		"huge":          {`{"ecdsa_signature":` + nonce + `}` + strings.Repeat(" ", maxChallenge), "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			attempt := &popAttempt{key: ecKey(t, elliptic.P256())}
			response, err := attempt.Answer(t.Context(), []byte(test.challenge))
			if response != nil || err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("response %s, error %v, want %q", response, err, test.want)
			}
		})
	}
	attempt := &popAttempt{key: rsaKey()}
	if _, err := attempt.Answer(t.Context(), []byte(`{"ecdsa_signature":`+nonce+`}`)); err == nil || !strings.Contains(err.Error(), "not one for an RSA key") {
		t.Fatalf("error %v", err)
	}
}

func FuzzX509PoPChallenge(f *testing.F) {
	f.Add([]byte(`{"rsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="},"ecdsa_signature":null}`))
	f.Add([]byte(`{"rsa_signature":null,"ecdsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`))
	f.Add([]byte(`{"ecdsa_signature":{"nonce":[1,2]}}`))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, challenge []byte) {
		asked, parseErr := parseChallenge(challenge, key.Public())
		response, err := (&popAttempt{key: key}).Answer(t.Context(), challenge)
		if (parseErr == nil) != (err == nil) {
			t.Fatalf("parsed: %v, answered: %v", parseErr, err)
		}
		if err != nil {
			return
		}
		server := &popServer{leaf: &x509.Certificate{PublicKey: key.Public()}, nonce: asked}
		if err := server.verify(response); err != nil {
			t.Fatal(err)
		}
	})
}
