package proxy

import (
	"fmt"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"
)

// This file is what becomes due while a connection lives, and how it is ended.

// idleChecks is how many times within an idle timeout a connection is looked
// at, so one is ended at most a quarter late.
const idleChecks = 4

// tick looks after the connection because it is due.
func (c *conn) tick(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil || c.phase == finished {
		return
	}
	c.check(now)
	if c.closing == nil {
		c.settle()
		c.l.proxy.table.schedule(c, c.nextDue())
	}
}

// settle asks streams on which nothing moved since it last looked to park,
// with c.mu held.
func (c *conn) settle() {
	for _, s := range c.streams {
		if s == nil {
			return
		}
		if sum := s.bytes.Load(); sum != s.seen {
			s.seen = sum
		} else if s.state.CompareAndSwap(moving, kicked) {
			s.src.interrupt()
		}
	}
}

// lively reports whether a stream has a goroutine that may be to be parked, or
// a request is served, with c.mu held.
func (c *conn) lively() bool {
	for _, s := range c.streams {
		if s == nil {
			continue
		}
		if state := s.state.Load(); state == moving || state == busy {
			return true
		}
	}
	return false
}

// awake sees to it that a stream which has a goroutine again is looked after.
func (c *conn) awake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing == nil {
		c.l.proxy.table.schedule(c, c.nextDue())
	}
}

// check ends the connection if one of its times has come, with c.mu held.
func (c *conn) check(now time.Time) {
	for _, end := range c.deadlines {
		if !end.at.IsZero() && !now.Before(end.at) {
			c.kill(end.why)
			return
		}
	}
	if c.phase == opening {
		return
	}
	s := c.under(c.l.proxy.world.Load())
	if s.MaxAge > 0 && now.Sub(c.start) >= s.MaxAge {
		why := closing{"expiry", fmt.Sprintf("older than max_age %s", s.MaxAge)}
		if c.http == nil {
			c.kill(why)
			return
		}
		c.endLocked(endAge, c.start.Add(s.MaxAge+s.Timeouts.Drain), why)
	}
	if end, ok := c.peerEnd(); ok && now.After(end) && s.OnPeerExpiry != ActionKeep {
		why := closing{"expiry", fmt.Sprintf("the peer's SVID expired at %s", end.UTC().Format(time.RFC3339))}
		if s.OnPeerExpiry == ActionClose {
			c.kill(why)
			return
		}
		c.endLocked(endExpiry, end.Add(s.Timeouts.Drain), why)
	}
	if v := c.recheckExpiry(now); !v.ok {
		c.violate(v, now, s)
		return
	}
	if c.own != nil && !now.Before(c.own.NotAfter()) {
		if v := c.reverify(s.lease, now); !v.ok {
			c.violate(v, now, s)
		}
	}
	if c.closing != nil {
		return
	}
	if c.http != nil {
		c.checkHTTP(now, s)
		return
	}
	c.checkIdle(now, s)
}

// checkHTTP ends waits that are over, and a client's connection that has asked
// for nothing for long or is to end, with c.mu held.
func (c *conn) checkHTTP(now time.Time, s *settings) {
	d := c.http
	d.hurry(now)
	if c.closing != nil || d.state.Load() == busy {
		c.moved = now
		return
	}
	if sum := c.in.Load(); sum != c.movedSum {
		c.movedSum, c.moved = sum, now
	}
	quiet := now.Sub(c.moved)
	if why, ok := c.drains(); ok && now.Sub(c.drainedAt) >= lameDuck(s) {
		d.leave(why)
	} else if s.Timeouts.Idle > 0 && quiet >= s.Timeouts.Idle {
		d.leave(closing{"peer", fmt.Sprintf("idle for %s", s.Timeouts.Idle)})
	}
}

// longestDuck bounds lameDuck.
const longestDuck = 2 * time.Second

// lameDuck is how long a client that may send another request is waited for
// when its connection is to end: the answer tells it so, and it loses nothing,
// while a close could cross a request on its way.
func lameDuck(s *settings) time.Duration { return min(s.Timeouts.Drain/2, longestDuck) }

// drains reports why the connection is to end, if it is, with c.mu held.
func (c *conn) drains() (closing, bool) {
	for n := endPolicy; n < causes; n++ {
		if !c.deadlines[n].at.IsZero() {
			return c.deadlines[n].why, true
		}
	}
	return closing{}, false
}

// noteDrain has requests end the connection after them while it is to end, with
// c.mu held.
func (c *conn) noteDrain() {
	if c.http == nil {
		return
	}
	_, drains := c.drains()
	if !drains {
		c.drainedAt = time.Time{}
	} else if c.drainedAt.IsZero() {
		c.drainedAt = time.Now()
	}
	c.http.draining.Store(drains)
}

