package upstream

import (
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// endpoint is one address of a target, with what is known of its health. Who
// chooses reads atomics alone; the mutex is for failures, and for the first
// success after one.
type endpoint struct {
	target *target
	place  place
	name   string // of place, for people

	limits limits        // of target.key: read for each choice
	shelf  shelf         // its idle connections, and those that are shared
	active atomic.Int64  // connections and loans from here, those being made too
	conns  atomic.Int64  // the connections of these: one that is shared counts once
	failed atomic.Uint64 // connections that failed, in all
	fails  atomic.Int32  // of those, the last ones in a row
	until  atomic.Int64  // by Set.clock, when it may be tried again; 0: it is not ejected
	trying atomic.Bool   // one connection tries whether it can come back
	down   atomic.Bool   // active checks failed
	gone   atomic.Bool   // the target has this address no longer

	mu       sync.Mutex // guards the following
	ejected  int        // how many times without a success between
	why      string     // the last failure
	downWhy  string     // the last failed check
	inARow   int        // checks with the same outcome
	lastGood bool       // of these
}

func newEndpoint(t *target, p place) *endpoint {
	return &endpoint{target: t, place: p, name: p.String(), limits: t.key.limits}
}

// maxGrowth bounds the time of an ejection, in times of the first.
const maxGrowth = 10

// healthy reports whether it is chosen like any other.
func (e *endpoint) healthy() bool { return e.until.Load() == 0 && !e.down.Load() }

// eligible reports whether it may be chosen while others are healthy, and
// whether that would be a trial.
func (e *endpoint) eligible() (ok, trial bool) {
	if e.down.Load() {
		return false, false
	}
	until := e.until.Load()
	if until == 0 {
		return true, false
	}
	trial = e.target.set.clock() >= until && !e.trying.Load()
	return trial, trial
}

// leave counts one active less and the connection it had for itself, or else
// the shared one, and tells those who wait for room. The connection is counted last, so
// that there are never more active ones that have one for themselves than
// connections.
func (e *endpoint) leave(shared *parked) {
	e.active.Add(-1)
	if shared != nil {
		e.part(shared)
	} else {
		e.conns.Add(-1)
	}
	e.target.wake()
}

// full reports whether there is no room for a loan. Of one that shares this says
// nothing of connections: shared ones are asked when the endpoint is chosen.
func (e *endpoint) full(shares bool) bool {
	most := e.limits.requests
	return most > 0 && e.active.Load() >= int64(most) || !shares && !e.roomy()
}

// roomy reports whether one more connection may be in use: idle ones make way
// for it.
func (e *endpoint) roomy() bool {
	most := e.limits.connections
	return most == 0 || e.conns.Load() < int64(most)
}

// open reports whether what was made for a group under a key may be lent from
// now on.
func (e *endpoint) open(g *Group, key any) bool {
	return e.healthy() && !e.gone.Load() && !g.released.Load() && !g.outdated(key) && !e.target.set.over.Load()
}

// succeeded notes that a connection was good.
func (e *endpoint) succeeded() {
	if e.fails.Load() == 0 && e.until.Load() == 0 {
		return
	}
	e.mu.Lock()
	e.fails.Store(0)
	was := e.until.Swap(0)
	e.ejected, e.why = 0, ""
	e.mu.Unlock()
	if was != 0 {
		t := e.target
		t.set.Log.Info("endpoint is back", "listener", t.key.owner, "target", t.key.address, "endpoint", e.name)
		t.set.recount(t.key.owner)
		t.wake()
	}
}

// failure notes that a connection was not, or what came over it, and ejects the
// endpoint once that happened often enough in a row.
func (e *endpoint) failure(err error) {
	t := e.target
	now := t.set.clock()
	e.mu.Lock()
	fails := e.fails.Add(1)
	e.why = err.Error()
	until := e.until.Load()
	eject := until != 0 && now >= until || until == 0 && t.key.ejection.After > 0 && int(fails) >= t.key.ejection.After
	var pause time.Duration
	if eject {
		pause = min(t.key.ejection.For<<min(e.ejected, 4), maxGrowth*t.key.ejection.For)
		e.ejected++
		e.until.Store(now + int64(later(pause)))
	}
	e.mu.Unlock()
	if !eject {
		return
	}
	t.meters.Ejections.Inc()
	t.set.Log.Warn("endpoint ejected: it is left out while another one is healthy",
		"listener", t.key.owner, "target", t.key.address, "endpoint", e.name, "failures", fails, "for", pause, "error", err)
	e.empty()
	t.set.recount(t.key.owner)
	t.wake()
}

// problem says why the endpoint is not healthy; empty when it is.
func (e *endpoint) problem() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.down.Load():
		return "health check: " + e.downWhy
	case e.until.Load() != 0:
		return "ejected: " + e.why
	}
	return ""
}

// ours reports whether a dial failed for want of something here, which says
// nothing of the endpoint.
func ours(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
