package proxy

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/narthex-id/narthex/proxy/upstream"
)

// TestBalance: connections are spread over the targets, past one that is
// down, and every record says where it went.
func TestBalance(t *testing.T) {
	ca := testca.New(t, "example.org")
	targets := []string{serve(t, echo), "127.0.0.1:1", serve(t, echo)}
	in := inbound("orders", "")
	in.Targets = targets
	in.Upstream.Ejection = upstream.Ejection{After: 2, For: time.Hour}
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	went := map[string]int{}
	for range 12 {
		c := dialTLS(t, p.addr("orders"), clientConfig(ca.SVID("/web")))
		say(t, c, "hello")
		_ = c.Close()
		went[p.next().Destination]++
	}
	if went[targets[0]]+went[targets[2]] != 12 || went[targets[0]] < 5 || went[targets[2]] < 5 {
		t.Errorf("connections went to %v", went)
	}
	s := p.Status().Listeners[0]
	if len(s.Endpoints) != 3 || !s.Endpoints[0].Healthy || s.Endpoints[1].Healthy || s.Endpoints[1].Failed != 2 || s.Endpoints[0].Active != 0 {
		t.Errorf("endpoints %+v", s.Endpoints)
	}
	for name, want := range map[string]float64{
		"narthex_upstream_endpoints": 3, "narthex_upstream_healthy": 2,
		"narthex_upstream_connect_failures_total": 2, "narthex_upstream_ejections_total": 1,
	} {
		if got := p.metric(name, "orders"); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
}

// TestBadPeerIsEjected: outbound, a target that takes connections and fails
// the handshake is left out like one that is down.
func TestBadPeerIsEjected(t *testing.T) {
	ca := testca.New(t, "example.org")
	ids := source(t, ca.SVID("/web"), ca)
	var deaf atomic.Int32
	notTLS := serve(t, func(c net.Conn) { deaf.Add(1); _, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) })
	peer := run(t, Config{Listeners: []Listener{inbound("orders", serve(t, echo))}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	out := outbound(t, "to-orders", "", "spiffe://example.org/orders")
	out.Targets = []string{notTLS, peer.addr("orders")}
	out.Upstream.Ejection = upstream.Ejection{After: 2, For: time.Hour}
	p := run(t, Config{Listeners: []Listener{out}, Policy: rulesOf(t, allowAll), Identities: ids})
	good := 0
	for range 10 {
		c, err := net.Dial("tcp", p.addr("to-orders"))
		if err == nil { // else it was reset already
			_, _ = c.Write([]byte("hello"))
			if _, err := c.Read(make([]byte, 5)); err == nil {
				good++
			}
			_ = c.Close()
		}
		p.next()
	}
	if good != 8 || deaf.Load() != 2 {
		t.Errorf("%d of 10 connections came through, the bad peer saw %d; want 8 and 2", good, deaf.Load())
	}
	if e := p.Status().Listeners[0].Endpoints[0]; e.Healthy || e.Problem == "" {
		t.Errorf("endpoint %+v", e)
	}
}

// TestEndedIsNotBlamed: that we ended a client's connection says nothing of the
// endpoint that its requests were with.
func TestEndedIsNotBlamed(t *testing.T) {
	t.Parallel()
	const requests = 20
	asked := make(chan struct{}, requests)
	target, _ := scripted(t, func(net.Conn, int64) bool { asked <- struct{}{}; return true })
	p, ca := web(t, target, speaking(ProtocolHTTP1))
	f := framedClient(t, p.addr("web"), ca)
	for n := range uint32(requests) {
		f.asks(2*n+1, true, "GET", "/v1/a")
	}
	for range requests {
		<-asked
	}
	p.apply(denyAll)
	for range requests {
		if a := p.next(); a.HTTP == nil || a.Closed != "policy" {
			t.Errorf("record %+v %+v", a, a.HTTP)
		}
	}
	if e := p.Status().Listeners[0].Endpoints[0]; e.Failed > 0 || !e.Healthy {
		t.Errorf("endpoint %+v", e)
	}
}
