package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
)

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
func (s *store) set(certs []SVID, authorities map[spiffeid.TrustDomain][]*x509.Certificate) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	trust := s.trust.next(authorities)
	ids := make([]*Identity, 0, len(certs))
	for _, c := range certs {
		id, err := newIdentity(c)
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

// ring wakes every lease for a change of what only the source itself returns.
func (s *store) ring() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wake()
}

// holder makes a source known as one that CRLs can be put into.
func (s *store) holder() *store { return s }

// trusted returns the bundles as of now.
func (s *store) trusted() *Trust {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trust
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

// forget goes back to where nothing was received yet. The bundles stay, as with
// withdraw.
func (s *store) forget(waiting error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identities, s.err, s.problem, s.waiting = nil, waiting, "", true
	s.wake()
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

// Held is a source that holds what its owner sets.
type Held struct{ *store }

// NewHeld returns a source without an identity, under the name its report has.
func NewHeld(source string) *Held {
	return &Held{newStore(source, errors.New("none was set"))}
}

// Set replaces what is held, all of it or, on an error, nothing.
func (h *Held) Set(svids []SVID, authorities map[spiffeid.TrustDomain][]*x509.Certificate) error {
	return h.set(svids, authorities)
}

// Withdraw forgets all identities, for that reason; the bundles stay.
func (h *Held) Withdraw(why error) { h.withdraw(why) }
