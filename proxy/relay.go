package proxy

import (
	"net/http"
	"slices"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/http2"
)

// This file is a passage over HTTP/2 on both sides. It has no goroutine: what
// the client sends is passed on by who reads the client's frames, and what the
// service sends by who reads the service's; what finds no room stays in its
// stream and goes on when there is some.
//
// Lock order: http2.Stream's own before passage.turn before conn.mu before
// passage.mu. Who holds one of a stream never waits for that of another: what is
// sent meanwhile leaves at the end of the batch (mux.letGo).

// relay sends the request on. It reports whether it is to be sent again.
func (p *passage) relay() (again bool) {
	far := p.far
	if p.told.Upgrade != "" {
		if refused := p.connects(); refused != nil {
			return p.fail(refused)
		}
	}
	sent, again := p.ask()
	if !sent {
		return again
	}
	p.f.holds.Add(1) // a batch: what is passed on has locked its stream
	p.in.Held(p.forth)
	p.forthEnd()
	p.f.letGo()
	far.flush()
	p.f.flush()
	return false
}

// ask opens the service's stream with the head of the request. Where that cannot
// be it concludes the passage, or reports that it is to be sent again.
func (p *passage) ask() (sent, again bool) {
	far := p.far
	p.tries++
	p.awaitAnswer()
	p.mu.Lock()
	if p.over {
		p.mu.Unlock()
		p.conclude()
		return false, false
	}
	ended := p.req.Body == http1.NoBody && p.told.Upgrade == ""
	out, err := far.h2.Request(&p.req, &p.told, p.scheme(), ended, (*returning)(p))
	if err != nil { // the connection has ended meanwhile: nothing of it was sent
		p.mu.Unlock()
		p.release()
		if p.tries <= maxStale {
			return false, true
		}
		return false, p.fail(refuseRequest(http.StatusBadGateway, "the service takes no requests: %v", err))
	}
	p.out, p.to, p.alone = out, far, false
	p.mu.Unlock()
	return true, false
}

// await leaves content of the client where it is until there is where to.
func (p *passage) await(b []byte, ended bool) {
	if len(b) == 0 && ended { // which leaves nothing behind
		p.noteEnd(nil)
	}
	signal(p.arrived)
}

// noteEnd keeps the end of the request for who sends it on.
func (p *passage) noteEnd(trailers []http1.Field) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trailers = append([]http1.Field{}, trailers...)
}

// forthEnd passes on the end of the request, with its trailers, where that came
// before there was where to.
func (p *passage) forthEnd() {
	if !p.enter() {
		return
	}
	p.mu.Lock()
	trailers, out := p.trailers, p.out
	if out != nil {
		p.trailers = nil
	}
	p.mu.Unlock()
	switch { // what fails is a stream that has ended, which its receiver was told
	case trailers == nil || out == nil:
	case len(trailers) > 0:
		p.passed = true
		_ = out.Trailers(trailers)
	default:
		p.passed = true
		_, _ = out.Write(nil, true)
	}
	p.leave(nil)
}

// scheme is what the service is told of how the client came: it is what the
// request is written with, and no proof of anything.
func (p *passage) scheme() string {
	if p.far.own == nil {
		return "http"
	}
	return "https"
}

// enter has whoever passes frames on do so alone. It reports false where the
// passage is over.
func (p *passage) enter() bool {
	p.turn.Lock()
	if p.isOver() {
		p.turn.Unlock()
		return false
	}
	return true
}

// leave ends what enter began, and with why the passage.
func (p *passage) leave(why *refused) {
	p.turn.Unlock()
	if why != nil && p.end(why) {
		p.conclude()
	}
}

// touch has both connections send.
func (p *passage) touch(to *far) {
	p.f.touch(&to.mux)
	to.touch(&p.f.mux)
}

// forth passes on content of the client.
func (p *passage) forth(b []byte, ended bool) int {
	if !p.enter() {
		return len(b)
	}
	p.mu.Lock()
	out, to := p.out, p.to
	p.mu.Unlock()
	if out == nil { // the service has not looked at it: it goes to another one
		p.leave(nil)
		p.await(b, ended)
		return 0
	}
	if taken := p.taken.Load() + int64(len(b)); p.told.Upgrade == "" && p.s.HTTP.MaxBody > 0 && taken > p.s.HTTP.MaxBody {
		p.leave(p.largeBody())
		return len(b)
	}
	n, err := out.Write(b, ended)
	if err != nil {
		n = len(b) // the stream has ended, which its receiver was told
	}
	p.passed = p.passed || n > 0 || len(b) == 0
	p.taken.Add(int64(n))
	if n > 0 {
		p.stretch()
	}
	p.mayWait(serviceTakes, len(b)-n, n > 0)
	p.leave(nil)
	p.touch(to) // which p.to may not be any more
	return n
}

