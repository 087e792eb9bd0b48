package attestor

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
)

const (
	typeX509PoP  = "x509pop"
	maxPEMFile   = 1 << 20  // bytes
	maxChallenge = 16 << 10 // bytes of JSON; a challenge of SPIRE has about 100
	nonceLen     = 32       // bytes, of either side's nonce
)

// X509PoP is the node attestor "x509pop": a certificate that the SPIRE Server
// trusts by configuration, and proof that this node has its key. The fields
// are paths of PEM files of at most 1 MiB each, read at each Begin.
type X509PoP struct {
	Key           string // RSA or EC private key: PKCS#8, PKCS#1 or SEC 1
	Certificate   string // the leaf certificate first; intermediates may follow
	Intermediates string // further intermediates; optional
}

// Type returns "x509pop".
func (X509PoP) Type() string { return typeX509PoP }

// Begin implements Node. The key must be the certificate's, and the
// certificate must be fit for digital signatures, without which the server
// refuses it.
func (x X509PoP) Begin(ctx context.Context) (Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	key, chain, err := x.loadKeyPair()
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w", err)
	}
	if x.Intermediates != "" {
		more, err := loadCertificates(x.Intermediates)
		if err != nil {
			return nil, fmt.Errorf("x509pop: %w", err)
		}
		chain = append(chain, more...)
	}
	payload, err := json.Marshal(popPayload{Certificates: chain})
	if err != nil {
		return nil, fmt.Errorf("x509pop: encode payload: %w", err)
	}
	return &popAttempt{key: key, payload: payload}, nil
}

func (x X509PoP) loadKeyPair() (crypto.Signer, [][]byte, error) {
	if x.Key == "" || x.Certificate == "" {
		return nil, nil, errors.New("a private key and a certificate are required")
	}
	certPEM, err := readBounded(x.Certificate, maxPEMFile)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := readBounded(x.Key, maxPEMFile)
	if err != nil {
		return nil, nil, err
	}
	if encrypted(keyPEM) {
		return nil, nil, fmt.Errorf("key %s is encrypted; give the key without a passphrase, readable by the agent alone", x.Key)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, nil, fmt.Errorf("load key %s and certificate %s: %w", x.Key, x.Certificate, err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return nil, nil, fmt.Errorf("load certificate %s: %w", x.Certificate, err)
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, nil, fmt.Errorf("certificate %s lacks the key usage digitalSignature, which the server requires", x.Certificate)
	}
	switch key := pair.PrivateKey.(type) {
	case *rsa.PrivateKey:
		return key, pair.Certificate, nil
	case *ecdsa.PrivateKey:
		return key, pair.Certificate, nil
	default:
		return nil, nil, fmt.Errorf("key %s is neither RSA nor EC, the kinds the server knows", x.Key)
	}
}

// encrypted tells whether the first key of a PEM file has a passphrase, in
// PKCS#8 or, by the header that RFC 1421 gave it, in the older forms.
func encrypted(keyPEM []byte) bool {
	for {
		var block *pem.Block
		block, keyPEM = pem.Decode(keyPEM)
		switch {
		case block == nil:
			return false
		case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "":
			return true
		case block.Type == "PRIVATE KEY" || bytes.HasSuffix([]byte(block.Type), []byte(" PRIVATE KEY")):
			return false
		}
	}
}

// loadCertificates returns the certificates of a PEM file as DER.
func loadCertificates(path string) ([][]byte, error) {
	rest, err := readBounded(path, maxPEMFile)
	if err != nil {
		return nil, err
	}
	var certs [][]byte
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("load intermediates %s: certificate %d: %w", path, len(certs)+1, err)
		}
		certs = append(certs, block.Bytes)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("load intermediates %s: no certificate in PEM form", path)
	}
	return certs, nil
}

// What is sent and received, as SPIRE v1.15 has it in
// pkg/common/plugin/x509pop: JSON, with bytes in base64.
type (
	popPayload struct {
		Certificates [][]byte `json:"certificates"` // DER, the leaf first
	}
	popChallenge struct {
		RSA   *popNonce `json:"rsa_signature"`
		ECDSA *popNonce `json:"ecdsa_signature"`
	}
	popNonce struct {
		Nonce []byte `json:"nonce"`
	}
	popResponse struct {
		RSA   *popRSA   `json:"rsa_signature"`
		ECDSA *popECDSA `json:"ecdsa_signature"`
	}
	popRSA struct {
		Nonce     []byte `json:"nonce"`     // our own
		Signature []byte `json:"signature"` // RSASSA-PSS, RFC 8017 §8.1
	}
	popECDSA struct {
		Nonce []byte `json:"nonce"` // our own
		R     []byte `json:"r"`     // big-endian, without leading zeros
		S     []byte `json:"s"`
	}
)

type popAttempt struct {
	key      crypto.Signer
	payload  []byte
	answered bool
}

func (a *popAttempt) Payload() []byte { return a.payload }

// Answer signs the SHA-256 of the server's nonce followed by one of our own,
// without which the server could choose what is signed. The server asks once;
// a second challenge is an error.
func (a *popAttempt) Answer(ctx context.Context, challenge []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if a.answered {
		return nil, errors.New("x509pop: the server sent a second challenge")
	}
	asked, err := parseChallenge(challenge, a.key.Public())
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w", err)
	}
	own := make([]byte, nonceLen)
	rand.Read(own)
	response, err := a.sign(asked, own)
	if err != nil {
		return nil, fmt.Errorf("x509pop: sign the server's challenge: %w", err)
	}
	a.answered = true
	return json.Marshal(response)
}

func (a *popAttempt) Close() error { return nil }

// parseChallenge returns the server's nonce of the challenge meant for a key
// of this kind.
func parseChallenge(challenge []byte, public crypto.PublicKey) ([]byte, error) {
	if len(challenge) > maxChallenge {
		return nil, fmt.Errorf("the server's challenge has %d bytes, at most %d are expected", len(challenge), maxChallenge)
	}
	var c popChallenge
	if err := json.Unmarshal(challenge, &c); err != nil {
		return nil, fmt.Errorf("parse the server's challenge: %w", err)
	}
	asked, kind := c.RSA, "RSA"
	if _, ok := public.(*ecdsa.PublicKey); ok {
		asked, kind = c.ECDSA, "ECDSA"
	}
	if asked == nil {
		return nil, fmt.Errorf("the server's challenge is not one for an %s key", kind)
	}
	if len(asked.Nonce) != nonceLen {
		return nil, fmt.Errorf("the nonce in the server's challenge has %d bytes, want %d", len(asked.Nonce), nonceLen)
	}
	return asked.Nonce, nil
}

func (a *popAttempt) sign(asked, own []byte) (*popResponse, error) {
	digest := sha256.Sum256(append(bytes.Clone(asked), own...))
	if _, ok := a.key.Public().(*rsa.PublicKey); ok {
		opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256}
		signature, err := a.key.Sign(rand.Reader, digest[:], opts)
		if err != nil {
			return nil, err
		}
		return &popResponse{RSA: &popRSA{Nonce: own, Signature: signature}}, nil
	}
	signature, err := a.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	var rs struct{ R, S *big.Int } // Ecdsa-Sig-Value, RFC 3279 §2.2.3
	if _, err := asn1.Unmarshal(signature, &rs); err != nil {
		return nil, err
	}
	return &popResponse{ECDSA: &popECDSA{Nonce: own, R: rs.R.Bytes(), S: rs.S.Bytes()}}, nil
}
