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
// a request is served, with c.mu held. One that was asked to park is still lively:
// bytes may have come first, and a request that they are is looked after.
func (c *conn) lively() bool {
	for _, s := range c.streams {
		if s == nil {
			continue
		}
		if state := s.state.Load(); state != parked && state != over {
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

// hasten sees to it that the connection is looked after by then.
func (c *conn) hasten(by time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing == nil {
		c.l.proxy.table.hasten(c, by)
	}
}

// check ends the connection, or what is decided on it, if one of its times has
// come, with c.mu held.
func (c *conn) check(now time.Time) {
	for q := range c.questions {
		if q.checkDeadlines(now); c.closing != nil {
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
	for q := range c.questions {
		if q.checkExpiry(now, s); c.closing != nil {
			return
		}
	}
	if c.http != nil {
		c.http.check(now, s)
		return
	}
	c.checkIdle(now, s)
}

// checkDeadlines ends what is past one of its deadlines, with c.mu held.
func (q *question) checkDeadlines(now time.Time) {
	for i := range q.deadlines {
		if end := &q.deadlines[i]; !end.at.IsZero() && !now.Before(end.at) {
			q.end(end.why)
			return
		}
	}
}

// checkExpiry ends, as far as the settings have it, what depends on an SVID or
// token whose time is over, with c.mu held.
func (q *question) checkExpiry(now time.Time, s *settings) {
	if end, ok := q.peerEnd(); ok && now.After(end) && s.OnPeerExpiry != ActionKeep {
		why := closing{"expiry", fmt.Sprintf("the peer's SVID expired at %s", end.UTC().Format(time.RFC3339))}
		if s.OnPeerExpiry == ActionClose {
			q.end(why)
			return
		}
		q.endLocked(endExpiry, end.Add(s.Timeouts.Drain), why)
	}
	if v := q.recheckExpiry(now); !v.ok {
		q.violate(v, now, s)
		return
	}
	if q.own != nil && !now.Before(q.own.NotAfter()) {
		if v := q.reverify(s.lease, now); !v.ok {
			q.violate(v, now, s)
		}
	}
}

// longestDuck bounds lameDuck.
const longestDuck = 2 * time.Second

// lameDuck is how long a client that may send another request is waited for
// when its connection is to end: the answer tells it so, and it loses nothing,
// while a close could cross a request on its way.
func lameDuck(s *settings) time.Duration { return min(s.Timeouts.Drain/2, longestDuck) }

// drains reports why it is to end, if it is, with c.mu held.
func (q *question) drains() (closing, bool) {
	for n := endPolicy; n < causes; n++ {
		if !q.deadlines[n].at.IsZero() {
			return q.deadlines[n].why, true
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
	c.http.drain(drains)
}

// peerEnd returns when the peer's SVID ends, if it is there and showed one, with
// c.mu held.
func (q *question) peerEnd() (time.Time, bool) {
	if q.standing == nil {
		return time.Time{}, false
	}
	return q.standing.NotAfter(), true
}

// violate applies on_policy_change to a verdict, with c.mu held. What is not
// copying yet is not there to be kept: it is refused.
func (q *question) violate(v verdict, now time.Time, s *settings) {
	switch {
	case v.always || q.c.phase != copying || s.OnPolicyChange == ActionClose:
		q.end(v.closing)
	case s.OnPolicyChange == ActionDrain:
		q.endLocked(endPolicy, now.Add(s.Timeouts.Drain), v.closing)
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
	for q := range c.questions {
		if q.reset == nil { // else it is about to be gone
			q.soonerDeadline(sooner)
		}
	}
	if c.phase == opening {
		return next
	}
	now := time.Now()
	s := c.under(c.l.proxy.world.Load())
	for q := range c.questions {
		if q.reset == nil {
			q.soonerExpiry(now, s, sooner)
		}
	}
	if c.lively() {
		sooner(now.Add(parkAfter))
	}
	if s.MaxAge > 0 && c.deadlines[endAge].at.IsZero() { // once that is over it has a deadline
		sooner(c.start.Add(s.MaxAge))
	}
	if c.http != nil {
		c.http.sooner(s, sooner)
	}
	if c.phase == copying && s.Timeouts.Idle > 0 {
		sooner(now.Add(s.Timeouts.Idle / idleChecks))
	}
	return next
}

// soonerDeadline tells of when it is to end, with c.mu held.
func (q *question) soonerDeadline(sooner func(time.Time)) {
	for i := range q.deadlines {
		if at := q.deadlines[i].at; !at.IsZero() {
			sooner(at)
		}
	}
}

// soonerExpiry tells of when an SVID or token ends that it depends on, with c.mu
// held.
func (q *question) soonerExpiry(now time.Time, s *settings, sooner func(time.Time)) {
	if end, ok := q.peerEnd(); ok && s.OnPeerExpiry != ActionKeep && !now.After(end) {
		sooner(end.Add(time.Millisecond))
	}
	if q.own != nil && now.Before(q.own.NotAfter()) {
		sooner(q.own.NotAfter())
	}
	if q.proof != (identity.JWT{}) {
		sooner(q.proof.NotAfter)
	}
}

// endBy ends it at the given time unless it has ended before. Of two ends for
// the same cause the earlier one counts.
func (q *question) endBy(cause cause, at time.Time, why closing) {
	q.c.mu.Lock()
	defer q.c.mu.Unlock()
	q.endLocked(cause, at, why)
}

func (q *question) endLocked(cause cause, at time.Time, why closing) {
	c := q.c
	if q.closed() != nil || c.phase == finished { // one that was refused may have ended unidentified
		return
	}
	if set := q.deadlines[cause].at; !set.IsZero() && !at.Before(set) {
		return
	}
	q.deadlines[cause] = deadline{at, why}
	c.noteDrain()
	c.l.proxy.table.schedule(c, c.nextDue())
}

// end ends what is asked about now, with c.mu held: the connection, or itself
// alone.
func (q *question) end(why closing) {
	switch {
	case q.alone == nil:
		q.c.kill(why)
	case q.closed() == nil:
		q.reset = &why
		q.alone(why) // first: why it ended is not that its target was let go of
		q.letGo()
	}
}

// letGo breaks off what it has of a target, with c.mu held.
func (q *question) letGo() {
	if q.cancel != nil {
		q.cancel()
	}
	if q.up != nil {
		abort(q.up)
	}
	if q.rouse != nil {
		q.rouse()
	}
}

// kill ends the connection now, with c.mu held. Both ends are broken off, so
// that neither takes what it has for the whole.
func (c *conn) kill(why closing) {
	if c.closing != nil {
		return
	}
	c.closing = &why
	for q := range c.questions {
		q.letGo()
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
		c.letGo()
		_ = c.down.Close()
	} else {
		abort(c.down)
		if c.up != nil { // else it is a stream, and has ended
			_ = c.up.Close()
		}
	}
	c.wakeStreams()
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
