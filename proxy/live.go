package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"

	"github.com/hashicorp/go-hclog"
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

// peer returns the peer's side of the request, with c.mu held.
func (c *conn) peer() *policy.Peer {
	if c.request.Direction == policy.Inbound {
		return &c.request.From
	}
	return &c.request.To
}

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

func (c *conn) setEnds(own *identity.Identity, peer policy.Peer) { // with c.mu held
	c.own = own
	us := policy.PeerOf(own.ID, own.Certificate.Leaf)
	if c.request.Direction == policy.Inbound {
		c.request.From, c.request.To = peer, us
	} else {
		c.request.From, c.request.To = us, peer
	}
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

// verdict is whether a connection may be, and if not, why.
type verdict struct {
	ok      bool
	open    bool   // nothing was decided: requests are to come
	would   string // why it would not be, if the listener did more than audit
	always  bool   // on_policy_change does not soften it
	closing closing
}

// note keeps what came of asking, with c.mu held, and counts it when it is
// other than before. It reports whether it is.
func (c *conn) note(v verdict) (news bool) {
	was := c.outcome
	switch {
	case !v.ok:
		c.outcome = denied
	case v.would != "":
		c.outcome = audited
	default:
		c.outcome = allowed
	}
	c.would = v.would
	c.noteShadow()
	if c.outcome == was {
		return false
	}
	c.count(c.decision.Rule, c.outcome)
	if c.outcome == audited {
		c.l.wouldDeny.Add(1)
	}
	return true
}

// logOutcome says what nobody would notice otherwise: that a connection passes
// in plaintext, or only because its listener audits.
func (c *conn) logOutcome() {
	c.mu.Lock()
	came, would, plaintext := c.outcome, c.would, c.inPlaintext()
	pairs := []any{"source", c.source, "from", peerName(&c.request.From), "to", peerName(&c.request.To), "rule", c.decision.Rule}
	c.mu.Unlock()
	switch {
	case came == audited:
		c.l.logSome(&c.l.audits, hclog.Warn, "passes in an audit only: the rules refuse it", append(pairs, "reason", would)...)
	case came == allowed && plaintext:
		c.l.logSome(&c.l.plains, hclog.Info, "passes in plaintext", pairs...)
	}
}

// ask asks the connection again and reports whether it was asked (it was
// decided before and is not ending) and whether it was ended for it.
func (c *conn) ask(now time.Time) answer {
	a, audit := c.askNow(now)
	if audit {
		c.logOutcome()
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

func (c *conn) askNow(now time.Time) (a answer, audit bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == opening || c.phase == finished || c.closing != nil {
		return notAsked, false
	}
	w, was, generation := c.l.proxy.world.Load(), c.latest, c.decision.Generation
	v := c.judge(w, now)
	if generation != w.generation {
		c.moveLimits(w)
	}
	audit = !v.open && c.note(v) && c.outcome == audited
	c.against = ""
	if !v.ok {
		c.against = v.closing.why
		c.violate(v, now, c.latest)
	} else {
		c.deadlines[endPolicy] = deadline{} // a drain that an earlier policy had begun
		c.noteDrain()
	}
	c.followTarget(now)
	if c.closing == nil && c.latest != was { // other times may count, and one of them may be over
		c.check(now)
	}
	if c.closing == nil && c.latest != was {
		c.l.proxy.table.schedule(c, c.nextDue())
	}
	switch {
	case c.closing != nil && c.against == "":
		return ended, audit
	case c.closing != nil:
		return killed, audit
	case c.against != "":
		return kept, audit
	}
	return passes, audit
}

// bound returns where the connection is bound for, with c.mu held.
func (c *conn) bound() bound {
	if c.request.Direction == policy.Outbound {
		return bound{target: c.target}
	}
	b := bound{serverName: c.request.SNI, protocol: c.protocol, target: c.target}
	if h := c.request.HTTP; h != nil {
		b.host, b.path = h.Host, h.Path
	}
	return b
}

// followTarget is for a connection whose target is no longer one of its
// listener's, with c.mu held. It stays with the one it has, for as long as
// those of a removed listener may; what has not come there yet does not come.
func (c *conn) followTarget(now time.Time) {
	s := c.latest
	if c.http != nil && c.target == "" { // the next request takes the target of its moment
		return
	}
	if s.keeps(c.began, c.bound()) {
		c.deadlines[endMoved] = deadline{}
		c.noteDrain()
		return
	}
	why := closing{"drain", "its listener has no target for it any more"}
	if now := s.targetsFor(c.bound()); s.ServerName != c.began.ServerName {
		why.why = "its listener asks for another server name"
	} else if len(now) > 0 {
		why.why = "its listener has another target, " + strings.Join(now, ", ")
	}
	if c.phase != copying {
		c.kill(why)
		return
	}
	c.endLocked(endMoved, now.Add(s.Timeouts.Drain), why)
}

// under returns the settings of c's listener in w, or, once that was removed,
// the last ones, with c.mu held.
func (c *conn) under(w *world) *settings {
	if s := w.listeners[c.l]; s != nil {
		c.latest = s
	}
	return c.latest
}

// judge decides as of now in w, with c.mu held: is the peer's chain still
// good under today's bundles, is it still whom the listener expects, does the
// policy allow it.
func (c *conn) judge(w *world, now time.Time) verdict {
	s := c.under(w)
	c.request.Time = now
	if c.own == nil { // outbound, between two requests: nobody is there to be asked about
		return verdict{ok: true, open: true}
	}
	if c.inPlaintext() && s.Mode != ModePermissive {
		c.decision = policy.Decision{Generation: w.generation}
		return verdict{always: true, closing: closing{"policy", "plaintext: the listener's mode is strict by now"}}
	}
	if v := c.reverify(s.lease, now); !v.ok {
		c.decision = policy.Decision{Generation: w.generation}
		return v
	}
	if v := c.recheckProof(s, now); !v.ok {
		c.decision = policy.Decision{Generation: w.generation}
		return v
	}
	if peer := c.peer().ID; c.request.Direction == policy.Outbound && !expected(s.Expect, peer) {
		c.decision = policy.Decision{Generation: w.generation}
		return verdict{closing: closing{"policy", fmt.Sprintf("%s is not who `expect` names: %s", peer, someOf(s.Expect))}}
	}
	if c.header != nil && !s.ProxyProtocol.trusts(c.down) {
		c.decision = policy.Decision{Generation: w.generation}
		return verdict{closing: closing{"policy", fmt.Sprintf("its source %s is the word of %s, whom accept_from does not name any more", c.source, c.via)}}
	}
	if s.HTTP != nil && c.request.HTTP == nil && w.policy.Admit(&c.request) != policy.Never {
		c.decision = policy.Decision{Generation: w.generation}
		return verdict{ok: true, open: true}
	}
	c.decision = policy.Decision{} // noteShadow has the last one's memory
	w.policy.Decide(&c.request, &c.decision)
	c.decision.Generation = w.generation
	if c.decision.Allow {
		return verdict{ok: true}
	}
	why := "policy: " + c.decision.Reason.String()
	if c.decision.Rule != "" {
		why += " (" + c.decision.Rule + ")"
	}
	switch {
	case c.decision.Reason.Revoked():
		return verdict{always: true, closing: closing{"revoked", why}}
	case s.Enforcement == Audit && c.decision.Reason != policy.NoPolicy:
		return verdict{ok: true, would: why, open: s.HTTP != nil && c.request.HTTP == nil}
	}
	return verdict{closing: closing{"policy", why}}
}

// reverify checks the peer's chain and our own identity against what the
// source holds now, with c.mu held. The peer comes first: what became of our
// own identity says nothing of the bundles.
func (c *conn) reverify(lease identity.Lease, now time.Time) verdict {
	if v := c.reverifyPeer(lease.Trust(), now); !v.ok {
		return v
	}
	own, err := lease.Current()
	if err == nil && own.ID == c.own.ID {
		c.own = own
		return verdict{ok: true}
	}
	// Taken back, or expired. What was presented stays good until its end;
	// the peer learns no sooner either.
	if now.Before(c.own.NotAfter()) {
		return verdict{ok: true}
	}
	return verdict{closing: closing{"expiry", fmt.Sprintf("our own SVID %s expired at %s and was not renewed", c.own.ID, c.own.NotAfter().UTC().Format(time.RFC3339))}}
}

// reverifyPeer checks the peer's chain against the newest bundles and CRLs,
// with c.mu held.
func (c *conn) reverifyPeer(trust *identity.Trust, now time.Time) verdict {
	if c.inPlaintext() {
		return verdict{ok: true} // there is none
	}
	if err := c.standing.Recheck(trust, now); err != nil {
		return verdict{always: true, closing: closing{"revoked", err.Error()}}
	}
	return verdict{ok: true}
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

// dialling notes a dial in progress, unless the connection was ended before.
func (c *conn) dialling(cancel context.CancelFunc) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel = cancel
	return c.closing == nil
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
