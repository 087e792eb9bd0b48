package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"
)

// This file is one certificate revocation list (RFC 5280 §5): reading it,
// looking certificates up in it, and telling whose it is.

// Bounds on CRLs. Half a million entries fit into the bytes.
const (
	maxCRLBytes = 32 << 20 // of all files of a trust domain
	maxCRLs     = 256      // in force for a trust domain
	maxSerial   = 20       // bytes of a serial number (RFC 5280 §4.1.2.2)
	maxStranger = 64       // certificates remembered as not having signed a CRL
)

// serial is the serial number of a certificate, big-endian.
type serial [maxSerial]byte

// revocation is when and why a certificate was revoked.
type revocation struct {
	at     int64 // Unix time
	reason uint8 // RFC 5280 §5.3.1
}

// crl is a CRL that can be looked up. It is immutable, but for whose signature
// it is known to carry.
type crl struct {
	file        string
	issuer      []byte   // raw name
	name        string   // the same for a person
	keyID       []byte   // of the issuer; nil where the CRL does not say it
	scope       string   // raw issuing distribution point: which of the issuer's certificates it speaks of
	number      *big.Int // nil where the CRL has none
	from, until time.Time
	sum         [sha256.Size]byte
	revoked     map[serial]revocation

	mu        sync.RWMutex         // guards the following
	list      *x509.RevocationList // for its signature, until that was verified
	signer    *x509.Certificate    // whose key verified it; nil until then
	strangers map[string]error     // why certificates, by their DER, did not
}

var (
	oidReasonCode        = asn1.ObjectIdentifier{2, 5, 29, 21}
	oidInvalidityDate    = asn1.ObjectIdentifier{2, 5, 29, 24}
	oidDeltaCRL          = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidDistributionPoint = asn1.ObjectIdentifier{2, 5, 29, 28}
	oidCertificateIssuer = asn1.ObjectIdentifier{2, 5, 29, 29}
	oidCRLNumber         = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidAuthorityKeyID    = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// reasonRemoveFromCRL is for delta CRLs only (RFC 5280 §5.3.1).
const reasonRemoveFromCRL = 8

var reasonWords = map[uint8]string{
	0: "unspecified", 1: "keyCompromise", 2: "cACompromise", 3: "affiliationChanged", 4: "superseded",
	5: "cessationOfOperation", 6: "certificateHold", 9: "privilegeWithdrawn", 10: "aACompromise",
}

// parseCRLs reads all CRLs of a file, DER or PEM. A file that was cut short
// gives none.
func parseCRLs(file string, data []byte) ([]*crl, error) {
	if len(data) > 0 && data[0] == 0x30 { // a DER sequence
		c, err := newCRL(file, data)
		if err != nil {
			return nil, err
		}
		return []*crl{c}, nil
	}
	if err := wholePEM(data); err != nil {
		return nil, err
	}
	var lists []*crl
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return lists, nil
		}
		if block.Type != "X509 CRL" {
			return nil, fmt.Errorf("holds %q; want CRLs alone (-----BEGIN X509 CRL-----)", block.Type)
		}
		if len(lists) == maxCRLs {
			return nil, fmt.Errorf("holds more than %d CRLs", maxCRLs)
		}
		c, err := newCRL(file, block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("CRL %d: %w", len(lists)+1, err)
		}
		lists = append(lists, c)
	}
}

