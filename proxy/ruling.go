package proxy

import (
	"fmt"
	"net/http"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file decides on a request, and answers those that are refused.

// refused is why a request is not served, and what its client is told. The why
// is for the log alone.
type refused struct {
	status int
	why    string
	closed string        // one of telemetry.CloseReasons, where it was ended in its midst
	last   bool          // nothing after it can be served on this connection
	again  bool          // it was looked at under settings that are not in force any more
	fields []http1.Field // of the answer
}

func refuseRequest(status int, format string, args ...any) *refused {
	return &refused{status: status, why: fmt.Sprintf(format, args...)}
}

// admit decides whether the request may go on to where it is sent, as far as
// that is known by now.
func (x *call) admit() *refused {
	for range 3 {
		refused := x.admitNow()
		if refused == nil || !refused.again {
			return refused
		}
		clear(x.asked.Headers)
		x.asked = policy.HTTP{Headers: x.asked.Headers[:0]}
		x.told = http1.Edit{Set: x.told.Set[:0], Append: x.told.Append[:0]}
		x.notes, x.proof = x.notes[:0], identity.JWT{}
	}
	return refuseRequest(http.StatusServiceUnavailable, "the listener changes all the time")
}

func (x *call) admitNow() *refused {
	c := x.c
	s := c.began
	if now := c.l.settings(); now != nil {
		s = now
	}
	if s.HTTP == nil {
		return &refused{status: http.StatusServiceUnavailable, why: "its listener serves no HTTP any more", last: true}
	}
	x.s = s
	if err := x.tell(); err != nil {
		return refuseRequest(http.StatusBadRequest, "%v", err)
	}
	x.see()
	if x.req.Method == http.MethodTrace { // it would show the client what its service is told (RFC 9110, section 9.3.8)
		return refuseRequest(http.StatusMethodNotAllowed, "TRACE is not served")
	}
	if refused := x.prove(); refused != nil {
		return refused
	}
	if most := s.HTTP.MaxBody; most > 0 && x.req.Length > most {
		return x.largeBody()
	}
	if s.Direction == policy.Outbound {
		return nil // once it is known who the far end is
	}
	return x.decide(false)
}

// tell makes the fields that say who calls.
func (x *call) tell() (err error) {
	m := x.caller.makerFor(x.s)
	x.id, x.notes, err = m.Edit(&x.req, &x.told, x.notes)
	if switchable(x.req.Upgrade) {
		x.told.Upgrade = x.req.Upgrade
	}
	return err
}

// see shows the rules the request as its service gets it, but for what we add.
func (x *call) see() {
	h := &x.asked
	h.Method, h.Host, h.Path = x.req.Method, x.req.Host, x.req.Target.Path
	h.NoProof = x.s.HTTP.JWT == nil || x.s.Direction == policy.Outbound // where the token is for the far end
	for i := range x.req.Fields {
		if f := &x.req.Fields[i]; !f.Hop && !x.told.Drop.Has(f.Name) {
			h.Headers = append(h.Headers, policy.Header{Name: f.Name, Value: f.Value})
		}
	}
}

// decide asks the policy of this moment. Outbound, it is known by then where the
// request would go.
func (x *call) decide(attached bool) *refused {
	c, q := x.c, x.q
	c.mu.Lock()
	defer c.mu.Unlock()
	if ended := q.closed(); ended != nil {
		return &refused{status: http.StatusServiceUnavailable, why: ended.why, last: true}
	}
	if q.own == nil { // cannot happen: nobody decides on what has no ends
		return refuseRequest(http.StatusServiceUnavailable, "it is not known who the ends are")
	}
	w := c.l.proxy.world.Load()
	s := w.listeners[c.l]
	if s == nil || s.HTTP == nil {
		return &refused{status: http.StatusServiceUnavailable, why: "its listener was removed", last: true}
	}
	switch {
	case s != x.s && !s.HTTP.readsAs(x.s.HTTP):
		return &refused{status: http.StatusServiceUnavailable, why: "the listener changed while the request was on its way", again: true}
	case !attached:
		x.s, q.began = s, s
	default:
		if what := x.s.replaced(s, bound{target: q.target}); what != "" {
			return refuseRequest(http.StatusServiceUnavailable, "the %s while the request was on its way", what)
		}
	}
	q.request.HTTP, q.proof = &x.asked, x.proof
	q.outcome, q.shadow = "", shadow{}
	v := q.judge(w, x.began)
	q.note(v)
	x.noteDecision()
	switch {
	case v.always:
		// Whoever is spoken for is out, not the peer, who may speak for others.
		return &refused{status: http.StatusForbidden, why: v.closing.why, last: q.decision.Reason != policy.RevokedSubject}
	case !v.ok && q.decision.NeedsSubject:
		return &refused{status: http.StatusUnauthorized, why: v.closing.why + "; with a JWT-SVID one may", fields: noToken}
	case !v.ok:
		return &refused{status: http.StatusForbidden, why: v.closing.why}
	}
	return x.takeRate(w)
}

// noteDecision keeps what was decided for the record, with c.mu held.
func (x *call) noteDecision() {
	q, r := x.q, &x.record
	x.came = q.outcome
	r.Decision, r.WouldDeny = string(q.outcome), q.would
	r.Rule, r.Generation = q.decision.Rule, q.decision.Generation
	if len(q.decision.Shadow) > 0 {
		r.Shadow = append(r.Shadow[:0], q.decision.Shadow...)
	}
}

// takeRate spends a token of each limit of requests a second that is for the
// peer, with c.mu held.
func (x *call) takeRate(w *world) *refused {
	c := x.c
	if x.s.Direction != policy.Inbound {
		return nil
	}
	var room [8]*policy.Limit
	limits := w.policy.Limits(&x.q.request, room[:0])
	if len(limits) == 0 {
		return nil
	}
	if _, excess := c.l.proxy.limits.take(limits, c.whoIs(), aRequest); excess != nil {
		x.record.Limit = excess.limit.ID
		c.l.proxy.instruments.limited(c.l.name, excess.limit.ID)
		return &refused{
			status: http.StatusTooManyRequests, why: excess.why(c.whoIs()),
			fields: []http1.Field{{Name: "retry-after", Value: excess.retryAfter()}},
		}
	}
	return nil
}

func (x *exchange) tooLarge() bool {
	most := x.s.HTTP.MaxBody
	return most > 0 && x.taken > most
}

func (x *call) largeBody() *refused {
	return &refused{status: http.StatusRequestEntityTooLarge, why: fmt.Sprintf("the body is larger than max_body, %d bytes", x.s.HTTP.MaxBody), last: true}
}

func (x *call) badBody(err error) *refused {
	return &refused{status: http.StatusBadRequest, why: "the body of the request: " + err.Error(), last: true}
}

// reply answers a request that is refused, or that could not be served. It
// reports whether the client may send another one.
func (x *exchange) reply(r *refused) (next bool) {
	d := x.d
	x.release()
	d.c.mu.Lock()
	x.nameEnds()
	d.c.mu.Unlock()
	x.http.Status = r.status
	x.record.Reason = telemetry.Tidy(r.why)
	done := x.req.Body == http1.NoBody
	if !done && x.whole {
		x.takeBody()
		done = true
	}
	next = !r.last && done && x.req.KeepAlive && x.req.Minor == 1 && !d.draining.Load() && !d.leaving.Load()
	if d.c.ended() != nil {
		return false
	}
	buf := takeBuffer(headClass)
	answer := http1.AppendAnswer((*buf)[:0], &http1.Answer{Status: r.status, ID: x.id, Head: x.req.Method == http.MethodHead, Fields: r.fields, Close: !next})
	d.expectOf(clientTakes, d.c.began.Timeouts.Stall)
	err := d.out.pass(answer)
	d.forget(clientTakes)
	bufferPools[headClass].Put(buf)
	x.logRefused(r)
	if err != nil {
		d.end("peer", "the client went away before the answer")
		return false
	}
	if !next {
		d.lastWords()
	}
	return next
}

// logRefused says in the log what a request was refused for.
func (x *call) logRefused(r *refused) {
	what := "request refused"
	switch r.status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout: // by us or by the service, not by who called
		what = "request failed"
	}
	c := x.c
	c.l.logRefusal(what, "source", c.source, "from", x.record.From, "to", x.record.To, "method", telemetry.Tidy(x.asked.Method), "path", telemetry.Tidy(x.asked.Path), "status", r.status, "request_id", x.id, "reason", x.record.Reason)
}

