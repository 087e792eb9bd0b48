package proxy

import (
	"crypto/tls"
	"errors"
	"net/http"
	"time"

	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// This file takes connections to a service for a request, and gives them back.

// borrow takes a connection to an endpoint for the request. Outbound, the far
// end is known by then and the policy is asked.
func (x *exchange) borrow() *refused {
	c, s := x.d.c, x.s
	to := x.bound()
	var key *session
	if s.Direction == policy.Outbound {
		var err error
		if key, err = c.l.session(s); err != nil {
			return refuseRequest(http.StatusServiceUnavailable, "cannot present an identity: %v", err)
		}
	}
	way := s.wayFor(to)
	if way == nil {
		return refuseRequest(http.StatusServiceUnavailable, "no route takes it, and the listener has no target of its own")
	}
	if x.tries == 0 {
		way.group.Budget.Request()
	}
	x.budget = &way.group.Budget
	var err error
	x.loan, err = way.group.Borrow(x.d.dialContext(), upstream.Wish{Timeout: s.Timeouts.Connect, Own: c.l.socket.Addr(), Key: keyOf(key)}, &x.tried)
	if err != nil {
		return x.cannotBorrow(err)
	}
	if x.loan.Kept != nil {
		x.b = x.loan.Kept.(*backend)
	} else if refused := x.connect(key); refused != nil {
		return refused
	}
	if refused := x.attach(); refused != nil {
		return refused
	}
	if s.Direction == policy.Outbound {
		if refused := x.decide(x.b); refused != nil {
			return refused
		}
		return x.vouch(x.b.own)
	}
	return nil
}

// bound is where the request is bound for.
func (x *exchange) bound() bound { return x.boundTo("") }

func (x *exchange) boundTo(target string) bound {
	if x.s.Direction == policy.Outbound {
		return bound{target: target}
	}
	c := x.d.c
	return bound{c.request.SNI, c.protocol, x.asked.Host, x.asked.Path, target}
}

// keyOf is under which key connections are kept: in plaintext all under one.
func keyOf(s *session) any {
	if s == nil {
		return nil
	}
	return s
}

func (x *exchange) cannotBorrow(err error) *refused {
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
// end proves that it is whom the listener expects.
func (x *exchange) connect(key *session) *refused {
	c, s := x.d.c, x.s
	raw, ok := x.loan.Conn.(end)
	if !ok {
		_ = x.loan.Conn.Close()
		x.loan.Close()
		return refuseRequest(http.StatusBadGateway, "target %s: %T cannot be half-closed", x.loan.Target, x.loan.Conn)
	}
	noticeTargetLoss(raw, s)
	if key == nil {
		x.b = newBackend(raw, raw)
		return nil
	}
	b, err := c.prove(raw, key, x)
	if err != nil {
		address, status := x.loan.Address, http.StatusBadGateway
		if x.d.late[serviceSends].Load() {
			status = http.StatusGatewayTimeout
		}
		c.mu.Lock()
		c.up = nil
		c.mu.Unlock()
		_ = raw.Close()
		x.loan.Close()
		return refuseRequest(status, "target %s: %v", address, err)
	}
	x.b = b
	return nil
}

// prove has the far end of a connection prove that it is expected, and us whom
// we are.
func (c *conn) prove(raw end, s *session, x *exchange) (*backend, error) {
	c.mu.Lock()
	c.up = raw
	ended := c.closing
	c.mu.Unlock()
	if ended != nil {
		return nil, errors.New(ended.why)
	}
	config := s.toward(x.loan.Target)
	t := secure(raw, tls.Client, config)
	if err := c.handshake(t, s.settings, &x.record); err != nil {
		var failed *handshakeError
		if errors.As(err, &failed) && !failed.late {
			x.loan.Failed(errors.New(tidy(err.Error())))
		}
		return nil, err
	}
	cs := t.ConnectionState()
	peer, err := peerOf(&cs)
	if err != nil { // cannot happen: the handshake read it before
		return nil, err
	}
	b := newBackend(raw, t)
	b.own, b.peer, b.serverName = s.identity, peer, normalSNI(config.ServerName)
	if b.standing, err = s.trust.Stand(peer.ID, cs.PeerCertificates, time.Now()); err != nil { // verified a moment ago, or expired since
		return nil, err
	}
	b.proved.TLSVersion, b.proved.Cipher, b.proved.Protocol = x.record.TLSVersion, x.record.Cipher, x.record.Protocol
	b.proved.ServerName = config.ServerName
	return b, nil
}

// attach gives the connection its upstream for this request, unless it was
// ended or its listener leads elsewhere by now.
func (x *exchange) attach() *refused {
	c, b := x.d.c, x.b
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadlines[endHandshake] = deadline{}
	if c.closing != nil {
		return &refused{status: http.StatusServiceUnavailable, why: c.closing.why, last: true}
	}
	if c.latest != x.s && !c.latest.keeps(x.s, x.boundTo(x.loan.Target)) {
		return refuseRequest(http.StatusServiceUnavailable, "the listener's target changed while the request was on its way")
	}
	c.up, c.target, c.began = b.raw, x.loan.Target, x.s
	x.used = false
	x.record.Destination = x.loan.Address
	if b.own != nil {
		c.own, c.standing = b.own, b.standing
		c.request.From, c.request.To = policy.PeerOf(b.own.ID, b.own.Certificate.Leaf), b.peer
		c.request.SNI, c.request.Port = b.serverName, portOf(b.raw.RemoteAddr())
		x.record.TLSVersion, x.record.Cipher = b.proved.TLSVersion, b.proved.Cipher
		x.record.ServerName, x.record.Protocol = b.proved.ServerName, b.proved.Protocol
	}
	return nil
}

// release takes the upstream from the connection. One that was sent nothing is
// as good as before.
func (x *exchange) release() {
	if x.b != nil && x.used {
		x.dropBackend()
	} else if x.b != nil {
		x.returnBackend()
	}
}

// dropBackend ends the connection to the service.
func (x *exchange) dropBackend() {
	if x.b == nil {
		return
	}
	x.stopUpload()
	x.detach()
	x.b.in.unpin()
	x.b.in.drop()
	_ = x.b.raw.Close()
	x.loan.Close()
	x.b = nil
}

// returnBackend has the connection lie idle for another request.
func (x *exchange) returnBackend() {
	x.detach()
	d, b := x.d, x.b
	if d.cut() {
		x.dropBackend()
		return
	}
	x.b = nil
	b.in.unpin()
	b.rest()
	x.loan.Return(b)
}

// detach takes the upstream from the connection. Who ends that leaves this
// alone from then on.
func (x *exchange) detach() {
	c := x.d.c
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up, c.target = nil, ""
	x.nameEnds()
}

// nameEnds notes the two ends for the record, with c.mu held.
func (x *exchange) nameEnds() {
	c := x.d.c
	x.record.From, x.record.To = peerName(&c.request.From), peerName(&c.request.To)
	x.record.Plaintext, x.record.Serial = c.inPlaintext(), c.peer().Serial
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
