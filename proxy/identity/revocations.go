package identity

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// revocations are the CRLs in force, by trust domain: those of one domain say
// nothing of another's certificates. It is immutable, and nil where none are
// configured. Nothing of what it says is remembered with a verified chain: it
// is asked every time, which costs a look into a hash table for each
// certificate.
type revocations struct {
	domains map[spiffeid.TrustDomain]*crlSet
}

// crlSet are the CRLs of a trust domain.
type crlSet struct {
	unusable error             // its files were never good yet: nobody of the domain comes in
	lists    map[string][]*crl // by raw issuer
	problem  string            // why the newest files are not in force
}

// path is a verified chain: the leaf first, an authority of the bundle last.
type path []*x509.Certificate

// RevokedError is why a certificate is good no more.
type RevokedError struct {
	Serial string // hexadecimal, of the certificate that was revoked
	At     time.Time
	Reason string // as in RFC 5280 §5.3.1
	CRL    string // which says so

	issuer string // of an intermediate: its subject
}

func (e *RevokedError) Error() string {
	what := "revoked"
	if e.issuer != "" {
		what = fmt.Sprintf("its intermediate %s was revoked", e.issuer)
	}
	return fmt.Sprintf("%s at %s (%s), says %s", what, e.At.UTC().Format(time.RFC3339), e.Reason, e.CRL)
}

// CRLError is why it cannot be told whether a certificate was revoked.
type CRLError struct{ Err error }

func (e *CRLError) Error() string { return e.Err.Error() }

func (e *CRLError) Unwrap() error { return e.Err }

// admit decides on a new connection: on one of the paths nothing was revoked,
// and every CRL that speaks of it is good. Errors are *RevokedError and
// *CRLError.
func (r *revocations) admit(td spiffeid.TrustDomain, paths []path, now time.Time) error {
	set := r.of(td)
	if set == nil {
		return nil
	}
	if set.unusable != nil {
		return &CRLError{set.unusable}
	}
	if err := set.revoked(paths); err != nil {
		return err
	}
	var first error
	for _, p := range paths {
		err := set.revokes(p)
		if err == nil {
			err = set.doubts(p, now)
		}
		if err == nil {
			return nil
		}
		first = cmp.Or(first, err)
	}
	return first
}

// revoked decides on a live connection, which stays unless a good CRL says
// that it must not.
func (r *revocations) revoked(td spiffeid.TrustDomain, paths []path) error {
	set := r.of(td)
	if set == nil {
		return nil
	}
	return set.revoked(paths)
}

func (r *revocations) of(td spiffeid.TrustDomain) *crlSet {
	if r == nil {
		return nil
	}
	return r.domains[td]
}

// revoked is nil when nothing of one of the paths was revoked.
func (s *crlSet) revoked(paths []path) error {
	var first error
	for _, p := range paths {
		err := s.revokes(p)
		if err == nil {
			return nil
		}
		first = cmp.Or(first, err)
	}
	return first
}

// revokes looks up every certificate of a path below its root.
func (s *crlSet) revokes(p path) error {
	for i := range len(p) - 1 {
		for _, c := range s.lists[string(p[i].RawIssuer)] {
			r, there := c.has(p[i])
			if !there || !c.claims(p[i+1]) || c.signedBy(p[i+1]) != nil {
				continue
			}
			return revokedBy(c, r, p[i], i)
		}
	}
	return nil
}

// doubts is an error when a CRL that speaks of a certificate of the path is
// out of date or not its issuer's.
func (s *crlSet) doubts(p path, now time.Time) error {
	for i := range len(p) - 1 {
		for _, c := range s.lists[string(p[i].RawIssuer)] {
			if !c.claims(p[i+1]) {
				continue
			}
			if err := c.signedBy(p[i+1]); err != nil {
				return &CRLError{fmt.Errorf("%s (%s) does not carry its signature: %w", c, c.file, err)}
			}
			if now.After(c.until) {
				return &CRLError{fmt.Errorf("%s (%s) is out of date since %s: nobody can tell whom it revoked since; have it renewed", c, c.file, c.until.UTC().Format(time.RFC3339))}
			}
		}
	}
	return nil
}

func revokedBy(c *crl, r revocation, cert *x509.Certificate, depth int) error {
	e := &RevokedError{Serial: cert.SerialNumber.Text(16), At: time.Unix(r.at, 0), Reason: cmp.Or(reasonWords[r.reason], reasonWords[0]), CRL: c.String()}
	if depth > 0 {
		e.issuer = cert.Subject.String()
	}
	return e
}

// status describes the CRLs for people, by trust domain and issuer.
func (r *revocations) status() []telemetry.CRL {
	if r == nil {
		return nil
	}
	var out []telemetry.CRL
	for _, td := range slices.SortedFunc(maps.Keys(r.domains), spiffeid.TrustDomain.Compare) {
		set := r.domains[td]
		problem := set.problem
		if set.unusable != nil {
			problem = set.unusable.Error()
		}
		if problem != "" {
			out = append(out, telemetry.CRL{TrustDomain: td.Name(), Problem: problem})
		}
		for _, issuer := range slices.Sorted(maps.Keys(set.lists)) {
			for _, c := range set.lists[issuer] {
				s := telemetry.CRL{
					TrustDomain: td.Name(), Issuer: c.name, File: c.file, Entries: len(c.revoked),
					ThisUpdate: c.from, NextUpdate: c.until, Verified: c.known() != nil,
				}
				if c.number != nil {
					s.Number = c.number.String()
				}
				out = append(out, s)
			}
		}
	}
	return out
}
