package registry

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

// model is the registry without index, sharing or anything else that makes it
// fast: it looks at all entries for every question.
type model struct {
	synced    bool
	bundle    *Bundle
	federated map[spiffeid.TrustDomain]*Bundle
	entries   map[string]Entry
	states    map[string]*modelState
}

type modelState struct {
	svid      *SVID
	rotateAt  time.Time
	err       error
	retryAt   time.Time
	failures  int
	awaitSync bool
	stale     bool // svid is of an older revision
	seen      bool // svid has been held against the time
	asked     bool
	outrun    bool
}

func newModel() *model { return &model{entries: map[string]Entry{}, states: map[string]*modelState{}} }

func (m *model) apply(u Update) {
	if u.Wipe {
		m.synced, m.entries, m.states = false, map[string]Entry{}, map[string]*modelState{}
	}
	if u.Bundle != nil {
		m.bundle = u.Bundle
	}
	if u.HasFederated {
		m.federated = u.Federated
	}
	if u.HasEntries {
		m.sync(u.Entries)
	}
	for id, s := range u.SVIDs {
		m.signed(id, s)
	}
	for id, err := range u.Failed {
		m.failed(id, err, u.Retry)
	}
}

func (m *model) sync(entries []Entry) {
	m.synced = true
	next, states := map[string]Entry{}, map[string]*modelState{}
	for _, e := range entries {
		next[e.ID], states[e.ID] = e, &modelState{}
		old, had := m.entries[e.ID]
		if !had || !old.servable() || !e.servable() {
			continue
		}
		st := m.states[e.ID]
		states[e.ID] = st
		st.awaitSync = false
		if fmt.Sprintf("%+v", old) != fmt.Sprintf("%+v", e) {
			st.err, st.failures, st.retryAt = nil, 0, time.Time{}
		}
		if old.Revision != e.Revision || !old.CreatedAt.Equal(e.CreatedAt) || old.SPIFFEID != e.SPIFFEID {
			st.outrun, st.stale = st.asked, true
		}
		if old.SPIFFEID != e.SPIFFEID {
			st.svid = nil
		}
	}
	m.entries, m.states = next, states
}

func (m *model) signed(id string, s *SVID) {
	e, ok := m.entries[id]
	switch {
	case !ok || !e.servable():
	case e.SPIFFEID != s.ID:
		m.failed(id, ErrWrongID, nil)
	default:
		life := s.NotAfter.Sub(s.NotBefore)
		m.states[id] = &modelState{
			svid: s, rotateAt: s.NotAfter.Add(-life / 2), stale: m.states[id].outrun, awaitSync: m.tainted(s),
		}
	}
}

func (m *model) failed(id string, err error, retry func(int) time.Time) {
	e, ok := m.entries[id]
	if !ok || !e.servable() {
		return
	}
	st := m.states[id]
	outrun := st.outrun
	st.asked, st.outrun = false, false
	if outrun {
		return
	}
	st.err = err
	st.failures++
	st.awaitSync = retry == nil
	if retry != nil {
		st.retryAt = retry(st.failures)
	}
}

func (m *model) tainted(s *SVID) bool {
	return m.bundle != nil && slices.Contains(m.bundle.Tainted, s.Authority)
}

func matches(e Entry, selectors []attestor.Selector) bool {
	for _, s := range e.Selectors {
		if !slices.Contains(selectors, s) {
			return false
		}
	}
	return e.servable()
}

func (m *model) view(selectors []attestor.Selector) *View {
	v := &View{Synced: m.synced, Bundle: m.bundle, Federated: map[spiffeid.TrustDomain]*Bundle{}}
	for _, id := range slices.Sorted(maps.Keys(m.entries)) {
		e, st := m.entries[id], m.states[id]
		if !matches(e, selectors) {
			continue
		}
		for _, o := range m.entries {
			if matches(o, selectors) && o.Hint == e.Hint && o.older(&e) {
				e.Hint = ""
				break
			}
		}
		for _, td := range e.FederatesWith {
			if b := m.federated[td]; b != nil {
				v.Federated[td] = b
			}
		}
		switch {
		case st.svid != nil:
			v.Identities = append(v.Identities, Identity{&e, st.svid})
		case st.err == nil:
			v.Pending++
			v.unresolved++
		default:
			v.Pending++
			if v.PendingErr == nil {
				v.PendingErr = fmt.Errorf("SVID of entry %s (%s): %w", id, m.entries[id].SPIFFEID, st.err)
			}
		}
	}
	return v
}

