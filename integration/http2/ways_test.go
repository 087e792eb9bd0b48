//go:build integration

package http2_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// way is how calls come from who makes them to their service.
type way struct {
	name    string
	in, out bool // through listeners of that direction
}

// ways are all of them. The first proves the test.
var ways = []way{
	{name: "without narthex"},
	{name: "inbound", in: true},
	{name: "outbound", out: true},
	{name: "both", in: true, out: true},
}

// far is a service, as a way ends at it.
type far struct {
	address string   // of its plaintext
	speaks  []string // what it is known to speak behind mutual TLS (ALPN), empty: HTTP/2 and HTTP/1.1
	// secure starts one that speaks mutual TLS itself and returns its address;
	// nil: a door in front of its plaintext does.
	secure func(t *testing.T, own *mesh.SVID) string
	// all has every request go to it by HTTP/2, and not those alone which need
	// it.
	all bool
}

// route is a way that is open to a service.
type route struct {
	address string     // where callers come
	own     *mesh.SVID // who they prove to be, by mutual TLS; nil: they speak plaintext
	caller  *mesh.SVID // who calls, whoever proves it
	in, out *mesh.Node // nil where it does not go through one
}

// open starts what stands on the way; more is further YAML of all listeners.
// They speak both versions where it says nothing else.
func (w way) open(t *testing.T, f far, more ...string) *route {
	t.Helper()
	ca := mesh.NewAuthority(t)
	r := &route{address: f.address, caller: ca.Leaf("/client")}
	server := ca.Leaf("/server")
	upstream := func(protocol string) []string {
		if f.all {
			return append([]string{"upstream: {protocol: " + protocol + "}"}, more...)
		}
		return more
	}
	if w.in {
		r.own, r.in = r.caller, mesh.NewNode(t, "in", server)
		r.address = r.in.Inbound("in", f.address, upstream("h2c")...)
		r.in.Rules(mesh.Allow("client-may", r.caller.ID))
		r.in.Start()
	}
	if w.out {
		if !w.in && f.secure != nil {
			r.address = f.secure(t, server)
		} else if !w.in {
			r.address = door(t, server, f)
		}
		r.own, r.out = nil, mesh.NewNode(t, "out", r.caller)
		r.address = r.out.Outbound("out", r.address, server.ID, upstream("h2")...)
		r.out.Rules(mesh.Allow("client-may", r.caller.ID))
		r.out.Start()
	}
	return r
}

// nodes are the proxies that calls go through, the first one first.
func (r *route) nodes() (all []*mesh.Node) {
	for _, n := range []*mesh.Node{r.out, r.in} {
		if n != nil {
			all = append(all, n)
		}
	}
	return all
}

// through runs a test on every way to a service; what is named in the test's
// name.
func through(t *testing.T, what string, f func(t *testing.T) far, test func(t *testing.T, r *route)) {
	for _, w := range ways {
		t.Run(what+w.name, func(t *testing.T) {
			t.Parallel()
			test(t, w.open(t, f(t)))
		})
	}
}

// url is where callers come for a path.
func (r *route) url(path string) string {
	if r.own != nil {
		return "https://" + r.address + path
	}
	return "http://" + r.address + path
}

// files are the arguments by which a script proves who it is.
func (r *route) files() []string {
	if r.own == nil {
		return nil
	}
	return []string{r.own.CertFile, r.own.KeyFile, r.own.CA.Bundle}
}

// client returns one of net/http that speaks HTTP/2 alone, on one connection.
func (r *route) client(t *testing.T) *http.Client {
	t.Helper()
	transport := &http.Transport{DisableCompression: true, Protocols: &http.Protocols{}}
	if r.own != nil {
		transport.TLSClientConfig = r.own.Client()
		transport.Protocols.SetHTTP2(true)
	} else {
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// dial connects as callers do who speak HTTP/2 alone.
func dial(address string, own *mesh.SVID) (net.Conn, error) {
	dialer := &net.Dialer{Timeout: mesh.CallTime}
	if own == nil {
		return dialer.Dial("tcp", address)
	}
	config := own.Client()
	config.NextProtos = []string{"h2"}
	return tls.DialWithDialer(dialer, "tcp", address, config)
}

// plain returns the address for callers who speak plaintext alone: where the
// route begins with mutual TLS, something speaks it for them.
func (r *route) plain(t *testing.T) string {
	t.Helper()
	if r.own == nil {
		return r.address
	}
	return stage.Serve(t, func(c net.Conn) {
		if up, err := dial(r.address, r.own); err == nil {
			join(c.(*net.TCPConn), up.(*tls.Conn))
		}
	})
}

// door speaks mutual TLS for a service that does not.
func door(t *testing.T, own *mesh.SVID, f far) (address string) {
	t.Helper()
	config := own.Client()
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, config.RootCAs
	if config.NextProtos = f.speaks; len(f.speaks) == 0 {
		config.NextProtos = []string{"h2", "http/1.1"}
	}
	return stage.Serve(t, func(c net.Conn) {
		s := tls.Server(c, config)
		defer s.Close()
		if s.Handshake() != nil {
			return
		}
		if up, err := net.DialTimeout("tcp", f.address, mesh.CallTime); err == nil {
			join(s, up.(*net.TCPConn))
		}
	})
}

// halfCloser is a connection that can say that it will send no more.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// join moves bytes both ways until both have ended, and closes to.
func join(from, to halfCloser) {
	defer to.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pass(from, to)
	}()
	pass(to, from)
	<-ended
}

// pass moves bytes one way. What breaks one connection ends both; when from
// sends no more, to may still end what it says.
func pass(to, from halfCloser) {
	_, err := io.Copy(to, from)
	if err == nil {
		err = to.CloseWrite()
		_ = to.SetReadDeadline(time.Now().Add(mesh.CallTime))
	}
	if err != nil {
		_ = to.Close()
		_ = from.Close()
	}
}
