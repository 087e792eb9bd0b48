package registry

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// SVID is an X.509-SVID with its private key, encoded once as the Workload API
// sends it and shared by all who are served it. It is never modified.
type SVID struct {
	ID                  spiffeid.ID
	Chain               []byte // DER certificates concatenated, leaf first
	Key                 []byte // PKCS#8 DER; printing an SVID leaves it out
	Serial              string // of the leaf, hexadecimal, as big.Int.Text has it
	NotBefore, NotAfter time.Time
	Authority           string // authority key ID of the leaf, hexadecimal; empty if it has none

	// issuers are the authority key IDs above the leaf's own. Below an upstream
	// authority it is one of these that a bundle flags as tainted.
	issuers []string
}

// NewSVID checks and encodes a signed certificate chain (DER, leaf first) with
// the key it was signed for. It fails unless the leaf is an X.509-SVID by the
// X509-SVID standard §4-5 and certifies that key. It does not verify the chain
// against a bundle.
func NewSVID(chain [][]byte, key crypto.Signer) (*SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("encode SVID: no certificate in the chain")
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode SVID: private key: %w", err)
	}
	der := slices.Concat(chain...)
	parsed, err := x509svid.ParseRaw(der, pkcs8)
	if err != nil {
		return nil, fmt.Errorf("encode SVID: %w", err)
	}
	leaf := parsed.Certificates[0]
	s := &SVID{
		ID: parsed.ID, Chain: der, Key: pkcs8,
		Serial:    leaf.SerialNumber.Text(16),
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
		Authority: hex.EncodeToString(leaf.AuthorityKeyId),
	}
	for _, c := range parsed.Certificates[1:] {
		if len(c.AuthorityKeyId) > 0 && !bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId) {
			s.issuers = append(s.issuers, hex.EncodeToString(c.AuthorityKeyId))
		}
	}
	return s, nil
}

// Format writes what may be seen of the SVID: its ID and serial number,
// whatever the verb. It keeps the private key out of logs.
func (s SVID) Format(f fmt.State, _ rune) {
	_, _ = fmt.Fprintf(f, "SVID(%s, serial %s)", s.ID, s.Serial)
}

// signedByAny tells whether one of the authorities, by hexadecimal subject key
// ID, stands in the SVID's chain.
func (s *SVID) signedByAny(authorities []string) bool {
	return slices.ContainsFunc(authorities, func(id string) bool {
		return id != "" && (id == s.Authority || slices.Contains(s.issuers, id))
	})
}