// mayWait bounds how long who is sent content may take none of what is left of a
// piece.
func (p *passage) mayWait(w wait, left int, moved bool) {
	waits := p.wait.patience[w].Load() != 0
	switch {
	case left == 0 && waits:
		p.wait.forget(w)
	case left == 0 || waits && !moved:
	case w == clientTakes:
		p.expect(w, p.s.Timeouts.Stall+time.Duration(left)*time.Second/SlowestTaken)
	default:
		p.expect(w, p.s.Timeouts.Stall)
	}
}

// back passes on content of the service.
func (p *passage) back(b []byte, ended bool) int {
	if !p.enter() {
		return len(b)
	}
	n, err := p.in.Write(b, ended)
	if err != nil {
		n = len(b)
	}
	p.given.Add(int64(n))
	p.mayWait(clientTakes, len(b)-n, n > 0)
	whole := err == nil && ended && n == len(b)
	p.turn.Unlock()
	if whole {
		p.finish()
		return n
	}
	p.touch(p.to)
	return n
}

// finish ends a passage whose response is whole.
func (p *passage) finish() {
	p.mu.Lock()
	p.answered = true
	p.mu.Unlock()
	if p.end(nil) {
		p.conclude()
	}
}

// returning is the passage as the receiver of the service's stream.
type returning passage

// Head implements http2.Receiver.
func (a *returning) Head(parts *http1.Parts, large bool) {
	p := (*passage)(a)
	if !p.enter() {
		return
	}
	if large {
		p.leave(refuseRequest(http.StatusBadGateway, "the service's answer: its fields are too many or too long"))
		return
	}
	if err := p.resp.Assemble(parts, http1.Asked{Method: p.req.Method}); err != nil {
		p.leave(refuseRequest(http.StatusBadGateway, "the service's answer: %v", err))
		return
	}
	if p.resp.Interim() {
		_ = p.in.Respond(&p.resp, &http1.Edit{}, false) // fails where the client is gone, which the passage was told
		p.leave(nil)
		p.touch(p.to)
		return
	}
	p.wait.forget(serviceSends)
	p.loan.Status(p.resp.Status)
	p.http.Status = p.resp.Status
	p.mu.Lock()
	p.sent = true
	p.mu.Unlock()
	err := p.in.Respond(&p.resp, &http1.Edit{}, parts.Ended)
	p.turn.Unlock()
	if err == nil && parts.Ended {
		p.finish()
		return
	}
	p.touch(p.to)
}

// Data implements http2.Receiver.
func (a *returning) Data(b []byte, ended bool) int { return (*passage)(a).back(b, ended) }

// Trailers implements http2.Receiver. What may not come behind a body is left
// out: a service says nothing by it that anybody decides on.
func (a *returning) Trailers(fields []http1.Field) {
	p := (*passage)(a)
	if !p.enter() {
		return
	}
	fields = slices.DeleteFunc(fields, func(f http1.Field) bool { return http1.CheckTrailer(f, nil) != nil })
	err := p.in.Trailers(fields)
	p.turn.Unlock()
	if err == nil {
		p.finish()
	}
}

// Room implements http2.Receiver.
func (a *returning) Room() {
	p := (*passage)(a)
	p.in.Held(p.forth)
	p.mu.Lock()
	to := p.to
	p.mu.Unlock()
	if to != nil { // else nothing was taken
		to.touch(&p.f.mux) // again: what was taken last has made room for the client, who is to be told
	}
}

// Ended implements http2.Receiver: the service has reset the stream, or is gone.
func (a *returning) Ended(err *http2.Error) {
	p := (*passage)(a)
	if !p.enter() {
		return
	}
	p.mu.Lock()
	sent, out := p.sent, p.out
	if p.over { // since enter looked: who ended it concludes it
		p.mu.Unlock()
		p.turn.Unlock()
		return
	}
	again := err.Unseen && !sent && !p.passed && p.tries <= maxStale
	if again {
		p.wait.forget(serviceSends)
		p.wait.forget(serviceTakes)
		p.out, p.to, p.alone = nil, nil, true
	}
	p.mu.Unlock()
	if again {
		p.leaveFar(out)
		p.turn.Unlock()
		go p.run()
		return
	}
	p.leave(p.cutOff(err, sent))
}

// cutOff is what a client is told of a service that broke off.
func (p *passage) cutOff(err *http2.Error, sent bool) *refused {
	why := "the service broke off before it answered: "
	if sent {
		why = "the response broke off: "
	}
	if !err.Remote && !sent { // the connection, and not this request alone
		p.loan.Failed(err)
	}
	return refuseRequest(http.StatusBadGateway, "%s%v", why, err)
}
