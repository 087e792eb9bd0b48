package registry

import (
	"cmp"
	"slices"
	"strings"

	"github.com/narthex-id/narthex/attestor"
)

// Match is an entry that a caller matches, and where its SVID stands.
type Match struct {
	Entry *Entry
	SVID  *SVID // nil: none is signed
	Err   error // why the last signing failed; nil where it did not
}

// Matching returns the entries that a caller with these selectors matches, in
// the order of their IDs. Other than Watch it asks for nothing to be signed: it
// is for a person who wants to know.
func (r *Registry) Matching(selectors []attestor.Selector) []Match {
	have := newSelectorSet(selectors)
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []Match
	for s := range have.all {
		n := r.index.nodes[s]
		if n == nil {
			continue
		}
		for _, rec := range n.bucket {
			if have.lacks(rec.entry) > 0 {
				continue
			}
			m := Match{Entry: rec.entry}
			if rec.live != nil {
				m.SVID, m.Err = rec.live.svid, rec.live.err
			}
			found = append(found, m)
		}
	}
	slices.SortFunc(found, func(a, b Match) int { return strings.Compare(a.Entry.ID, b.Entry.ID) })
	return found
}

// Near is an entry that a caller does not match, and the selectors it lacks.
type Near struct {
	Entry   *Entry
	Missing []attestor.Selector // sorted, at least one
}

// Nearest returns up to n entries that a caller with these selectors fails to
// match by least: first those it shares a selector with, of them those it lacks
// the fewest selectors of, then those it shares the most with, then by ID.
// Entries that no caller can match are left out: those of an SVID store, and those
// that name agents (spiffe_id), as `spire-server token generate -spiffeID` makes.
// It looks at every entry, outside of the lock: some 20 ms for 100,000.
func (r *Registry) Nearest(selectors []attestor.Selector, n int) []Near {
	if n <= 0 {
		return nil
	}
	have := newSelectorSet(selectors)
	best := make([]candidate, 0, n)
	entries := r.Entries()
	for i := range entries {
		e := &entries[i]
		if !e.servable() || e.ofAgents() {
			continue
		}
		c := candidate{entry: e, lacks: have.lacks(e)}
		if c.lacks == 0 || len(best) == n && c.compare(best[n-1]) > 0 {
			continue
		}
		at, _ := slices.BinarySearchFunc(best, c, candidate.compare)
		best = slices.Insert(best[:min(len(best), n-1)], at, c)
	}
	near := make([]Near, len(best))
	for i, c := range best {
		near[i].Entry = c.entry
		for _, s := range c.entry.Selectors {
			if !have.has(s) {
				near[i].Missing = append(near[i].Missing, s)
			}
		}
	}
	return near
}

// ofAgents tells whether an entry gives agents a second name: that of a group of
// nodes, say, which other entries have as parent.
func (e *Entry) ofAgents() bool {
	return slices.ContainsFunc(e.Selectors, func(s attestor.Selector) bool { return s.Type == "spiffe_id" })
}

// candidate is an entry that may be among the nearest.
type candidate struct {
	entry *Entry
	lacks int // how many of its selectors the caller does not have
}

func (c candidate) shares() int { return len(c.entry.Selectors) - c.lacks }

// compare orders the nearer one first.
func (c candidate) compare(o candidate) int {
	if (c.shares() == 0) != (o.shares() == 0) {
		return cmp.Compare(o.shares(), c.shares())
	}
	return cmp.Or(cmp.Compare(c.lacks, o.lacks), cmp.Compare(o.shares(), c.shares()), strings.Compare(c.entry.ID, o.entry.ID))
}

// selectorSet is what a caller has.
type selectorSet struct {
	all    map[attestor.Selector]struct{}
	traits [256]bool // of those in all: most that are not in it differ by this already
}

func newSelectorSet(selectors []attestor.Selector) *selectorSet {
	s := &selectorSet{all: make(map[attestor.Selector]struct{}, len(selectors))}
	for _, selector := range selectors {
		s.all[selector] = struct{}{}
		s.traits[trait(selector.Value)] = true
	}
	return s
}

// trait mixes the length of a value with its last byte, where those of one kind
// differ most often.
func trait(value string) uint8 {
	if value == "" {
		return 0
	}
	return uint8(len(value))*37 + value[len(value)-1]
}

func (s *selectorSet) has(selector attestor.Selector) bool {
	if !s.traits[trait(selector.Value)] {
		return false
	}
	_, found := s.all[selector]
	return found
}

// lacks returns how many of the entry's selectors are not in the set.
func (s *selectorSet) lacks(e *Entry) (n int) {
	for i := range e.Selectors {
		if !s.has(e.Selectors[i]) {
			n++
		}
	}
	return n
}
