package proxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/forwarded"
)

// HTTP is what an HTTP listener does with requests. Zero values mean what
// stands beside them.
type HTTP struct {
	Literal   canonical.Options  // what its services take literally; nothing
	Forwarded forwarded.Settings // what its services are told of who calls
	MaxBody   int64              // of a request, in bytes, its chunks included; 0: unbounded
	JWT       *JWT               // none
	Retries   int                // further endpoints that a request is sent to which none has answered: 2; negative: none
}

const defaultRetries = 2

// The ALPN protocols of HTTP/1.1 and 1.0 (RFC 7301, section 6).
const (
	protocolHTTP   = "http/1.1"
	protocolHTTP10 = "http/1.0"
)

func (h *HTTP) withDefaults() *HTTP {
	out := *h
	out.Retries = max(0, cmp.Or(h.Retries, defaultRetries))
	return &out
}

// check returns why the settings cannot be.
func (h *HTTP) check(inbound bool) error {
	if h.MaxBody < 0 {
		return errors.New("max_body cannot be negative")
	}
	if h.JWT != nil {
		if err := h.JWT.check(inbound); err != nil {
			return err
		}
	}
	_, err := forwarded.Compile(h.Forwarded)
	return err
}

// This file is the client's side of an HTTP/1.1 connection: its requests, one
// after another. Each is an exchange (exchange.go), decided by itself
// (ruling.go). Between two of them the connection is parked like any other.

// downstream is a client's connection as a sequence of requests.
type downstream struct {
	sleeper
	in    intake
	out   outlet
	maker *forwarded.Maker // of what services are told of the client
	told  *forwarded.Rules // by which maker was made

	waits                // of the request that is served, and for the next one
	leaving  atomic.Bool // no further request is read
	draining atomic.Bool // as leaving, after the one that is served now

	ctx    context.Context // ends with the connection; nil while nothing was dialled
	served int             // requests that came to an answer

	forth, back *stream // which carry it since it changed its protocol
}

// follow has services told of the client as s says from now on.
func (d *downstream) follow(s *settings) {
	if d.told != s.told {
		d.maker, d.told = d.c.makerOf(d.out.dst, s), s.told
	}
}

// serveHTTP serves the requests of a connection whose ends are known, until
// there is nothing to do for this goroutine.
func (c *conn) serveHTTP(down end) error {
	d := &downstream{}
	d.sleeper = sleeper{c: c, src: inletOf(down), work: d, bytes: &c.in}
	d.in = intake{src: d.src, flow: flow{&c.in, c.l.meters.bytesIn}}
	d.out = outlet{down, flow{&c.out, c.l.meters.bytesOut}}
	if !c.startRequests(d) {
		return c.killedBefore()
	}
	d.run()
	return errCarried
}

// makerOf returns what tells services who calls. Outbound, the far end learns
// that from our certificate.
func (c *conn) makerOf(down end, s *settings) *forwarded.Maker {
	client := forwarded.Client{Source: c.request.Source.Addr()}
	if t, ok := down.(*secured); ok {
		client.TLS, client.ID, client.Own = true, c.request.From.ID, c.request.To.ID
		client.Hash = sha256.Sum256(t.ConnectionState().PeerCertificates[0].Raw)
	}
	return s.told.Maker(client)
}

// startRequests notes that the connection takes requests, unless it was ended
// before.
func (c *conn) startRequests(d *downstream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		return false
	}
	c.http = d
	c.streams[0] = &d.sleeper
	c.phase, c.moved = copying, time.Now()
	c.l.meters.allowed.Inc()
	c.noteDrain()
	d.expect(clientSends, c.moved.Add(c.under(c.l.proxy.world.Load()).Timeouts.Head))
	c.l.proxy.table.schedule(c, c.nextDue())
	return true
}

