package sigstore

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"time"
)

// oidSCTs is the extension with the promises of CT logs, in a list
// (RFC 6962, section 3.3).
var oidSCTs = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2}

const maxSCTs = 8

var errSCT = errors.New("the SCT of its certificate is malformed")

// sct is a signed certificate timestamp (RFC 6962, section 3.2).
type sct struct {
	log        logID
	timestamp  uint64 // milliseconds since 1970
	extensions []byte
	signature  []byte
}

// verifySCTs checks that the certificate has promises of CT logs to publish
// it, and that each is of a log in the trusted root.
func verifySCTs(chain []*x509.Certificate, t *trust) error {
	cert, issuer := chain[0], chain[1]
	scts, err := sctsOf(cert)
	if err != nil {
		return err
	}
	if len(scts) == 0 {
		return errors.New("its certificate has no SCT: no CT log has promised to publish it")
	}
	tbs, err := withoutSCTs(cert.RawTBSCertificate)
	if err != nil {
		return err
	}
	key := sha256.Sum256(issuer.RawSubjectPublicKeyInfo)
	for _, s := range scts {
		log, ok := t.ctlogs[s.log]
		if !ok {
			return errors.New("the SCT of its certificate is of a CT log that is not in the trusted root")
		}
		if !log.verifies(s.message(key, tbs), s.signature) {
			return errors.New("the SCT of its certificate is not signed by that CT log")
		}
		if !log.valid.contains(time.UnixMilli(int64(s.timestamp))) {
			return errors.New("the SCT of its certificate is signed with a key that was not valid at that time")
		}
	}
	return nil
}

// message is what the log signed for a certificate that was not issued yet:
// the digitally-signed struct of RFC 6962, section 3.2, for a precert_entry.
func (s *sct) message(issuerKey [sha256.Size]byte, tbs []byte) []byte {
	b := []byte{0, 0} // version 1, certificate_timestamp
	b = binary.BigEndian.AppendUint64(b, s.timestamp)
	b = binary.BigEndian.AppendUint16(b, 1) // precert_entry
	b = append(b, issuerKey[:]...)
	b = append(b, byte(len(tbs)>>16), byte(len(tbs)>>8), byte(len(tbs)))
	b = append(b, tbs...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.extensions)))
	return append(b, s.extensions...)
}

func sctsOf(cert *x509.Certificate) ([]sct, error) {
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSCTs) {
			continue
		}
		var list []byte
		if rest, err := asn1.Unmarshal(ext.Value, &list); err != nil || len(rest) != 0 {
			return nil, errSCT
		}
		return parseSCTs(list)
	}
	return nil, nil
}

func parseSCTs(list []byte) ([]sct, error) {
	all, rest, ok := vector(list)
	if !ok || len(rest) != 0 {
		return nil, errSCT
	}
	var scts []sct
	for len(all) > 0 {
		var one []byte
		if one, all, ok = vector(all); !ok || len(scts) == maxSCTs {
			return nil, errSCT
		}
		s, err := parseSCT(one)
		if err != nil {
			return nil, err
		}
		scts = append(scts, s)
	}
	return scts, nil
}

func parseSCT(b []byte) (s sct, err error) {
	const head = 1 + sha256.Size + 8
	if len(b) < head || b[0] != 0 {
		return sct{}, errSCT
	}
	s.log = logID(b[1 : 1+sha256.Size])
	s.timestamp = binary.BigEndian.Uint64(b[1+sha256.Size:])
	var ok bool
	if s.extensions, b, ok = vector(b[head:]); !ok || len(b) < 2 {
		return sct{}, errSCT
	}
	// SHA-256; whether ECDSA or RSA the log's key says.
	if b[0] != 4 || s.timestamp > 1<<62 {
		return sct{}, errSCT
	}
	if s.signature, b, ok = vector(b[2:]); !ok || len(b) != 0 {
		return sct{}, errSCT
	}
	return s, nil
}

// vector reads bytes after their length in two bytes (RFC 8446, section 3.4).
func vector(b []byte) (value, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; len(b) < n {
		return nil, nil, false
	}
	return b[:n], b[n:], true
}

// withoutSCTs returns the DER of a TBSCertificate without the extension that
// holds the SCTs, which is what the log has seen.
func withoutSCTs(tbs []byte) ([]byte, error) {
	fields, err := elements(tbs)
	if err != nil {
		return nil, errSCT
	}
	var out bytes.Buffer
	for _, f := range fields {
		if f.Class != asn1.ClassContextSpecific || f.Tag != 3 {
			out.Write(f.FullBytes)
			continue
		}
		exts, err := elements(f.Bytes)
		if err != nil {
			return nil, errSCT
		}
		var kept bytes.Buffer
		for _, e := range exts {
			var ext pkix.Extension
			if _, err := asn1.Unmarshal(e.FullBytes, &ext); err != nil {
				return nil, errSCT
			}
			if !ext.Id.Equal(oidSCTs) {
				kept.Write(e.FullBytes)
			}
		}
		list, err := wrap(asn1.ClassUniversal, asn1.TagSequence, kept.Bytes())
		if err != nil {
			return nil, err
		}
		field, err := wrap(asn1.ClassContextSpecific, 3, list)
		if err != nil {
			return nil, err
		}
		out.Write(field)
	}
	return wrap(asn1.ClassUniversal, asn1.TagSequence, out.Bytes())
}

// elements returns what is in a DER sequence.
func elements(der []byte) ([]asn1.RawValue, error) {
	var sequence asn1.RawValue
	rest, err := asn1.Unmarshal(der, &sequence)
	if err != nil || len(rest) != 0 || sequence.Class != asn1.ClassUniversal || sequence.Tag != asn1.TagSequence {
		return nil, errors.New("not a DER sequence")
	}
	var found []asn1.RawValue
	for rest = sequence.Bytes; len(rest) > 0; {
		var v asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &v); err != nil {
			return nil, err
		}
		found = append(found, v)
	}
	return found, nil
}

func wrap(class, tag int, content []byte) ([]byte, error) {
	return asn1.Marshal(asn1.RawValue{Class: class, Tag: tag, IsCompound: true, Bytes: content})
}
