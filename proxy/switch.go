package proxy

import (
	"net/http"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is about connections that change their protocol (RFC 9110, section
// 7.8), as WebSocket does. From then on they are two streams, as those of a TCP
// listener are: parked while silent, and asked again on every change, by the
// request that began them.

// switchable reports whether a client may change to a protocol. From then on
// nobody sees what is said, so that those are none in which there are requests
// of their own, as in HTTP/2 (h2c) and whatever goes over TLS.
func switchable(protocol string) bool {
	for _, prefix := range []string{"h2", "http", "tls"} {
		if len(protocol) >= len(prefix) && strings.EqualFold(protocol[:len(prefix)], prefix) {
			return false
		}
	}
	return true
}

// switchProtocols passes the response on, and what each side has said behind
// its head, and has the connection carried by its streams.
func (x *exchange) switchProtocols() (next bool) {
	d, b := x.d, x.b
	c := d.c
	x.http.Status = http.StatusSwitchingProtocols
	if x.resp.Upgrade == "" || !strings.EqualFold(x.resp.Upgrade, x.told.Upgrade) {
		return x.reply(refuseRequest(http.StatusBadGateway, "the service took another protocol than it was offered"))
	}
	x.sent = true
	if x.writeHead(&http1.Edit{Upgrade: x.resp.Upgrade}, b.in.b) != nil {
		d.end("peer", "the client went away")
		x.dropBackend()
		return false
	}
	b.in.unpin()
	b.in.b = nil
	b.in.drop()
	if early := d.in.b; len(early) > 0 {
		d.expectOf(serviceTakes, x.s.Timeouts.Stall)
		_, err := b.Write(early)
		d.forget(serviceTakes)
		if err != nil {
			d.end("error", "the service broke off: "+explainBroken(err))
			x.dropBackend()
			return false
		}
		d.in.take(len(early))
	}
	forth := c.stream(client, d.src, b.end, flow{&c.in, c.l.meters.bytesIn})
	back := c.stream(target, b.in.src, d.out.dst, flow{&c.out, c.l.meters.bytesOut})
	lent := x.loan
	if !c.startStreams(forth, back, x, &lent) {
		x.dropBackend()
		return false
	}
	d.forth, d.back = forth, back
	return false
}

// startStreams has both streams carry the connection, unless it was ended
// before. What it was decided on, and what was lent, is kept for as long as it
// lives.
func (c *conn) startStreams(forth, back *stream, x *exchange, lent loan) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		return false
	}
	c.request.HTTP = keepAsked(&x.asked)
	c.record.Destination = x.record.Destination
	c.lent = lent
	c.streams = [2]*sleeper{&forth.sleeper, &back.sleeper}
	c.live.Store(int32(len(c.streams)))
	c.http = nil
	if c.up != nil { // else the service's end is a stream
		_ = c.up.SetDeadline(time.Time{}) // of a wait that was over when all was well; fails on a closed socket, which its reader finds out
	}
	c.moved = time.Now()
	c.l.proxy.table.schedule(c, c.nextDue())
	return true
}

// keepAsked copies what rules saw of a request out of the buffer it came in. It
// is as bounded as the head of a request is.
func keepAsked(h *policy.HTTP) *policy.HTTP {
	kept := *h
	kept.Method, kept.Host, kept.Path = strings.Clone(h.Method), strings.Clone(h.Host), strings.Clone(h.Path)
	kept.Headers = make([]policy.Header, len(h.Headers))
	for i, f := range h.Headers {
		kept.Headers[i] = policy.Header{Name: strings.Clone(f.Name), Value: strings.Clone(f.Value)}
	}
	return &kept
}
