// Package registry is the agent's state: from entries, SVIDs and bundles it
// tells what each caller may have, and what needs signing.
//
// It is pure state. It starts no goroutine, speaks to nobody and reads no
// clock: what was synced and signed comes in by Apply, the time as an
// argument.
//
//	r := registry.New(registry.Options{TrustDomain: td})
//	r.Apply(registry.Update{Entries: entries, HasEntries: true, Bundle: bundle})
//	for _, e := range r.Due(now) {
//		svids[e.ID] = … // sign
//	}
//	r.Apply(registry.Update{SVIDs: svids})
//
//	w := r.Watch(selectors) // elsewhere, for each caller
//	defer w.Close()
//	view, err := w.Next(ctx)
//
// It leaves to others: talking to the server (agent/spire), when to sync and
// sign (agent), who the caller is (attestor) and what goes over the socket
// (agent/endpoint).
package registry

import (
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// DefaultCacheSize is how many SVIDs are kept ready when Options says nothing.
const DefaultCacheSize = 1000

// Options of a Registry. All but the trust domain may be left out.
type Options struct {
	TrustDomain spiffeid.TrustDomain

	// CacheSize is up to how many SVIDs are signed ahead and kept for callers
	// that may come. What is being watched is signed in any case, and counts.
	// Zero means DefaultCacheSize; negative, none but those watched.
	CacheSize int

	// AvailabilityTarget is how long workloads are to outlive a server that is
	// away: SVIDs are renewed when that much of their life is left, instead of
	// half, if they live at least 12 h longer than that. Zero: none.
	AvailabilityTarget time.Duration

	// Jitter returns a number in [-1,1), drawn once for each SVID, that spreads
	// renewals. Nil means random.
	Jitter func() float64
}

// Registry holds entries, SVIDs and bundles. It is safe for concurrent use.
type Registry struct {
	options Options

	mu          sync.Mutex // guards the following
	synced      bool
	bundle      *Bundle
	federated   map[spiffeid.TrustDomain]*Bundle
	entries     []Entry   // by ID; handed out by Entries and hence never written to
	records     []*record // one for each of entries, in the same order
	servable    int       // how many of entries anybody could have
	index       index
	active      map[*record]struct{} // the records that have a live part
	watched     int                  // how many of active are watched
	audiences   map[*audience]struct{}
	dirty       []*audience
	everyBundle *audience // that of WatchBundles, nil while nobody watches
	clock       uint64    // counts the moments at which entries ceased to be watched
}

// New returns an empty registry, not synced.
func New(o Options) *Registry {
	if o.CacheSize == 0 {
		o.CacheSize = DefaultCacheSize
	}
	if o.Jitter == nil {
		o.Jitter = func() float64 { return 2*rand.Float64() - 1 }
	}
	return &Registry{
		options:   o,
		index:     index{nodes: map[attestor.Selector]*node{}},
		active:    map[*record]struct{}{},
		audiences: map[*audience]struct{}{},
	}
}

// Update is what is to change. Its zero value changes nothing, as does each
// field left out.
type Update struct {
	// Entries is the complete new set, if HasEntries. IDs are distinct; of two
	// entries with one ID the first counts. When nothing changed, giving back
	// what Entries returned costs least.
	Entries    []Entry
	HasEntries bool

	Bundle *Bundle // of the own trust domain

	// Federated is the complete new set of other trust domains' bundles, if
	// HasFederated.
	Federated    map[spiffeid.TrustDomain]*Bundle
	HasFederated bool

	// SVIDs are newly signed, by entry ID. One whose entry is gone is ignored,
	// one whose entry has another SPIFFE ID counts as failed until the next
	// Update that HasEntries.
	SVIDs map[string]*SVID

	// Failed are the entries whose signing failed, by ID, and why. What they
	// have they keep until it ends. Retry tells when an entry that has now
	// failed so many times in a row (1, 2, …) is due again; a nil Retry means
	// after the next Update that HasEntries. A change of the entry makes it due
	// at once.
	Failed map[string]error
	Retry  func(failures int) time.Time

	// Again makes due at once what has failed.
	Again bool

	// Wipe forgets entries and SVIDs before anything else of the update is
	// done, as after a ban: callers get nothing until entries are applied again.
	Wipe bool
}

// Changes says what an update did.
type Changes struct {
	Added, Changed, Removed int // entries
	Views                   int // distinct sets of callers' selectors that are given something else than before
}

func (c *Changes) count(o Changes) {
	c.Added += o.Added
	c.Changed += o.Changed
	c.Removed += o.Removed
}

// Apply makes the update, all of it or, to any caller, none yet, and wakes
// the watches to which it makes a difference. What u points to must not be
// modified afterwards, except the slice of entries and their selectors.
func (r *Registry) Apply(u Update) Changes {
	var entries []Entry
	if u.HasEntries && !r.isCurrent(u.Entries) {
		entries = sorted(u.Entries) // before the lock: callers need not wait for that
	}
	var c Changes
	r.mu.Lock()
	defer r.mu.Unlock()
	if u.Wipe {
		c.count(r.setEntries(nil))
		r.setSynced(false)
	}
	if u.Bundle != nil {
		r.setBundle(u.Bundle)
	}
	if u.HasFederated {
		r.setFederated(u.Federated)
	}
	if u.HasEntries {
		if !r.holds(u.Entries) {
			if entries == nil {
				entries = sorted(u.Entries)
			}
			c.count(r.setEntries(entries))
		}
		r.setSynced(true)
		for rec := range r.active {
			rec.live.awaitSync = false
		}
	}
	if u.Again {
		for rec := range r.active {
			if l := rec.live; l.err != nil {
				l.failures, l.retryAt, l.awaitSync = 0, time.Time{}, false
			}
		}
	}
	for id, svid := range u.SVIDs {
		r.signed(id, svid)
	}
	for id, err := range u.Failed {
		r.failed(id, err, u.Retry)
	}
	r.trim()
	c.Views = r.refresh()
	return c
}

func (r *Registry) setSynced(synced bool) {
	if r.synced != synced {
		r.synced = synced
		r.touchAll()
	}
}

func (r *Registry) touchAll() {
	for a := range r.audiences {
		r.touch(a)
	}
}

func (r *Registry) setBundle(b *Bundle) {
	if b.Equal(r.bundle) {
		return
	}
	if !b.servesSame(r.bundle) {
		r.touchAll()
	}
	r.bundle = b
	for rec := range r.active {
		if l := rec.live; l.svid != nil {
			l.tainted = l.svid.signedByAny(b.Tainted)
		}
	}
}

func (r *Registry) setFederated(bundles map[spiffeid.TrustDomain]*Bundle) {
	next := make(map[spiffeid.TrustDomain]*Bundle, len(bundles))
	for td, b := range bundles {
		if old := r.federated[td]; b.Equal(old) {
			b = old
		}
		if b != nil {
			next[td] = b
		}
	}
	if !sameFederated(r.federated, next) {
		r.touchAll()
	}
	r.federated = next
}

// isCurrent tells whether entries is what Entries returned last.
func (r *Registry) isCurrent(entries []Entry) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.holds(entries)
}

