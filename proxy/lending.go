package proxy

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/http2"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// This file takes connections to a service for a request, and gives them back.

// borrow takes a connection to an endpoint for the request. Outbound, the far
// end is known by then and the policy is asked.
func (x *call) borrow() *refused {
	group, key, refused := x.group()
	if refused != nil {
		return refused
	}
	wish := upstream.Wish{Timeout: x.s.Timeouts.Connect, Own: x.c.l.socket.Addr(), Key: keyOf(key), Shares: x.overHTTP2()}
	var err error
	x.loan, err = group.Borrow(x.q.dialContext(), wish, &x.tried)
	if err != nil {
		return x.cannotBorrow(err)
	}
	switch {
	case !x.take():
		if refused := x.connect(key, wish.Shares); refused != nil {
			return refused
		}
	case x.b != nil && x.caller.version() == 1 && !x.b.dismiss(): // it was closed since it was found idle
		x.dropBackend()
		return x.borrow()
	}
	return x.accept()
}

// take takes what was lent, unless that is to be made first.
func (x *call) take() bool {
	switch kept := x.loan.Kept.(type) {
	case *backend:
		x.b = kept
	case *far:
		x.far = kept
	default:
		return false
	}
	return true
}

// join is borrow for who must not wait: it takes a connection that is there, and
// reports false where there is none, or what follows might take time.
func (x *call) join() (joined bool, refused *refused) {
	if x.s.Direction == policy.Outbound && x.s.HTTP.JWT != nil { // a token may have to be fetched
		return false, nil
	}
	group, key, refused := x.group()
	if refused != nil {
		return false, refused
	}
	if x.loan, joined = group.Join(upstream.Wish{Key: keyOf(key), Shares: x.overHTTP2()}, &x.tried); !joined {
		return false, nil
	}
	x.take()
	return true, x.accept()
}

// group returns where the request is bound for, and outbound as whom.
func (x *call) group() (*upstream.Group, *session, *refused) {
	s := x.s
	var key *session
	if s.Direction == policy.Outbound {
		var err error
		if key, err = x.c.l.session(s); err != nil {
			return nil, nil, refuseRequest(http.StatusServiceUnavailable, "cannot present an identity: %v", err)
		}
	}
	way := s.wayFor(x.bound())
	if way == nil {
		return nil, nil, refuseRequest(http.StatusServiceUnavailable, "no route takes it, and the listener has no target of its own")
	}
	if x.budget == nil { // it is counted once
		way.group.Budget.Request()
	}
	x.budget = &way.group.Budget
	return way.group, key, nil
}

// accept has the request go over what was lent, if it still may.
func (x *call) accept() *refused {
	if refused := x.attach(); refused != nil {
		return refused
	}
	if x.s.Direction == policy.Outbound {
		if refused := x.decide(true); refused != nil {
			return refused
		}
		return x.vouch(x.backed().own)
	}
	return nil
}

// overHTTP2 reports whether the request is to go on over HTTP/2, if the far end
// speaks it.
func (x *call) overHTTP2() bool {
	switch x.s.UpstreamProtocol {
	case ProtocolHTTP1:
		return false
	case ProtocolHTTP2:
		return true
	}
	if x.s.Direction == policy.Outbound {
		return x.caller.version() == 2
	}
	return x.caller.version() == 2 && x.asked.GRPC()
}

// backed returns what is known of the connection that was lent.
func (x *call) backed() *backed {
	if x.far != nil {
		return &x.far.backed
	}
	return &x.b.backed
}

// bound is where the request is bound for.
func (x *call) bound() bound { return x.boundTo("") }

func (x *call) boundTo(target string) bound {
	if x.s.Direction == policy.Outbound {
		return bound{target: target}
	}
	return bound{x.q.request.SNI, x.c.protocol, x.asked.Host, x.asked.Path, target}
}

// keyOf is under which key connections are kept: in plaintext all under one.
func keyOf(s *session) any {
	if s == nil {
		return nil
	}
	return s
}

