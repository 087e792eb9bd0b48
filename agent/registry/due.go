package registry

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"time"
)

// ErrEntryExpired is why an entry past its ExpiresAt gets no SVID.
var ErrEntryExpired = errors.New("the entry has expired")

// live is what the registry knows about an entry beyond the entry: one that
// has an SVID, is watched, is to have an SVID, or could not get one.
type live struct {
	svid     *SVID
	rotateAt time.Time // when svid is to be replaced

	err       error // why the last signing failed
	failures  int   // in a row
	retryAt   time.Time
	awaitSync bool // not due before the next sync, whatever the time

	watched int    // audiences that match it
	used    uint64 // Registry.clock when it was last watched

	stale   bool // svid was signed for an older revision
	tainted bool // svid was signed by a tainted authority
	asked   bool // Due has handed out the entry and there is no answer yet
	outrun  bool // the entry changed since, so that the answer will be stale

	shown, hintless *Entry // copies of the entry for views, made when first needed
	view            *View  // of the last audience whose first match this is
}

// urgency orders what is due.
type urgency int

const (
	tainted urgency = iota // an SVID no longer to be relied on
	missing                // somebody waits
	ageing                 // somebody will wait
	ahead                  // nobody waits, but may
)

// activate returns the live part of a record, made if need be.
func (r *Registry) activate(rec *record) *live {
	if rec.live == nil {
		rec.live = &live{}
		r.active[rec] = struct{}{}
	}
	return rec.live
}

func (r *Registry) deactivate(rec *record) {
	delete(r.active, rec)
	rec.live = nil
}

// unwatch counts one audience less.
func (r *Registry) unwatch(rec *record) {
	l := rec.live
	if l.watched--; l.watched == 0 {
		r.clock++
		l.used = r.clock
		l.view = nil
	}
}

// entryChanged forgets what was true of the old entry only.
func (l *live) entryChanged(old, e *Entry) {
	l.shown, l.hintless = nil, nil
	l.err, l.failures, l.retryAt, l.awaitSync = nil, 0, time.Time{}, false
	if old.sameIssue(e) {
		return
	}
	l.outrun = l.asked
	l.stale = true
	if old.SPIFFEID != e.SPIFFEID {
		l.svid = nil
	}
}

// signed takes in a new SVID.
func (r *Registry) signed(id string, svid *SVID) {
	rec := r.find(id)
	if rec == nil || svid == nil || !rec.entry.servable() || svid.ID != rec.entry.SPIFFEID {
		return
	}
	l := r.activate(rec)
	l.svid = svid
	l.rotateAt = r.rotateAt(svid)
	l.tainted = r.bundle != nil && svid.signedByAny(r.bundle.Tainted)
	l.stale = l.outrun
	l.asked, l.outrun = false, false
	l.err, l.failures, l.retryAt, l.awaitSync = nil, 0, time.Time{}, false
	r.index.audiencesOf(rec, r.touch)
}

// failed takes in why there is no new SVID.
func (r *Registry) failed(id string, err error, retry func(int) time.Time) {
	rec := r.find(id)
	if rec == nil || err == nil || !rec.entry.servable() {
		return
	}
	l := r.activate(rec)
	l.asked = false
	if l.outrun { // it was another entry that failed
		l.outrun = false
		return
	}
	l.err = pendingError(rec.entry, err)
	l.failures++
	if l.awaitSync = retry == nil; !l.awaitSync {
		l.retryAt = retry(l.failures)
	}
	r.index.audiencesOf(rec, r.touch)
}

// rotateAt is when an SVID is to be replaced: with half its life left ±10 %,
// or with the availability target left and up to 10 minutes more where the
// SVID lives at least 12 h longer than that.
func (r *Registry) rotateAt(s *SVID) time.Time {
	jitter := r.options.Jitter()
	life := s.NotAfter.Sub(s.NotBefore)
	if target := r.options.AvailabilityTarget; target > 0 && life-target > 12*time.Hour {
		return s.NotAfter.Add(-target - time.Duration((jitter+1)/2*float64(10*time.Minute)))
	}
	return s.NotAfter.Add(-time.Duration(float64(life) / 2 * (1 + jitter/10)))
}

