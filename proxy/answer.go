package proxy

import (
	"net/http"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file answers for requests that another proxy carries, by the rules and
// limits that hold for those on our own listeners.

// Answer decides a request that another proxy carries, by the rules in force,
// and counts the decision as one of q.Listener. Status is 0 where the request
// may go on, else that of the refusal: 403, or 429, where a limit of requests a
// second has no room and after is the value of retry-after. Audit lets pass
// what Enforcement's Audit does. What was decided, and why, goes into r.
//
// q.Listener must be a name of the configuration: it becomes the value of a
// metric label. That q.From is who it says was proven to whoever asks.
func (p *Proxy) Answer(q *policy.Request, audit bool, r *telemetry.Access) (status int, after string) {
	w := p.world.Load()
	var d policy.Decision
	w.policy.Decide(q, &d)
	r.Rule, r.Shadow, r.Generation = d.Rule, d.Shadow, w.generation
	p.countShadow(q.Listener, &d)
	came, why := allowed, ""
	if !d.Allow {
		came, why = denied, whyRefused(&d)
	}
	if audit && !d.Allow && !d.Reason.Revoked() && d.Reason != policy.NoPolicy {
		came = audited
	}
	r.Decision = string(came)
	p.instruments.decided(q.Listener, d.Rule, came).Inc()
	switch came {
	case denied:
		r.Reason = why
		return http.StatusForbidden, ""
	case audited:
		r.WouldDeny = why
	}
	return p.answerLimits(w, q, r)
}

// answerLimits spends a token of each limit of requests a second that is for
// the request.
func (p *Proxy) answerLimits(w *world, q *policy.Request, r *telemetry.Access) (status int, after string) {
	var room [8]*policy.Limit
	whose := who{id: q.From.ID}
	_, excess := p.limits.take(w.policy.Limits(q, room[:0]), whose, aRequest)
	if excess == nil {
		return 0, ""
	}
	r.Limit, r.Reason = excess.limit.ID, excess.why(whose)
	p.instruments.limited(q.Listener, excess.limit.ID)
	return http.StatusTooManyRequests, excess.retryAfter()
}

// countShadow counts what rules in shadow would have made of the request.
func (p *Proxy) countShadow(listener string, d *policy.Decision) {
	came := missed
	if d.Allow {
		came = audited
	}
	for _, id := range d.Shadow {
		p.instruments.decided(listener, id, came).Inc()
	}
}

// Bars says why the rules in force refuse whatever comes from a peer: it is
// revoked, or outside the ceiling of its trust domain. It is empty where they do
// not.
func (p *Proxy) Bars(peer policy.Peer) string {
	var d policy.Decision
	p.world.Load().policy.Decide(&policy.Request{From: peer}, &d)
	if d.Reason == policy.RevokedFrom || d.Reason == policy.Ceiling {
		return whyRefused(&d)
	}
	return ""
}

// whyRefused says why a request is refused, for the log.
func whyRefused(d *policy.Decision) string {
	why := "policy: " + d.Reason.String()
	if d.Rule != "" {
		why += " (" + d.Rule + ")"
	}
	return why
}
