package upstream

import (
	"context"
	"fmt"
	"net"
	"slices"
	"time"
)

// Keeper is a connection that a borrower made of Chosen.Conn, the same in
// plaintext or TLS over it, and that can lie idle and be lent again. It is a
// pointer, or an allocation each time that it is returned.
type Keeper interface {
	// Alive reports whether the far end has neither closed the connection nor
	// sent anything that was not asked for. It looks and does not wait: it may
	// be called in the way of other borrowers. No other method is called
	// meanwhile, unless the connection is Shared.
	Alive() bool
	// Close closes the connection, and does not wait for the far end.
	Close() error
}

// Loan is a connection that is lent for one request. The borrower says how it
// went, once, by Status or Failed, and ends it with Return or Close, of which
// the first counts.
type Loan struct {
	Chosen
	Kept Keeper // what was returned or shared before; nil: Conn is fresh

	group  *Group
	key    any
	shares bool
	shared *parked // what the loan is with, where it is shared
	makes  *making // what others wait for
}

// Wish says what is to be borrowed.
type Wish struct {
	Timeout time.Duration // that Borrow may take
	Own     net.Addr      // as that of DialFrom
	Key     any           // what a connection was made for: identity, expected peer, trust

	// Shares says that the borrower will speak a protocol with many requests on
	// one connection, if the far end does. What was made for such borrowers and
	// what was made for others are not lent to each other.
	Shares bool
}

// Borrow lends a connection to an endpoint that the balance chooses among the
// healthy ones: an idle one that was returned under the same key, or else a
// fresh one, which is dialled as Dial does. Where every healthy endpoint has as
// many loans as it may, it waits its turn, behind those who came before. It
// takes no longer than the timeout, and ends at once when ctx is cancelled.
//
// The key can be compared, and is a pointer or nil, or it costs an allocation.
// A connection is never lent under another key than that which it was returned
// under; idle ones of this group under another one are closed when they are
// seen.
//
// With Wish.Shares it lends a place on a connection that another borrower has
// shared. Where that is still being made it waits for it, and what is told of
// it by Failed is an error of those who wait, too. When all are full one more
// is made, by one borrower at a time.
//
// Tried, which may be nil, remembers what was lent for the request: a retry goes
// to another endpoint while a healthy one is there, and does without idle
// connections where it is not. Shared ones are known to live.
//
// Other than by ctx, an error is ErrFull, ErrDown or ErrTimeout.
func (g *Group) Borrow(ctx context.Context, w Wish, tried *Tried) (Loan, error) {
	s := search{
		group: g, ctx: ctx, timeout: w.Timeout, own: w.Own, turn: g.turn.Add(1) - 1,
		lends: true, key: w.Key, shares: w.Shares,
	}
	return s.run(tried)
}

// Join is Borrow for what can be had at once: an idle connection to the endpoint
// that Borrow would choose, or a place on one that is shared. It does not wait,
// and reports false where Borrow might have to. Of the wish it looks at Key and
// Shares.
func (g *Group) Join(w Wish, tried *Tried) (Loan, bool) {
	if g.line.waiting.Load() > 0 { // they come first
		return Loan{}, false
	}
	s := search{group: g, turn: g.turn.Add(1) - 1, lends: true, key: w.Key, shares: w.Shares, joins: true}
	c, _ := s.choose(tried)
	if c.idle != nil && !c.idle.Alive() {
		_ = c.idle.Close()
		c.endpoint.conns.Add(-1)
		c.quit()
		c.endpoint = nil
	}
	if c.endpoint == nil {
		g.turn.Add(^uint64(0)) // it is the turn of who borrows
		return Loan{}, false
	}
	if tried != nil && !c.again {
		tried.add(c.endpoint)
	}
	return s.lend(&c), true
}

// obtain returns a connection to the endpoint that was chosen. It returns
// neither that nor an error where the endpoint is to be chosen anew.
func (s *search) obtain(c *choice) (Loan, error) {
	if s.lends {
		if ok, err := s.settle(c); !ok {
			c.quit()
			return Loan{}, err
		}
	}
	if c.with == nil && c.idle == nil {
		loan := Loan{group: s.group, key: s.key, shares: s.shares, makes: c.makes}
		var err error
		loan.Chosen, err = s.connect(c)
		return loan, err
	}
	return s.lend(c), nil
}

// lend makes a loan of what was found.
func (s *search) lend(c *choice) Loan {
	loan := Loan{group: s.group, key: s.key, shares: s.shares, shared: c.with}
	if c.with != nil {
		loan.Kept, c.conn = c.with.keeper, c.with.conn
	} else {
		loan.Kept = c.idle
	}
	e := c.endpoint
	loan.Chosen = Chosen{Conn: c.conn, Target: e.target.key.address, Address: e.name, endpoint: e, trial: c.trial}
	return loan
}

// enter counts one more at the endpoint, or reports that there is no room for
// it where it borrows. What it is with is found in the same look: nobody sees a
// count that is taken back.
func (s *search) enter(c *choice) bool {
	e := c.endpoint
	if !s.lends {
		e.active.Add(1)
		e.conns.Add(1)
		return true
	}
	e.shelf.mu.Lock()
	if e.full(s.shares) {
		e.shelf.mu.Unlock()
		return false
	}
	out, ok := s.findLocked(c)
	if ok {
		e.active.Add(1)
	}
	e.shelf.mu.Unlock()
	closeAll(out)
	return ok
}

