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
	// meanwhile.
	Alive() bool
	// Close closes the connection, and does not wait for the far end.
	Close() error
}

// Loan is a connection that is lent for one request. The borrower says how it
// went, once, by Status or Failed, and ends it with Return or Close, of which
// the first counts.
type Loan struct {
	Chosen
	Kept Keeper // what was returned before; nil: Conn is fresh

	group *Group
	key   any
}

// Borrow lends a connection to an endpoint that the balance chooses among the
// healthy ones: an idle one that was returned under the same key, or else a
// fresh one, which is dialled as Dial does. Where every healthy endpoint has as
// many loans as it may, it waits its turn, behind those who came before. It
// takes no longer than timeout, and ends at once when ctx is cancelled.
//
// The key says what a connection was made for: identity, expected peer, trust.
// It can be compared, and is a pointer or nil, or it costs an allocation. A
// connection is never lent under another key than that which it was returned
// under; idle ones of this group under another one are closed when they are
// seen.
//
// Own is as that of DialFrom, and tried, which may be nil, remembers what was
// lent for the request: a retry goes to another endpoint while a healthy one is
// there, and does without idle connections where it is not.
//
// Other than by ctx, an error is ErrFull, ErrDown or ErrTimeout.
func (g *Group) Borrow(ctx context.Context, timeout time.Duration, own net.Addr, key any, tried *Tried) (Loan, error) {
	s := search{
		group: g, ctx: ctx, timeout: timeout, own: own, turn: g.turn.Add(1) - 1,
		lends: true, key: key,
	}
	return s.run(tried)
}

// lend returns an idle connection of the endpoint, if it lends at all. Else it
// makes room for one that is dialled.
func (s *search) lend(c choice, past *Tried) (Loan, bool) {
	if !s.lends {
		return Loan{}, false
	}
	e, again := c.endpoint, false
	if past != nil {
		if again = past.has(e); !again {
			past.add(e)
		}
	}
	if !again { // else what lies there may be as dead as what it was lent before
		if p, ok := e.take(s.group, s.key); ok {
			return Loan{
				Chosen: Chosen{Conn: p.conn, Target: e.target.key.address, Address: e.name, endpoint: e, trial: c.trial},
				Kept:   p.keeper, group: s.group, key: s.key,
			}, true
		}
	}
	e.makeWay()
	return Loan{}, false
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

// Return ends the loan, and keeps the connection for another one under the same
// key. It is closed where it cannot be kept: the endpoint is not healthy or no
// longer an address of its target, too many are idle, or the group was released.
func (l *Loan) Return(k Keeper) {
	e := l.endpoint
	if e == nil {
		return
	}
	l.tried()
	e.keep(parked{keeper: k, conn: l.Conn, key: l.key, group: l.group})
	e.leave()
	*l = Loan{}
}

// Forget closes the idle connections under other keys than the one that stays.
// From now on none is kept under another one, and who still borrows under one
// is given a fresh connection.
func (g *Group) Forget(stays any) {
	g.stays.Store(&stays)
	g.clear(func(p *parked) bool { return p.key != stays })
}

// outdated reports whether nothing is kept under the key any more.
func (g *Group) outdated(key any) bool {
	stays := g.stays.Load()
	return stays != nil && *stays != key
}

// clear closes the group's idle connections of which unwanted is true.
func (g *Group) clear(unwanted func(*parked) bool) {
	for _, t := range g.targets {
		for _, e := range t.addresses() {
			e.clear(func(p *parked) bool { return p.group == g && unwanted(p) })
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