func (x *call) cannotBorrow(err error) *refused {
	status := http.StatusBadGateway
	switch {
	case errors.Is(err, upstream.ErrFull):
		status = http.StatusServiceUnavailable
	case errors.Is(err, upstream.ErrTimeout):
		status = http.StatusGatewayTimeout
	}
	return refuseRequest(status, "target: %v", err)
}

// connect makes a backend of a connection that was dialled. Outbound, the far
// end proves that it is whom the listener expects. With shares it is to carry
// many requests, if the far end agrees.
func (x *call) connect(key *session, shares bool) *refused {
	raw, ok := x.loan.Conn.(end)
	if !ok {
		_ = x.loan.Conn.Close()
		x.loan.Close()
		return refuseRequest(http.StatusBadGateway, "target %s: %T cannot be half-closed", x.loan.Target, x.loan.Conn)
	}
	noticeTargetLoss(raw, x.s)
	over, known := raw, backed{raw: raw}
	if key != nil {
		t, proved, err := x.shake(raw, key, shares)
		if err == nil { // what this request was interrupted for is nothing to others who are to use it
			err = raw.SetDeadline(time.Time{})
		}
		if err != nil {
			address, status := x.loan.Address, http.StatusBadGateway
			if x.w.late[serviceSends].Load() {
				status = http.StatusGatewayTimeout
			}
			_ = raw.Close()
			x.loan.Close()
			return refuseRequest(status, "target %s: %v", address, err)
		}
		over, known = t, proved
		shares = shares && proved.proved.Protocol == protocolH2
	}
	if !shares {
		x.b = newBackend(known, over)
		x.loan.Alone()
		return nil
	}
	x.loan.Succeeded()
	x.far = newFar(known, over, &x.c.l.proxy.hosts, x.loan.Grows())
	x.loan.Share(x.far)
	return nil
}

// shake has the far end of a connection prove that it is expected, and us whom
// we are. It is the request's alone until then, and ended with it.
func (x *call) shake(raw end, s *session, shares bool) (*secured, backed, error) {
	if err := x.hold(raw); err != nil {
		return nil, backed{}, err
	}
	defer func() { _ = x.hold(nil) }() // nobody ends it from here on
	config := s.offering(x.loan.Target, x.protocols(shares))
	t := secure(raw, tls.Client, config)
	if err := x.q.handshake(t, s.settings, &x.record, x.w); err != nil {
		var failed *handshakeError
		if errors.As(err, &failed) && !failed.late && x.q.dialContext().Err() == nil { // else nobody waits for it any more
			x.loan.Failed(errors.New(telemetry.Tidy(err.Error())))
		}
		return nil, backed{}, err
	}
	cs := t.ConnectionState()
	peer, err := peerOf(&cs)
	if err != nil { // cannot happen: the handshake read it before
		return nil, backed{}, err
	}
	b := backed{raw: raw, own: s.identity, peer: peer, serverName: normalSNI(config.ServerName)}
	if b.standing, err = s.trust.Stand(peer.ID, cs.PeerCertificates, time.Now()); err != nil { // verified a moment ago, or expired since
		return nil, backed{}, err
	}
	b.proved.TLSVersion, b.proved.Cipher, b.proved.Protocol = x.record.TLSVersion, x.record.Cipher, x.record.Protocol
	b.proved.ServerName = config.ServerName
	return t, b, nil
}

// hold has whoever ends the request end what it holds, too. The error is why it
// was ended before.
func (x *call) hold(raw net.Conn) error {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	x.q.up = nil
	switch ended := x.q.closed(); {
	case ended != nil:
		return errors.New(ended.why)
	case x.q.abandoned:
		return errors.New("the request was ended")
	}
	x.q.up = raw
	return nil
}

// protocols are what the far end is offered.
func (x *call) protocols(shares bool) offer {
	switch {
	case !shares:
		return offersHTTP1
	case x.s.UpstreamProtocol == ProtocolHTTP2:
		return offersHTTP2
	}
	return offersBoth
}

