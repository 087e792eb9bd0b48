package upstream

import (
	"fmt"
	"slices"
	"time"
)

// making is a connection that one borrower dials and shakes hands on, and that
// may come to be shared. Others under the same key wait for it, instead of as
// many dials as there are requests in the moment in which a far end comes up.
type making struct {
	group *Group
	key   any
	room  chan struct{} // one who waits may find a place on another connection
	done  chan struct{} // closed when it is over; guards the following
	err   error         // the far end is no good
	alone bool          // it is not shared: nobody waits for the next one
}

const (
	// aloneFor is how long it is known of an endpoint that it does not
	// multiplex.
	aloneFor = time.Minute
	// maxMarks bounds the keys that this is known of.
	maxMarks = 64
)

// mark is that an endpoint does not multiplex for a group and key.
type mark struct {
	group *Group
	key   any
	until int64 // Set.clock
}

// madeLocked returns what others wait for, or nil.
func (h *shelf) madeLocked(g *Group, key any) *making {
	for _, m := range h.making {
		if m.group == g && m.key == key {
			return m
		}
	}
	return nil
}

// beginLocked has others wait from now on.
func (h *shelf) beginLocked(g *Group, key any) *making {
	m := &making{group: g, key: key, room: make(chan struct{}, 1), done: make(chan struct{})}
	h.making = append(h.making, m)
	return m
}

// end has nobody wait for m any more, which may be nil. An error is that of all
// who do; without one they look again, and one of them makes the next.
func (h *shelf) end(m *making, err error) {
	if m == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.endLocked(m, err, false)
}

func (h *shelf) endLocked(m *making, err error, alone bool) {
	i := slices.Index(h.making, m)
	if i < 0 {
		return
	}
	h.making = slices.Delete(h.making, i, i+1)
	m.err, m.alone = err, alone
	close(m.done)
}

// callLocked has one of those who wait look for a place: a loan ended.
func (h *shelf) callLocked(g *Group, key any) {
	if m := h.madeLocked(g, key); m != nil {
		m.call()
	}
}

func (m *making) call() {
	select {
	case m.room <- struct{}{}:
	default: // one was called and has not looked yet
	}
}

// Alone notes that the far end takes one request at a time. Who waits for the
// connection waits no longer, and for a minute nobody waits for another one to
// this endpoint under this key.
func (l *Loan) Alone() {
	e := l.endpoint
	if e == nil || !l.shares || l.shared != nil {
		return
	}
	h, now := &e.shelf, e.target.set.clock()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.marks = slices.DeleteFunc(h.marks, func(m mark) bool {
		return m.until <= now || m.group == l.group && m.key == l.key
	})
	if e.open(l.group, l.key) && len(h.marks) < maxMarks {
		h.marks = append(h.marks, mark{l.group, l.key, now + int64(aloneFor)})
	}
	h.endLocked(l.makes, nil, true)
	l.makes = nil
}

// markedLocked reports whether the endpoint is known not to multiplex.
func (h *shelf) markedLocked(g *Group, key any, s *Set) bool {
	for _, m := range h.marks {
		if m.group == g && m.key == key {
			return s.clock() < m.until
		}
	}
	return false
}

// unmarkLocked forgets that the endpoint does not multiplex for a group, under
// the keys of which unwanted is true.
func (h *shelf) unmarkLocked(g *Group, unwanted func(key any) bool) {
	h.marks = slices.DeleteFunc(h.marks, func(m mark) bool { return m.group == g && unwanted(m.key) })
}

// settle waits until there is a connection for the choice, or it is to be
// dialled. It reports false where the endpoint is to be given up: with an error
// when that is the endpoint's, and else because another one may be better now.
func (s *search) settle(c *choice) (bool, error) {
	for {
		awaited := c.awaits
		switch {
		case c.idle != nil:
			if c.idle.Alive() {
				return true, nil
			}
			_ = c.idle.Close()
		case awaited != nil:
			if err := s.await(awaited, c); err != nil {
				return false, err
			}
			if !c.endpoint.healthy() || c.endpoint.gone.Load() {
				return false, nil
			}
		default:
			return true, nil
		}
		if !s.lookAgain(c) {
			return false, nil
		}
		if awaited != nil && c.with != nil {
			awaited.call() // there may be more places
		}
	}
}

// await waits for a connection that another borrower makes, as long as a dial
// might take. That it is not ready in time is no failure of the endpoint: who
// makes it knows.
func (s *search) await(m *making, c *choice) error {
	limit, until := s.portion(c.left)
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-m.done:
		s.solo = s.solo || m.alone
		return m.err
	case <-m.room:
		return nil
	case <-timer.C:
		return fmt.Errorf("another request connects for this one, too: %w", &silentError{c.endpoint.name, limit.Round(time.Millisecond)})
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}
