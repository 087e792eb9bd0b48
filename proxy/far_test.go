package proxy

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/internal/testca"
)

// abroad is an outbound listener of HTTP/2 whose far end is dialled by dial, and
// two of its clients.
func abroad(t *testing.T, target string, ca *testca.Authority, dial func(ctx context.Context, network, address string) (net.Conn, error)) (p *running, a, b *framed) {
	t.Helper()
	l := outbound(t, "out", target, "spiffe://example.org/inventory")
	l.HTTP = &HTTP{Versions: []string{protocolH2}}
	p = run(t, Config{Identities: source(t, ca.SVID("/web"), ca), Policy: rulesOf(t, allowAll)})
	p.upstreams.Dial = dial
	c := p.config
	c.Listeners = []Listener{l}
	if _, err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	client := func() *framed {
		f := framedOn(t, dialPlain(t, p.addr("out")))
		_, err := f.Write([]byte(http2.ClientPreface))
		f.must(err)
		f.must(f.WriteSettings())
		return f
	}
	return p, client(), client()
}

// shaken is a socket on which a handshake is not done before it was interrupted.
type shaken struct {
	*net.TCPConn
	writes      int
	last        chan struct{} // closed: all of the handshake was sent
	interrupted chan struct{} // closed once it was
	once        sync.Once
}

// Write sends the client's two flights (RFC 8446, section 2).
func (s *shaken) Write(b []byte) (int, error) {
	n, err := s.TCPConn.Write(b)
	if s.writes++; s.writes == 2 {
		close(s.last)
		<-s.interrupted
	}
	return n, err
}

func (s *shaken) SetDeadline(at time.Time) error {
	err := s.TCPConn.SetDeadline(at)
	s.once.Do(func() { close(s.interrupted) })
	return err
}

// A client that leaves in the moment in which the connection is made that its
// request would have gone over leaves it to the others who wait for it.
func TestMakerLeaves(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	server := httptest.NewUnstartedServer(http.HandlerFunc(describes))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.SVID("/inventory")}, ClientAuth: tls.RequireAnyClientCert}
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	var dials atomic.Int32
	last, interrupted := make(chan struct{}), make(chan struct{})
	p, a, b := abroad(t, strings.TrimPrefix(server.URL, "https://"), ca, func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil || dials.Add(1) > 1 {
			return c, err
		}
		return &shaken{TCPConn: c.(*net.TCPConn), last: last, interrupted: interrupted}, nil
	})
	a.asks(1, true, "GET", "/v1/a")
	<-last
	b.asks(1, true, "GET", "/v1/b")
	p.until("the other one waits for it", func() bool { return p.Status().Listeners[0].Endpoints[0].Active == 2 })
	a.must(a.WriteRSTStream(1, http2.ErrCodeCancel))
	if got := b.answer(1); got.status != "200" || dials.Load() != 1 {
		t.Errorf("%+v, over %d connections", got, dials.Load())
	}
	if e := p.Status().Listeners[0].Endpoints[0]; e.Failed > 0 {
		t.Errorf("the endpoint is blamed: %+v", e)
	}
}

// A request that was ended while its connection was dialled does not wait for the
// handshake of a far end that says nothing.
func TestEndedBeforeHandshake(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	dialling, silent := make(chan struct{}), serve(t, func(c net.Conn) { _, _ = c.Read(make([]byte, 1<<16)); _, _ = c.Read(make([]byte, 1)) })
	p, a, _ := abroad(t, silent, ca, func(ctx context.Context, network, address string) (net.Conn, error) {
		close(dialling)
		<-ctx.Done() // and it is there all the same
		return net.Dial(network, address)
	})
	a.asks(1, true, "GET", "/v1/a")
	<-dialling
	a.must(a.WriteRSTStream(1, http2.ErrCodeCancel))
	if r := p.next(); r.HTTP == nil || r.HTTP.Status != statusLeft {
		t.Errorf("record %+v", r)
	}
}

// What was ended before it came to dial does not dial.
func TestEndedBeforeDial(t *testing.T) {
	t.Parallel()
	q := &question{c: &conn{}}
	q.c.mu.Lock()
	q.abandon()
	q.c.mu.Unlock()
	if q.dialContext().Err() == nil {
		t.Error("it is dialled for")
	}
}

// A service that takes no request from the start on, before anybody could ask for
// one, is left nevertheless.
func TestServiceLeavesAtOnce(t *testing.T) {
	t.Parallel()
	raw, err := net.Dial("tcp", framedService(t, func(f *framed) {
		_ = f.WriteGoAway(0, http2.ErrCodeNo, nil)
		f.request() // it waits for us to end the connection
	}))
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	b := newFar(backed{raw: raw}, raw.(end), &work, func() {})
	for !b.leaving.Load() {
		runtime.Gosched()
	}
	b.h2.Unreserve() // who could not send its request
	b.settle()
	work.Wait()
}

// A service that takes more requests at a time than before gets those that wait.
func TestServiceTakesMore(t *testing.T) {
	t.Parallel()
	held, more := make(chan struct{}), make(chan struct{})
	p, ca := web(t, framedService(t, func(f *framed) {
		_ = f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
		answers := func() {
			if head := f.request(); head != nil {
				f.sends(head.StreamID, true, ":status:200")
			}
		}
		answers()
		f.request()
		close(held)
		<-more
		_ = f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
		answers()
		f.request()
	}), speaking(ProtocolHTTP2), func(c *Config) { c.Listeners[0].Upstream.MaxConnections = 1 })
	f := framedClient(t, p.addr("web"), ca)
	f.asks(1, true, "GET", "/v1/a")
	f.answer(1)
	f.asks(3, true, "GET", "/v1/held")
	<-held
	f.asks(5, true, "GET", "/v1/a")
	c := p.table.of(nil)[0]
	p.until("it waits for a place", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		live := c.http.(*front).live
		waits := func(p *passage) bool { return p.matter.cancel != nil } // set right before that
		return len(live) == 2 && slices.ContainsFunc(live, waits)
	})
	close(more)
	if a := f.answer(5); a.status != "200" {
		t.Errorf("%+v", a)
	}
}
