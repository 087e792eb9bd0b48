package proxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/http1"
)

// exchange is one request of a client and its response: read, decided, sent on
// to an endpoint of the target, answered, recorded. It is used again for the
// next request, of any connection, so that one that is idle holds none of it.
type exchange struct {
	call
	d      *downstream
	body   http1.Body
	whole  bool  // all of its body is there, so that it can be sent again
	held   int   // bytes of a whole body, which stay in the intake until the request is done with
	taken  int64 // of its body, in bytes; the upload's while that runs
	upload upload

	answer  http1.Edit
	content http1.Body // of the response
	sent    bool       // the client got something of a response
	in, out uint64     // of the connection, before it
}

var exchanges = sync.Pool{New: func() any {
	x := &exchange{}
	x.upload.done = make(chan struct{}, 1)
	return x
}}

// exchange serves one request, of which a byte is there. It reports whether
// another one may follow.
func (d *downstream) exchange() (next bool) {
	x := exchanges.Get().(*exchange)
	x.d = d
	x.of(&d.c.question, &d.waits, d)
	x.in, x.out = d.read(), d.c.out.Load()
	next = x.serve() && !d.leaving.Load()
	x.finish()
	return next
}

// read is how many bytes of the client belong to requests before the next one.
func (d *downstream) read() uint64 { return d.c.in.Load() - uint64(len(d.in.b)) }

func (x *exchange) serve() bool {
	if err := x.readHead(); err != nil {
		return x.refuseHead(err)
	}
	if refused := x.admit(); refused != nil {
		return x.reply(refused)
	}
	x.body.Start(x.req.Body, x.req.Length, x.told.Drop)
	return x.forward()
}

// finish records the request and gives back what it held.
func (x *exchange) finish() {
	d := x.d
	d.endRequest(x)
	d.served++
	x.account(d.read()-x.in, d.c.out.Load()-x.out)
	d.in.unpin()
	x.reset()
	exchanges.Put(x)
}

// reset forgets the request but not the memory it was held in.
func (x *exchange) reset() {
	x.call.reset()
	*x = exchange{call: x.call, upload: upload{done: x.upload.done}}
}

// readHead reads the head of the request.
func (x *exchange) readHead() error {
	d := x.d
	x.began = time.Now()
	x.req.Options = d.c.began.HTTP.Literal
	for {
		n, err := x.req.Parse(d.in.b)
		if err != nil {
			return err
		}
		if n > 0 {
			d.forget(clientSends)
			d.in.pin()
			d.in.take(n)
			return nil
		}
		if d.patience[clientSends].Load() == 0 || d.served > 0 {
			d.expect(clientSends, x.began.Add(d.c.began.Timeouts.Head))
		}
		if err := d.in.fill(); err != nil && !d.interruptedBefore(err, x.upload.isStopped) {
			return cutShort(err)
		}
	}
}

// refuseHead answers a request that cannot be understood. Nothing after it can.
func (x *exchange) refuseHead(err error) bool {
	var bad *http1.Error
	switch {
	case errors.As(err, &bad):
		x.id, x.notes = forwarded.NewID(x.notes) // what was sent of one was not read
		why := "request: " + bad.Error()
		if speechOf(x.d.in.b[:min(len(x.d.in.b), headOfHello)]) == saysTLS {
			why = "the client speaks TLS; this port speaks plain HTTP"
		}
		return x.reply(&refused{status: bad.Status, why: why, last: true})
	case isInterrupt(err) && x.d.late[clientSends].Load():
		x.d.resume()
		return x.reply(&refused{status: http.StatusRequestTimeout, why: fmt.Sprintf("the head of the request did not come within %s", x.d.c.began.Timeouts.Head), last: true})
	}
	x.d.end("peer", "client: within the head of a request: "+explainBroken(err))
	return false
}

// resume has reads of the client wait again.
func (d *downstream) resume() {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	d.src.resume()
}

// forward sends the request to an endpoint, and to another one where none of it
// was understood and nothing is lost by that.
func (x *exchange) forward() bool {
	for {
		if refused := x.borrow(); refused != nil {
			return x.reply(refused)
		}
		attempt := x.attempt
		if x.far != nil {
			attempt = x.lift
		}
		again, next := attempt()
		if !again {
			return next
		}
	}
}

