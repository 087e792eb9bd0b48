package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/http2"
	"github.com/narthex-id/narthex/proxy/policy"
)

// passage is one request that came as a stream of HTTP/2, on its way to a
// service and back. The goroutine that reads the client's frames decides on it
// (begin), and where a connection of HTTP/2 is there sends it on by itself
// (setOff). Else one of its own brings it on its way (run), and then it either
// stays with that one, over HTTP/1.1 (tunnel.go), or has none: over HTTP/2 frames
// are passed on by whoever has read them (relay.go). A goroutine that has answered
// over HTTP/1.1 answers what comes over the same connection next (stay.go).
//
// Whatever ends it, end does once. What follows from that is done by conclude:
// on its own goroutine while it has one, and else by who ended it.
type passage struct {
	*call  // of the pool; conclude gives it back, and from then on nobody may enter
	matter question
	wait   waits

	f  *front
	in *http2.Stream // the client's

	arrived chan struct{} // something came from the client; for the goroutine that sends it on
	room    chan struct{} // the client takes more; for the goroutine that answers it
	content http1.Body    // of the response, over HTTP/1.1
	taken   atomic.Int64  // bytes of the request's content
	given   atomic.Int64  // of the response's
	seen    int64         // of both when last looked at; guarded by conn.mu
	moved   time.Time     // when they were last seen to have changed; guarded by conn.mu

	turn   sync.Mutex // who passes frames on, or concludes it, does so alone
	passed bool       // something of what follows the head was; guarded by turn

	mu       sync.Mutex // guards the following; conn.mu may be held when it is taken, never the other way round
	alone    bool       // it has a goroutine
	over     bool       // end has come
	why      *refused   // why, where the response is not whole
	left     bool       // the client has
	cut      bool       // its goroutine was interrupted
	out      *http2.Stream
	to       *far          // that out is of
	trailers []http1.Field // with which the request ended, while there is nowhere to send them; empty, not nil, where it had none
	sent     bool          // the client got the head of a final response
	answered bool          // and all of it
}

func newPassage(f *front, in *http2.Stream) *passage {
	p := &passage{call: spareCalls.Get().(*call), f: f, in: in, arrived: make(chan struct{}, 1), room: make(chan struct{}, 1), alone: true}
	q := &p.matter
	q.c, q.alone, q.began = f.c, p.killed, f.c.began
	p.of(q, &p.wait, f)
	return p
}

// begin decides on the request and sends it on its way.
func (p *passage) begin(parts *http1.Parts, large bool) {
	p.began = time.Now()
	if !p.f.add(p) {
		p.in.Release(http2.RefusedStream)
		return
	}
	if refused := p.admitParts(parts, large); refused != nil {
		p.close(refused)
		p.conclude()
		return
	}
	if !p.setOff() {
		go p.run()
	}
}

// setOff has the reader bring the request on its way, where that takes no time:
// nothing of what follows the head is there yet. It reports false where a
// goroutine has to, which may wait.
func (p *passage) setOff() bool {
	if p.told.Upgrade != "" { // whether the service takes it may not be known yet
		return false
	}
	joined, refused := p.join()
	switch {
	case refused != nil:
		p.close(refused)
		p.conclude()
		return true
	case !joined:
		return false
	case p.b != nil:
		return p.askAtOnce()
	}
	far := p.far
	sent, again := p.ask()
	if sent {
		p.f.touch(&far.mux)
	}
	return !again
}

func (p *passage) admitParts(parts *http1.Parts, large bool) *refused {
	p.s = p.f.c.began
	p.req.Options = p.s.HTTP.Literal
	err := p.req.Assemble(parts)
	if err == nil && !large {
		return p.admitWhole()
	}
	p.id, p.notes = forwarded.NewID(p.notes) // what was sent of one is not relied on
	p.asked.Method = p.req.Method
	for _, f := range parts.Fields {
		if f.Name == "content-type" { // by which its client is answered in the right form
			p.asked.Headers = append(p.asked.Headers, policy.Header{Name: f.Name, Value: f.Value})
		}
	}
	var bad *http1.Error
	switch {
	case large:
		return refuseRequest(http.StatusRequestHeaderFieldsTooLarge, "request: its fields are too many or too long; send less")
	case errors.As(err, &bad):
		return refuseRequest(bad.Status, "request: %v", bad)
	}
	return refuseRequest(http.StatusBadRequest, "request: %v", err)
}

// admitWhole is admit for a request that could be read. One that offers to change
// to what hides requests would be a GET to its service, whose answer the client
// takes for the change.
func (p *passage) admitWhole() *refused {
	if refused := p.admit(); refused != nil {
		return refused
	}
	if p.req.Upgrade != "" && p.told.Upgrade == "" {
		return refuseRequest(http.StatusNotImplemented, "request: an extended CONNECT to a protocol that hides requests")
	}
	return nil
}

