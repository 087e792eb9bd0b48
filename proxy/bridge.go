package proxy

import (
	"crypto/sha1" //nolint:gosec // RFC 6455 has it, to tell a service of WebSocket from others
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/http2"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// This file is a connection of HTTP/1.1 that changes its protocol where the
// service speaks HTTP/2: to the service it is a stream of frames, opened by an
// extended CONNECT (RFC 8441). From the change on it is two streams of bytes, as
// in switch.go, of which one end is that stream.

const webSocket = "websocket"

// connects reports, by nil, whether the service takes the change of protocol
// that the request offers.
func (x *call) connects() *refused {
	if x.far.connects(x.q.dialContext(), x.s.Timeouts.Connect) {
		return nil
	}
	return refuseRequest(http.StatusNotImplemented, "the service takes no extended CONNECT (RFC 8441), by which it would change to %s: have it offer that, or set upstream.protocol to http1 if it speaks that", telemetry.Tidy(x.told.Upgrade))
}

// offers makes the offer of an HTTP/1.1 client one of HTTP/2, or returns why that
// cannot be.
func (x *exchange) offers() *refused {
	if strings.EqualFold(x.told.Upgrade, webSocket) {
		x.told.Upgrade = webSocket // in HTTP/2 it is spelled like that
	}
	switch protocol := x.told.Upgrade; {
	case x.req.Method != http.MethodGet, strings.Contains(protocol, "/"): // an extended CONNECT names no method, and no version
		return refuseRequest(http.StatusNotImplemented, "the service speaks HTTP/2, in which %s cannot be changed to by %s: want GET and a protocol without a version, or set upstream.protocol to http1", telemetry.Tidy(protocol), telemetry.Tidy(x.req.Method))
	case protocol == webSocket && acceptOf(x.req.Fields) == "":
		return refuseRequest(http.StatusBadRequest, "a WebSocket without one Sec-WebSocket-Key of 16 bytes in base64 (RFC 6455, section 4.2.1)")
	}
	return x.connects()
}

// acceptOf returns the Sec-WebSocket-Accept that answers the key of a handshake
// (RFC 6455, section 4.2.2), or "" where there is not one that is good. Services
// of HTTP/2 get no key and send none (RFC 8441, section 5).
func acceptOf(fields []http1.Field) string {
	const guid, size = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 16
	key, n := "", 0
	for i := range fields {
		if fields[i].Name == "sec-websocket-key" {
			key = fields[i].Value
			n++
		}
	}
	if nonce, err := base64.StdEncoding.DecodeString(key); n != 1 || err != nil || len(nonce) != size {
		return ""
	}
	sum := sha1.Sum([]byte(key + guid)) //nolint:gosec // see above
	return base64.StdEncoding.EncodeToString(sum[:])
}

// bridge is the service's end of such a connection: what is written to it goes
// into the stream, and it is the inlet of what comes.
type bridge struct {
	lifted *lifted
	stream *http2.Stream
	far    *far
	loan   upstream.Loan

	buf         *[]byte // of headClass, that the bytes of next are in
	n           int     // of them
	interrupted atomic.Bool
	cut         atomic.Bool // nobody is to wait any more
}

// change passes the response on as one of HTTP/1.1 that takes the offer, and has
// the connection carried by its streams.
func (l *lifted) change() {
	x, d := l.x, l.x.d
	c := d.c
	b := &bridge{lifted: l, stream: l.stream, far: x.far, loan: x.loan}
	if x.rouse(b.rouse); c.ended() != nil { // before it was b that is roused
		l.close()
		return
	}
	x.http.Status = http.StatusSwitchingProtocols
	x.resp.Switch(x.told.Upgrade)
	x.answer = http1.Edit{Upgrade: x.told.Upgrade}
	if x.told.Upgrade == webSocket {
		x.answer.Set = []http1.Field{{Name: "sec-websocket-accept", Value: acceptOf(x.req.Fields)}}
	}
	x.sent = true
	if x.writeHead(&x.answer, nil) != nil {
		l.close()
		d.end("peer", "the client went away")
		return
	}
	if err := b.early(x); err != nil {
		l.close()
		d.end("error", "the service broke off: "+explainBroken(err))
		return
	}
	forth := c.stream(client, d.src, b, flow{&c.in, c.l.meters.bytesIn})
	back := c.stream(target, b, d.out.dst, flow{&c.out, c.l.meters.bytesOut})
	if !c.startStreams(forth, back, x, b) {
		l.close()
		return
	}
	l.carry(&back.sleeper)
	d.forth, d.back = forth, back
}

// early sends what the client has said behind its request.
func (b *bridge) early(x *exchange) error {
	d := x.d
	early := d.in.b
	if len(early) == 0 {
		return nil
	}
	d.expectOf(serviceTakes, x.s.Timeouts.Stall)
	_, err := b.Write(early)
	d.forget(serviceTakes)
	if d.late[serviceTakes].Load() { // or it was, and the stream was cut just then
		err = errTakesNothing
	}
	d.in.take(len(early))
	return err
}

// carry has what comes wake who is parked, and leaves the request alone, which
// is another one's from then on.
func (l *lifted) carry(back *sleeper) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.x, l.done = nil, true
	l.back.Store(back)
}

