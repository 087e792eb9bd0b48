package registry

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

var (
	// ErrClosed is what Next returns once the watch is closed.
	ErrClosed = errors.New("watch is closed")

	// ErrInterrupted is what one Next returns after Interrupt.
	ErrInterrupted = errors.New("watch was interrupted")
)

// View is what a caller may have, at one moment. It is immutable and shared by
// all callers that may have the same.
type View struct {
	// Synced is false until entries were applied, and again after a wipe: then
	// nothing is known about the caller, which is not the same as no entry.
	Synced bool
	// Identities are in the order of their entry IDs. Where several matched
	// entries claim one hint, the oldest entry keeps it (by creation, then ID)
	// and the others are shown without.
	Identities []Identity
	// Pending counts the matched entries that have no SVID; PendingErr is why
	// the first of those that failed did, nil if none has.
	Pending    int
	PendingErr error
	// Unsigned are those entries, in the order of their IDs and with their
	// hints as in Identities.
	Unsigned []*Entry
	// Bundle is that of the own trust domain, nil before the first was applied.
	Bundle *Bundle
	// Federated has the bundles, as far as there are any, of the trust domains
	// that any matched entry federates with. It may be nil.
	Federated map[spiffeid.TrustDomain]*Bundle

	unresolved int // of Pending, those that have not failed: an answer is on its way
}

// Identity is one SVID and the entry it was signed for. The registry has no
// clock: it withdraws an SVID that has ended at the next Due, and who serves
// it later than that looks at NotAfter.
type Identity struct {
	Entry *Entry
	SVID  *SVID
}

// Entries returns what the caller matches, signed or not, in the order of entry
// IDs. It is for what is not served with an X.509-SVID.
func (v *View) Entries() []*Entry {
	entries := make([]*Entry, 0, len(v.Identities)+len(v.Unsigned))
	rest := v.Unsigned
	for _, id := range v.Identities {
		for len(rest) > 0 && rest[0].ID < id.Entry.ID {
			entries, rest = append(entries, rest[0]), rest[1:]
		}
		entries = append(entries, id.Entry)
	}
	return append(entries, rest...)
}

// sameAs tells whether the caller is given the same by both. What is pending
// matters only to a caller that has nothing.
func (v *View) sameAs(o *View) bool {
	if v == o {
		return true
	}
	if len(v.Identities) == 0 && ((v.Pending == 0) != (o.Pending == 0) || !sameReason(v.PendingErr, o.PendingErr)) {
		return false
	}
	return v.Synced == o.Synced && slices.EqualFunc(v.Identities, o.Identities, Identity.sameAs) &&
		v.Bundle.servesSame(o.Bundle) && sameFederated(v.Federated, o.Federated)
}

// sameAs leaves out what is between the server and the agent, like an entry's
// revision. The same SVID has the same SPIFFE ID.
func (i Identity) sameAs(o Identity) bool {
	return i.SVID == o.SVID && (i.Entry == o.Entry || i.Entry.Hint == o.Entry.Hint &&
		i.Entry.Admin == o.Entry.Admin && i.Entry.Downstream == o.Entry.Downstream &&
		slices.Equal(i.Entry.FederatesWith, o.Entry.FederatesWith))
}

// sameReason compares what callers are told.
func sameReason(a, b error) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Error() == b.Error()
}

// identical tells whether one may stand for the other in memory.
func (v *View) identical(o *View) bool {
	return v.Pending == o.Pending && v.unresolved == o.unresolved && sameReason(v.PendingErr, o.PendingErr) &&
		slices.Equal(v.Identities, o.Identities) && slices.Equal(v.Unsigned, o.Unsigned) && v.sameAs(o)
}

func sameFederated(a, b map[spiffeid.TrustDomain]*Bundle) bool {
	if len(a) != len(b) {
		return false
	}
	for td, bundle := range a {
		if o := b[td]; o == nil || !bundle.servesSame(o) {
			return false
		}
	}
	return true
}

// audience is one distinct set of selectors that is being watched, however
// many watches there are on it. Guarded by the registry's mutex.
type audience struct {
	nodes   []*node // its selectors, sorted
	at      []int   // where it stands in the list of each node
	matched []*record
	watches int
	view    *View
	changed chan struct{} // closed when view is replaced or a watch closed; nil while nobody waits
	dirty   bool          // view may be out of date; the registry has it in its list
	bundles bool          // it is told every bundle, and nothing else
}

// includes tells whether all of the sorted selectors are the audience's.
func (a *audience) includes(selectors []attestor.Selector) bool {
	rest := a.nodes
	for _, s := range selectors {
		i, found := slices.BinarySearchFunc(rest, s, func(n *node, s attestor.Selector) int {
			return n.selector.Compare(s)
		})
		if !found {
			return false
		}
		rest = rest[i+1:]
	}
	return true
}

