package proxy

import (
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/http2"
)

// This file is a request of HTTP/1.1 whose service speaks HTTP/2. The exchange
// keeps its goroutine: it waits for what the one that reads the service's frames
// leaves in the stream. One that changes the protocol goes on in bridge.go.

// lifted is the stream of such a request, and its receiver.
type lifted struct {
	x      *exchange
	stream *http2.Stream
	came   chan struct{} // something did, or it is over
	room   chan struct{} // the service takes more, or it is over
	stop   chan struct{} // closed once nobody wants the rest of the request
	upload sync.WaitGroup
	back   atomic.Pointer[sleeper] // that waits for it once the protocol was changed, and may be parked

	mu       sync.Mutex // guards the following
	interim  []*http1.Response
	headed   bool  // x.resp is there
	bad      error // why it is not
	trailers []http1.Field
	ended    bool // with the head, or by trailers
	err      *http2.Error
	done     bool     // nobody wants what comes: x may be another request's
	sentAll  bool     // of the request
	refused  *refused // why the client's body is no good
	gone     error    // how the client left within it
}

// maxInterim bounds the responses before the final one.
const maxInterim = 16

// lift sends the request over HTTP/2 and passes on what comes back. It reports
// whether the request is to be sent again, or else whether the client may send
// another one.
func (x *exchange) lift() (again, next bool) {
	x.tries++
	l := &lifted{x: x, came: make(chan struct{}, 1), room: make(chan struct{}, 1), stop: make(chan struct{})}
	if x.told.Upgrade != "" {
		if refused := x.offers(); refused != nil {
			return false, x.reply(refused)
		}
	}
	x.rouse(l.signal)
	defer func() {
		if x.d.forth == nil { // else it is its streams' to wake
			x.rouse(nil)
		}
	}()
	scheme := "http"
	if x.far.own != nil {
		scheme = "https"
	}
	none := x.req.Body == http1.NoBody
	x.whole = none
	stream, err := x.far.h2.Request(&x.req, &x.told, scheme, none && x.told.Upgrade == "", l)
	if err != nil { // it ended meanwhile: nothing was sent
		x.call.release()
		if x.tries <= maxStale {
			return true, false
		}
		return false, x.reply(refuseRequest(http.StatusBadGateway, "the service takes no requests: %v", err))
	}
	l.stream, x.used = stream, true
	x.far.flush()
	if l.sentAll = none; !none {
		l.upload.Go(l.send)
	}
	return l.answer()
}

// rouse has f called when the request is not to wait any more.
func (x *exchange) rouse(f func()) {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	x.q.rouse = f
}

func (l *lifted) signal() {
	l.arrived()
	signal(l.room)
}

// arrived has who waits for what comes look.
func (l *lifted) arrived() {
	signal(l.came)
	if back := l.back.Load(); back != nil {
		back.wake()
	}
}

// close ends the upload, the stream and the loan. It reports whether all of the
// request's body was read.
func (l *lifted) close() (read bool) {
	x := l.x
	close(l.stop)
	if l.x.req.Body != http1.NoBody {
		x.c.mu.Lock()
		x.d.src.interrupt()
		x.c.mu.Unlock()
		l.signal()
		l.upload.Wait()
		x.d.resume()
	}
	l.mu.Lock()
	l.done = true
	l.mu.Unlock()
	far := x.far
	x.leaveFar(l.stream)
	far.flush()
	return l.sentAll
}

// answer waits for the response and passes it on.
func (l *lifted) answer() (again, next bool) {
	x, d := l.x, l.x.d
	d.expectOf(serviceSends, x.s.responseWithin(x.bound()))
	refused, again := l.await()
	d.forget(serviceSends)
	l.mu.Lock()
	gone := l.gone
	l.mu.Unlock()
	switch {
	case again:
		l.close()
		return true, false
	case d.gone.Load():
		l.close()
		x.left("the client went away before the response")
		return false, false
	case gone != nil:
		l.close()
		x.left("the client broke off within the body of its request: " + explainBroken(gone))
		return false, false
	case d.c.ended() != nil:
		l.close()
		return false, false
	case refused != nil:
		l.close()
		return false, x.reply(refused)
	case x.told.Upgrade != "" && x.resp.Status/100 == 2:
		l.change()
		return false, false
	case x.told.Upgrade != "": // and the service has not taken it: nothing follows
		_, _ = l.stream.Write(nil, true) // fails where the stream has ended
	}
	return false, l.respond()
}

