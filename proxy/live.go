package proxy

import (
	"cmp"
	"errors"
	"net"
	"slices"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is what happens to a connection while it lives: it is registered
// before it is decided, and asked again on every change.
//
// There is no window between the decision and a change. Who changes the
// world or an identity first swaps the pointer and then asks every
// connection in the table; a connection loads the pointer under its mutex
// when it is asked. One that was registered before the swap is asked again
// after it, and one that was not yet asked loads the new pointer.
//
// Nor is there one between rules and targets: a connection is decided by the
// rules of a world whose settings of its listener are those it began under,
// or refused.

// identify notes who the two ends are. From here on changes ask the
// connection.
func (c *conn) identify(s *session, t *secured, serverName string) error {
	cs := t.ConnectionState()
	peer, err := peerOf(&cs)
	if err != nil { // cannot happen: the handshake read it before
		return refuse("refused", "%v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.standing, err = s.trust.Stand(peer.ID, cs.PeerCertificates, time.Now()); err != nil { // verified a moment ago, or expired since
		return refuse("refused", "%v", err)
	}
	c.setEnds(s.identity, peer)
	c.request.SNI, c.protocol = normalSNI(serverName), cs.NegotiatedProtocol
	c.deadlines[endHandshake] = deadline{}
	return nil
}

// notePeer keeps who a refused peer said it was, for the access record: its
// certificate named it, though it was not believed.
func (c *conn) notePeer(s *session, err error) {
	var id spiffeid.ID
	var pe *identity.PeerError
	if errors.As(err, &pe) {
		id = pe.ID
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setEnds(s.identity, policy.Peer{ID: id})
}

// decide asks for the first time.
func (c *conn) decide() error {
	err := c.decideNow(time.Now())
	c.logOutcome()
	return err
}

func (c *conn) decideNow(now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		return refuse("refused", "%s", c.closing.why)
	}
	w := c.l.proxy.world.Load()
	s := w.listeners[c.l]
	if what := c.began.replaced(s, c.bound()); what != "" {
		return refuse("refused", "the %s while the handshake was going on", what)
	}
	if !c.believed(s) {
		return refuse("refused", "the listener's accept_from changed while the handshake was going on")
	}
	if own, err := s.lease.Current(); err != nil {
		return refuse("failed", "our own SVID %s went while the handshake was going on: %v", c.own.ID, err)
	} else if own.ID != c.own.ID {
		return refuse("failed", "our own SVID %s went while the handshake was going on: the listener presents %s by now", c.own.ID, own.ID)
	}
	c.phase = decided
	c.moved = now
	v := c.judge(w, now)
	if !v.open {
		c.note(v)
	}
	if !v.ok {
		return refuse("denied", "%s", v.closing.why)
	}
	if err := c.takeLimits(w); err != nil {
		return err
	}
	c.l.proxy.table.schedule(c, c.nextDue())
	return nil
}

// logOutcome says what nobody would notice otherwise.
func (c *conn) logOutcome() {
	c.mu.Lock()
	p := c.passing()
	c.mu.Unlock()
	c.l.logPassing(p)
}

// ask asks the connection again and reports whether it was asked (it was
// decided before and is not ending) and whether it was ended for it.
func (c *conn) ask(now time.Time) answer {
	a, audits := c.askNow(now)
	for _, p := range audits {
		c.l.logPassing(p)
	}
	return a
}

// answer is what became of a connection that was asked again.
type answer int

const (
	notAsked answer = iota
	passes
	kept   // against the rules: on_policy_change keeps it, or drains it
	killed // likewise
	ended  // for another reason: a target that is not its own any more, a shorter time
	answers
)

func (c *conn) askNow(now time.Time) (a answer, audits []passing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == opening || c.phase == finished || c.closing != nil {
		return notAsked, nil
	}
	w, was, generation := c.l.proxy.world.Load(), c.latest, c.decision.Generation
	against, reset := false, false
	for q := range c.questions {
		if q.askAgain(w, now) {
			audits = append(audits, q.passing())
		}
		against = against || q.against != "" && q.reset == nil
		reset = reset || q.reset != nil && q.reset.why == q.against
		if c.closing != nil {
			break
		}
	}
	if generation != w.generation {
		c.moveLimits(w)
	}
	if c.closing == nil && c.latest != was { // other times may count, and one of them may be over
		c.check(now)
	}
	if c.closing == nil && c.latest != was {
		c.l.proxy.table.schedule(c, c.nextDue())
	}
	switch {
	case c.closing != nil && !against:
		return ended, audits
	case c.closing != nil, reset:
		return killed, audits
	case against:
		return kept, audits
	}
	return passes, audits
}

// under returns the settings of c's listener in w, or, once that was removed,
// the last ones, with c.mu held.
func (c *conn) under(w *world) *settings {
	if s := w.listeners[c.l]; s != nil {
		c.latest = s
	}
	return c.latest
}

// expected reports whether id is one of those a listener expects.
func expected(expect []policy.Pattern, id spiffeid.ID) bool {
	for _, p := range expect {
		if p.Match(id) {
			return true
		}
	}
	return false
}

// attach gives the connection its upstream, which it came to by target, or
// closes it at once when the connection was ended meanwhile.
func (c *conn) attach(up net.Conn, target string) bool {
	noticeTargetLoss(up, c.began)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		_ = up.Close()
		return false
	}
	c.up, c.target = up, target
	if c.request.Direction == policy.Outbound {
		c.request.Port = portOf(up.RemoteAddr())
	}
	return true
}

// startCopying has both streams run, unless the connection was ended before.
func (c *conn) startCopying(forth, back *stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		return false
	}
	c.streams = [2]*sleeper{&forth.sleeper, &back.sleeper}
	c.live.Store(int32(len(c.streams)))
	c.phase, c.moved = copying, time.Now()
	c.l.meters.allowed.Inc()
	c.l.proxy.table.schedule(c, c.nextDue())
	return true
}

// status describes the connection, or returns false while nobody knows whose
// it is.
func (c *conn) status() (telemetry.ConnectionStatus, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == opening {
		return telemetry.ConnectionStatus{}, false
	}
	return telemetry.ConnectionStatus{
		From: peerName(&c.request.From), To: peerName(&c.request.To), WouldDeny: cmp.Or(c.would, c.against), Source: c.source, Rule: c.decision.Rule, Since: c.start,
		Shadow: slices.Clone(c.decision.Shadow),
	}, true
}
