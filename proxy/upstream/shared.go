package upstream

import "slices"

// Shared is a connection that carries many requests at a time, and is lent to a
// borrower for each. Its methods may be called by many at once, in the way of
// other borrowers: they do not wait, and call nothing of this package.
//
// While it lives it stays with its endpoint. One that has ended, or may not be
// lent any more, is taken from there: nobody joins it from then on, and loans
// that are on it go on.
type Shared interface {
	// Alive is false from when it is ending: it takes no new request ever
	// again. It is asked when Join was false and when nobody has it.
	//
	// Close is called once, after it was taken from its endpoint and the last
	// loan that was on it has ended. A request which outlives its loan is not
	// cut: the connection ends itself after it. One that ended itself is closed
	// all the same.
	Keeper
	// Join takes a place for one more request, and reports false where there
	// is none or the connection is ending. The place is given back by whoever
	// makes the request, to the connection itself and before the loan ends, so
	// that who waits for room finds it.
	Join() bool
	// Idle reports whether no request is on it.
	Idle() bool
}

// Share offers a fresh connection to all who borrow with Wish.Shares under the
// key of the loan, which goes on. Its own request has its place already. From
// now on the connection is closed as Shared tells, also where it may not be
// lent to others. What says that the far end is good is said before: an
// endpoint which is ejected still has no connection that is shared.
func (l *Loan) Share(s Shared) {
	e := l.endpoint
	if e == nil || l.shared != nil {
		return
	}
	p := &parked{keeper: s, shared: s, conn: l.Conn, key: l.key, group: l.group, shares: true, loans: 1}
	l.shared = p
	h := &e.shelf
	h.mu.Lock()
	p.off = !e.open(p.group, p.key)
	if !p.off {
		h.shared = append(h.shared, p)
		h.unmarkLocked(p.group, func(key any) bool { return key == p.key })
	}
	h.endLocked(l.makes, nil, p.off)
	h.mu.Unlock()
	l.makes = nil
	e.target.wake()
}

// Grows returns what the connection of the loan is to call once it takes more
// requests at a time than before, as its far end may have it: who waits for a
// place looks then. It may be called at any time, but not from within the methods
// of Shared.
func (l *Loan) Grows() func() {
	e, g, key := l.endpoint, l.group, l.key
	return func() {
		e.shelf.mu.Lock()
		e.shelf.callLocked(g, key)
		e.shelf.mu.Unlock()
		e.target.wake()
	}
}

// joinLocked takes a place on a shared connection, the last that came first: the
// others empty and grow old. Those which end are taken off the shelf, and
// returned where they are to be closed.
func (e *endpoint) joinLocked(s *search) (p *parked, out []Keeper) {
	h := &e.shelf
	for i := len(h.shared) - 1; i >= 0; i-- {
		p := h.shared[i]
		if p.group != s.group || p.key != s.key || p.loans == 0 && !e.roomy() {
			continue
		}
		if p.shared.Join() {
			if p.loans++; p.loans == 1 {
				h.lying--
				e.conns.Add(1)
				h.countLocked()
			}
			return p, out
		}
		if !p.shared.Alive() {
			out = h.removeLocked(i, out)
		}
	}
	return nil, out
}

// removeLocked takes a shared connection off the shelf, and appends it to out
// where nobody has it.
func (h *shelf) removeLocked(i int, out []Keeper) []Keeper {
	p := h.shared[i]
	h.shared = slices.Delete(h.shared, i, i+1)
	p.off = true
	if p.loans == 0 {
		h.lying--
		out = append(out, p.keeper)
	}
	h.countLocked()
	return out
}

// part ends a loan of a shared connection.
func (e *endpoint) part(p *parked) {
	set, h := e.target.set, &e.shelf
	var out []Keeper
	h.mu.Lock()
	p.loans--
	idle := p.loans == 0
	switch {
	case !idle:
	case p.off:
		out = append(out, p.keeper)
	default:
		p.since = set.tick.Load()
		h.lying++
		out = h.tidyLocked(p, e.limits.idle)
	}
	if idle {
		e.conns.Add(-1)
	}
	stays := idle && !p.off
	h.countLocked()
	h.callLocked(p.group, p.key)
	h.mu.Unlock()
	closeAll(out)
	if stays && !set.sweeping.Load() {
		set.sweep()
	}
}

// tidyLocked takes from the shelf a shared connection that nobody has any more,
// where it is dead; else the oldest, where more are idle than may be.
func (h *shelf) tidyLocked(p *parked, most int) (out []Keeper) {
	switch {
	case most <= 0 || !p.shared.Alive():
		return h.removeLocked(slices.Index(h.shared, p), nil)
	case len(h.idle)+h.lying > most:
		return h.oldestLocked(nil)
	}
	return nil
}
