package proxy

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/canonical"
	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/http2"
)

// HTTP is what an HTTP listener does with requests. Zero values mean what
// stands beside them.
type HTTP struct {
	Literal   canonical.Options  // what its services take literally; nothing
	Forwarded forwarded.Settings // what its services are told of who calls
	MaxBody   int64              // of a request, in bytes, its chunks included; 0: unbounded
	JWT       *JWT               // none
	Retries   int                // further endpoints that a request is sent to which none has answered: 2; negative: none

	// Versions are those that clients may speak, by their ALPN protocols (RFC
	// 7301 §6), the preferred first: h2 and http/1.1, with which goes 1.0.
	// Empty: both, in that order.
	Versions   []string
	MaxStreams int // requests of one connection of HTTP/2 at a time (RFC 9113 §5.1.2), at most 1,000: 250
}

const defaultRetries = 2

// Of HTTP.MaxStreams. Each is served like a connection, and all of them take one
// place of MaxConnections.
const (
	defaultMaxStreams = 250
	maxStreams        = 1000
)

// The ALPN protocols of HTTP/2, 1.1 and 1.0 (RFC 7301, section 6).
const (
	protocolH2     = "h2"
	protocolHTTP   = "http/1.1"
	protocolHTTP10 = "http/1.0"
)

func (h *HTTP) withDefaults() *HTTP {
	out := *h
	out.Retries = max(0, cmp.Or(h.Retries, defaultRetries))
	out.MaxStreams = cmp.Or(h.MaxStreams, defaultMaxStreams)
	if out.Versions = slices.Clone(h.Versions); len(out.Versions) == 0 {
		out.Versions = []string{protocolH2, protocolHTTP}
	}
	return &out
}

// readsAs reports whether a request that was read, proven and told of under was
// would be the same under h. What is of connections, or comes after the
// decision, makes no difference to it.
func (h *HTTP) readsAs(was *HTTP) bool {
	now := *h
	now.Versions, now.MaxStreams, now.Retries = was.Versions, was.MaxStreams, was.Retries
	return reflect.DeepEqual(&now, was)
}

// check returns why the settings cannot be.
func (h *HTTP) check(inbound bool) error {
	if h.MaxBody < 0 {
		return errors.New("max_body cannot be negative")
	}
	if h.MaxStreams < 0 || h.MaxStreams > maxStreams {
		return fmt.Errorf("max_streams: %d is out of bounds: want 1 to %d, or 0 for %d", h.MaxStreams, maxStreams, defaultMaxStreams)
	}
	if err := checkVersions(h.Versions); err != nil {
		return fmt.Errorf("versions: %w", err)
	}
	if h.JWT != nil {
		if err := h.JWT.check(inbound); err != nil {
			return err
		}
	}
	_, err := forwarded.Compile(h.Forwarded)
	return err
}

func checkVersions(versions []string) error {
	for i, v := range versions {
		if v != protocolH2 && v != protocolHTTP {
			return fmt.Errorf("%q is none that is served: want %s or %s", v, protocolH2, protocolHTTP)
		}
		if slices.Contains(versions[:i], v) {
			return fmt.Errorf("%s is in the list twice", v)
		}
	}
	return nil
}

// This file is the client's side of an HTTP/1.1 connection: its requests, one
// after another. Each is an exchange (exchange.go), decided by itself
// (ruling.go). Between two of them the connection is parked like any other.

// requests are what a connection carries, as far as what they come over makes a
// difference. The methods are called with conn.mu held.
type requests interface {
	questions(yield func(*question) bool)       // that are asked, other than the connection's own
	check(now time.Time, s *settings)           // what is due
	sooner(s *settings, tell func(t time.Time)) // of when something is
	drain(drains bool)                          // the connection is to end, or is not any more
	answered() int                              // how many there were
	says() end                                  // the client's end, as it is spoken to
}

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

	served int  // requests that came to an answer
	mayTry bool // it may turn out to be one of HTTP/2, by how it begins

	forth, back *stream // which carry it since it changed its protocol
}

func (d *downstream) makerFor(s *settings) *forwarded.Maker {
	if d.told != s.told {
		d.maker, d.told = d.c.makerOf(d.out.dst, s), s.told
	}
	return d.maker
}

func (d *downstream) version() int { return 1 }