// attach gives the request its upstream, unless it was ended or its listener
// leads elsewhere by now.
func (x *call) attach() *refused {
	c, q, b := x.c, x.q, x.backed()
	c.mu.Lock()
	defer c.mu.Unlock()
	q.deadlines[endHandshake] = deadline{}
	if ended := q.closed(); ended != nil {
		return &refused{status: http.StatusServiceUnavailable, why: ended.why, last: true}
	}
	if c.latest != x.s && !c.latest.keeps(x.s, x.boundTo(x.loan.Target)) {
		return refuseRequest(http.StatusServiceUnavailable, "the listener's target changed while the request was on its way")
	}
	q.up, q.target, q.began = nil, x.loan.Target, x.s
	if x.far == nil { // else it is of others too
		q.up = b.raw
	}
	x.used = false
	x.record.Destination = x.loan.Address
	if b.own != nil {
		q.own, q.standing = b.own, b.standing
		q.request.From, q.request.To = policy.PeerOf(b.own.ID, b.own.Certificate.Leaf), b.peer
		q.request.SNI, q.request.Port = b.serverName, portOf(b.raw.RemoteAddr())
		x.record.TLSVersion, x.record.Cipher = b.proved.TLSVersion, b.proved.Cipher
		x.record.ServerName, x.record.Protocol = b.proved.ServerName, b.proved.Protocol
	}
	return nil
}

// release gives back what was lent. A connection that was sent nothing is as
// good as before.
func (x *call) release() {
	switch {
	case x.far != nil:
		x.leaveFar(nil)
	case x.b != nil && x.used:
		x.dropBackend()
	case x.b != nil:
		x.returnBackend()
	}
}

// leaveFar ends the loan of a connection that others use too, with the stream
// that was opened on it, if one was.
func (x *call) leaveFar(out *http2.Stream) {
	far := x.far
	x.far = nil
	x.detach()
	if out != nil {
		out.Release(http2.Cancel)
	} else {
		far.h2.Unreserve()
	}
	x.loan.Close()
	far.settle()
}

// dropBackend ends the connection to the service. Who stays with it has left by
// then.
func (x *call) dropBackend() {
	if x.b == nil {
		return
	}
	x.detach()
	x.b.dismiss()
	x.b.in.unpin()
	x.b.in.drop()
	_ = x.b.raw.Close()
	x.loan.Close()
	x.b = nil
}

// returnBackend has the connection lie idle for another request.
func (x *call) returnBackend() {
	if b := x.restBackend(); b != nil {
		x.loan.Return(b)
	}
}

// restBackend takes the connection from the request and makes it ready for
// another one. It returns nil where it is no good for that, and has ended it.
func (x *call) restBackend() *backend {
	b := x.b
	x.detach()
	if x.w.cut() { // nobody interrupts it from here on
		x.dropBackend()
		return nil
	}
	x.b = nil
	if !b.stay.is() { // else it was not used, and is read
		b.in.unpin()
		b.rest()
	}
	return b
}

// detach takes the upstream from the request. Who ends that leaves this alone
// from then on.
func (x *call) detach() {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	x.q.up, x.q.target = nil, ""
	x.nameEnds()
}

// nameEnds notes the two ends for the record, with c.mu held.
func (x *call) nameEnds() {
	q := x.q
	x.record.From, x.record.To = peerName(&q.request.From), peerName(&q.request.To)
	x.record.Plaintext, x.record.Serial = q.inPlaintext(), q.peer().Serial
}

// endRequest has no rules asked about the request any more.
func (d *downstream) endRequest(x *exchange) {
	c := d.c
	c.mu.Lock()
	defer c.mu.Unlock()
	x.nameEnds()
	if d.forth != nil {
		return
	}
	c.request.HTTP, c.proof = nil, identity.JWT{}
	if c.request.Direction == policy.Outbound {
		c.own, c.standing = nil, nil
		c.request.From, c.request.To = policy.Peer{}, policy.Peer{}
	}
}