// due is what Due returns, with a cache that has room for all, and what it
// does.
func (m *model) due(now time.Time, watched func(Entry) bool) []string {
	type item struct {
		u  urgency
		at time.Time
		id string
	}
	var items []item
	for id, e := range m.entries {
		st := m.states[id]
		if !e.servable() {
			continue
		}
		m.expire(e, st, now, watched(e))
		if st.awaitSync || e.expired(now) {
			continue
		}
		it := item{ahead, time.Time{}, id}
		switch {
		case st.svid != nil && m.tainted(st.svid):
			it.u = tainted
		case watched(e) && st.svid == nil:
			it.u = missing
		case watched(e):
			it.u = ageing
		}
		if it.u != tainted && st.svid != nil && !st.stale {
			it.at = st.rotateAt
		}
		if st.retryAt.After(it.at) {
			it.at = st.retryAt
		}
		if !it.at.After(now) {
			items = append(items, it)
			st.asked, st.outrun = true, false
		}
	}
	slices.SortFunc(items, func(a, b item) int {
		return cmp.Or(cmp.Compare(a.u, b.u), a.at.Compare(b.at), cmp.Compare(a.id, b.id))
	})
	var ids []string
	for _, it := range items {
		ids = append(ids, it.id)
	}
	return ids
}

func (m *model) expire(e Entry, st *modelState, now time.Time, watched bool) {
	if st.svid != nil && !now.Before(st.svid.NotAfter) {
		if !st.seen {
			st.err, st.awaitSync = ErrEnded, true
		}
		st.svid = nil
	}
	if st.svid != nil && !st.seen {
		switch {
		case !now.Before(st.rotateAt):
			st.rotateAt = now.Add(st.svid.NotAfter.Sub(now) / 2)
		case now.Before(st.svid.NotBefore):
			st.rotateAt = now.Add(st.rotateAt.Sub(st.svid.NotBefore))
		}
	}
	st.seen = true
	if st.svid == nil && e.expired(now) {
		if !watched {
			*st = modelState{}
		} else if st.err == nil {
			st.err = ErrEntryExpired
		}
	}
}

// watcher is a watch and what the model knows of it.
type watcher struct {
	*Watch
	selectors []attestor.Selector
	last      string // what it was told last, as served says
	settled   bool
}

// served is what a caller sees of a view.
func served(v *View) string {
	v2 := *v
	if len(v.Identities) > 0 {
		v2.Pending, v2.PendingErr = 0, nil
	} else if v.Pending > 0 {
		v2.Pending = 1
	}
	out := printView(&v2)
	if !v.Synced && v.Bundle != nil {
		out += string(v.Bundle.DER)
	}
	for _, id := range v.Identities {
		out += fmt.Sprint(id.Entry.Admin, id.Entry.Downstream, id.Entry.FederatesWith)
	}
	return out
}

// world makes random things happen to a registry and its model.
type world struct {
	*rand.Rand
	t        *testing.T
	r        *Registry
	m        *model
	now      time.Time
	entries  map[string]Entry
	watchers []*watcher
	serial   int
	log      []string
}

func (w *world) note(format string, args ...any) { w.log = append(w.log, fmt.Sprintf(format, args...)) }

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\nafter:\n%s", fmt.Sprintf(format, args...), strings.Join(w.log, "\n"))
}

func (w *world) selectors(most int) []attestor.Selector {
	var s []attestor.Selector
	for range w.IntN(most + 1) {
		s = append(s, selectors(string(rune('a'+w.IntN(6))))...)
	}
	return s
}