// run brings the request on its way, to another endpoint where one did not look
// at it, and then those that come over the same connection of HTTP/1.1.
func (p *passage) run() {
	for p != nil {
		p = p.bring()
	}
}

// bring returns the passage that is to be brought on its way next, if one is.
func (p *passage) bring() *passage {
	if p.b == nil && p.far == nil { // else the reader has borrowed it
		if refused := p.borrow(); refused != nil {
			p.close(refused)
			p.conclude()
			return nil
		}
	}
	if p.far != nil {
		if again := p.relay(); again {
			return p
		}
		return nil
	}
	hosts := &p.f.c.l.proxy.hosts
	again, stays := p.tunnel()
	for !again && stays != nil {
		c := stays.await(hosts)
		if c == nil {
			return nil
		}
		p = c.p
		again, stays = p.answer(c)
	}
	if again {
		return p
	}
	return nil
}

// close ends the passage for the goroutine that it has, which concludes it: whole
// where why is nil. It reports false where it was ended before.
func (p *passage) close(why *refused) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return false
	}
	p.over, p.why = true, why
	return true
}

// expect bounds a wait from now on.
func (p *passage) expect(w wait, most time.Duration) {
	until := time.Now().Add(most)
	p.wait.expect(w, until)
	p.f.c.hasten(until)
}

// end is close for anybody else. It reports whether the caller has to conclude
// it.
func (p *passage) end(why *refused) (mine bool) {
	c := p.f.c
	c.mu.Lock()
	defer c.mu.Unlock()
	return p.endLocked(why)
}

func (p *passage) endLocked(why *refused) (mine bool) { // with c.mu held
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return false
	}
	p.over, p.why = true, why
	if !p.alone {
		return true
	}
	p.cut = true
	p.matter.abandon()
	signal(p.arrived)
	signal(p.room)
	return false
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// isOver reports whether it was ended.
func (p *passage) isOver() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.over
}

// killed ends it because of the rules, or of what else the table has found, with
// c.mu held.
func (p *passage) killed(why closing) {
	status := http.StatusServiceUnavailable
	if why.reason == "policy" || why.reason == "revoked" {
		status = http.StatusForbidden
	}
	p.stop(&refused{status: status, why: why.why, closed: why.reason})
}

// stop ends it from the table, with c.mu held.
func (p *passage) stop(why *refused) {
	if p.endLocked(why) {
		p.f.helpers.Go(p.conclude)
	}
}

// conclude tells client and service that it is over, and records it.
func (p *passage) conclude() {
	c := p.f.c
	c.mu.Lock()
	p.nameEnds()
	c.mu.Unlock()
	p.turn.Lock()
	p.tellClient()
	p.mu.Lock()
	out, to := p.out, p.to
	p.used = p.used || p.cut // what was interrupted is no good for another request
	p.mu.Unlock()
	if to != nil {
		p.leaveFar(out)
	} else {
		p.release()
	}
	p.turn.Unlock()
	if to != nil {
		p.f.touch(&to.mux)
		to.touch(&p.f.mux)
	} else {
		p.f.flush()
	}
	p.account(uint64(p.taken.Load()), uint64(p.given.Load()))
	c.mu.Lock()
	p.f.remove(p)
	c.mu.Unlock()
	p.reset()
	spareCalls.Put(p.call)
	p.f.work.Done()
}

// tellClient says what the client has not been told yet.
func (p *passage) tellClient() {
	p.mu.Lock()
	why, left, sent, answered := p.why, p.left, p.sent, p.answered
	p.mu.Unlock()
	if why != nil {
		p.record.Reason, p.record.Closed = telemetry.Tidy(why.why), why.closed
	}
	switch {
	case answered:
		p.in.Release(http2.NoError) // what it still sends is not needed (RFC 9113, section 8.1)
	case left:
		if p.http.Status == 0 {
			p.http.Status = statusLeft
		}
		p.in.Release(http2.Cancel)
	case !sent:
		p.reply(why)
	case p.asked.GRPC() && p.in.Trailers(p.callStatus(nil, why.status)) == nil:
		p.in.Release(http2.NoError)
	default:
		p.in.Release(resetCode(why))
	}
}

// resetCode is with which code a response that is not whole ends.
func resetCode(why *refused) http2.Code {
	switch why.status {
	case http.StatusForbidden, http.StatusUnauthorized:
		return http2.Cancel
	}
	return http2.InternalError
}

// reply answers a request that is refused, or that could not be served.
func (p *passage) reply(r *refused) {
	p.http.Status = r.status
	p.logRefused(r)
	if p.asked.GRPC() {
		fields := append(slices.Clone(r.fields), http1.Field{Name: "content-type", Value: "application/grpc"})
		_ = p.in.Answer(http.StatusOK, p.callStatus(fields, r.status), true) // fails where the client is gone
		p.in.Release(http2.NoError)
		return
	}
	fields, body := http1.AnswerParts(&http1.Answer{Status: r.status, ID: p.id, Fields: r.fields})
	head := p.req.Method == http.MethodHead
	if p.in.Answer(r.status, fields, head) != nil || head {
		p.in.Release(http2.NoError)
		return
	}
	code := http2.NoError
	if n, err := p.in.Write(body, true); err != nil || n < len(body) { // whose window is less than a line takes none
		code = http2.Cancel
	}
	p.in.Release(code)
}

