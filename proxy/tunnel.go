package proxy

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/http1"
)

// This file is a passage whose service speaks HTTP/1.1. It has a goroutine which
// waits for the service, and a second one while content of the request is still to
// come.

// tunnel sends the request, and passes on the answer unless somebody else does. It
// reports whether the request is to be sent again, or else with which connection
// the goroutine stays.
func (p *passage) tunnel() (again bool, stays *backend) {
	if p.isOver() { // before there was a connection to interrupt
		p.used = true
		p.conclude()
		return false, nil
	}
	c := &courier{p: p}
	asked, gone := p.b.ask(c)
	if asked {
		return false, nil
	}
	p.tries++
	if gone { // since it was found idle
		p.dropBackend()
		if p.tries <= maxStale {
			return true, nil
		}
		return p.fail(refuseRequest(http.StatusBadGateway, "the service closes its connections")), nil
	}
	p.used = true
	c.err = c.sendHead()
	return p.answer(c)
}

// askAtOnce is for the client's reader: it sends a request of which all is there,
// and that cannot have it wait, where somebody waits for the answer.
func (p *passage) askAtOnce() bool {
	if p.req.Body != http1.NoBody || !p.small() || p.isOver() {
		return false
	}
	asked, _ := p.b.ask(&courier{p: p})
	return asked
}

// small reports whether the head of the request surely finds room in the socket of
// an idle connection.
func (p *passage) small() bool {
	const around = 4 // ": " and a line's end
	n := len(p.req.Target.Path) + len(p.req.Target.Query) + len(p.req.Host) + len(p.told.Host)
	for _, fields := range [][]http1.Field{p.req.Fields, p.told.Set, p.told.Append} {
		for i := range fields {
			n += len(fields[i].Name) + len(fields[i].Value) + around
		}
	}
	return n <= roomForSure/2
}

// answer passes on the answer to what was sent. It reports what tunnel does.
func (p *passage) answer(c *courier) (again bool, stays *backend) {
	err := c.err
	if err == nil || c.running {
		err = p.readHead()
	}
	if err != nil {
		c.stop()
		return p.failed(err, c), nil
	}
	switch {
	case p.resp.Status == http.StatusSwitchingProtocols:
		p.switchOver(c)
	case p.told.Upgrade != "" && p.resp.Status/100 == 2: // which the client would take for the change (RFC 8441, section 4)
		c.stop()
		p.close(refuseRequest(http.StatusBadGateway, "the service answered %d in place of a change to %s", p.resp.Status, telemetry.Tidy(p.told.Upgrade)))
	default:
		stays = p.respond(c)
	}
	p.conclude()
	return false, stays
}

// courier brings the content of a request to the service.
type courier struct {
	p       *passage
	work    sync.WaitGroup
	running bool
	raw     bool          // what is carried is no content of a request any more
	stopped chan struct{} // closed to end it, once it runs
	whole   atomic.Bool   // all of it was sent
	begun   bool          // some of it was
	err     error         // of sending the head
}

// sendHead sends the head of the request, with what of its content is there.
// What is to come goes by itself.
func (c *courier) sendHead() error {
	p := c.p
	p.key()
	buf, content := takeBuffer(headClass), takeBuffer(headClass)
	defer bufferPools[headClass].Put(buf)
	defer bufferPools[headClass].Put(content)
	out := p.req.Append((*buf)[:0], &p.told)
	ended := p.req.Body == http1.NoBody
	var read []byte
	if !ended {
		var trailers []http1.Field
		if read, ended, trailers = c.next((*content)[:0]); len(read) > 0 {
			c.begun = true
			out = c.frame(out, read)
		}
		if ended {
			out = c.finish(out, trailers)
		}
	}
	if p.tooMuch(len(read)) {
		p.in.Credit(len(read))
		p.close(p.largeBody())
		return io.ErrShortWrite
	}
	p.expect(serviceTakes, p.s.Timeouts.Stall)
	_, err := p.b.Write(out)
	p.wait.forget(serviceTakes)
	p.in.Credit(len(read))
	c.whole.Store(ended)
	if err == nil && !ended {
		c.start()
	}
	p.awaitAnswer()
	return err
}