// lookAgain is enter for one that is counted already, and found something that is
// of no use.
func (s *search) lookAgain(c *choice) bool {
	e := c.endpoint
	e.shelf.mu.Lock()
	if c.idle != nil {
		e.conns.Add(-1)
	}
	c.idle, c.conn, c.awaits = nil, nil, nil
	out, ok := s.findLocked(c)
	e.shelf.mu.Unlock()
	closeAll(out)
	return ok
}

// findLocked finds a connection for a loan: a shared one, an idle one, one that
// is being made, or room for one that is to be dialled. It reports whether
// there is any of these, and returns what is to be closed.
func (s *search) findLocked(c *choice) (out []Keeper, ok bool) {
	e, h := c.endpoint, &c.endpoint.shelf
	kept := !s.group.outdated(s.key)
	if kept && s.shares {
		if c.with, out = e.joinLocked(s); c.with != nil {
			return out, true
		}
	}
	room := e.roomy()
	if room && kept && !c.again { // else what lies there may be as dead as what it was lent before
		out = append(out, h.popLocked(s, c)...)
		if c.idle != nil {
			e.conns.Add(1)
			return out, true
		}
	}
	if s.joins {
		return out, false
	}
	if kept && s.shares && !s.solo && !h.markedLocked(s.group, s.key, e.target.set) {
		if c.awaits = h.madeLocked(s.group, s.key); c.awaits != nil {
			return out, true
		}
		if room {
			c.makes = h.beginLocked(s.group, s.key)
		}
	}
	if !room {
		return out, false
	}
	e.conns.Add(1)
	return e.makeWayLocked(out), true
}

// statusError is an answer that says that the service is not there.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("answered with status %d", int(e)) }

// Status notes with which status the far end answered. That it did is a
// success; with Ejection.On5xx, 502, 503 and 504 are failures like those of
// Failed.
func (l *Loan) Status(code int) {
	if e := l.endpoint; e != nil && e.target.key.ejection.On5xx && code >= 502 && code <= 504 {
		e.failure(statusError(code))
		l.tried()
		return
	}
	l.Succeeded()
}

// Failed notes that the far end is no good, as that of Chosen. Who waits for this
// connection waits no longer.
func (l *Loan) Failed(err error) {
	if e := l.endpoint; e != nil {
		l.Chosen.Failed(err)
		e.shelf.end(l.makes, fmt.Errorf("%s: %w", e.name, err))
		l.makes = nil
	}
}

// Return ends the loan, and keeps the connection for another one under the same
// key. It is closed where it cannot be kept: the endpoint is not healthy or no
// longer an address of its target, too many are idle, or the group was released.
// Of a shared connection it ends the loan alone.
func (l *Loan) Return(k Keeper) {
	e := l.endpoint
	switch {
	case e == nil:
		return
	case l.shared != nil:
		l.Close()
	default:
		l.tried()
		e.active.Add(-1)
		e.keep(parked{keeper: k, conn: l.Conn, key: l.key, group: l.group, shares: l.shares})
		if l.makes != nil {
			l.Alone()
		}
		e.target.wake()
	}
	*l = Loan{}
}

// Close ends the loan. It leaves the connection to the borrower unless it is
// shared, and does nothing the second time.
func (l *Loan) Close() {
	e := l.endpoint
	if e == nil {
		return
	}
	l.tried()
	e.leave(l.shared)
	e.shelf.end(l.makes, nil)
	l.endpoint, l.shared, l.makes = nil, nil, nil
}

// Forget closes the idle connections under other keys than the one that stays;
// shared ones end with their last loan. From now on none is kept under another
// one, and who still borrows under one is given a fresh connection.
func (g *Group) Forget(stays any) {
	g.stays.Store(&stays)
	g.clear(func(key any) bool { return key != stays })
}

// outdated reports whether nothing is kept under the key any more.
func (g *Group) outdated(key any) bool {
	stays := g.stays.Load()
	return stays != nil && *stays != key
}

// clear drops what is kept for the group under keys of which unwanted is true.
func (g *Group) clear(unwanted func(key any) bool) {
	for _, t := range g.targets {
		for _, e := range t.addresses() {
			e.clear(func(p *parked) bool { return p.group == g && unwanted(p.key) })
			e.shelf.mu.Lock()
			e.shelf.unmarkLocked(g, unwanted)
			e.shelf.mu.Unlock()
		}
	}
}

// Tried remembers the endpoints that a request was lent connections to. The
// zero value is ready. It is for one goroutine.
type Tried struct {
	few   [4]*endpoint // no allocation for these
	more  []*endpoint
	count int
}

func (t *Tried) add(e *endpoint) {
	if t.count < len(t.few) {
		t.few[t.count] = e
	} else {
		t.more = append(t.more, e)
	}
	t.count++
}

func (t *Tried) has(e *endpoint) bool {
	return slices.Contains(t.few[:min(t.count, len(t.few))], e) || slices.Contains(t.more, e)
}