// serveHTTP serves the requests of a connection whose ends are known, until
// there is nothing to do for this goroutine.
func (c *conn) serveHTTP(down end) error {
	_, overTLS := down.(*secured)
	if overTLS && c.protocol == protocolH2 || !slices.Contains(c.began.HTTP.Versions, protocolHTTP) {
		return c.serveHTTP2(down)
	}
	d := &downstream{mayTry: !overTLS && slices.Contains(c.began.HTTP.Versions, protocolH2)}
	d.sleeper = sleeper{c: c, src: inletOf(down), work: d, bytes: &c.in}
	d.in = intake{src: d.src, flow: flow{&c.in, c.l.meters.bytesIn}}
	d.out = outlet{down, flow{&c.out, c.l.meters.bytesOut}}
	if !c.startRequests(d, &d.sleeper, &d.waits) {
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
func (c *conn) startRequests(r requests, reader *sleeper, w *waits) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		return false
	}
	c.http = r
	c.streams[0] = reader
	c.phase, c.moved = copying, time.Now()
	c.l.meters.allowed.Inc()
	c.noteDrain()
	w.expect(clientSends, c.moved.Add(c.under(c.l.proxy.world.Load()).Timeouts.Head))
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
		if err == nil && d.mayTry {
			d.mayTry = false
			if d.speaksHTTP2() {
				d.c.continueHTTP2(d)
				return
			}
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

// speaksHTTP2 reports whether a client that has begun to speak does so in HTTP/2,
// as one may that knows it of us (RFC 9113, section 3.3). In HTTP/1.1 nothing
// begins like that.
func (d *downstream) speaksHTTP2() bool {
	for {
		n := min(len(d.in.b), len(http2.Preface))
		if string(d.in.b[:n]) != http2.Preface[:n] {
			return false
		}
		if n > len("PRI") {
			return true
		}
		if d.in.fill() != nil {
			return false // reading the head finds out why
		}
	}
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
		case d.late[clientSends].Load() && d.patience[clientSends].Load() != 0: // else it was for a head that came just then
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

func (d *downstream) questions(func(*question) bool) {}

// check ends waits that are over, those for a service whose answer nobody waits
// for any more, and a client's connection that has asked for nothing for long or
// is to end.
func (d *downstream) check(now time.Time, s *settings) {
	c := d.c
	if d.hurry(now); c.closing != nil || d.state.Load() == busy {
		c.moved = now
		return
	}
	if sum := c.in.Load(); sum != c.movedSum {
		c.movedSum, c.moved = sum, now
	}
	quiet := now.Sub(c.moved)
	if why, ok := c.drains(); ok && now.Sub(c.drainedAt) >= lameDuck(s) {
		d.leave(why)
	} else if s.Timeouts.Idle > 0 && quiet >= s.Timeouts.Idle {
		d.leave(closing{"peer", fmt.Sprintf("idle for %s", s.Timeouts.Idle)})
	}
}

func (d *downstream) sooner(s *settings, tell func(time.Time)) {
	d.waits.sooner(tell)
	if c := d.c; !c.drainedAt.IsZero() && d.state.Load() != busy && !d.leaving.Load() {
		tell(c.drainedAt.Add(lameDuck(s)))
	}
}

func (d *downstream) drain(drains bool) { d.draining.Store(drains) }
func (d *downstream) answered() int     { return d.served }
func (d *downstream) says() end         { return d.out.dst }

// hurry ends the waits that are over, and those for a service whose answer
// nobody waits for any more, with c.mu held.
func (d *downstream) hurry(now time.Time) {
	if d.state.Load() == busy && d.patience[serviceSends].Load() != 0 && (d.c.up != nil || d.c.rouse != nil) && hasGone(d.c.down) {
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
func (q *question) interruptTarget() {
	if q.up != nil {
		_ = q.up.SetDeadline(past) // fails on a closed socket, which its reader finds out
	}
	if q.rouse != nil {
		q.rouse()
	}
}

// isInterrupt reports whether a read or write was ended by us.
func isInterrupt(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// interruptedBefore reports whether a read was interrupted for a wait that had
// ended before it began: the bytes came just when their time was over. It is to
// be tried again, unless it was stopped, which is asked with c.mu held.
func (d *downstream) interruptedBefore(err error, stopped func() bool) bool {
	if !isInterrupt(err) {
		return false
	}
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	if stopped() || d.late[clientSends].Load() {
		return false
	}
	d.src.resume()
	return true
}

// isEnd reports whether the far end closed the connection. Between two messages
// it makes no difference whether it said so in TLS first.
func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
