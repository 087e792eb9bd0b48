package identity

import (
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Standing is why a peer is believed while its connection lives: its chain,
// and the bundle and paths by which that was last verified. It is for one
// goroutine at a time.
type Standing struct {
	id    spiffeid.ID
	chain []*x509.Certificate // leaf first
	under *domain             // the bundle that last verified chain
	paths []path              // by which it did
}

// Stand returns the standing of a peer whose chain Verify has accepted under t.
// It fails when the chain has expired since.
func (t *Trust) Stand(id spiffeid.ID, chain []*x509.Certificate, at time.Time) (*Standing, error) {
	s := &Standing{id: id, chain: chain, under: t.domains[id.TrustDomain()]}
	var err error
	if s.paths, err = s.under.verify(chain, at); err != nil {
		return nil, fmt.Errorf("peer certificate of %s: %w", id, err)
	}
	return s, nil
}

// NotAfter is when the peer's SVID expires.
func (s *Standing) NotAfter() time.Time { return s.chain[0].NotAfter }

// Recheck holds the peer against the bundles and CRLs of now. That its SVID
// has expired since is no error.
func (s *Standing) Recheck(t *Trust, now time.Time) error {
	td := s.id.TrustDomain()
	if d := t.domains[td]; d != s.under {
		if err := s.restand(d, now); err != nil {
			return fmt.Errorf("the peer's certificate does not stand under the new bundle: %w", err)
		}
	}
	if err := t.crls.revoked(td, s.paths); err != nil {
		return fmt.Errorf("peer certificate of %s: %w", s.id, err)
	}
	return nil
}

// restand verifies the chain under d, the bundle its trust domain has now.
func (s *Standing) restand(d *domain, now time.Time) error {
	at := now
	if end := s.NotAfter(); at.After(end) {
		at = end // its expiry is not the business of a new bundle
	}
	var err error
	switch {
	case d == nil:
		err = fmt.Errorf("trust domain %s is no longer trusted", s.id.TrustDomain())
	case !d.holds(s.under.authorities): // more authorities than before take nothing away
		var paths []path
		if paths, err = d.verify(s.chain, at); err == nil {
			s.paths = paths
		}
	}
	if err == nil {
		s.under = d
		return nil
	}
	if d != nil && s.under.prunedAfterExpiry(s.chain, at, now) {
		return nil
	}
	return err
}

// prunedAfterExpiry reports whether d, the bundle that once verified chain,
// did so only by authorities that have expired since: they left the bundle
// in the ordinary course of things, not because they were withdrawn.
func (d *domain) prunedAfterExpiry(chain []*x509.Certificate, at, now time.Time) bool {
	paths, err := d.paths(chain, at)
	if err != nil {
		return false
	}
	for _, p := range paths {
		if root := p[len(p)-1]; !now.After(root.NotAfter) {
			return false
		}
	}
	return true
}