// newCRL reads one CRL and refuses what RFC 5280 §5.2 has us refuse. Whether
// its time has come is not asked here.
func newCRL(file string, der []byte) (*crl, error) {
	list, err := x509.ParseRevocationList(der)
	switch {
	case err != nil:
		return nil, fmt.Errorf("no whole CRL: %w", err)
	case len(list.Raw) != len(der):
		return nil, fmt.Errorf("%d bytes follow the CRL", len(der)-len(list.Raw))
	case list.NextUpdate.IsZero():
		return nil, errors.New("the CRL has no nextUpdate (RFC 5280 §5.1.2.5), so nobody could tell when it is out of date")
	case !list.NextUpdate.After(list.ThisUpdate):
		return nil, errors.New("the CRL ends before it begins")
	}
	c := &crl{
		file: file, issuer: bytes.Clone(list.RawIssuer), name: list.Issuer.String(), keyID: bytes.Clone(list.AuthorityKeyId),
		number: list.Number, from: list.ThisUpdate, until: list.NextUpdate, sum: sha256.Sum256(der),
		strangers: map[string]error{},
	}
	if err := c.takeExtensions(list.Extensions); err != nil {
		return nil, err
	}
	if err := c.takeEntries(list.RevokedCertificateEntries); err != nil {
		return nil, err
	}
	list.RevokedCertificateEntries, list.RevokedCertificates = nil, nil //nolint:staticcheck // the deprecated field holds memory
	c.list = list
	return c, nil
}

func (c *crl) takeExtensions(extensions []pkix.Extension) error {
	seen := map[string]bool{}
	for _, e := range extensions {
		id := e.Id.String()
		if seen[id] {
			return fmt.Errorf("the extension %s is there twice", id)
		}
		seen[id] = true
		switch {
		case e.Id.Equal(oidDeltaCRL):
			return errors.New("this is a delta CRL (RFC 5280 §5.2.4); use the complete one")
		case e.Id.Equal(oidDistributionPoint):
			if err := checkScope(e.Value); err != nil {
				return err
			}
			c.scope = string(e.Value)
		case e.Id.Equal(oidCRLNumber), e.Id.Equal(oidAuthorityKeyID):
		case e.Critical:
			return fmt.Errorf("the critical extension %s is not known (RFC 5280 §5.2)", id)
		}
	}
	return nil
}

// distributionPoint is RFC 5280 §5.2.5.
type distributionPoint struct {
	Name           asn1.RawValue  `asn1:"optional,tag:0"`
	OnlyUsers      bool           `asn1:"optional,tag:1"`
	OnlyCAs        bool           `asn1:"optional,tag:2"`
	OnlyReasons    asn1.BitString `asn1:"optional,tag:3"`
	Indirect       bool           `asn1:"optional,tag:4"`
	OnlyAttributes bool           `asn1:"optional,tag:5"`
}

// checkScope refuses CRLs that speak of other things than certificates of
// their own issuer. One that speaks of some of those is used: what it revokes
// is revoked.
func checkScope(der []byte) error {
	var p distributionPoint
	rest, err := asn1.Unmarshal(der, &p)
	switch {
	case err != nil || len(rest) > 0:
		return errors.New("its issuing distribution point is malformed")
	case p.Indirect:
		return errors.New("this is an indirect CRL (RFC 5280 §5.2.5); use one of the certificates' own issuer")
	case p.OnlyAttributes:
		return errors.New("this CRL is for attribute certificates")
	}
	return nil
}

func (c *crl) takeEntries(entries []x509.RevocationListEntry) error {
	c.revoked = make(map[serial]revocation, len(entries))
	for i := range entries {
		e := &entries[i]
		for _, x := range e.Extensions {
			switch {
			case x.Id.Equal(oidCertificateIssuer):
				return errors.New("this is an indirect CRL (RFC 5280 §5.3.3): an entry names another issuer")
			case x.Id.Equal(oidReasonCode), x.Id.Equal(oidInvalidityDate):
			case x.Critical:
				return fmt.Errorf("an entry's critical extension %s is not known (RFC 5280 §5.3)", x.Id)
			}
		}
		s, ok := serialOf(e.SerialNumber)
		switch {
		case !ok:
			return fmt.Errorf("entry %d: a serial number has at most %d bytes and no sign (RFC 5280 §4.1.2.2)", i+1, maxSerial)
		case e.ReasonCode == reasonRemoveFromCRL:
			return fmt.Errorf("entry %d: removeFromCRL, which only delta CRLs may say (RFC 5280 §5.3.1)", i+1)
		}
		if _, twice := c.revoked[s]; !twice {
			c.revoked[s] = revocation{e.RevocationTime.Unix(), uint8(e.ReasonCode)}
		}
	}
	return nil
}