// The following are the receiver of the client's stream.

// Head implements http2.Receiver: a client sends none on its own stream.
func (p *passage) Head(*http1.Parts, bool) {}

// Data implements http2.Receiver.
func (p *passage) Data(b []byte, ended bool) int {
	p.mu.Lock()
	out, over, alone := p.out, p.over, p.alone
	p.mu.Unlock()
	switch {
	case over:
		return len(b)
	case out == nil || alone:
		p.await(b, ended)
		return 0
	}
	return p.forth(b, ended)
}

// Trailers implements http2.Receiver.
func (p *passage) Trailers(fields []http1.Field) {
	if !p.enter() {
		return
	}
	for i := range fields {
		if err := http1.CheckTrailer(fields[i], p.told.Drop); err != nil {
			p.leave(refuseRequest(http.StatusBadRequest, "a trailer of the request: %v", err))
			return
		}
	}
	p.noteEnd(fields)
	p.leave(nil)
	p.mu.Lock()
	out, to := p.out, p.to
	p.mu.Unlock()
	if out == nil {
		signal(p.arrived)
		return
	}
	p.forthEnd()
	p.f.touch(&to.mux)
}

// Room implements http2.Receiver.
func (p *passage) Room() {
	p.mu.Lock()
	out, to, over, alone := p.out, p.to, p.over, p.alone
	p.mu.Unlock()
	switch {
	case over:
	case alone || out == nil:
		signal(p.room)
	default:
		out.Held(p.back)
		p.f.touch(&to.mux) // again: what was taken last has made room for the service, who is to be told
	}
}

// Ended implements http2.Receiver: the client has cancelled, or is gone.
func (p *passage) Ended(err *http2.Error) {
	why := "the client reset the stream before the response: " + err.Code.String()
	p.mu.Lock()
	p.left = true
	if p.sent {
		why = "the client reset the stream within the response: " + err.Code.String()
	}
	if err.Stream == 0 {
		why = "the client went away before the response"
		if p.sent {
			why = "the client went away within the response"
		}
	} else if !err.Remote {
		why = "the client's stream: " + err.Error()
	}
	p.mu.Unlock()
	if p.end(&refused{status: statusLeft, why: why, closed: "peer"}) {
		p.conclude()
	}
}

// The following is what the table does with it, with c.mu held.

func (p *passage) check(now time.Time, s *settings) {
	if p.isOver() {
		return
	}
	for w := range p.wait.overdue(now) {
		p.stop(p.lateFor(w, s))
	}
	p.mu.Lock()
	to := p.to
	p.mu.Unlock()
	if to != nil && to.stalls(s.Timeouts.Stall, now) {
		to.retire()
		p.stop(refuseRequest(http.StatusGatewayTimeout, "the service took nothing of what was sent to it for %s", s.Timeouts.Stall))
	}
	if sum := p.taken.Load() + p.given.Load(); sum != p.seen || p.moved.IsZero() {
		p.seen, p.moved = sum, now
	} else if p.wait.patience[serviceSends].Load() != 0 {
		p.moved = now // that has a bound of its own
	} else if s.Timeouts.Idle > 0 && now.Sub(p.moved) >= s.Timeouts.Idle {
		p.stop(&refused{status: http.StatusGatewayTimeout, why: fmt.Sprintf("the stream was idle for %s", s.Timeouts.Idle), closed: "peer"})
	}
}

// lateFor is what a client is told of whom was waited for too long.
func (p *passage) lateFor(w wait, s *settings) *refused {
	switch w {
	case clientSends:
		return refuseRequest(http.StatusRequestTimeout, "the body of the request came too slowly")
	case clientTakes:
		return refuseRequest(http.StatusRequestTimeout, "the client takes nothing of what it asked for")
	case serviceTakes:
		return refuseRequest(http.StatusGatewayTimeout, "the service took nothing of the request for %s", s.Timeouts.Stall)
	}
	return refuseRequest(http.StatusGatewayTimeout, "the service sent nothing for too long")
}

func (p *passage) sooner(s *settings, tell func(time.Time)) {
	if p.isOver() {
		return
	}
	p.wait.sooner(tell)
	p.mu.Lock()
	to := p.to
	p.mu.Unlock()
	if to != nil {
		to.sooner(s.Timeouts.Stall, tell)
	}
	if s.Timeouts.Idle > 0 && !p.moved.IsZero() {
		tell(p.moved.Add(s.Timeouts.Idle))
	}
}
