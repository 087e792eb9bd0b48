package upstream

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// shelf is an endpoint's idle connections. The last that was returned is the
// first to be lent, so that those which are not needed grow old and go.
type shelf struct {
	size atomic.Int32 // len(idle), for those who only look

	mu   sync.Mutex // guards the following
	idle []parked   // in the order in which they came
}

// parked is an idle connection.
type parked struct {
	keeper Keeper
	conn   net.Conn // under it
	key    any
	group  *Group
	since  int64 // Set.tick
}

// take returns the last connection that the group returned under the key and
// that still lives.
func (e *endpoint) take(g *Group, key any) (parked, bool) {
	if g.outdated(key) {
		return parked{}, false
	}
	for e.shelf.size.Load() > 0 {
		p, ok, others := e.shelf.pop(g, key)
		closeAll(others)
		if !ok {
			break
		}
		if p.keeper.Alive() {
			return p, true
		}
		_ = p.keeper.Close()
	}
	return parked{}, false
}

// pop removes the last connection of that group and key, and with it those
// above it of that group that have another key.
func (s *shelf) pop(g *Group, key any) (p parked, ok bool, others []parked) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.idle) - 1; i >= 0 && !ok; i-- {
		if s.idle[i].group != g {
			continue
		}
		if s.idle[i].key == key {
			p, ok = s.idle[i], true
		} else {
			others = append(others, s.idle[i])
		}
		s.idle = slices.Delete(s.idle, i, i+1)
	}
	s.size.Store(int32(len(s.idle)))
	return p, ok, others
}

// keep puts a connection on the shelf, or closes it.
func (e *endpoint) keep(p parked) {
	set := e.target.set
	p.since = set.tick.Load()
	out, kept := e.put(p)
	if out.keeper != nil {
		_ = out.keeper.Close()
	}
	if kept && !set.sweeping.Load() {
		set.sweep()
	}
}

// put puts a connection on the shelf, and returns one that has to go for it, if
// any: itself, where it cannot be kept. What makes it so is set before the
// shelf is emptied, so that nothing comes upon it afterwards.
func (e *endpoint) put(p parked) (out parked, kept bool) {
	s := &e.shelf
	s.mu.Lock()
	defer s.mu.Unlock()
	most := e.target.key.limits.idle
	if most <= 0 || !e.healthy() || e.gone.Load() || p.group.released.Load() || p.group.outdated(p.key) || e.target.set.over.Load() {
		return p, false
	}
	if len(s.idle) >= most {
		out = s.idle[0]
		s.idle = slices.Delete(s.idle, 0, 1)
	}
	s.idle = append(s.idle, p)
	s.size.Store(int32(len(s.idle)))
	return out, true
}

// makeWay closes the oldest idle connections where, with one that is counted
// as active and about to be dialled, there would be more than there may be.
func (e *endpoint) makeWay() {
	most := e.target.key.limits.connections
	if most == 0 {
		return
	}
	s := &e.shelf
	s.mu.Lock()
	n := min(max(len(s.idle)+int(e.active.Load())-most, 0), len(s.idle))
	out := slices.Clone(s.idle[:n])
	s.idle = slices.Delete(s.idle, 0, n)
	s.size.Store(int32(len(s.idle)))
	s.mu.Unlock()
	closeAll(out)
}

// empty closes all idle connections.
func (e *endpoint) empty() { e.clear(func(*parked) bool { return true }) }

// clear closes the idle connections of which unwanted is true. It is asked from
// the oldest on.
func (e *endpoint) clear(unwanted func(*parked) bool) {
	s := &e.shelf
	var out []parked
	s.mu.Lock() // even where size is 0: a put may be about to change that
	s.idle = slices.DeleteFunc(s.idle, func(p parked) bool {
		if !unwanted(&p) {
			return false
		}
		out = append(out, p)
		return true
	})
	s.size.Store(int32(len(s.idle)))
	s.mu.Unlock()
	closeAll(out)
}

func closeAll(list []parked) {
	for i := range list {
		_ = list[i].keeper.Close()
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
		oldest := max(1, int64(e.target.key.limits.idleTimeout/sweepEvery))
		e.clear(func(p *parked) bool {
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
