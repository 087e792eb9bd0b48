package sigstore

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

var (
	// Fulcio's extensions: the OIDC issuer as raw text, which spire-agent
	// reads, the same as a DER string, and the type of a subject that is
	// neither a mail address nor a URI.
	oidIssuer    = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 1}
	oidIssuerDER = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 8}
	oidUserName  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 7}

	oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// signer is who signed, as the certificate has it.
type signer struct {
	cert     *x509.Certificate
	issuer   string
	subjects []string // at least one
}

func parseSigner(text string) (*signer, error) {
	if text == "" {
		return nil, errors.New("it has no certificate; signatures of keys without one have no identity")
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("its certificate is not one PEM block")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, errors.New("its certificate is malformed")
	}
	s := &signer{cert: cert}
	if s.issuer, err = issuerOf(cert); err != nil {
		return nil, err
	}
	if s.subjects, err = subjectsOf(cert); err != nil {
		return nil, err
	}
	for _, name := range append([]string{s.issuer}, s.subjects...) {
		if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
			return nil, errors.New("its certificate has a name with control characters")
		}
	}
	return s, nil
}

// issuerOf returns the OIDC issuer that Fulcio saw. Where the certificate has
// both spellings, they must agree.
func issuerOf(cert *x509.Certificate) (string, error) {
	var text, der string
	for _, ext := range cert.Extensions {
		switch {
		case ext.Id.Equal(oidIssuer):
			text = string(ext.Value)
		case ext.Id.Equal(oidIssuerDER):
			if rest, err := asn1.UnmarshalWithParams(ext.Value, &der, "utf8"); err != nil || len(rest) != 0 {
				return "", errors.New("its certificate has a malformed OIDC issuer")
			}
		}
	}
	switch {
	case text == "" && der == "":
		return "", errors.New("its certificate names no OIDC issuer")
	case text == "":
		return der, nil
	case der != "" && der != text:
		return "", errors.New("its certificate names two OIDC issuers")
	}
	return text, nil
}

// subjectsOf returns the alternative names, in the order in which spire-agent
// takes the first one.
func subjectsOf(cert *x509.Certificate) ([]string, error) {
	names := slices.Concat(cert.DNSNames, cert.EmailAddresses)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	for _, uri := range cert.URIs {
		names = append(names, uri.String())
	}
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(oidSAN) {
			name, err := userName(ext.Value)
			if err != nil {
				return nil, err
			}
			names = append(names, name)
		}
	}
	names = slices.DeleteFunc(names, func(s string) bool { return s == "" })
	if len(names) == 0 {
		return nil, errors.New("its certificate names no subject")
	}
	return names, nil
}

// userName returns the alternative name of Fulcio's own type, an OtherName
// (RFC 5280, section 4.2.1.6), empty where there is none.
func userName(san []byte) (string, error) {
	malformed := errors.New("its certificate has malformed alternative names")
	names, err := elements(san)
	if err != nil {
		return "", malformed
	}
	found := ""
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != 0 {
			continue
		}
		var id asn1.ObjectIdentifier
		value, err := asn1.Unmarshal(n.Bytes, &id)
		if err != nil {
			return "", malformed
		}
		if !id.Equal(oidUserName) {
			continue
		}
		var name string
		if rest, err := asn1.UnmarshalWithParams(value, &name, "utf8,explicit,tag:0"); err != nil || len(rest) != 0 || found != "" {
			return "", malformed
		}
		found = name
	}
	return found, nil
}

// chain verifies that a trusted authority issued the certificate for signing
// code, and that all certificates up to its root were valid at a time. It
// returns one chain, the signer's certificate first.
func (s *signer) chain(t *trust, at time.Time) ([]*x509.Certificate, error) {
	if s.cert.IsCA {
		return nil, errors.New("its certificate is one of a CA")
	}
	leaf := *s.cert
	// crypto/x509 does not know Fulcio's kind of name; it is read above.
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(leaf.UnhandledCriticalExtensions), oidSAN.Equal)
	var why error
	for _, a := range t.authorities {
		if !a.valid.contains(at) {
			continue
		}
		chains, err := leaf.Verify(x509.VerifyOptions{
			Roots: a.roots, Intermediates: a.intermediates, CurrentTime: at,
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		})
		if err == nil && len(chains[0]) > 1 {
			return chains[0], nil
		}
		if err != nil && (why == nil || errors.As(err, new(x509.CertificateInvalidError))) {
			why = err
		}
	}
	if why == nil {
		why = errors.New("none is valid at that time")
	}
	return nil, fmt.Errorf("its certificate is not of an authority in the trusted root, as of %s: %w", at.UTC().Format(time.RFC3339), why)
}

// verifies tells whether signature is the signer's, of message: ECDSA or RSA
// (PKCS #1 1.5) with SHA-256, or Ed25519.
func (s *signer) verifies(message, signature []byte) bool {
	var algorithm x509.SignatureAlgorithm
	switch s.cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		algorithm = x509.ECDSAWithSHA256
	case *rsa.PublicKey:
		algorithm = x509.SHA256WithRSA
	case ed25519.PublicKey:
		algorithm = x509.PureEd25519
	}
	return s.cert.CheckSignature(algorithm, message, signature) == nil
}