// run serves requests until the connection ends or is parked.
func (d *downstream) run() {
	for {
		parked, err := d.await()
		if parked {
			return
		}
		if err != nil || !d.exchange() {
			break
		}
	}
	d.state.Store(over)
	if d.forth != nil {
		go d.back.run()
		d.forth.run()
		return
	}
	d.c.finish(&d.c.record, nil)
}

// dialContext ends with the connection.
func (d *downstream) dialContext() context.Context {
	if d.ctx == nil {
		ctx, cancel := context.WithCancel(context.Background())
		if !d.c.dialling(cancel) {
			cancel()
		}
		d.ctx = ctx
	}
	return d.ctx
}

// lastWords says that nothing more comes. What the client still sends is read
// for a moment: a reset could take the answer from it.
func (d *downstream) lastWords() {
	d.leaving.Store(true)
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	d.c.unread = true
}

// errLeaving ends a connection between two requests.
var errLeaving = errors.New("no further request is read")

// await waits for the first byte of a request. It reports whether the
// connection was parked, which this goroutine must not touch then.
func (d *downstream) await() (parkedNow bool, err error) {
	for len(d.in.b) == 0 {
		if d.leaving.Load() {
			return false, errLeaving
		}
		d.state.CompareAndSwap(busy, moving)
		err := d.in.fill()
		switch {
		case err == nil:
			d.begin()
			return false, nil
		case !isInterrupt(err):
			d.begin()
			d.left(err)
			return false, err
		case d.late[clientSends].Load():
			d.begin()
			d.end("peer", fmt.Sprintf("the client sent no request within %s", d.c.began.Timeouts.Head))
			return false, errLeaving
		case d.leaving.Load():
		case d.park():
			if d.leaving.Load() { // since it looked
				d.wake()
			}
			return true, nil
		}
	}
	d.begin()
	return false, nil
}

// begin has nobody interrupt what follows.
func (d *downstream) begin() {
	if d.state.CompareAndSwap(moving, busy) {
		return
	}
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	if d.state.Swap(busy) == kicked {
		d.src.resume()
	}
}

// left notes how the client went between two requests.
func (d *downstream) left(err error) {
	if d.leaving.Load() || isEnd(err) {
		return
	}
	d.end("peer", "client: "+explainBroken(err))
}

// end notes why the connection ends. What was noted first counts.
func (d *downstream) end(reason, why string) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	if d.c.closing == nil {
		d.c.closing = &closing{reason, why}
		d.c.orderly = true
	}
}

// leave ends the connection if it waits for a request, and else after that
// one, with c.mu held.
func (d *downstream) leave(why closing) {
	if !d.leaving.Swap(true) && d.c.closing == nil {
		d.c.closing, d.c.orderly = &why, true
	}
	d.wake()
	if d.state.CompareAndSwap(moving, kicked) {
		d.src.interrupt()
	}
}

// hurry ends the waits that are over, and those for a service whose answer
// nobody waits for any more, with c.mu held.
func (d *downstream) hurry(now time.Time) {
	if d.state.Load() == busy && d.patience[serviceSends].Load() != 0 && d.c.up != nil && hasGone(d.c.down) {
		d.gone.Store(true)
		d.c.interruptTarget()
	}
	for w := range d.overdue(now) {
		switch w {
		case clientSends:
			d.state.CompareAndSwap(moving, kicked)
			d.src.interrupt()
			d.wake()
		case clientTakes:
			d.c.kill(closing{"peer", "the client takes nothing of what it asked for"})
		case serviceSends, serviceTakes:
			d.c.interruptTarget()
		}
	}
}

// interruptTarget has nobody wait for the target any more, with c.mu held.
func (c *conn) interruptTarget() {
	if c.up != nil {
		_ = c.up.SetDeadline(past) // fails on a closed socket, which its reader finds out
	}
}

// isInterrupt reports whether a read or write was ended by us.
func isInterrupt(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// isEnd reports whether the far end closed the connection. Between two messages
// it makes no difference whether it said so in TLS first.
func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