// key gives a WebSocket's handshake what it has in HTTP/1.1 alone, and no use
// for elsewhere (RFC 8441, section 5).
func (p *passage) key() {
	if !strings.EqualFold(p.told.Upgrade, "websocket") {
		return
	}
	var nonce [16]byte
	_, _ = rand.Read(nonce[:]) // never fails
	p.told.Set = append(p.told.Set, http1.Field{Name: "sec-websocket-key", Value: base64.StdEncoding.EncodeToString(nonce[:])})
}

// tooMuch counts content of the request, and reports whether it is more than it
// may be.
func (p *passage) tooMuch(n int) bool {
	taken, most := p.taken.Add(int64(n)), p.s.HTTP.MaxBody
	return most > 0 && taken > most
}

func (c *courier) start() {
	c.running, c.stopped = true, make(chan struct{})
	c.work.Go(c.run)
}

// next takes what is there of the content.
func (c *courier) next(b []byte) (got []byte, ended bool, trailers []http1.Field) {
	p := c.p
	got, ended, trailers = p.in.Next(b)
	if ended || len(got) > 0 {
		return got, ended, trailers
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return got, p.trailers != nil, p.trailers
}

// frame appends content as the service gets it.
func (c *courier) frame(dst, content []byte) []byte {
	if c.raw || c.p.req.Body != http1.Chunked {
		return append(dst, content...)
	}
	dst = append(strconv.AppendInt(dst, int64(len(content)), 16), "\r\n"...)
	return append(append(dst, content...), "\r\n"...)
}

// finish appends the end of the content.
func (c *courier) finish(dst []byte, trailers []http1.Field) []byte {
	if c.raw || c.p.req.Body != http1.Chunked {
		return dst
	}
	dst = append(dst, "0\r\n"...)
	for _, f := range trailers {
		dst = append(append(append(append(dst, f.Name...), ": "...), f.Value...), "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

func (c *courier) run() {
	p := c.p
	since, before := time.Now(), p.taken.Load()
	for {
		content := takeBuffer(headClass)
		got, ended, trailers := c.next((*content)[:0])
		if len(got) == 0 && !ended {
			bufferPools[headClass].Put(content)
			if p.isOver() {
				return
			}
			if !c.raw && !p.asked.GRPC() {
				p.expect(clientSends, time.Until(bodyDue(p.s, since, p.taken.Load()-before)))
			}
			select {
			case <-p.arrived:
			case <-c.stopped:
				return
			}
			p.wait.forget(clientSends)
			continue
		}
		err := c.bring(got, ended, trailers)
		bufferPools[headClass].Put(content)
		if err != nil || ended {
			return
		}
	}
}

// bring sends a piece of content.
func (c *courier) bring(got []byte, ended bool, trailers []http1.Field) error {
	p := c.p
	if p.tooMuch(len(got)) && !c.raw {
		p.in.Credit(len(got)) // its connection goes on, and has one window for all
		p.end(p.largeBody())
		return io.ErrShortWrite
	}
	buf := takeBuffer(largeClass)
	defer bufferPools[largeClass].Put(buf)
	out := (*buf)[:0]
	if len(got) > 0 {
		out = c.frame(out, got)
	}
	if ended {
		out = c.finish(out, trailers)
	}
	p.expect(serviceTakes, p.s.Timeouts.Stall)
	_, err := p.b.Write(out)
	p.wait.forget(serviceTakes)
	p.in.Credit(len(got))
	p.f.flush()
	if err != nil {
		return err // it may answer all the same
	}
	if c.raw && ended {
		return p.b.CloseWrite()
	}
	p.stretch()
	c.whole.Store(ended)
	return nil
}

// stop ends it, if it runs.
func (c *courier) stop() {
	if !c.running {
		return
	}
	c.running = false
	close(c.stopped)
	_ = c.p.b.raw.SetWriteDeadline(past) // fails on a closed socket
	c.work.Wait()
	if !c.p.isOver() {
		_ = c.p.b.raw.SetWriteDeadline(time.Time{})
	}
}

// readHead reads the head of the final response, and passes on those before it.
func (p *passage) readHead() error {
	in := &p.b.in
	asked := http1.Asked{Method: p.req.Method, Upgrade: p.told.Upgrade != ""}
	defer p.wait.forget(serviceSends)
	for {
		n, err := p.resp.Parse(in.b, asked)
		switch {
		case err != nil:
			return err
		case n == 0:
			if err := in.fill(); err != nil {
				return cutShort(err)
			}
		case p.resp.Interim():
			if err := p.in.Respond(&p.resp, &http1.Edit{}, false); err != nil {
				return errClient
			}
			p.f.flush()
			in.take(n)
		default:
			in.pin()
			in.take(n)
			p.loan.Status(p.resp.Status)
			return nil
		}
	}
}

// awaitAnswer bounds how long the service may take to answer. A gRPC call says
// so itself, or takes as long as it does.
func (p *passage) awaitAnswer() {
	if within := p.answerWithin(); within > 0 {
		p.expect(serviceSends, within)
	}
}

// stretch gives the service time to answer anew: it got more of the request. A
// call has said for how long it waits.
func (p *passage) stretch() {
	if p.wait.patience[serviceSends].Load() != 0 && !p.asked.GRPC() {
		p.wait.stretch(serviceSends, time.Now().Add(p.s.responseWithin(p.bound())))
	}
}

// respond passes the response on. It returns the connection that is as good as
// before, if it is, with which the goroutine stays.
func (p *passage) respond(c *courier) (stays *backend) {
	in := &p.b.in
	p.http.Status = p.resp.Status
	p.content.Start(p.resp.Body, p.resp.Length, nil)
	p.mu.Lock()
	p.sent = true
	p.mu.Unlock()
	ended := p.resp.Body == http1.NoBody
	err := p.in.Respond(&p.resp, &http1.Edit{}, ended)
	if err == nil && !ended {
		err = p.passBody(in)
	}
	c.stop()
	if err != nil {
		p.breakOff(err)
		return nil
	}
	if !p.closeWhole() || !c.whole.Load() || !p.resp.KeepAlive || p.resp.Body == http1.UntilClose || len(in.b) > 0 {
		return nil
	}
	if stays = p.restBackend(); stays != nil {
		stays.stay.begin(&p.f.c.l.proxy.hosts)
		p.loan.Return(stays)
	}
	return stays
}

// closeWhole is close for a response that is whole.
func (p *passage) closeWhole() bool {
	p.mu.Lock()
	p.answered = true
	p.mu.Unlock()
	return p.close(nil)
}

// breakOff is close for a response that is not whole.
func (p *passage) breakOff(err error) {
	if !errors.Is(err, errClient) {
		p.close(refuseRequest(http.StatusBadGateway, "the response broke off: %s", p.explain(err)))
		return
	}
	p.mu.Lock() // its stream is about to be told, or was
	sent := p.sent
	p.left = p.left || !p.over
	p.mu.Unlock()
	why := "the client went away before the response"
	if sent {
		why = "the client went away within the response"
	}
	p.close(&refused{status: statusLeft, why: why, closed: "peer"})
}

// passBody passes on all of the response's content, and its trailers.
func (p *passage) passBody(in *intake) error {
	for {
		span, n, done, err := p.content.NextData(in.b)
		if err != nil {
			return err
		}
		trailers := done && len(p.content.Trailers) > 0
		if len(span) > 0 || done && !trailers {
			if err := p.push(span, done && !trailers); err != nil {
				return err
			}
		}
		if done && trailers {
			if err := p.in.Trailers(p.content.Trailers); err != nil {
				return errClient
			}
		}
		in.take(n)
		if done {
			return nil
		}
		if n > 0 && len(in.b) > 0 {
			continue // there may be more in what is there
		}
		p.f.flush()
		if err := p.awaitMore(in); err != nil {
			if err == io.EOF && p.content.Close() == nil { //nolint:errorlint // in TLS no other end is one in good order
				return p.push(nil, true)
			}
			return err
		}
	}
}

// awaitMore waits for more of the response.
func (p *passage) awaitMore(in *intake) error {
	if idle := p.s.Timeouts.Idle; idle > 0 && !p.asked.GRPC() {
		p.expect(serviceSends, idle)
		defer p.wait.forget(serviceSends)
	}
	return in.fill()
}

// push sends content to the client, as fast as it takes it.
func (p *passage) push(b []byte, ended bool) error {
	for {
		n, err := p.in.Write(b, ended)
		p.given.Add(int64(n))
		if err != nil {
			return errClient
		}
		if b = b[n:]; len(b) == 0 {
			return nil
		}
		p.f.flush()
		p.expect(clientTakes, p.s.Timeouts.Stall+time.Duration(len(b))*time.Second/SlowestTaken)
		<-p.room
		p.wait.forget(clientTakes)
		if p.isOver() {
			return errClient
		}
	}
}

// failed is for a request that got no response. It reports whether it is to be
// sent again.
func (p *passage) failed(err error, c *courier) (again bool) {
	if errors.Is(err, errClient) || p.matter.ended() != nil { // with its connection, which breaks off what it has
		p.breakOff(errClient)
	}
	if p.isOver() {
		p.conclude()
		return false
	}
	fresh := p.loan.Kept == nil
	var bad *http1.Error
	nothing := len(p.b.in.b) == 0 && !errors.As(err, &bad)
	why := "the service broke off before it answered: "
	if !nothing {
		why = "the service's answer: "
	}
	refused := refuseRequest(http.StatusBadGateway, "%s%s", why, p.explain(err))
	if fresh || !nothing { // one that was kept may have been closed just then
		p.loan.Failed(fmt.Errorf("%s %s", p.b.raw.RemoteAddr(), p.explain(err)))
	}
	p.dropBackend()
	if nothing && c.whole.Load() && !c.begun && p.mayRetry(fresh) {
		return true
	}
	return p.fail(refused)
}

// fail ends the passage for a reason, and reports that it is not to be sent
// again.
func (p *passage) fail(why *refused) (again bool) {
	p.close(why)
	p.conclude()
	return false
}

// switchOver carries what client and service say once they have changed the
// protocol.
func (p *passage) switchOver(c *courier) {
	if p.resp.Upgrade == "" || !strings.EqualFold(p.resp.Upgrade, p.told.Upgrade) {
		p.close(refuseRequest(http.StatusBadGateway, "the service took another protocol than it was offered"))
		return
	}
	p.http.Status = http.StatusOK
	p.mu.Lock()
	p.sent = true
	p.mu.Unlock()
	fields := make([]http1.Field, 0, len(p.resp.Fields))
	for i := range p.resp.Fields {
		if f := &p.resp.Fields[i]; !f.Hop && f.Name != "sec-websocket-accept" {
			fields = append(fields, *f)
		}
	}
	err := p.in.Answer(http.StatusOK, fields, false)
	p.f.flush()
	c.raw = true
	c.start()
	in := &p.b.in
	for err == nil {
		if len(in.b) > 0 {
			err = p.push(in.b, false)
			in.take(len(in.b))
			p.f.flush()
			continue
		}
		err = in.fill()
	}
	if err == io.EOF { //nolint:errorlint // as inlet.next returns it
		if err = p.push(nil, true); err == nil {
			p.f.flush()
			c.work.Wait() // the client may have more to say
			p.closeWhole()
			return
		}
	}
	p.breakOff(err)
	c.stop()
}
