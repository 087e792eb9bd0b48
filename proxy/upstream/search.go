package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// What an error of Dial and Borrow is, for errors.Is; an error that is none of
// them is that of the context. Nothing was sent to anybody, so that asking
// again is safe.
var (
	// ErrFull is that every healthy endpoint has as many loans as it may, and
	// either as many borrowers wait as may, or the time was over.
	ErrFull = errors.New("no endpoint has room")
	// ErrDown is that every endpoint failed, or that there is none.
	ErrDown = errors.New("no endpoint is up")
	// ErrTimeout is that no endpoint, or no resolver, answered in time.
	ErrTimeout = errors.New("no endpoint answered in time")
)

// kindError is an error of one of these kinds, in words of its own.
type kindError struct{ kind, err error }

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// silentError is an endpoint that did not answer a dial.
type silentError struct {
	name string
	time time.Duration // that it was given
}

func (e *silentError) Error() string {
	return fmt.Sprintf("dial %s: no answer within %s", e.name, e.time)
}

const (
	// maxAttempts bounds the endpoints that one connection tries.
	maxAttempts = 64
	// shares is into how many parts the time that is left is divided for an
	// attempt while others can follow, so that an endpoint which does not
	// answer leaves time for another one.
	shares = 3
	// fairTime is what an endpoint must have been given, or nearly the part of
	// the time that the first one gets, for its silence to count as a failure:
	// the handshake of a good one takes a second more when a packet is lost.
	fairTime = 1500 * time.Millisecond
	// maxTold bounds the failures that an error tells of.
	maxTold = 3
)

// search is the way of one call from endpoint to endpoint.
type search struct {
	group   *Group
	ctx     context.Context
	timeout time.Duration
	own     net.Addr
	turn    uint64

	lends  bool // it borrows: limits apply, and idle connections will do
	key    any  // of those
	shares bool // as Wish.Shares
	solo   bool // it waits for no other borrower's connection any more
	joins  bool // what is there, or nothing: it does not dial

	until    time.Time // when timeout is over; zero while nothing took time
	failed   Tried     // by this call
	failures []error   // of these
}

// choice is an endpoint to try, already counted as active there.
type choice struct {
	endpoint *endpoint // nil: all there are failed
	trial    bool
	left     int // how many there were to choose from

	// Of a loan, what was found for it; nothing: it is to be dialled.
	again  bool     // the request was lent a connection there before
	idle   Keeper   // taken from the shelf, or nil
	conn   net.Conn // under it
	with   *parked  // a shared one, on which it has a place
	awaits *making  // another borrower's, to wait for
	makes  *making  // its own, which others wait for
}

// quit gives an endpoint up to which there is no connection.
func (c *choice) quit() {
	if c.trial {
		c.endpoint.trying.Store(false)
	}
	c.endpoint.active.Add(-1)
	c.endpoint.target.wake()
}

// run goes from endpoint to endpoint until one has a connection. Past is what
// earlier calls for the same request tried, or nil; no field, so that it stays
// on the stack of the caller.
func (s *search) run(past *Tried) (Loan, error) {
	for s.failed.count < maxAttempts {
		c, err := s.next(past)
		if err != nil {
			return Loan{}, err
		}
		if c.endpoint == nil {
			break
		}
		loan, err := s.obtain(&c)
		if err == nil && loan.endpoint == nil {
			continue // while we waited for it, it became one to choose anew
		}
		if past != nil && !c.again {
			past.add(c.endpoint)
		}
		if err == nil {
			return loan, nil
		}
		if s.ctx.Err() != nil {
			return Loan{}, err
		}
		s.failed.add(c.endpoint)
		if s.failures = append(s.failures, err); !time.Now().Before(s.deadline()) {
			break
		}
	}
	return Loan{}, s.problem()
}

// next returns the endpoint to try next, once there is one to choose.
func (s *search) next(past *Tried) (choice, error) {
	if s.lends && s.group.line.waiting.Load() > 0 {
		return s.wait(past) // behind those
	}
	c, full := s.choose(past)
	if c.endpoint == nil && !full && s.failed.count == 0 {
		if err := s.group.await(s.ctx, s.deadline(), s.timeout); err != nil {
			return choice{}, err
		}
		c, full = s.choose(past)
	}
	if full {
		return s.wait(past)
	}
	return c, nil
}

// deadline is when the call's time is over. It is not asked for where nothing
// takes time, so that the clock is not read either.
func (s *search) deadline() time.Time {
	if s.until.IsZero() {
		s.until = time.Now().Add(s.timeout)
	}
	return s.until
}

// The ranks of endpoints, the best first. One that an earlier call for the same
// request was lent is better than one that is not healthy: it failed once.
const (
	healthy = iota
	healthyTried
	unhealthy
	unhealthyTried
	noRank
)

// choose returns the endpoint to try next. It reports full where there is none
// because those that would be chosen have no room.
func (s *search) choose(past *Tried) (c choice, full bool) {
	var array [64]*endpoint // no allocation for most
	var noRoom Tried
	for {
		among, rank, left, full := s.best(array[:0], past, &noRoom)
		if full || len(among) == 0 {
			return choice{}, full
		}
		e := among[s.group.pick(among, s.turn)]
		trial := rank < unhealthy && e.until.Load() != 0
		if trial && !e.trying.CompareAndSwap(false, true) {
			continue // another connection tries it
		}
		c = choice{endpoint: e, trial: trial, left: left, again: past != nil && past.has(e)}
		if s.enter(&c) {
			return c, false
		}
		if trial {
			e.trying.Store(false)
		}
		if s.joins {
			return choice{}, false // not to go by one only because it is not connected to yet
		}
		noRoom.add(e)
	}
}