// peerEnd returns when the peer's SVID ends, if it is there and showed one, with
// c.mu held.
func (c *conn) peerEnd() (time.Time, bool) {
	if c.standing == nil {
		return time.Time{}, false
	}
	return c.standing.NotAfter(), true
}

// violate applies on_policy_change to a verdict, with c.mu held. What is not
// copying yet is not there to be kept: it is refused.
func (c *conn) violate(v verdict, now time.Time, s *settings) {
	switch {
	case v.always || c.phase != copying || s.OnPolicyChange == ActionClose:
		c.kill(v.closing)
	case s.OnPolicyChange == ActionDrain:
		c.endLocked(endPolicy, now.Add(s.Timeouts.Drain), v.closing)
	}
}

func (c *conn) checkIdle(now time.Time, s *settings) {
	if c.phase != copying || s.Timeouts.Idle < 0 {
		return
	}
	if sum := c.in.Load() + c.out.Load(); sum != c.movedSum {
		c.movedSum, c.moved = sum, now
	} else if now.Sub(c.moved) >= s.Timeouts.Idle {
		c.kill(closing{"peer", fmt.Sprintf("idle for %s", s.Timeouts.Idle)})
	}
}

// nextDue returns when the connection next needs attention, with c.mu held.
// Zero is never.
func (c *conn) nextDue() time.Time {
	var next time.Time
	sooner := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	for _, end := range c.deadlines {
		if !end.at.IsZero() {
			sooner(end.at)
		}
	}
	if c.phase == opening {
		return next
	}
	now := time.Now()
	s := c.under(c.l.proxy.world.Load())
	if c.lively() {
		sooner(now.Add(parkAfter))
	}
	if s.MaxAge > 0 {
		sooner(c.start.Add(s.MaxAge))
	}
	if end, ok := c.peerEnd(); ok && s.OnPeerExpiry != ActionKeep && !now.After(end) {
		sooner(end.Add(time.Millisecond))
	}
	if c.own != nil && now.Before(c.own.NotAfter()) {
		sooner(c.own.NotAfter())
	}
	if c.proof != (identity.JWT{}) {
		sooner(c.proof.NotAfter)
	}
	if c.http != nil {
		c.soonerHTTP(s, sooner)
	}
	if c.phase == copying && s.Timeouts.Idle > 0 {
		sooner(now.Add(s.Timeouts.Idle / idleChecks))
	}
	return next
}

// soonerHTTP tells of what an HTTP client's connection is due for, with c.mu
// held.
func (c *conn) soonerHTTP(s *settings, sooner func(time.Time)) {
	c.http.sooner(sooner)
	if !c.drainedAt.IsZero() && c.http.state.Load() != busy && !c.http.leaving.Load() {
		sooner(c.drainedAt.Add(lameDuck(s)))
	}
}

// endBy ends the connection at the given time unless it has ended before. Of
// two ends for the same cause the earlier one counts.
func (c *conn) endBy(cause cause, at time.Time, why closing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked(cause, at, why)
}

func (c *conn) endLocked(cause cause, at time.Time, why closing) {
	if c.closing != nil || c.phase == finished { // one that was refused may have ended unidentified
		return
	}
	if set := c.deadlines[cause].at; !set.IsZero() && !at.Before(set) {
		return
	}
	c.deadlines[cause] = deadline{at, why}
	c.noteDrain()
	c.l.proxy.table.schedule(c, c.nextDue())
}

// kill ends the connection now, with c.mu held. Both ends are broken off, so
// that neither takes what it has for the whole.
func (c *conn) kill(why closing) {
	if c.closing != nil {
		return
	}
	c.closing = &why
	if c.cancel != nil {
		c.cancel()
	}
	if c.up != nil {
		abort(c.up)
	}
	abort(c.down)
	c.wakeStreams()
}

// wakeStreams has parked streams find out that their sockets were closed, with
// c.mu held.
func (c *conn) wakeStreams() {
	for _, s := range c.streams {
		if s != nil {
			s.wake()
		}
	}
}

// breakOff ends the connection because one side broke off, with c.mu held.
// The other side is told so; what was already sent to the one that left may
// still reach it.
func (c *conn) breakOff(from side, why closing) {
	if c.closing != nil {
		return
	}
	c.closing = &why
	if from == client {
		abort(c.up)
		_ = c.down.Close()
	} else {
		abort(c.down)
		_ = c.up.Close()
	}
	c.wakeStreams()
}

// ended returns why the connection was ended, or nil while it was not.
func (c *conn) ended() *closing {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closing
}

// deadline is when and why a connection will be ended. A zero at is never.
type deadline struct {
	at  time.Time
	why closing
}

// cause is what set a deadline: each can be taken back without the others.
type cause int

const (
	endHello cause = iota
	endHandshake
	endPolicy
	endExpiry
	endDrain
	endMoved
	endAge
	causes
)
