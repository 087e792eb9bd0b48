// Package identity is whom the proxy speaks as and whom it believes: sources of
// X.509-SVIDs and JWT-SVIDs, and the verification of those of peers against
// bundles and CRLs.
//
//	source, err := identity.NewWorkloadAPI(identity.WorkloadAPIConfig{Socket: "/run/spire/sockets/agent.sock"})
//	…
//	lease, err := source.Own(ctx, identity.Pick{})
//	…
//	own, err := lease.Current()                               // what to present
//	id, err := lease.Trust().Verify(chain, time.Now())         // in a handshake
//	standing, err := lease.Trust().Stand(id, chain, time.Now())
//	…
//	err = standing.Recheck(lease.Trust(), time.Now())          // while the connection lives
//	…
//	tokens, ok := source.(identity.Tokens)                     // where it knows JWT-SVIDs
//	j, err := tokens.ValidateJWT(bearer, audience, time.Now())
//
// A source (workloadapi.go, files.go) keeps what it last learned in a store,
// and CRLs (crls.go) put theirs into the same. trust.go verifies chains,
// revocations.go looks them up, standing.go does both again for peers that are
// connected. jwt.go reads and verifies tokens, by the authorities of
// jwttrust.go; jwtsource.go is the source of them, which remembers verdicts
// (jwtverdicts.go) and renews our own (jwtgrant.go). What an identity may do is the business of proxy/policy.
package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// Source is what the proxy presents and whom it trusts: X.509-SVIDs and
// trust bundles that keep themselves up to date.
type Source interface {
	// Own returns a lease on one of the proxy's own identities. It does not
	// wait for the identity to be there: a lease that has nothing to give
	// yet says so, and why, in Current. ctx bounds the call, not the lease.
	Own(ctx context.Context, pick Pick) (Lease, error)

	// Report tells what the source holds and what is wrong with it.
	Report() Report
}

// Lease is the right to speak as one identity. It ends with Close.
type Lease interface {
	// Current returns the identity as of now, or why there is none: not
	// received yet, taken back, expired. The result is shared and must not
	// be changed; the same pointer is returned until something changed.
	Current() (*Identity, error)

	// Trust returns the bundles as of now, whether or not there is an
	// identity: that ours was taken back does not make a peer's withdrawn
	// authority good. It is never nil, and the same pointer until an
	// authority came or went, or other CRLs are in force.
	Trust() *Trust

	// Changed returns a channel that is closed at the next change of what
	// Current or Trust returns by an update of the source. The passing of
	// NotAfter is not announced.
	Changed() <-chan struct{}

	Close()
}

// Pick names one of our own identities: by SPIFFE ID, or by the hint the
// Workload API gives with it. The zero Pick takes the default identity, which
// is the first one (SPIFFE Workload API §5.3).
type Pick struct {
	SPIFFEID spiffeid.ID
	Hint     string
}

func (p Pick) String() string {
	switch {
	case !p.SPIFFEID.IsZero():
		return p.SPIFFEID.String()
	case p.Hint != "":
		return fmt.Sprintf("hint %q", p.Hint)
	default:
		return "default"
	}
}

func (p Pick) matches(id *Identity) bool {
	if !p.SPIFFEID.IsZero() {
		return id.ID == p.SPIFFEID
	}
	return p.Hint == "" || id.Hint == p.Hint
}

// Identity is one X.509-SVID with its key. It is immutable: a rotation makes
// a new one.
type Identity struct {
	ID          spiffeid.ID
	Hint        string
	Certificate tls.Certificate // with Leaf set
}

// NotAfter is when the SVID expires.
func (i *Identity) NotAfter() time.Time { return i.Certificate.Leaf.NotAfter }

// Report is what a source tells of itself.
type Report struct {
	Source     string // workload_api or files
	Problem    string // why it cannot serve or is out of date; empty when all is well
	Identities []telemetry.Identity
	CRLs       []telemetry.CRL // in force, and what is wrong with those that should be
}

// Errors of Lease.Current.
var (
	ErrNoIdentity = errors.New("no identity") // the source has none that was asked for, or none at all
	ErrExpired    = errors.New("SVID expired")
)

// SVID is what a source was given: a chain with its key, and the hint that came
// with it.
type SVID struct {
	Certificate tls.Certificate
	Hint        string
}

// newIdentity checks a certificate chain against the rules for the leaf of an
// X.509-SVID.
func newIdentity(from SVID) (*Identity, error) {
	cert := from.Certificate
	if cert.Leaf == nil {
		leaf, err := x509.ParseCertificate(cert.Certificate[0])
		if err != nil {
			return nil, fmt.Errorf("parse own certificate: %w", err)
		}
		cert.Leaf = leaf
	}
	id, err := checkLeaf(cert.Leaf)
	if err != nil {
		return nil, fmt.Errorf("own certificate: %w", err)
	}
	return &Identity{ID: id, Hint: from.Hint, Certificate: cert}, nil
}

// same reports whether two identities present the same chain, so that nobody
// has to be told.
func (i *Identity) same(o *Identity) bool {
	if i.Hint != o.Hint || len(i.Certificate.Certificate) != len(o.Certificate.Certificate) {
		return false
	}
	for n, der := range i.Certificate.Certificate {
		if !bytes.Equal(der, o.Certificate.Certificate[n]) {
			return false
		}
	}
	return true
}
