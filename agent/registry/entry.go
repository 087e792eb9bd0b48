package registry

import (
	"math/bits"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

// Entry is a registration entry the server authorizes this agent for: callers
// whose selectors include all of the entry's may have its SPIFFE ID. An Entry
// is never modified once the registry holds it.
type Entry struct {
	ID            string // the server's name for the entry
	SPIFFEID      spiffeid.ID
	Selectors     []attestor.Selector // none: the entry matches nobody
	FederatesWith []spiffeid.TrustDomain
	Hint          string // which of its identities a workload should use for what
	Revision      int64  // goes up with every change of the entry, DNS names and TTL included
	CreatedAt     time.Time
	ExpiresAt     time.Time // zero: never
	Admin         bool
	Downstream    bool
	StoreSVID     bool // for an SVID store: never signed or served here
	JTI           bool // its JWT-SVIDs have a jti (RFC 7519 §4.1.7) and are given out once
}

// servable tells whether any caller could ever be given the entry's SVID.
func (e *Entry) servable() bool { return !e.StoreSVID && len(e.Selectors) > 0 }

func (e *Entry) expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// SameIssue tells whether an SVID signed for o is also what e asks for. An
// entry that was deleted and made again under the same ID may have the same
// revision, hence the time.
func (e *Entry) SameIssue(o *Entry) bool {
	return e.Revision == o.Revision && e.CreatedAt.Equal(o.CreatedAt) && e.SPIFFEID == o.SPIFFEID
}

// equal compares all fields. The receiver's selectors are normalised; those
// of o may be in any order.
func (e *Entry) equal(o *Entry) bool {
	return e.ID == o.ID && e.SameIssue(o) && e.Hint == o.Hint && e.ExpiresAt.Equal(o.ExpiresAt) &&
		e.Admin == o.Admin && e.Downstream == o.Downstream && e.StoreSVID == o.StoreSVID && e.JTI == o.JTI &&
		slices.Equal(e.FederatesWith, o.FederatesWith) && sameSelectors(e.Selectors, o.Selectors)
}

// older orders entries by age, then ID: the oldest keeps a hint that several
// entries claim.
func (e *Entry) older(o *Entry) bool {
	if c := e.CreatedAt.Compare(o.CreatedAt); c != 0 {
		return c < 0
	}
	return e.ID < o.ID
}

// normalise returns s sorted and without duplicates, leaving s alone.
func normalise(s []attestor.Selector) []attestor.Selector {
	s = slices.Clone(s)
	slices.SortFunc(s, attestor.Selector.Compare)
	return slices.Clip(slices.Compact(s))
}

// sameSelectors tells whether s has the selectors of normal, in any order.
func sameSelectors(normal, s []attestor.Selector) bool {
	if slices.Equal(normal, s) {
		return true
	}
	if len(normal) != len(s) || len(s) > 64 {
		return slices.Equal(normal, normalise(s))
	}
	var seen uint64 // those of normal, by index; without allocating, as this is asked of every entry at every sync
	for i := range s {
		at, found := slices.BinarySearchFunc(normal, s[i], attestor.Selector.Compare)
		if !found {
			return false
		}
		seen |= 1 << at
	}
	return bits.OnesCount64(seen) == len(normal)
}