// dueAt tells when the entry of an active record is to be signed and how
// urgent that is then. ok is false if no time will make it due.
func (rec *record) dueAt(now time.Time) (at time.Time, u urgency, ok bool) {
	l := rec.live
	if l.awaitSync || rec.entry.expired(now) {
		return time.Time{}, 0, false
	}
	switch {
	case l.svid != nil && l.tainted:
		u = tainted
	case l.watched == 0:
		u = ahead
	case l.svid == nil:
		u = missing
	default:
		u = ageing
	}
	if l.svid != nil && !l.tainted && !l.stale {
		at = l.rotateAt
	}
	if l.retryAt.After(at) {
		at = l.retryAt
	}
	return at, u, true
}

// Due returns the entries that need an SVID signed, most urgent first: those
// whose SVID is tainted, those watched that have none, those watched whose
// SVID is to be replaced because of its age or because the entry changed, and
// then those nobody watches, up to the cache size in all. Entries for an SVID
// store, without selectors or expired are not among them.
//
// What it returns stays due until Apply says that it was signed or failed.
//
// Due is also how the registry learns that time has passed: it withdraws SVIDs
// that have ended.
func (r *Registry) Due(now time.Time) []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire(now)
	r.trim()
	r.pick(now)
	r.refresh()

	type item struct {
		rec *record
		at  time.Time
		u   urgency
	}
	var items []item
	for rec := range r.active {
		if at, u, ok := rec.dueAt(now); ok && !at.After(now) {
			items = append(items, item{rec, at, u})
		}
	}
	slices.SortFunc(items, func(a, b item) int {
		return cmp.Or(cmp.Compare(a.u, b.u), a.at.Compare(b.at), strings.Compare(a.rec.entry.ID, b.rec.entry.ID))
	})
	due := make([]Entry, len(items))
	for i, it := range items {
		due[i] = *it.rec.entry
		it.rec.live.asked, it.rec.live.outrun = true, false
	}
	return due
}

// NextDue returns when to call Due next: now if something is due already,
// else when the first SVID is to be replaced, a failed one tried again, or one
// ends. Zero means that only an update can make anything due.
func (r *Registry) NextDue(now time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pick(now)
	var next time.Time
	sooner := func(t time.Time) {
		if t.Before(now) {
			t = now
		}
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	for rec := range r.active {
		if at, _, ok := rec.dueAt(now); ok {
			sooner(at)
		}
		if s := rec.live.svid; s != nil {
			sooner(s.NotAfter)
		}
	}
	return next
}

// expire withdraws the SVIDs that have ended. It gives up on expired entries,
// lest their callers wait for an SVID that will not come.
func (r *Registry) expire(now time.Time) {
	for rec := range r.active {
		l := rec.live
		if l.svid != nil && !now.Before(l.svid.NotAfter) {
			l.svid = nil
			r.index.audiencesOf(rec, r.touch)
		}
		if l.svid != nil || !rec.entry.expired(now) {
			continue
		}
		if l.watched == 0 {
			r.deactivate(rec)
		} else if l.err == nil {
			l.err = pendingError(rec.entry, ErrEntryExpired)
			r.index.audiencesOf(rec, r.touch)
		}
	}
}

// trim drops what is kept beyond the cache size and not watched, that without
// SVID first, then the longest unused.
func (r *Registry) trim() {
	excess := len(r.active) - max(r.options.CacheSize, 0)
	if excess <= 0 {
		return
	}
	var idle []*record
	for rec := range r.active {
		if rec.live.watched == 0 {
			idle = append(idle, rec)
		}
	}
	slices.SortFunc(idle, func(a, b *record) int {
		if (a.live.svid == nil) != (b.live.svid == nil) {
			if a.live.svid == nil {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.live.used, b.live.used), strings.Compare(b.entry.ID, a.entry.ID))
	})
	for _, rec := range idle[:min(excess, len(idle))] {
		r.deactivate(rec)
	}
}

// pick chooses entries to sign ahead while there is room.
func (r *Registry) pick(now time.Time) {
	room := min(r.options.CacheSize, r.servable) - len(r.active)
	for _, rec := range r.records {
		if room <= 0 {
			return
		}
		if rec.live == nil && rec.entry.servable() && !rec.entry.expired(now) {
			r.activate(rec)
			room--
		}
	}
}