// await waits for the final response, and passes on those before it.
func (l *lifted) await() (why *refused, again bool) {
	x, d := l.x, l.x.d
	for {
		l.mu.Lock()
		interim, headed, bad, err, refused, gone := l.interim, l.headed, l.bad, l.err, l.refused, l.gone
		l.interim = nil
		l.mu.Unlock()
		for _, r := range interim {
			if l.passInterim(r) != nil {
				d.gone.Store(true)
				return nil, false
			}
		}
		switch {
		case headed:
			x.loan.Status(x.resp.Status)
			return nil, false
		case bad != nil:
			return refuseRequest(http.StatusBadGateway, "the service's answer: %v", bad), false
		case refused != nil:
			return refused, false
		case err != nil && err.Unseen && x.req.Body == http1.NoBody && x.tries <= maxStale:
			return nil, true
		case err != nil:
			if !err.Remote {
				x.loan.Failed(err)
			}
			return refuseRequest(http.StatusBadGateway, "the service broke off before it answered: %v", err), false
		case d.late[serviceTakes].Load():
			return refuseRequest(http.StatusGatewayTimeout, "the service took nothing of the request for %s", x.s.Timeouts.Stall), false
		case d.late[serviceSends].Load():
			return refuseRequest(http.StatusGatewayTimeout, "the service did not answer within %s", x.s.responseWithin(x.bound())), false
		case d.gone.Load() || gone != nil || d.c.ended() != nil:
			return nil, false
		}
		<-l.came
	}
}

func (l *lifted) passInterim(r *http1.Response) error {
	x := l.x
	if x.req.Minor == 0 {
		return nil
	}
	x.sent = true
	buf := takeBuffer(headClass)
	defer bufferPools[headClass].Put(buf)
	return x.d.out.write(r.Append((*buf)[:0], &http1.Edit{}), nil)
}

// respond passes the response on. It reports whether the client may send
// another request.
func (l *lifted) respond() (next bool) {
	x, d := l.x, l.x.d
	x.http.Status = x.resp.Status
	unchunked := x.req.Minor == 0 && x.resp.Body == http1.Chunked
	l.mu.Lock()
	unread := !l.sentAll
	l.mu.Unlock()
	closes := !x.req.KeepAlive || unread && x.req.Continue || d.draining.Load()
	x.answer = http1.Edit{Close: closes, Persist: !closes && x.req.Minor == 0, Unchunked: x.req.Minor == 0}
	x.sent = true
	err := x.writeHead(&x.answer, nil)
	if err == nil && x.resp.Body != http1.NoBody {
		err = l.passBody(x.resp.Body == http1.Chunked && !unchunked)
	}
	read := l.close()
	switch {
	case err != nil && (err == errClient || d.gone.Load()): //nolint:errorlint // it is never wrapped
		x.left("the client went away within the response")
		return false
	case err != nil:
		x.breakOff(err)
		return false
	}
	if closes || !read || unchunked {
		d.lastWords()
		return false
	}
	return true
}

// passBody passes on the content, in chunks where its length is not known.
func (l *lifted) passBody(chunked bool) error {
	x, d := l.x, l.x.d
	content, out := takeBuffer(headClass), takeBuffer(largeClass)
	defer bufferPools[headClass].Put(content)
	defer bufferPools[largeClass].Put(out)
	for {
		got, ended, trailers := l.stream.Next((*content)[:0])
		l.mu.Lock()
		broken := l.err
		if len(got) == 0 && l.ended {
			ended, trailers = true, l.trailers
		}
		l.mu.Unlock()
		if len(got) == 0 && !ended {
			switch {
			case broken != nil:
				return broken
			case d.late[serviceSends].Load():
				return errServiceIdle
			case d.gone.Load() || d.c.ended() != nil:
				return errClient
			}
			l.wait()
			continue
		}
		err := l.pass((*out)[:0], got, chunked, ended, trailers)
		l.stream.Credit(len(got)) // also where the client is gone: the connection is of others too
		if err != nil {
			return err
		}
		x.far.flush()
		if ended {
			return nil
		}
	}
}

// wait waits for more of the response.
func (l *lifted) wait() {
	if idle := l.x.s.Timeouts.Idle; idle > 0 {
		l.x.d.expectOf(serviceSends, idle)
		defer l.x.d.forget(serviceSends)
	}
	<-l.came
}

// pass writes a piece of content.
func (l *lifted) pass(out, got []byte, chunked, ended bool, trailers []http1.Field) error {
	x := l.x
	if chunked && len(got) > 0 {
		out = append(strconv.AppendInt(out, int64(len(got)), 16), "\r\n"...)
	}
	out = append(out, got...)
	if chunked && len(got) > 0 {
		out = append(out, "\r\n"...)
	}
	if chunked && ended {
		out = append(out, "0\r\n"...)
		for _, f := range trailers {
			if http1.CheckTrailer(f, nil) == nil {
				out = append(append(append(append(out, f.Name...), ": "...), f.Value...), "\r\n"...)
			}
		}
		out = append(out, "\r\n"...)
	}
	if len(out) == 0 {
		return nil
	}
	x.d.expectTaken(x.s, len(out))
	defer x.d.forget(clientTakes)
	if x.d.out.pass(out) != nil {
		return errClient
	}
	return nil
}

