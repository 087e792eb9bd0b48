package upstream

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// Group is the targets of one listener or route. Its methods may be called
// by many at once.
type Group struct {
	Budget Budget // of retries

	set     *Set
	owner   string
	balance Balance
	targets []*target
	turn    atomic.Uint64
	line    line // who waits for room at an endpoint

	stays    atomic.Pointer[any] // the only key that is kept, since Forget
	done     sync.Once
	released atomic.Bool
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

// Dial connects to an endpoint that the balance chooses among the healthy
// ones, and to the next when that fails: nothing was sent yet, so that is
// always safe. Where no healthy one is left those that are not are tried too.
// It takes no longer than timeout, the lookup of a name that was never
// resolved included, and ends at once when ctx is cancelled. Other than by
// ctx, an error is ErrDown or ErrTimeout and tells of each of the first few
// endpoints.
func (g *Group) Dial(ctx context.Context, timeout time.Duration) (Chosen, error) {
	return g.DialFrom(ctx, timeout, nil)
}

// DialFrom is Dial for a connection that a listener at own has accepted: an
// endpoint that is the listener itself fails.
func (g *Group) DialFrom(ctx context.Context, timeout time.Duration, own net.Addr) (Chosen, error) {
	s := search{group: g, ctx: ctx, timeout: timeout, own: own, turn: g.turn.Add(1) - 1}
	loan, err := s.run(nil)
	return loan.Chosen, err
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
		c.endpoint.target.meters.ConnectFailures.Inc()
		c.endpoint.failed.Add(1)
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
	c.tried()
	c.endpoint.leave(nil)
	c.endpoint = nil
}

// Release gives the group back. Connections that were made stay, and one that
// is being made is made with the addresses there are. Idle ones are closed,
// those that are returned from now on are too, and shared ones end with their
// last loan.
func (g *Group) Release() {
	g.done.Do(func() {
		g.released.Store(true)
		g.clear(func(any) bool { return true })
		g.set.release(g.owner, g.targets)
	})
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
				Active: int(e.active.Load()), Idle: int(e.shelf.size.Load()), Failed: e.failed.Load(),
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
