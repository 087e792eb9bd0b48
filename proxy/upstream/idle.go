package upstream

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// shelf is an endpoint's connections that can be lent: idle ones, and shared ones
// whether they are idle or not. The last that was returned is the first to be
// lent, so that those which are not needed grow old and go.
type shelf struct {
	size atomic.Int32 // of those that nobody has, for those who only look

	mu     sync.Mutex // guards the following
	idle   []parked   // in the order in which they came
	shared []*parked  // those too
	lying  int        // of these, how many have no loan
	making []*making  // connections that may come to be shared
	marks  []mark     // where they did not
}

// parked is a connection on the shelf, or one that was.
type parked struct {
	keeper Keeper
	conn   net.Conn // under it
	key    any
	group  *Group
	shares bool  // who made it would have shared it; who borrows it would, too
	since  int64 // Set.tick, from when nobody has it

	shared Shared // keeper, or nil: it has one loan at a time
	loans  int    // of a shared one
	off    bool   // it is shared no longer
}

// busy reports whether a connection on the shelf is in use.
func (p *parked) busy() bool { return p.shared != nil && (p.loans > 0 || !p.shared.Idle()) }

// countLocked tells those who only look.
func (h *shelf) countLocked() { h.size.Store(int32(len(h.idle) + h.lying)) }

// popLocked moves the last connection that the group returned under the key to
// the choice, and removes with it those above it of that group that have another
// key.
func (h *shelf) popLocked(s *search, c *choice) (others []Keeper) {
	for i := len(h.idle) - 1; i >= 0 && c.idle == nil; i-- {
		at := &h.idle[i]
		switch {
		case at.group != s.group || at.key == s.key && at.shares != s.shares:
			continue
		case at.key == s.key:
			c.idle, c.conn = at.keeper, at.conn
		default:
			others = append(others, at.keeper)
		}
		h.idle = slices.Delete(h.idle, i, i+1)
	}
	h.countLocked()
	return others
}

// keep puts a connection on the shelf, or closes it.
func (e *endpoint) keep(p parked) {
	set := e.target.set
	p.since = set.tick.Load()
	out, kept := e.put(p)
	closeAll(out)
	if kept && !set.sweeping.Load() {
		set.sweep()
	}
}

// put puts a connection on the shelf, and returns one that has to go for it, if
// any: itself, where it cannot be kept. What makes it so is set before the
// shelf is emptied, so that nothing comes upon it afterwards.
func (e *endpoint) put(p parked) (out []Keeper, kept bool) {
	h := &e.shelf
	h.mu.Lock()
	defer h.mu.Unlock()
	e.conns.Add(-1)
	most := e.limits.idle
	if most <= 0 || !e.open(p.group, p.key) {
		return []Keeper{p.keeper}, false
	}
	if len(h.idle)+h.lying >= most {
		out = h.oldestLocked(nil)
	}
	h.idle = append(h.idle, p)
	h.countLocked()
	return out, true
}

// oldestLocked takes the connection from the shelf that nobody has for the
// longest time, and appends it to out.
func (h *shelf) oldestLocked(out []Keeper) []Keeper {
	oldest := -1
	for i, p := range h.shared {
		if !p.busy() && (oldest < 0 || p.since < h.shared[oldest].since) {
			oldest = i
		}
	}
	if len(h.idle) > 0 && (oldest < 0 || h.idle[0].since <= h.shared[oldest].since) {
		out = append(out, h.idle[0].keeper)
		h.idle = slices.Delete(h.idle, 0, 1)
		h.countLocked()
		return out
	}
	if oldest >= 0 {
		return h.removeLocked(oldest, out)
	}
	return out
}

// makeWayLocked takes the oldest idle connections from the shelf where, with
// those in use, there are more than there may be.
func (e *endpoint) makeWayLocked(out []Keeper) []Keeper {
	most := e.limits.connections
	if most == 0 {
		return out
	}
	for range int(e.conns.Load()) + len(e.shelf.idle) + e.shelf.lying - most {
		out = e.shelf.oldestLocked(out)
	}
	return out
}

// empty closes all idle connections, and has nobody join the shared ones.
func (e *endpoint) empty() { e.clear(func(*parked) bool { return true }) }

// clear takes the connections from the shelf of which unwanted is true, and
// closes those that nobody has. It is asked from the oldest on.
func (e *endpoint) clear(unwanted func(*parked) bool) {
	h := &e.shelf
	var out []Keeper
	h.mu.Lock() // even where size is 0: a put may be about to change that
	h.idle = slices.DeleteFunc(h.idle, func(p parked) bool {
		if !unwanted(&p) {
			return false
		}
		out = append(out, p.keeper)
		return true
	})
	for i := 0; i < len(h.shared); {
		if unwanted(h.shared[i]) {
			out = h.removeLocked(i, out)
		} else {
			i++
		}
	}
	h.countLocked()
	h.mu.Unlock()
	closeAll(out)
}

func closeAll(list []Keeper) {
	for _, k := range list {
		_ = k.Close()
	}
}

const (
	// sweepEvery is how often the sweeper looks for idle connections that are
	// old, and what it counts time in: who lends and returns reads no clock.
	sweepEvery = time.Second
	// askEvery is after how many of these it asks one whether it lives, so that
	// what the far end has closed does not stay half open.
	askEvery = 5
)

// sweep starts the sweeper, unless there is one. It lives for as long as there
// are idle connections.
func (s *Set) sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.sweeping.CompareAndSwap(false, true) {
		return
	}
	s.work.Go(func() {
		ticker := time.NewTicker(sweepEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
			case <-s.ctx.Done():
				return
			}
			s.tick.Add(1)
			if s.sweepOnce() {
				continue
			}
			// One that is returned from here on starts another sweeper. One
			// that came since the shelves were seen did not.
			s.sweeping.Store(false)
			if !s.sweepOnce() || !s.sweeping.CompareAndSwap(false, true) {
				return
			}
		}
	})
}

// sweepOnce closes what is idle for too long, or dead, and reports whether any
// is left. It tells the owners' meters how many.
func (s *Set) sweepOnce() bool {
	now := s.tick.Load()
	idle := map[*telemetry.Gauge]int32{}
	var left int32
	for _, e := range s.endpoints() {
		oldest := max(1, int64(e.limits.idleTimeout/sweepEvery))
		e.clear(func(p *parked) bool {
			if p.busy() {
				p.since = now
				return !p.keeper.Alive()
			}
			age := now - p.since
			return age >= oldest || age > 0 && age%askEvery == 0 && !p.keeper.Alive()
		})
		size := e.shelf.size.Load()
		idle[e.target.meters.Idle] += size
		left += size
	}
	for gauge, n := range idle {
		gauge.Set(float64(n))
	}
	return left > 0
}
