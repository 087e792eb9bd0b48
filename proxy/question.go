package proxy

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is what the policy is asked, and what comes of it.

// question is one thing that the policy is asked about, and what came of it: a
// connection, with HTTP/1.1 together with the request that it carries. It is
// guarded by its connection's mutex, but for what is said of a field. Those of
// one connection are asked one after another.
type question struct {
	c *conn

	// alone ends what is asked about and leaves its connection, with c.mu held.
	// Nil is the connection itself.
	alone func(why closing)
	reset *closing // why it was ended alone; set once

	began     *settings          // in force when what it was dialled by was chosen; belongs to who serves it
	up        net.Conn           // as dialled, without TLS
	target    string             // of began.Targets, the one it came to; empty before that
	cancel    context.CancelFunc // ends the dial in progress
	abandoned bool               // nobody waits for the target any more; set once
	rouse     func()             // has who waits for the target, without up, look why it should not
	ctx       context.Context    // of dials, once there was one; belongs to who serves it

	request  policy.Request
	proof    identity.JWT // that came with request.HTTP
	decision policy.Decision
	outcome  outcome            // of the decision, as it was counted
	would    string             // why it would be refused, if its listener did more than audit
	against  string             // why the rules refuse it, though it is kept or drains
	shadow   shadow             // of the decision, as it was counted
	own      *identity.Identity // what we present
	standing *identity.Standing // the peer's; nil in plaintext

	deadlines [causes]deadline // when it is ended at the latest
}

// questions yields what is decided on the connection, with c.mu held: itself
// first, so that what comes of that counts for all.
func (c *conn) questions(yield func(*question) bool) {
	if yield(&c.question) && c.http != nil {
		c.http.questions(yield)
	}
}

// closed returns why it was ended, or nil while it was not, with c.mu held.
func (q *question) closed() *closing {
	if q.reset != nil {
		return q.reset
	}
	return q.c.closing
}

// ended is closed without c.mu.
func (q *question) ended() *closing {
	q.c.mu.Lock()
	defer q.c.mu.Unlock()
	return q.closed()
}

// peer returns the peer's side of the request, with c.mu held.
func (q *question) peer() *policy.Peer {
	if q.request.Direction == policy.Inbound {
		return &q.request.From
	}
	return &q.request.To
}

func (q *question) setEnds(own *identity.Identity, peer policy.Peer) { // with c.mu held
	q.own = own
	us := policy.PeerOf(own.ID, own.Certificate.Leaf)
	if q.request.Direction == policy.Inbound {
		q.request.From, q.request.To = peer, us
	} else {
		q.request.From, q.request.To = us, peer
	}
}

// bound returns where it is bound for, with c.mu held.
func (q *question) bound() bound {
	if q.request.Direction == policy.Outbound {
		return bound{target: q.target}
	}
	b := bound{serverName: q.request.SNI, protocol: q.c.protocol, target: q.target}
	if h := q.request.HTTP; h != nil {
		b.host, b.path = h.Host, h.Path
	}
	return b
}

// dialling notes a dial in progress, unless it was ended before.
func (q *question) dialling(cancel context.CancelFunc) bool {
	q.c.mu.Lock()
	defer q.c.mu.Unlock()
	q.cancel = cancel
	return q.closed() == nil && !q.abandoned
}

// abandon has nobody wait for the target any more, whether it is there or is yet
// to come, with c.mu held.
func (q *question) abandon() {
	q.abandoned = true
	if q.cancel != nil {
		q.cancel()
	}
	q.interruptTarget()
}

// dialContext ends with what is asked about.
func (q *question) dialContext() context.Context {
	if q.ctx == nil {
		ctx, cancel := context.WithCancel(context.Background())
		if !q.dialling(cancel) {
			cancel()
		}
		q.ctx = ctx
	}
	return q.ctx
}

// verdict is whether a connection may be, and if not, why.
type verdict struct {
	ok      bool
	open    bool   // nothing was decided: requests are to come
	would   string // why it would not be, if the listener did more than audit
	always  bool   // on_policy_change does not soften it
	closing closing
}

// judge decides as of now in w, with c.mu held: is the peer's chain still
// good under today's bundles, is it still whom the listener expects, does the
// policy allow it.
func (q *question) judge(w *world, now time.Time) verdict {
	c := q.c
	s := c.under(w)
	q.request.Time = now
	if q.own == nil { // outbound, between two requests: nobody is there to be asked about
		return verdict{ok: true, open: true}
	}
	if q.inPlaintext() && s.Mode != ModePermissive {
		q.decision = policy.Decision{Generation: w.generation}
		return verdict{always: true, closing: closing{"policy", "plaintext: the listener's mode is strict by now"}}
	}
	if v := q.reverify(s.lease, now); !v.ok {
		q.decision = policy.Decision{Generation: w.generation}
		return v
	}
	if v := q.recheckProof(s, now); !v.ok {
		q.decision = policy.Decision{Generation: w.generation}
		return v
	}
	if peer := q.peer().ID; q.request.Direction == policy.Outbound && !expected(s.Expect, peer) {
		q.decision = policy.Decision{Generation: w.generation}
		return verdict{closing: closing{"policy", fmt.Sprintf("%s is not who `expect` names: %s", peer, someOf(s.Expect))}}
	}
	if c.header != nil && !s.ProxyProtocol.trusts(c.down) {
		q.decision = policy.Decision{Generation: w.generation}
		return verdict{closing: closing{"policy", fmt.Sprintf("its source %s is the word of %s, whom accept_from does not name any more", c.source, c.via)}}
	}
	if s.HTTP != nil && q.request.HTTP == nil && w.policy.Admit(&q.request) != policy.Never {
		q.decision = policy.Decision{Generation: w.generation}
		return verdict{ok: true, open: true}
	}
	q.decision = policy.Decision{} // noteShadow has the last one's memory
	w.policy.Decide(&q.request, &q.decision)
	q.decision.Generation = w.generation
	if q.decision.Allow {
		return verdict{ok: true}
	}
	why := "policy: " + q.decision.Reason.String()
	if q.decision.Rule != "" {
		why += " (" + q.decision.Rule + ")"
	}
	switch {
	case q.decision.Reason.Revoked():
		return verdict{always: true, closing: closing{"revoked", why}}
	case s.Enforcement == Audit && q.decision.Reason != policy.NoPolicy:
		return verdict{ok: true, would: why, open: s.HTTP != nil && q.request.HTTP == nil}
	}
	return verdict{closing: closing{"policy", why}}
}