// attempt sends the request over the connection that was lent and passes on
// what comes back. It reports whether the request is to be sent again, or else
// whether the client may send another one.
func (x *exchange) attempt() (again, next bool) {
	x.tries++
	x.used = true
	if refused := x.send(); refused != nil {
		return false, x.reply(refused)
	}
	err := x.readResponse()
	if err != nil {
		return x.failed(err)
	}
	if x.resp.Status == http.StatusSwitchingProtocols {
		return false, x.switchProtocols()
	}
	return false, x.respond()
}

// send sends the head of the request, with what of its body is there. What is
// to come goes by itself.
func (x *exchange) send() *refused {
	d := x.d
	out := outlet{dst: x.b}
	buf := takeBuffer(headClass)
	head := x.req.Append((*buf)[:0], &x.told)
	n, done, err := x.body.Next(d.in.b)
	if err != nil {
		bufferPools[headClass].Put(buf)
		return x.badBody(err)
	}
	if x.taken += int64(n); x.tooLarge() {
		bufferPools[headClass].Put(buf)
		return x.largeBody()
	}
	if x.whole = done; done {
		x.held = n
	}
	x.upload.begun.Store(n > 0)
	d.expectOf(serviceTakes, x.s.Timeouts.Stall)
	err = out.write(head, d.in.b[:n])
	bufferPools[headClass].Put(buf)
	d.forget(serviceTakes)
	x.upload.err = err
	if done {
		return nil // its bytes are taken once it need not be sent again
	}
	d.in.take(n)
	if err == nil {
		x.startUpload()
	}
	return nil
}

// readResponse reads the head of the final response, and passes on those that
// come before it.
func (x *exchange) readResponse() error {
	d, in := x.d, &x.b.in
	asked := http1.Asked{Method: x.req.Method, Upgrade: x.told.Upgrade != ""}
	d.expectOf(serviceSends, x.s.responseWithin(x.bound()))
	defer d.forget(serviceSends)
	for {
		n, err := x.resp.Parse(in.b, asked)
		switch {
		case err != nil:
			return err
		case n == 0:
			if err := in.fill(); err != nil {
				return cutShort(err)
			}
		case x.resp.Interim():
			if err := x.passInterim(); err != nil {
				return err
			}
			in.take(n)
		default:
			in.pin()
			in.take(n)
			x.loan.Status(x.resp.Status)
			return nil
		}
	}
}

// errClient is why an exchange ends that the client has left.
var errClient = errors.New("the client is gone")

// passInterim passes on a response that another one follows (RFC 9110, section
// 15.2). Clients of HTTP/1.0 know none.
func (x *exchange) passInterim() error {
	if x.req.Minor == 0 {
		return nil
	}
	x.sent = true
	if err := x.writeHead(&http1.Edit{}, nil); err != nil {
		return errClient
	}
	return nil
}

// writeHead writes the head of the response, with what of its body is there.
func (x *exchange) writeHead(e *http1.Edit, body []byte) error {
	d := x.d
	buf := takeBuffer(headClass)
	head := x.resp.Append((*buf)[:0], e)
	d.expectTaken(x.s, len(head)+len(body))
	err := d.out.write(head, body)
	d.forget(clientTakes)
	bufferPools[headClass].Put(buf)
	return err
}

// respond passes the response on. It reports whether the client may send
// another request.
func (x *exchange) respond() (next bool) {
	d, in := x.d, &x.b.in
	x.http.Status = x.resp.Status
	x.content.Start(x.resp.Body, x.resp.Length, nil)
	unread := x.req.Continue && !x.whole && !x.upload.begun.Load() // it was told not to send its body, or not told to
	closes := !x.req.KeepAlive || unread || d.draining.Load()
	x.answer = http1.Edit{Close: closes, Persist: !closes && x.req.Minor == 0, Unchunked: x.req.Minor == 0}
	unchunked := x.req.Minor == 0 && x.resp.Body == http1.Chunked
	err := x.passBody(in, unchunked)
	switch {
	case errors.Is(err, errClient), err != nil && d.gone.Load():
		x.left("the client went away within the response")
		return false
	case err != nil:
		x.breakOff(err)
		return false
	}
	if !closes {
		x.awaitUpload()
	}
	kept := x.stopUpload()
	if kept && x.upload.err == nil && x.resp.KeepAlive && x.resp.Body != http1.UntilClose && len(in.b) == 0 {
		x.returnBackend()
	} else {
		x.dropBackend()
	}
	if x.whole {
		x.takeBody()
	}
	if closes || !kept || unchunked || x.resp.Body == http1.UntilClose {
		d.lastWords()
		return false
	}
	return true
}

// statusLeft is the status in log and metrics of a request whose client left
// before the response: nginx's word for it, and no client sees it.
const statusLeft = 499