var errServiceIdle = fmt.Errorf("it sent nothing for too long")

// send sends the body of the request, as it comes.
func (l *lifted) send() {
	x, d := l.x, l.x.d
	since := time.Now()
	within := x.s.responseWithin(x.bound())
	for {
		span, n, done, err := x.body.NextData(d.in.b)
		if err != nil {
			l.fail(x.badBody(err), nil)
			return
		}
		if x.taken += int64(len(span)); x.tooLarge() {
			l.fail(x.largeBody(), nil)
			return
		}
		if !l.push(span, done && len(x.body.Trailers) == 0) {
			return
		}
		d.in.take(n)
		if done {
			l.sent()
			return
		}
		if n > 0 && len(d.in.b) > 0 {
			continue
		}
		d.stretch(serviceSends, time.Now().Add(within))
		d.expect(clientSends, bodyDue(x.s, since, x.taken))
		err = d.in.fill()
		d.forget(clientSends)
		if err != nil && !d.interruptedBefore(err, l.isStopped) {
			l.brokeOff(err)
			return
		}
	}
}

func (l *lifted) sent() {
	x := l.x
	if trailers := x.body.Trailers; len(trailers) > 0 {
		_ = l.stream.Trailers(trailers) // fails where the stream has ended, which we were told
	}
	x.far.flush()
	l.mu.Lock()
	l.sentAll = true
	l.mu.Unlock()
}

// isStopped reports whether nobody wants the rest of the body.
func (l *lifted) isStopped() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// brokeOff notes how the client's body ended before its time.
func (l *lifted) brokeOff(err error) {
	d := l.x.d
	switch {
	case isInterrupt(err) && d.late[clientSends].Load():
		l.fail(&refused{status: http.StatusRequestTimeout, why: "the body of the request came too slowly", last: true}, nil)
	case isInterrupt(err): // nobody wants the rest
	default:
		l.fail(nil, cutShort(err))
	}
}

func (l *lifted) fail(why *refused, gone error) {
	l.mu.Lock()
	l.refused, l.gone = why, gone
	l.mu.Unlock()
	l.signal()
}

// push sends content to the service, as fast as it takes it. It reports whether
// there is a use for more.
func (l *lifted) push(b []byte, ended bool) bool {
	x := l.x
	for {
		n, err := l.stream.Write(b, ended)
		if err != nil {
			return false
		}
		b = b[n:]
		x.far.flush()
		if len(b) == 0 {
			return true
		}
		x.d.expectOf(serviceTakes, x.s.Timeouts.Stall)
		select {
		case <-l.room:
		case <-l.stop:
			return false
		}
		x.d.forget(serviceTakes)
		if x.d.late[serviceTakes].Load() {
			return false
		}
	}
}

// The following are the receiver of the service's stream.

// Head implements http2.Receiver.
func (l *lifted) Head(p *http1.Parts, large bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done {
		return
	}
	defer l.signal()
	asked := http1.Asked{Method: l.x.req.Method}
	switch {
	case large:
		l.bad = fmt.Errorf("its fields are too many or too long")
	case p.Status < http.StatusOK:
		r := &http1.Response{}
		if err := r.Assemble(p, asked); err != nil || len(l.interim) == maxInterim {
			l.bad = fmt.Errorf("too many interim responses, or bad ones: %w", err)
			return
		}
		l.interim = append(l.interim, r)
	default:
		if l.bad = l.x.resp.Assemble(p, asked); l.bad == nil {
			l.headed, l.ended = true, p.Ended
		}
	}
}

// Data implements http2.Receiver.
func (l *lifted) Data(b []byte, ended bool) int {
	if len(b) == 0 && ended { // which leaves nothing behind for Next
		l.mu.Lock()
		l.ended = true
		l.mu.Unlock()
	}
	l.arrived()
	return 0
}

// Trailers implements http2.Receiver.
func (l *lifted) Trailers(fields []http1.Field) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trailers, l.ended = append([]http1.Field{}, fields...), true
	l.arrived()
}

// Room implements http2.Receiver.
func (l *lifted) Room() { signal(l.room) }

// Ended implements http2.Receiver.
func (l *lifted) Ended(err *http2.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	l.signal()
}