// serialOf returns the key of a serial number, unless no CRL could hold it.
func serialOf(n *big.Int) (s serial, ok bool) {
	if n.Sign() < 0 || n.BitLen() > 8*maxSerial {
		return s, false
	}
	n.FillBytes(s[:])
	return s, true
}

// has looks a certificate of the CRL's issuer up.
func (c *crl) has(cert *x509.Certificate) (revocation, bool) {
	s, ok := serialOf(cert.SerialNumber)
	if !ok {
		return revocation{}, false
	}
	r, ok := c.revoked[s]
	return r, ok
}

// claims reports whether c says it is issued by that authority: by its name,
// and by its key where both say which that is.
func (c *crl) claims(by *x509.Certificate) bool {
	return bytes.Equal(c.issuer, by.RawSubject) &&
		(len(c.keyID) == 0 || len(by.SubjectKeyId) == 0 || bytes.Equal(c.keyID, by.SubjectKeyId))
}

// signedBy returns nil when the key of that authority signed c. The signature
// is computed once.
func (c *crl) signedBy(by *x509.Certificate) error {
	c.mu.RLock()
	signer, err := c.signer, c.strangers[string(by.Raw)]
	c.mu.RUnlock()
	switch {
	case err != nil:
		return err
	case signer == nil:
		return c.verify(by)
	case signer == by, bytes.Equal(signer.RawSubjectPublicKeyInfo, by.RawSubjectPublicKeyInfo):
		return nil
	}
	return errOtherKey
}

var errOtherKey = errors.New("it is signed by another key of an authority of the same name")

func (c *crl) verify(by *x509.Certificate) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.signer != nil { // by somebody else meanwhile
		if bytes.Equal(c.signer.RawSubjectPublicKeyInfo, by.RawSubjectPublicKeyInfo) {
			return nil
		}
		return errOtherKey
	}
	err := checkStrength(by)
	if err == nil {
		err = c.list.CheckSignatureFrom(by)
	}
	var constraint x509.ConstraintViolationError
	switch {
	case err == nil:
		c.signer, c.list, c.strangers = by, nil, nil
	case errors.As(err, &constraint):
		err = errors.New("its authority is not allowed to sign CRLs (key usage cRLSign)")
		fallthrough
	default:
		if len(c.strangers) < maxStranger {
			c.strangers[string(by.Raw)] = err
		}
	}
	return err
}

// wouldBe reports whether the key of that authority signed c, and remembers
// nothing of it.
func (c *crl) wouldBe(by *x509.Certificate) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.list != nil && c.list.CheckSignatureFrom(by) == nil
}

// known returns the authority whose signature was verified, or nil.
func (c *crl) known() *x509.Certificate {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.signer
}

// sameScope reports whether two CRLs speak of the same certificates, so that
// the newer one takes the place of the older.
func (c *crl) sameScope(o *crl) bool {
	return bytes.Equal(c.issuer, o.issuer) && bytes.Equal(c.keyID, o.keyID) && c.scope == o.scope
}

// olderThan compares by CRL number (RFC 5280 §5.2.3), or by thisUpdate where
// there are none. One that has lost its number is older.
func (c *crl) olderThan(o *crl) bool {
	switch {
	case o.number != nil && c.number != nil:
		if order := c.number.Cmp(o.number); order != 0 {
			return order < 0
		}
	case o.number != nil:
		return true
	}
	return c.from.Before(o.from)
}

func (c *crl) String() string {
	number := "without a number"
	if c.number != nil {
		number = c.number.String()
	}
	return fmt.Sprintf("CRL %s of %s", number, c.name)
}