// left ends the connection of a client that is gone.
func (x *exchange) left(why string) {
	x.dropBackend()
	if x.http.Status == 0 {
		x.http.Status = statusLeft
	}
	x.record.Reason = why
	x.d.end("peer", why)
}

// takeBody uses up the body that was sent from where it lies.
func (x *exchange) takeBody() {
	x.d.in.take(x.held)
	x.held = 0
}

// passBody writes the head of the response and all of its body.
func (x *exchange) passBody(in *intake, unchunked bool) error {
	d := x.d
	first := true
	for {
		var span []byte
		var n int
		var done bool
		var err error
		if unchunked {
			span, n, done, err = x.content.NextData(in.b)
		} else {
			n, done, err = x.content.Next(in.b)
			span = in.b[:n]
		}
		if err != nil {
			span = nil
		}
		switch {
		case first:
			first, x.sent = false, true
			if x.writeHead(&x.answer, span) != nil {
				return errClient
			}
		case len(span) > 0:
			d.expectTaken(x.s, len(span))
			if d.out.pass(span) != nil {
				return errClient
			}
			d.forget(clientTakes)
		}
		if err != nil {
			return err
		}
		in.take(n)
		if done {
			return nil
		}
		if unchunked && n > 0 {
			continue // there may be more in what is there
		}
		if err := x.await(in); err != nil {
			if err == io.EOF && x.content.Close() == nil { //nolint:errorlint // in TLS no other end is one in good order
				return nil
			}
			return err
		}
	}
}

// await waits for more of the response's body.
func (x *exchange) await(in *intake) error {
	if idle := x.s.Timeouts.Idle; idle > 0 {
		x.d.expectOf(serviceSends, idle)
		defer x.d.forget(serviceSends)
	}
	return in.fill()
}

// breakOff ends the connection in the midst of a response that the client must
// not take for whole.
func (x *exchange) breakOff(err error) {
	x.dropBackend()
	why := "the response broke off: " + x.explain(err)
	c := x.d.c
	c.mu.Lock()
	defer c.mu.Unlock()
	x.record.Reason = telemetry.Tidy(why)
	c.kill(closing{"error", why})
}

// failed is for a request that got no response. It reports whether it is to be
// sent again.
func (x *exchange) failed(err error) (again, next bool) {
	d := x.d
	fresh := x.loan.Kept == nil
	x.stopUpload()
	switch {
	case errors.Is(err, errClient), d.gone.Load():
		x.left("the client went away before the response")
		return false, false
	case x.upload.gone != nil:
		x.left("the client broke off within the body of its request: " + explainBroken(x.upload.gone))
		return false, false
	case d.c.ended() != nil:
		x.dropBackend()
		return false, false
	case x.upload.refused != nil: // which says nothing of the service
		x.dropBackend()
		return false, x.reply(x.upload.refused)
	}
	var bad *http1.Error
	late := isInterrupt(err)
	nothing := len(x.b.in.b) == 0 && !errors.As(err, &bad)
	if fresh || late || !nothing { // one that was kept may have been closed just then
		x.loan.Failed(fmt.Errorf("%s %s", x.b.raw.RemoteAddr(), x.explain(err)))
	}
	x.dropBackend()
	if nothing && !late && !x.sent && x.mayRetry(fresh) {
		x.body.Start(x.req.Body, x.req.Length, x.told.Drop)
		x.taken = 0
		return true, false
	}
	if x.sent { // an interim response
		d.end("error", "the service broke off: "+x.explain(err))
		return false, false
	}
	status, why := http.StatusBadGateway, "the service broke off before it answered: "
	if late {
		status, why = http.StatusGatewayTimeout, fmt.Sprintf("the service did not answer within %s: ", x.s.responseWithin(x.bound()))
	} else if !nothing {
		why = "the service's answer: "
	}
	return false, x.reply(&refused{status: status, why: why + x.explain(err)})
}

// mayRetry reports whether the request can be sent again: the client cannot
// tell by what comes of it, and all of it is there.
func (x *exchange) mayRetry(fresh bool) bool { return x.whole && x.call.mayRetry(fresh) }

// dropBackend ends the connection to the service.
func (x *exchange) dropBackend() {
	if x.b != nil {
		x.stopUpload()
	}
	x.call.dropBackend()
}

// release gives back what was lent.
func (x *exchange) release() {
	if x.b != nil && x.used {
		x.stopUpload()
	}
	x.call.release()
}