func (w *world) entry(id string) Entry {
	w.serial++
	e := Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(testDomain, "/"+id), Selectors: w.selectors(3),
		Revision: int64(w.serial), CreatedAt: epoch.Add(time.Duration(w.IntN(3)) * time.Second), StoreSVID: w.IntN(10) == 0,
	}
	if old, ok := w.entries[id]; ok && w.IntN(2) == 0 {
		e.Selectors, e.StoreSVID = old.Selectors, old.StoreSVID
	}
	if w.IntN(3) == 0 {
		e.SPIFFEID = spiffeid.RequireFromPath(testDomain, "/shared")
	}
	if w.IntN(3) == 0 {
		e.Hint = []string{"x", "y"}[w.IntN(2)]
	}
	if w.IntN(3) == 0 {
		e.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("td" + strconv.Itoa(w.IntN(3)))}
	}
	if w.IntN(8) == 0 {
		e.ExpiresAt = w.now.Add(time.Duration(w.IntN(100)) * time.Second)
	}
	return e
}

// update is a random update, of one kind or of several at once.
func (w *world) update() Update {
	var u Update
	if w.IntN(40) == 0 {
		u.Wipe = true
	}
	if w.IntN(3) == 0 {
		for range w.IntN(3) {
			id := "e" + strconv.Itoa(w.IntN(12))
			if w.IntN(4) == 0 {
				delete(w.entries, id)
			} else {
				w.entries[id] = w.entry(id)
			}
		}
		u.Entries, u.HasEntries = slices.Collect(maps.Values(w.entries)), true
	}
	if w.IntN(8) == 0 {
		u.Bundle = &Bundle{TrustDomain: testDomain, DER: []byte("v" + strconv.Itoa(w.IntN(3)))}
		if w.IntN(2) == 0 {
			u.Bundle.Tainted = []string{"a" + strconv.Itoa(w.IntN(2))}
		}
	}
	if w.IntN(8) == 0 {
		u.HasFederated, u.Federated = true, map[spiffeid.TrustDomain]*Bundle{}
		for i := range 3 {
			if td := spiffeid.RequireTrustDomainFromString("td" + strconv.Itoa(i)); w.IntN(2) == 0 {
				u.Federated[td] = &Bundle{TrustDomain: td, DER: []byte("f" + strconv.Itoa(w.IntN(2)))}
			}
		}
	}
	if w.IntN(2) == 0 {
		u.SVIDs = map[string]*SVID{}
		for range w.IntN(6) {
			w.serial++
			id := "e" + strconv.Itoa(w.IntN(12))
			from := w.now.Add(time.Duration(w.IntN(60)-50) * time.Second)
			u.SVIDs[id] = &SVID{
				ID: w.entries[id].SPIFFEID, Serial: strconv.Itoa(w.serial), Authority: "a" + strconv.Itoa(w.IntN(2)),
				NotBefore: from, NotAfter: from.Add(time.Minute),
			}
		}
	}
	if w.IntN(4) == 0 {
		id := "e" + strconv.Itoa(w.IntN(12))
		u.Failed = map[string]error{id: errors.New("no " + strconv.Itoa(w.IntN(2)))}
		delete(u.SVIDs, id)
		if until := w.now.Add(time.Duration(w.IntN(30)) * time.Second); w.IntN(2) == 0 {
			u.Retry = func(n int) time.Time { return until.Add(time.Duration(n) * time.Second) }
		}
	}
	w.note("at %v: %+v", w.now.Sub(epoch), u)
	return u
}

func (w *world) step() {
	switch w.IntN(5) {
	case 0:
		w.now = w.now.Add(time.Duration(w.IntN(20)) * time.Second)
	case 1:
		if len(w.watchers) > 0 && w.IntN(2) == 0 {
			i := w.IntN(len(w.watchers))
			w.note("close %v", w.watchers[i].selectors)
			w.watchers[i].Close()
			w.watchers = slices.Delete(w.watchers, i, i+1)
			return
		}
		s := w.selectors(7)
		w.note("watch %v", s)
		w.watchers = append(w.watchers, &watcher{Watch: w.r.Watch(s), selectors: s})
	default:
		u := w.update()
		w.m.apply(u)
		w.r.Apply(u)
	}
}

