package registry

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Why an entry has no SVID, beside what signing it failed with.
var (
	// ErrEntryExpired: the entry is past its ExpiresAt.
	ErrEntryExpired = errors.New("the entry has expired")
	// ErrWrongID: the SVID that came has not the entry's SPIFFE ID. Most likely
	// the entry has changed at the server, and the next sync will tell.
	ErrWrongID = errors.New("it was signed for another SPIFFE ID")
	// ErrEnded: the SVID that came had already ended.
	ErrEnded = errors.New("it had ended when it came: compare this host's clock with the server's")
)

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
	fresh   bool // svid has not been held against the time yet
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

// watch counts one more audience of a record.
func (r *Registry) watch(rec *record) {
	l := r.activate(rec)
	if l.watched++; l.watched == 1 {
		r.watched++
	}
}

// unwatch counts one less.
func (r *Registry) unwatch(rec *record) {
	l := rec.live
	if l.watched--; l.watched == 0 {
		r.watched--
		r.clock++
		l.used = r.clock
		l.view = nil
	}
}

// entryChanged forgets what was true of the old entry only.
func (l *live) entryChanged(old, e *Entry) {
	l.shown, l.hintless = nil, nil
	l.err, l.failures, l.retryAt, l.awaitSync = nil, 0, time.Time{}, false
	if old.SameIssue(e) {
		return
	}
	l.outrun, l.stale = l.asked, true
	if old.SPIFFEID != e.SPIFFEID {
		l.svid = nil
	}
}

// signed takes in a new SVID.
func (r *Registry) signed(id string, svid *SVID) {
	rec := r.find(id)
	if rec == nil || svid == nil || !rec.entry.servable() {
		return
	}
	if svid.ID != rec.entry.SPIFFEID {
		r.failed(id, ErrWrongID, nil)
		return
	}
	l := r.activate(rec)
	l.svid, l.fresh = svid, true
	l.rotateAt = r.rotateAt(svid)
	l.stale, l.asked, l.outrun = l.outrun, false, false
	l.err, l.failures, l.retryAt = nil, 0, time.Time{}
	l.tainted = r.bundle != nil && svid.signedByAny(r.bundle.Tainted)
	// A server that still signs with what is tainted is given until the next
	// sync to stop, lest it be asked without end.
	l.awaitSync = l.tainted
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
	rec.fail(err)
	l.failures++
	if l.awaitSync = retry == nil; !l.awaitSync {
		l.retryAt = retry(l.failures)
	}
	r.index.audiencesOf(rec, r.touch)
}

// fail notes why an entry has no new SVID.
func (r *record) fail(err error) {
	r.live.err = fmt.Errorf("SVID of entry %s (%s): %w", r.entry.ID, r.entry.SPIFFEID, err)
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

// rotation is when an SVID that has come by now is replaced that was to be at
// the given time. The result has the monotonic clock of now, see Reached.
func (s *SVID) rotation(at, now time.Time) time.Time {
	switch {
	case !now.Before(at):
		// The clock is ahead of the server's by a good part of the SVID's life.
		// Make do with what is left of it, lest the server be asked without end.
		at = now.Add(s.NotAfter.Sub(now) / 2)
	case now.Before(s.NotBefore):
		// The clock is behind the server's. The SVID's life has begun all the same.
		at = now.Add(at.Sub(s.NotBefore))
	}
	return now.Add(at.Sub(now))
}

// Reached reports whether it is time for what was planned for a moment: by the
// clock, or by the time that has gone by since a plan was made that has the
// monotonic clock. The first counts after a host was suspended, the second after its
// clock was set back, which makes no SVID live longer.
func Reached(at, now time.Time) bool {
	return !at.After(now) || !at.Round(0).After(now.Round(0))
}

// dueAt tells when the entry of an active record is to be signed and how
// urgent that is then. ok is false if no time will make it due.
func (r *record) dueAt(now time.Time) (at time.Time, u urgency, ok bool) {
	l := r.live
	if l.awaitSync || r.entry.expired(now) {
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
// Due and NextDue are also how the registry learns that time has passed: they
// withdraw the SVIDs that have ended.
func (r *Registry) Due(now time.Time) []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance(now)

	type item struct {
		rec *record
		at  time.Time
		u   urgency
	}
	var items []item
	for rec := range r.active {
		if at, u, ok := rec.dueAt(now); ok && Reached(at, now) {
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
	r.advance(now)

	var next time.Time
	sooner := func(t time.Time) {
		if Reached(t, now) {
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

// advance makes it now.
func (r *Registry) advance(now time.Time) {
	for rec := range r.active {
		if r.expire(rec, now) {
			r.index.audiencesOf(rec, r.touch)
		}
	}
	r.trim()
	r.pick(now)
	r.refresh()
}

// expire withdraws an SVID that has ended. It gives up on an expired entry,
// lest callers wait for an SVID that will not come. It tells whether that
// makes a difference to anybody.
func (r *Registry) expire(rec *record, now time.Time) (changed bool) {
	l := rec.live
	fresh := l.fresh
	l.fresh = false
	switch {
	case l.svid == nil:
	case !now.Before(l.svid.NotAfter):
		l.svid, changed = nil, true
		if fresh {
			rec.fail(ErrEnded)
			l.awaitSync = true
		}
	case fresh:
		l.rotateAt = l.svid.rotation(l.rotateAt, now)
	}
	if l.svid != nil || !rec.entry.expired(now) {
		return changed
	}
	if l.watched == 0 {
		r.deactivate(rec)
		return false
	}
	if l.err == nil {
		rec.fail(ErrEntryExpired)
		changed = true
	}
	return changed
}

// trim drops what is kept beyond the cache size and not watched, that without
// SVID first, then the longest unused.
func (r *Registry) trim() {
	excess := min(len(r.active)-max(r.options.CacheSize, 0), len(r.active)-r.watched)
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
	for _, rec := range idle[:excess] {
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
