package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// Group is the targets of one listener or route. Its methods may be called
// by many at once.
type Group struct {
	set     *Set
	owner   string
	balance Balance
	targets []*target
	turn    atomic.Uint64
	done    sync.Once
}

// Chosen is a connection to an endpoint. The caller says how it went, once,
// by Succeeded or Failed, and Close that it is over. Its methods are for one
// goroutine.
type Chosen struct {
	Conn    net.Conn // as dialled
	Target  string   // as it stands in the configuration
	Address string   // of the endpoint: ip:port or unix:/path

	endpoint *endpoint
	trial    bool
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

// Dial connects to an endpoint that the balance chooses among the healthy
// ones, and to the next when that fails: nothing was sent yet, so that is
// always safe. Where no healthy one is left those that are not are tried too.
// It takes no longer than timeout, the lookup of a name that was never
// resolved included, and ends at once when ctx is cancelled. Other than by
// ctx, an error tells of each of the first few endpoints.
func (g *Group) Dial(ctx context.Context, timeout time.Duration) (Chosen, error) {
	return g.DialFrom(ctx, timeout, nil)
}

// DialFrom is Dial for a connection that a listener at own has accepted: an
// endpoint that is the listener itself fails.
func (g *Group) DialFrom(ctx context.Context, timeout time.Duration, own net.Addr) (Chosen, error) {
	deadline := time.Now().Add(timeout)
	turn := g.turn.Add(1) - 1
	var few [4]*endpoint
	tried := few[:0]
	var failures []error
	for len(tried) < maxAttempts {
		e, trial, left := g.choose(turn, tried)
		if e == nil && len(tried) == 0 {
			if err := g.await(ctx, deadline, timeout); err != nil {
				return Chosen{}, err
			}
			e, trial, left = g.choose(turn, tried)
		}
		if e == nil {
			break
		}
		tried = append(tried, e)
		chosen, err := e.connect(ctx, own, trial, deadline, min(left, shares), min(fairTime, timeout/(shares+1)))
		if err == nil {
			return chosen, nil
		}
		if ctx.Err() != nil {
			return Chosen{}, err
		}
		if failures = append(failures, err); !time.Now().Before(deadline) {
			break
		}
	}
	return Chosen{}, tell(failures)
}

// choose returns the endpoint to try next, whether that is a trial, and how
// many there were to choose from; nil when all there are were tried.
func (g *Group) choose(turn uint64, tried []*endpoint) (e *endpoint, trial bool, left int) {
	var first, second [16]*endpoint // no allocation for most
	good, bad := first[:0], second[:0]
	for _, t := range g.targets {
		for _, e := range t.addresses() {
			if len(tried) > 0 && slices.Contains(tried, e) {
				continue
			}
			if ok, _ := e.eligible(); ok {
				good = append(good, e)
			} else {
				bad = append(bad, e)
			}
		}
	}
	left = len(good) + len(bad)
	for len(good) > 0 {
		n := g.pick(good, turn)
		e := good[n]
		if e.until.Load() == 0 {
			return e, false, left
		}
		if e.trying.CompareAndSwap(false, true) {
			return e, true, left
		}
		good = slices.Delete(good, n, n+1) // another connection tries it
		bad = append(bad, e)
	}
	if len(bad) == 0 {
		return nil, false, 0
	}
	return bad[g.pick(bad, turn)], false, left
}

// pick returns the index of one of the endpoints, by the balance.
func (g *Group) pick(among []*endpoint, turn uint64) int {
	start := int(turn % uint64(len(among)))
	if g.balance == RoundRobin {
		return start
	}
	best, fewest := start, among[start].active.Load()
	for i := 1; i < len(among); i++ {
		n := (start + i) % len(among)
		if active := among[n].active.Load(); active < fewest {
			best, fewest = n, active
		}
	}
	return best
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
			return g.lookupProblems()
		}
		select {
		case <-news:
		case <-timer.C:
			return fmt.Errorf("look up %s: no answer within %s", g.targets[0].host, timeout)
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

// tell joins failures into one error for a person.
func tell(failures []error) error {
	if len(failures) <= 1 {
		return errors.Join(failures...)
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

// connect dials the endpoint in its share of the time that is left. That it did
// not answer counts as a failure where the share was fair: those of before may
// have left it next to nothing.
func (e *endpoint) connect(ctx context.Context, own net.Addr, trial bool, deadline time.Time, share int, fair time.Duration) (Chosen, error) {
	e.active.Add(1)
	c := Chosen{Target: e.target.key.address, endpoint: e, trial: trial}
	limit := time.Until(deadline) / time.Duration(share)
	if share > 1 {
		deadline = time.Now().Add(limit)
	}
	var raw net.Conn
	var err error
	if e.place.leadsTo(own) {
		err = &loopError{e.name}
	} else {
		raw, err = e.dial(ctx, deadline)
	}
	if err == nil {
		c.Conn, c.Address = raw, e.name
		return c, nil
	}
	hurried := timedOut(err) && limit < fair
	if timedOut(err) {
		err = fmt.Errorf("dial %s: no answer within %s", e.name, limit.Round(time.Millisecond))
	}
	if e.target.host != "" {
		err = fmt.Errorf("%s: %w", e.target.host, err)
	}
	if ctx.Err() == nil && !ours(err) && !hurried {
		c.Failed(err)
	}
	c.Close()
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

// Succeeded notes that the far end is good: inbound that it took the
// connection, outbound that its handshake was.
func (c *Chosen) Succeeded() {
	if c.endpoint != nil {
		c.endpoint.succeeded()
		c.tried()
	}
}

// tried ends the trial, of which the outcome is known: how long the connection
// lives says nothing of the next time the endpoint is ejected.
func (c *Chosen) tried() {
	if c.trial {
		c.trial = false
		c.endpoint.trying.Store(false)
	}
}

// Failed notes that the far end is no good: what failed was its doing. Enough
// of it in a row ejects the endpoint.
func (c *Chosen) Failed(err error) {
	if c.endpoint != nil {
		c.endpoint.failure(err)
		c.tried()
	}
}

// Close notes that the connection is over, or never was. It leaves Conn to
// the caller, and does nothing the second time.
func (c *Chosen) Close() {
	if c.endpoint == nil {
		return
	}
	c.endpoint.active.Add(-1)
	c.tried()
	c.endpoint = nil
}

// Release gives the group back. Connections that were made stay, and one that
// is being made is made with the addresses there are.
func (g *Group) Release() {
	g.done.Do(func() { g.set.release(g.owner, g.targets) })
}

// Status tells of at most that many endpoints, and whether there are more. A
// name without addresses counts as one that has none.
func (g *Group) Status(most int) (list []telemetry.EndpointStatus, more bool) {
	for _, t := range g.targets {
		endpoints := t.addresses()
		problem := t.lookupProblem()
		if len(endpoints) == 0 {
			s := telemetry.EndpointStatus{Target: t.key.address, Problem: "not looked up yet"}
			if problem != nil {
				s.Problem = problem.Error()
			}
			list = append(list, s)
		}
		for _, e := range endpoints {
			if len(list) >= most {
				return list, true
			}
			s := telemetry.EndpointStatus{
				Target: t.key.address, Address: e.name, Healthy: e.healthy(), Problem: e.problem(),
				Active: int(e.active.Load()), Failed: e.failed.Load(),
			}
			if problem != nil && s.Problem == "" {
				s.Problem = "address may be old: " + problem.Error()
			}
			if until := e.until.Load(); until != 0 {
				s.EjectedUntil = g.set.base.Add(time.Duration(until))
			}
			list = append(list, s)
		}
	}
	return list[:min(len(list), most)], len(list) > most
}