// best appends the endpoints of the best rank to among, and counts all that
// could be tried. NoRoom are those that turned out to be full.
func (s *search) best(among []*endpoint, past, noRoom *Tried) (of []*endpoint, rank, left int, full bool) {
	rank = noRank
	fullRank := noRank
	for _, t := range s.group.targets {
		for _, e := range t.addresses() {
			if s.failed.has(e) {
				continue
			}
			r := unhealthy
			if ok, _ := e.eligible(); ok {
				r = healthy
			}
			if s.lends && (e.full(s.shares) || noRoom.count > 0 && noRoom.has(e)) {
				fullRank = min(fullRank, r)
				continue
			}
			if past != nil && past.has(e) {
				r++
			}
			left++
			switch {
			case r < rank:
				among, rank = append(among[:0], e), r
			case r == rank:
				among = append(among, e)
			}
		}
	}
	// A healthy one that has no room now is worth the wait, rather than one
	// that is not healthy.
	return among, rank, left, fullRank < noRank && rank > fullRank+1
}

// pick returns the index of one of the endpoints, by the balance.
func (g *Group) pick(among []*endpoint, turn uint64) int {
	start := int(turn % uint64(len(among)))
	if g.balance == RoundRobin {
		return start
	}
	best, fewest := start, g.load(among[start])
	for i := 1; i < len(among); i++ {
		n := (start + i) % len(among)
		if load := g.load(among[n]); load < fewest {
			best, fewest = n, load
		}
	}
	return best
}

// load is what the balance wants few of.
func (g *Group) load(e *endpoint) int64 {
	if g.balance == LeastRequests {
		return e.active.Load()
	}
	return e.conns.Load() + int64(e.shelf.size.Load())
}

// portion is the time that an endpoint gets of what is left, where that many are
// left to try, and when it is over.
func (s *search) portion(left int) (limit time.Duration, until time.Time) {
	until = s.deadline()
	n := min(left, shares)
	if limit = time.Until(until) / time.Duration(n); n > 1 {
		until = time.Now().Add(limit)
	}
	return limit, until
}

// connect dials the endpoint in its share of the time that is left. That it did
// not answer counts as a failure where the share was fair: those of before may
// have left it next to nothing.
func (s *search) connect(to *choice) (Chosen, error) {
	e := to.endpoint
	limit, deadline := s.portion(to.left)
	c := Chosen{Target: e.target.key.address, endpoint: e, trial: to.trial}
	var raw net.Conn
	var err error
	if e.place.leadsTo(s.own) {
		err = &loopError{e.name}
	} else {
		raw, err = e.dial(s.ctx, deadline)
	}
	if err == nil {
		c.Conn, c.Address = raw, e.name
		return c, nil
	}
	hurried := timedOut(err) && limit < min(fairTime, s.timeout/(shares+1))
	if timedOut(err) {
		err = &silentError{e.name, limit.Round(time.Millisecond)}
	}
	if e.target.host != "" {
		err = fmt.Errorf("%s: %w", e.target.host, err)
	}
	fair := s.ctx.Err() == nil && !hurried
	if fair && !ours(err) {
		c.Failed(err)
	}
	c.Close()
	if fair {
		e.shelf.end(to.makes, err)
	} else { // others may have more time
		e.shelf.end(to.makes, nil)
	}
	return Chosen{}, err
}

// dial connects, by the way that the set was given or by our own.
func (e *endpoint) dial(ctx context.Context, deadline time.Time) (net.Conn, error) {
	if other := e.target.set.Dial; other != nil {
		limited, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		network := "tcp"
		if e.place.path != "" {
			network = "unix"
		}
		return other(limited, network, strings.TrimPrefix(e.name, unixPrefix))
	}
	return e.place.dial(ctx, deadline)
}

// await waits until there is an endpoint, for as long as there are lookups to
// wait for.
func (g *Group) await(ctx context.Context, deadline time.Time, timeout time.Duration) error {
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	for {
		news := g.set.news.listen()
		waits := false
		for _, t := range g.targets {
			if len(t.addresses()) > 0 {
				return nil
			}
			waits = t.expect() || waits
		}
		if !waits {
			return &kindError{ErrDown, g.lookupProblems()}
		}
		select {
		case <-news:
		case <-timer.C:
			return &kindError{ErrTimeout, fmt.Errorf("look up %s: no answer within %s", g.targets[0].host, timeout)}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *Group) lookupProblems() error {
	var problems []error
	for _, t := range g.targets {
		if err := t.lookupProblem(); err != nil {
			problems = append(problems, err)
		}
	}
	if len(problems) == 0 {
		return fmt.Errorf("%s is no longer a target of %s", g.targets[0].key.address, g.owner)
	}
	return tell(problems)
}

// problem says why no endpoint has a connection.
func (s *search) problem() error {
	if len(s.failures) == 0 { // the addresses went while we looked
		return &kindError{ErrDown, s.group.lookupProblems()}
	}
	kind := ErrTimeout
	for _, err := range s.failures {
		if silent := (*silentError)(nil); !errors.As(err, &silent) {
			kind = ErrDown
		}
	}
	return &kindError{kind, tell(s.failures)}
}

// tell joins failures into one error for a person.
func tell(failures []error) error {
	if len(failures) == 1 {
		return failures[0]
	}
	words := make([]string, 0, maxTold)
	for _, err := range failures[:min(len(failures), maxTold)] {
		words = append(words, err.Error())
	}
	more := ""
	if n := len(failures) - maxTold; n > 0 {
		more = fmt.Sprintf("; and %d more", n)
	}
	return fmt.Errorf("none of %d endpoints took the connection: %s%s", len(failures), strings.Join(words, "; "), more)
}