// account counts and records the request, for which so many bytes came and were
// sent.
func (x *call) account(in, out uint64) {
	c := x.c
	took := time.Since(x.began)
	c.l.meters.requests.of(x.http.Status, x.came).Inc()
	c.l.meters.duration.Observe(took.Seconds())
	if c.l.proxy.access == nil {
		return
	}
	r := &x.record
	r.Time, r.Duration, r.Action = x.began.Add(took), took, "request"
	r.Listener, r.Direction = c.l.name, c.request.Direction.String()
	r.Source, r.Via, r.Port = c.source, c.via, x.q.request.Port
	r.BytesIn, r.BytesOut = in, out
	if c.request.Direction == policy.Inbound { // outbound, attach knows
		r.TLSVersion, r.Cipher = c.record.TLSVersion, c.record.Cipher
		r.ServerName, r.Protocol = c.record.ServerName, c.record.Protocol
	}
	if why := x.q.broken(); why.why != "" {
		r.Reason, r.Closed = telemetry.Tidy(why.why), why.reason
	}
	r.Outcome = "success"
	if r.Reason != "" {
		r.Outcome = "failure"
	}
	h := &x.http
	h.Method, h.Host, h.Path, h.RequestID = x.asked.Method, x.asked.Host, x.asked.Path, x.id
	for i := range x.asked.Headers {
		if x.asked.Headers[i].Name == "user-agent" {
			h.UserAgent = x.asked.Headers[i].Value
			break
		}
	}
	c.l.proxy.access.Write(r)
}

// broken says why we broke the connection off, if we did.
func (q *question) broken() closing {
	c := q.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case q.reset != nil:
		return *q.reset
	case c.closing == nil || c.orderly:
		return closing{}
	}
	return *c.closing
}