// Write sends all of p, as fast as the service takes it.
func (b *bridge) Write(p []byte) (n int, err error) {
	for {
		sent, err := b.stream.Write(p[n:], false)
		n += sent
		b.far.flush()
		switch {
		case err != nil || n == len(p):
			return n, err
		case b.cut.Load():
			return n, net.ErrClosed
		}
		<-b.lifted.room
	}
}

// CloseWrite says that nothing more comes (RFC 8441, section 4).
func (b *bridge) CloseWrite() error {
	_, err := b.stream.Write(nil, true)
	b.far.flush()
	return err
}

// rouse has nobody wait any more. It may be called with conn.mu held.
func (b *bridge) rouse() {
	b.cut.Store(true)
	b.lifted.signal()
}

// Close ends the stream, which is reset where it is still open, and the loan.
func (b *bridge) Close() {
	b.stream.Release(http2.Cancel)
	b.loan.Close()
	b.far.settle()
	b.far.flush()
}

// The following are the inlet.

func (b *bridge) next() ([]byte, error) {
	for {
		b.buf = takeBuffer(headClass)
		got, ended, _ := b.stream.Next((*b.buf)[:0:maxPlaintext])
		if b.n = len(got); b.n > 0 {
			return got, nil
		}
		bufferPools[headClass].Put(b.buf)
		b.buf = nil
		if err := b.over(ended); err != nil {
			return nil, err
		}
		<-b.lifted.came
	}
}

// over returns why nothing comes for now, or ever; nil where it is to be waited
// for.
func (b *bridge) over(ended bool) error {
	l := b.lifted
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case b.cut.Load():
		return net.ErrClosed
	case ended || l.ended:
		return io.EOF
	case l.err != nil:
		return l.err
	case b.interrupted.Load():
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (b *bridge) release() {
	buf, class := b.keep()
	bufferPools[class].Put(buf)
}

func (b *bridge) keep() (*[]byte, int) {
	buf := b.buf
	b.stream.Credit(b.n)
	b.far.flush()
	b.buf, b.n = nil, 0
	return buf, headClass
}

func (b *bridge) socket() syscall.RawConn { return nil }
func (b *bridge) resume()                 { b.interrupted.Store(false) }
func (b *bridge) rest()                   {}

func (b *bridge) interrupt() {
	b.interrupted.Store(true)
	signal(b.lifted.came)
}

// came implements herald.
func (b *bridge) came() bool {
	select {
	case <-b.lifted.came:
		return true
	default:
		return false
	}
}