func (r *Registry) holds(entries []Entry) bool {
	return len(entries) == len(r.entries) && (len(entries) == 0 || &entries[0] == &r.entries[0])
}

// setEntries replaces the set of entries by merging the old with the next,
// both sorted, so that what did not change keeps its memory and its place.
// next is the registry's from now on.
func (r *Registry) setEntries(next []Entry) Changes {
	var c Changes
	records := make([]*record, 0, len(next))
	old := r.records
	var domains []spiffeid.TrustDomain
	for i := range next {
		e := &next[i]
		for len(old) > 0 && old[0].entry.ID < e.ID {
			r.remove(old[0])
			old = old[1:]
			c.Removed++
		}
		if len(old) > 0 && old[0].entry.ID == e.ID {
			if r.change(old[0], e) {
				c.Changed++
			}
			records = append(records, old[0])
			old = old[1:]
			continue
		}
		e.Selectors = normalise(e.Selectors)
		// Neighbours often federate with the same domains.
		if slices.Equal(domains, e.FederatesWith) {
			e.FederatesWith = domains
		}
		domains = e.FederatesWith
		records = append(records, r.add(e))
		c.Added++
	}
	for _, rec := range old {
		r.remove(rec)
		c.Removed++
	}
	r.entries, r.records = next, records
	return c
}

