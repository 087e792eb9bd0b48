package proxy

import (
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/testca"
)

// TestTargetThatIsTheListener: a target that leads back to the listener itself,
// as a resolver can make any name, costs one connection and not all there are.
func TestTargetThatIsTheListener(t *testing.T) {
	ca := testca.New(t, "example.org")
	for _, bind := range []string{"127.0.0.1:0", ":0", "unix:" + t.TempDir() + "/own.sock"} {
		out := outbound(t, "to-orders", "127.0.0.1:1", "spiffe://example.org/orders")
		out.Bind, out.MaxConnections = bind, 50
		p := run(t, Config{Listeners: []Listener{out}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
		own := p.Addr("to-orders")
		at, targets := own.String(), []string{bind}
		if tcp, ok := own.(*net.TCPAddr); ok {
			port := strconv.Itoa(tcp.Port)
			at = net.JoinHostPort("127.0.0.1", port)
			targets = []string{at, net.JoinHostPort("localhost", port)}
			if bind == ":0" {
				targets = append(targets, net.JoinHostPort("127.0.0.2", port), net.JoinHostPort("0.0.0.0", port))
			}
		}
		for _, target := range targets {
			c := p.config
			out.Targets = []string{target}
			c.Listeners = []Listener{out}
			if _, err := p.Apply(c); err != nil {
				t.Fatal(err)
			}
			before := p.Status().Listeners[0].Accepted
			client, err := net.Dial(own.Network(), at)
			if err == nil { // else it was reset already
				t.Cleanup(func() { _ = client.Close() })
			}
			if a := p.next(); !strings.Contains(a.Reason, "the listener itself") {
				t.Errorf("%s at %s: %+v", target, bind, a)
			}
			p.until("all are gone", func() bool { return p.Status().Listeners[0].Active == 0 })
			if n := p.Status().Listeners[0].Accepted - before; n != 1 {
				t.Errorf("%s at %s: one client made %d connections", target, bind, n)
			}
		}
	}
}