func (a *audience) wake() {
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

func (a *audience) wait() <-chan struct{} {
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return a.changed
}

func (a *audience) add(r *record) {
	if i, found := slices.BinarySearchFunc(a.matched, r.entry.ID, (*record).compareID); !found {
		a.matched = slices.Insert(a.matched, i, r)
	}
}

func (a *audience) remove(r *record) {
	if i, found := slices.BinarySearchFunc(a.matched, r.entry.ID, (*record).compareID); found {
		a.matched = slices.Delete(a.matched, i, i+1)
	}
}

// Watch follows what a caller with certain selectors may have. It is used by
// one goroutine at a time, Close and Interrupt apart.
type Watch struct {
	registry *Registry
	audience *audience

	// The following is guarded by the registry's mutex.
	last        *View // what Next returned last
	settled     bool  // last had identities: from now on what changes is told at once
	early       bool  // Next does not wait for SVIDs
	interrupted bool
	closed      bool
}

// Watch starts to watch for a caller with these selectors, in any order. The
// caller closes the watch when done.
func (r *Registry) Watch(selectors []attestor.Selector) *Watch {
	normal := normalise(selectors)
	r.mu.Lock()
	defer r.mu.Unlock()
	a, made := r.index.audience(normal)
	if made {
		r.audiences[a] = struct{}{}
		a.matched = r.index.matching(a)
		for _, rec := range a.matched {
			r.watch(rec)
		}
		a.view = r.viewOf(a)
	}
	a.watches++
	return &Watch{registry: r, audience: a}
}

// WatchBundles starts to watch the bundles of all trust domains, whichever
// entries federate with them: Views have them in Bundle and Federated, and no
// identities. The caller closes the watch when done.
func (r *Registry) WatchBundles() *Watch {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.everyBundle
	if a == nil {
		a = &audience{bundles: true}
		a.view = r.viewOf(a)
		r.everyBundle, r.audiences[a] = a, struct{}{}
	}
	a.watches++
	return &Watch{registry: r, audience: a}
}

// Early makes Next tell what the caller matches without waiting for SVIDs to be
// signed, and each change of it. It is called before Next.
func (w *Watch) Early() {
	w.registry.mu.Lock()
	defer w.registry.mu.Unlock()
	w.early = true
}

// Matches tells whether any entry matches a caller with these selectors.
func (r *Registry) Matches(selectors []attestor.Selector) bool {
	w := r.Watch(selectors)
	defer w.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(w.audience.matched) > 0
}

// Next returns what the caller may have. The first call returns at once if
// the registry is not synced or nothing matches, and otherwise when each
// matched entry is signed or has failed. A later call returns once the view
// is another one for the caller than the last; a slow caller sees only the
// newest. A view without identities of which some are still being signed is
// held back.
//
// It fails with ErrClosed, once with ErrInterrupted, or, where there is nothing
// to tell, with the error of ctx: who has reasons not to wait learns the news.
func (w *Watch) Next(ctx context.Context) (*View, error) {
	for {
		view, changed, err := w.poll()
		if view != nil || err != nil {
			return view, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		}
	}
}

// poll returns a view that is to be told, or else what to wait for.
func (w *Watch) poll() (*View, <-chan struct{}, error) {
	w.registry.mu.Lock()
	defer w.registry.mu.Unlock()
	if w.closed {
		return nil, nil, ErrClosed
	}
	if w.interrupted {
		w.interrupted = false
		return nil, nil, ErrInterrupted
	}
	v := w.audience.view
	if !w.ready(v) {
		return nil, w.audience.wait(), nil
	}
	w.last = v
	w.settled = len(v.Identities) > 0
	return v, nil, nil
}

func (w *Watch) ready(v *View) bool {
	switch {
	case w.early:
		return w.last == nil || !w.last.sameAs(v) || !slices.Equal(w.last.Unsigned, v.Unsigned)
	case w.last != nil && w.last.sameAs(v):
		return false
	case v.unresolved == 0:
		return true
	default:
		return w.settled && len(v.Identities) > 0
	}
}

// Interrupt ends a Next that is waiting, or else the next one, with
// ErrInterrupted. The watch stays as it is: what Next did not tell, it tells
// when it is called again. Interrupts that no Next came between are one.
func (w *Watch) Interrupt() {
	w.registry.mu.Lock()
	defer w.registry.mu.Unlock()
	if !w.closed && !w.interrupted {
		w.interrupted = true
		w.audience.wake()
	}
}

// Selectors returns those of the caller, sorted and without duplicates. Their
// text is shared with everybody who has the same.
func (w *Watch) Selectors() []attestor.Selector {
	all := make([]attestor.Selector, len(w.audience.nodes))
	for i, n := range w.audience.nodes {
		all[i] = n.selector // neither ever changes
	}
	return all
}

// Due tells whether an entry that the caller matches is to be signed now, and so
// is among those that Registry.Due returns. It looks at no other entry.
func (w *Watch) Due(now time.Time) bool {
	w.registry.mu.Lock()
	defer w.registry.mu.Unlock()
	return slices.ContainsFunc(w.audience.matched, func(r *record) bool {
		at, _, ok := r.dueAt(now)
		return ok && Reached(at, now)
	})
}

// Succeed makes w, on which Next was not called yet, go on where old is, which
// it closes: Next compares with what old told. It is for a caller whose
// selectors became others, who is told of it like of a change of entries.
func (w *Watch) Succeed(old *Watch) {
	w.registry.mu.Lock()
	w.last, w.settled = old.last, old.settled
	w.registry.mu.Unlock()
	old.Close()
}

// Close ends the watch and a Next that is waiting. Closing twice is harmless.
func (w *Watch) Close() {
	r := w.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	if w.closed {
		return
	}
	w.closed, w.last = true, nil
	a := w.audience
	a.wake()
	if a.watches--; a.watches > 0 {
		return
	}
	if a.bundles {
		r.everyBundle = nil
	}
	r.index.drop(a)
	delete(r.audiences, a)
	for _, rec := range a.matched {
		r.unwatch(rec)
	}
	a.matched = nil
}

// viewOf computes what the audience may have. Audiences that match the same
// entries get the same View.
func (r *Registry) viewOf(a *audience) *View {
	v := &View{Synced: r.synced, Bundle: r.bundle}
	if a.bundles {
		v.Federated = r.federated // a new map at each change
		return v
	}
	hints := oldestOfHints(a.matched)
	for _, rec := range a.matched {
		l := rec.live
		entry := rec.shown(rec.entry.Hint == "" || len(a.matched) == 1 || hints[rec.entry.Hint] == rec)
		if l.svid != nil {
			v.Identities = append(v.Identities, Identity{Entry: entry, SVID: l.svid})
		} else {
			v.Pending++
			v.Unsigned = append(v.Unsigned, entry)
			switch {
			case l.err == nil:
				v.unresolved++
			case v.PendingErr == nil:
				v.PendingErr = l.err
			}
		}
		for _, td := range rec.entry.FederatesWith {
			if b := r.federated[td]; b != nil {
				if v.Federated == nil {
					v.Federated = map[spiffeid.TrustDomain]*Bundle{}
				}
				v.Federated[td] = b
			}
		}
	}
	v.Identities, v.Unsigned = slices.Clip(v.Identities), slices.Clip(v.Unsigned)
	if len(a.matched) == 0 {
		return v
	}
	first := a.matched[0].live
	if first.view == nil || !first.view.identical(v) {
		first.view = v
	}
	return first.view
}

// oldestOfHints tells which record keeps each hint. All matched entries count,
// signed or not, lest a hint wander while one is being signed.
func oldestOfHints(records []*record) map[string]*record {
	if len(records) < 2 {
		return nil
	}
	oldest := map[string]*record{}
	for _, rec := range records {
		if h := rec.entry.Hint; h != "" && (oldest[h] == nil || rec.entry.older(oldest[h].entry)) {
			oldest[h] = rec
		}
	}
	return oldest
}

// shown returns the entry as callers see it, the same pointer until the entry
// changes. It is a copy, so that a view does not keep the whole set of entries
// it came with in memory.
func (r *record) shown(hint bool) *Entry {
	p := &r.live.shown
	if !hint {
		p = &r.live.hintless
	}
	if *p == nil {
		e := *r.entry
		if !hint {
			e.Hint = ""
		}
		*p = &e
	}
	return *p
}

// touch marks an audience as in need of a new view.
func (r *Registry) touch(a *audience) {
	if !a.dirty {
		a.dirty = true
		r.dirty = append(r.dirty, a)
	}
}

// refresh computes the views of all touched audiences again, wakes the
// watches whose view is another one, and returns how many views that were.
func (r *Registry) refresh() (changed int) {
	for _, a := range r.dirty {
		a.dirty = false
		v := r.viewOf(a)
		if a.view.identical(v) {
			continue
		}
		if !a.view.sameAs(v) {
			changed++
		}
		a.view = v
		a.wake()
	}
	clear(r.dirty)
	r.dirty = r.dirty[:0]
	return changed
}