// sorted returns a copy of entries in the order of their IDs, each ID once.
func sorted(entries []Entry) []Entry {
	byID := func(a, b Entry) int { return strings.Compare(a.ID, b.ID) }
	entries = slices.Clone(entries)
	if !slices.IsSortedFunc(entries, byID) {
		slices.SortStableFunc(entries, byID)
	}
	return slices.CompactFunc(entries, func(a, b Entry) bool { return a.ID == b.ID })
}

func (r *Registry) add(e *Entry) *record {
	rec := &record{entry: e}
	r.enter(rec)
	return rec
}

// enter puts a record before the callers.
func (r *Registry) enter(rec *record) {
	if rec.entry.servable() {
		r.servable++
	}
	r.index.insert(rec)
	r.index.audiencesOf(rec, func(a *audience) {
		a.add(rec)
		r.watch(rec)
		r.touch(a)
	})
}

// withdraw takes a record away from all callers. What is known about it stays.
func (r *Registry) withdraw(rec *record) {
	if rec.entry.servable() {
		r.servable--
	}
	r.index.audiencesOf(rec, func(a *audience) {
		a.remove(rec)
		r.unwatch(rec)
		r.touch(a)
	})
	r.index.remove(rec)
}

func (r *Registry) remove(rec *record) {
	r.withdraw(rec)
	r.deactivate(rec)
}

// change gives a record the entry of the new set, and tells whether it is
// another one.
func (r *Registry) change(rec *record, e *Entry) bool {
	old := rec.entry
	if old.equal(e) {
		*e = *old // shares its memory with the old set
		rec.entry = e
		return false
	}
	e.Selectors = normalise(e.Selectors)
	if slices.Equal(old.Selectors, e.Selectors) && old.servable() == e.servable() {
		e.Selectors = old.Selectors
		rec.entry = e
		r.index.audiencesOf(rec, r.touch)
	} else {
		r.withdraw(rec)
		rec.entry = e
		r.enter(rec)
	}
	switch {
	case rec.live == nil:
	case e.servable():
		rec.live.entryChanged(old, e)
	default:
		r.deactivate(rec)
	}
	return true
}

// find returns the record of an entry ID, nil if there is none.
func (r *Registry) find(id string) *record {
	i, found := slices.BinarySearchFunc(r.records, id, (*record).compareID)
	if !found {
		return nil
	}
	return r.records[i]
}

// Entries returns the entries in the order of their IDs. The slice is the
// registry's own and must not be modified.
func (r *Registry) Entries() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.entries
}

// Status returns the number of entries, and the SVIDs held in the order of
// their entry IDs.
func (r *Registry) Status() (entries int, ids []telemetry.Identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for rec := range r.active {
		if s := rec.live.svid; s != nil {
			ids = append(ids, telemetry.Identity{
				SPIFFEID: s.ID.String(), Hint: rec.entry.Hint, EntryID: rec.entry.ID,
				Serial: s.Serial, NotBefore: s.NotBefore, NotAfter: s.NotAfter,
			})
		}
	}
	slices.SortFunc(ids, func(a, b telemetry.Identity) int { return strings.Compare(a.EntryID, b.EntryID) })
	return len(r.entries), ids
}