// reverify checks the peer's chain and our own identity against what the
// source holds now, with c.mu held. The peer comes first: what became of our
// own identity says nothing of the bundles.
func (q *question) reverify(lease identity.Lease, now time.Time) verdict {
	if v := q.reverifyPeer(lease.Trust(), now); !v.ok {
		return v
	}
	own, err := lease.Current()
	if err == nil && own.ID == q.own.ID {
		q.own = own
		return verdict{ok: true}
	}
	// Taken back, or expired. What was presented stays good until its end;
	// the peer learns no sooner either.
	if now.Before(q.own.NotAfter()) {
		return verdict{ok: true}
	}
	return verdict{closing: closing{"expiry", fmt.Sprintf("our own SVID %s expired at %s and was not renewed", q.own.ID, q.own.NotAfter().UTC().Format(time.RFC3339))}}
}

// reverifyPeer checks the peer's chain against the newest bundles and CRLs,
// with c.mu held.
func (q *question) reverifyPeer(trust *identity.Trust, now time.Time) verdict {
	if q.inPlaintext() {
		return verdict{ok: true} // there is none
	}
	if err := q.standing.Recheck(trust, now); err != nil {
		return verdict{always: true, closing: closing{"revoked", err.Error()}}
	}
	return verdict{ok: true}
}

// note keeps what came of asking, with c.mu held, and counts it when it is
// other than before. It reports whether it is.
func (q *question) note(v verdict) (news bool) {
	was := q.outcome
	switch {
	case !v.ok:
		q.outcome = denied
	case v.would != "":
		q.outcome = audited
	default:
		q.outcome = allowed
	}
	q.would = v.would
	q.noteShadow()
	if q.outcome == was {
		return false
	}
	q.c.count(q.decision.Rule, q.outcome)
	if q.outcome == audited {
		q.c.l.wouldDeny.Add(1)
	}
	return true
}

// passing is what the log is told of that passes in a way nobody would notice
// otherwise: in plaintext, or only because its listener audits.
type passing struct {
	came      outcome
	would     string
	plaintext bool
	pairs     []any
}

func (q *question) passing() passing { // with c.mu held
	return passing{
		q.outcome, q.would, q.inPlaintext(),
		[]any{"source", q.c.source, "from", peerName(&q.request.From), "to", peerName(&q.request.To), "rule", q.decision.Rule},
	}
}

func (l *listener) logPassing(p passing) {
	switch {
	case p.came == audited:
		l.logSome(&l.audits, hclog.Warn, "passes in an audit only: the rules refuse it", append(p.pairs, "reason", p.would)...)
	case p.came == allowed && p.plaintext:
		l.logSome(&l.plains, hclog.Info, "passes in plaintext", p.pairs...)
	}
}

// askAgain asks in w, with c.mu held, and does what comes of it. It reports
// whether it passes in an audit only, since this time.
func (q *question) askAgain(w *world, now time.Time) (audit bool) {
	v := q.judge(w, now)
	audit = !v.open && q.note(v) && q.outcome == audited
	q.against = ""
	if !v.ok {
		q.against = v.closing.why
		q.violate(v, now, q.c.latest)
	} else {
		q.deadlines[endPolicy] = deadline{} // a drain that an earlier policy had begun
		q.c.noteDrain()
	}
	q.followTarget(now)
	return audit
}

// followTarget is for what has a target that is no longer one of its
// listener's, with c.mu held. It stays with the one it has, for as long as
// those of a removed listener may; what has not come there yet does not come.
func (q *question) followTarget(now time.Time) {
	c, s := q.c, q.c.latest
	if c.http != nil && q.target == "" { // the next request takes the target of its moment
		return
	}
	if s.keeps(q.began, q.bound()) {
		q.deadlines[endMoved] = deadline{}
		c.noteDrain()
		return
	}
	why := closing{"drain", "its listener has no target for it any more"}
	if now := s.targetsFor(q.bound()); s.ServerName != q.began.ServerName {
		why.why = "its listener asks for another server name"
	} else if s.UpstreamProtocol != q.began.UpstreamProtocol {
		why.why = "its listener speaks another protocol to its target"
	} else if len(now) > 0 {
		why.why = "its listener has another target, " + strings.Join(now, ", ")
	}
	if c.phase != copying {
		q.end(why)
		return
	}
	q.endLocked(endMoved, now.Add(s.Timeouts.Drain), why)
}
