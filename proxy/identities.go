package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// Identities is what the proxy presents and whom it trusts: a source of
// X.509-SVIDs and trust bundles that keeps itself up to date.
type Identities interface {
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

// newIdentity checks a certificate chain against the rules for the leaf of an
// X.509-SVID.
func newIdentity(cert tls.Certificate, hint string) (*Identity, error) {
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
	return &Identity{ID: id, Hint: hint, Certificate: cert}, nil
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

// store is the part the sources share: what was last learned, and the leases
// on it.
type store struct {
	source string

	mu         sync.Mutex // guards the following
	identities []*Identity
	trust      *Trust
	waiting    bool   // nothing was ever received
	err        error  // why identities is empty
	problem    string // why what is held may be out of date
	changed    chan struct{}
}

func newStore(source string, waiting error) *store {
	return &store{source: source, trust: newTrust(nil), waiting: true, err: waiting, changed: make(chan struct{})}
}

// set replaces what is held. Identities that did not change keep their
// pointer, and when nothing changed at all no lease is woken.
func (s *store) set(certs []hinted, authorities map[spiffeid.TrustDomain][]*x509.Certificate) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	trust := s.trust.next(authorities)
	ids := make([]*Identity, 0, len(certs))
	for _, c := range certs {
		id, err := newIdentity(c.cert, c.hint)
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}
	same := s.err == nil && trust == s.trust && len(ids) == len(s.identities)
	for n := range ids {
		if n < len(s.identities) && ids[n].same(s.identities[n]) {
			ids[n] = s.identities[n]
		} else {
			same = false
		}
	}
	s.problem, s.err, s.waiting = "", nil, false
	s.identities, s.trust = ids, trust
	if !same {
		s.wake()
	}
	return nil
}

// narrow takes back every authority that is in force and not among these,
// while the identities stay as they are: what came with them cannot be used,
// but what was withdrawn is withdrawn.
func (s *store) narrow(authorities map[spiffeid.TrustDomain][]*x509.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	trust := s.trust.next(s.trust.within(authorities))
	if trust != s.trust {
		s.trust = trust
		s.wake()
	}
}

// revoke puts other CRLs in force and wakes every lease.
func (s *store) revoke(crls *revocations) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trust = s.trust.with(crls)
	s.wake()
}

// held makes a source known as one that CRLs can be put into.
func (s *store) held() *store { return s }

// trusted returns the bundles as of now.
func (s *store) trusted() *Trust {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trust
}

type hinted struct {
	cert tls.Certificate
	hint string
}

// withdraw forgets all identities: the source may not give them out any more.
// The bundles stay, for the connections that live.
func (s *store) withdraw(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	woken := len(s.identities) > 0
	s.identities, s.err, s.waiting = nil, why, false
	if woken {
		s.wake()
	}
}

// trouble notes why what is held may be out of date, and reports whether that
// is news, and whether nothing has come yet that could be out of date.
func (s *store) trouble(problem error) (news, waiting bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	news = s.problem != problem.Error()
	s.problem = problem.Error()
	if s.waiting {
		s.err = problem
	}
	return news, s.waiting
}

// settled notes that what is held is up to date.
func (s *store) settled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problem = ""
}

func (s *store) wake() { // with s.mu held
	close(s.changed)
	s.changed = make(chan struct{})
}

// Own implements Identities.
func (s *store) Own(_ context.Context, pick Pick) (Lease, error) {
	return &storeLease{store: s, pick: pick}, nil
}

// Report implements Identities.
func (s *store) Report() Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := Report{Source: s.source, Problem: s.problem, CRLs: s.trust.crls.status()}
	if s.err != nil {
		r.Problem = s.err.Error()
	}
	for _, id := range s.identities {
		leaf := id.Certificate.Leaf
		r.Identities = append(r.Identities, telemetry.Identity{
			SPIFFEID: id.ID.String(), Hint: id.Hint, Serial: leaf.SerialNumber.Text(16),
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
		})
	}
	return r
}

// storeLease is a view on a store; it holds nothing of its own.
type storeLease struct {
	store *store
	pick  Pick
}

func (l *storeLease) Current() (*Identity, error) {
	s := l.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.identities) == 0 {
		return nil, fmt.Errorf("%w: %w", ErrNoIdentity, s.err)
	}
	for _, id := range s.identities {
		if !l.pick.matches(id) {
			continue
		}
		if end := id.NotAfter(); time.Now().After(end) {
			return nil, fmt.Errorf("own %w at %s and was not renewed: %s", ErrExpired, end.UTC().Format(time.RFC3339), orUnknown(s.problem))
		}
		return id, nil
	}
	return nil, fmt.Errorf("%w: %s gives us %d identities, none of them is %s", ErrNoIdentity, s.source, len(s.identities), l.pick)
}

func orUnknown(problem string) string {
	if problem == "" {
		return "the source reported no problem"
	}
	return problem
}

func (l *storeLease) Trust() *Trust {
	return l.store.trusted()
}

func (l *storeLease) Changed() <-chan struct{} {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	return l.store.changed
}

func (l *storeLease) Close() {}