func (w *world) checkViews() {
	w.t.Helper()
	for _, x := range w.watchers {
		want := w.m.view(x.selectors)
		w.r.mu.Lock()
		has := x.audience.view
		w.r.mu.Unlock()
		if printView(has) != printView(want) {
			w.fatalf("view of %v:\n got %s\nwant %s", x.selectors, printView(has), printView(want))
		}
		if w.IntN(2) == 0 {
			continue // a slow reader
		}
		got, err := nextNow(x.Watch)
		tell := served(want) != x.last &&
			(want.unresolved == 0 || x.settled && len(want.Identities) > 0)
		if err != nil || (got != nil) != tell {
			w.fatalf("Next of %v: got %v, %v, want a view: %v\nlast %s\n now %s", x.selectors, got, err, tell, x.last, served(want))
		}
		if tell {
			x.last, x.settled = served(want), len(want.Identities) > 0
		}
	}
}

func (w *world) checkDue() {
	w.t.Helper()
	watched := func(e Entry) bool {
		return slices.ContainsFunc(w.watchers, func(x *watcher) bool { return matches(e, x.selectors) })
	}
	w.note("due at %v", w.now.Sub(epoch))
	want := w.m.due(w.now, watched)
	var got []string
	for _, e := range w.r.Due(w.now) {
		got = append(got, e.ID)
	}
	if !slices.Equal(got, want) {
		w.fatalf("Due: got %v, want %v", got, want)
	}
	next := w.r.NextDue(w.now)
	switch {
	case next.Equal(w.now) != (len(want) > 0):
		w.fatalf("NextDue: got %v, with %v due", next, want)
	case next.After(w.now) && !w.endsBefore(next): // to look ahead makes it so late for good
		if early := w.r.Due(next.Add(-1)); len(early) > 0 {
			w.fatalf("NextDue: got %v, but earlier than that %v is due", next.Sub(epoch), early)
		}
	}
}

// endsBefore reports whether an entry expires from now on until then.
func (w *world) endsBefore(then time.Time) bool {
	for _, e := range w.m.entries {
		if !e.ExpiresAt.IsZero() && !e.expired(w.now) && e.expired(then) {
			return true
		}
	}
	return false
}

func TestAgainstModel(t *testing.T) {
	for seed := range uint64(150) {
		w := &world{
			Rand: rand.New(rand.NewPCG(seed, 0)), t: t, r: New(testOptions()), m: newModel(),
			now: epoch, entries: map[string]Entry{},
		}
		w.note("seed %d", seed)
		for range 150 {
			w.step()
			w.checkViews()
			if w.IntN(3) == 0 {
				w.checkDue()
				w.checkViews()
			}
			checkIndex(t, w.r)
		}
		for _, x := range w.watchers {
			x.Close()
		}
		w.r.Apply(Update{Wipe: true})
		if n := len(w.r.index.nodes) + len(w.r.active) + len(w.r.audiences) + len(w.r.records); n > 0 {
			w.fatalf("%d things are left of nothing", n)
		}
	}
}

// TestSmallCache does the same to a registry that keeps few SVIDs: which of
// those nobody watches is not modelled.
func TestSmallCache(t *testing.T) {
	for seed := range uint64(50) {
		options := testOptions()
		options.CacheSize = 3
		w := &world{
			Rand: rand.New(rand.NewPCG(seed, 1)), t: t, r: New(options), m: newModel(),
			now: epoch, entries: map[string]Entry{},
		}
		for range 150 {
			w.step()
			w.r.Due(w.now)
			checkIndex(t, w.r)
			watched := 0
			for rec := range w.r.active {
				if rec.live.watched > 0 {
					watched++
				}
			}
			if n := len(w.r.active); n > max(watched, options.CacheSize) {
				w.fatalf("%d entries kept ready, %d of them watched", n, watched)
			}
		}
	}
}
