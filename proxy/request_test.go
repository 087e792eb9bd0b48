package proxy

import (
	"crypto/tls"
	"net"
	"strconv"
	"testing"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/policy"
)

// TestRequestIsWhole: port and server name are there when the rules are asked
// for the first time, and stay for when they are asked again.
func TestRequestIsWhole(t *testing.T) {
	ca := testca.New(t, "example.org")
	peer := &tls.Config{Certificates: []tls.Certificate{ca.SVID("/inventory")}, ClientAuth: tls.RequireAnyClientCert}
	dialled := serve(t, func(c net.Conn) { echo(tls.Server(c, peer)) })
	in, out := inbound("in", serve(t, echo)), outbound(t, "out", dialled, "spiffe://example.org/inventory")
	out.ServerName = "Inventory.example.org"
	open := permissive("open", serve(t, echo))
	socket := inbound("socket", serve(t, echo))
	socket.Bind = "unix:" + t.TempDir() + "/s"
	p := run(t, Config{
		Listeners: []Listener{in, out, open, socket}, Policy: rulesOf(t, allowAll+`  - {id: plain, effect: allow, from: [unauthenticated], on: [open]}
`), Identities: source(t, ca.SVID("/web"), ca),
	})
	portIn := func(addr string) uint16 {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			t.Fatal(err)
		}
		return uint16(n)
	}
	named := func(name string) *tls.Config {
		c := clientConfig(ca.SVID("/web"))
		c.ServerName = name
		return c
	}
	for _, test := range []struct {
		name, listener, sni string
		client              func() net.Conn
		port                uint16
	}{
		{"inbound", "in", "a.example.org", func() net.Conn { return dialTLS(t, p.addr("in"), named("A.Example.org")) }, portIn(p.addr("in"))},
		{"no host's name", "in", "", func() net.Conn { return dialTLS(t, p.addr("in"), named("a b")) }, portIn(p.addr("in"))},
		{"plaintext", "open", "", func() net.Conn { return dialPlain(t, p.addr("open")) }, portIn(p.addr("open"))},
		{"outbound", "out", "inventory.example.org", func() net.Conn { return dialPlain(t, p.addr("out")) }, portIn(dialled)},
		{"unix socket", "socket", "b.example.org", func() net.Conn {
			raw, err := net.Dial("unix", p.addr("socket"))
			if err != nil {
				t.Fatal(err)
			}
			return tls.Client(raw, named("b.example.org"))
		}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := test.client()
			say(t, c, "hello")
			p.apply(allowAll + `  - {id: plain, effect: allow, from: [unauthenticated], on: [open]}
`) // asks again
			l := p.world.Load().named(test.listener)
			live := p.table.of(l)
			if len(live) != 1 {
				t.Fatalf("%d connections", len(live))
			}
			live[0].mu.Lock()
			q := live[0].request
			live[0].mu.Unlock()
			if q.Port != test.port || q.SNI != test.sni || q.HTTP != nil || (q.Direction == policy.Outbound) != (test.listener == "out") {
				t.Errorf("port %d and server name %q, want %d and %q", q.Port, q.SNI, test.port, test.sni)
			}
			_ = c.Close()
			p.next()
		})
	}
}
