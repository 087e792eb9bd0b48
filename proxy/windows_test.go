package proxy

import (
	"net"
	"testing"

	"golang.org/x/net/http2"
)

// What is not passed on is given back to the window of its connection, of which
// others live.

// A client that sends more than it may, again and again, has the whole window for
// the next request.
func TestWindowAfterLargeBodies(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		p, ca := web(t, origin(t, echoes), speaking(protocol), func(c *Config) { c.Listeners[0].HTTP.MaxBody = 1000 })
		f := framedClient(t, p.addr("web"), ca)
		content := make([]byte, 16<<10)
		for n := range uint32(80) { // more than the window of the connection, in all
			f.asks(2*n+1, false, "POST", "/v1/a")
			f.must(f.WriteData(2*n+1, false, content))
			if a := f.answer(2*n + 1); a.status != "413" {
				t.Fatalf("%d: %+v", n, a)
			}
		}
	})
}

// Clients of HTTP/1.1 that leave within a response take nothing of the window of
// the service's connection along.
func TestWindowAfterClientsLeft(t *testing.T) {
	t.Parallel()
	const clients = 30
	on, lost := make(chan struct{}), make(chan int, 1)
	p, ca := web(t, framedService(t, func(f *framed) {
		sent, updated := 0, 0
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			switch frame := frame.(type) {
			case *http2.MetaHeadersFrame:
				if frame.PseudoValue("path") == "/v1/last" {
					lost <- sent - updated
					return
				}
				if sent == 0 {
					updated = 0 // what the connection began with
				}
				f.sends(frame.StreamID, false, ":status:200")
				<-on
				for range 4 { // all that a stream has room for
					f.must(f.WriteData(frame.StreamID, false, make([]byte, 16<<10)))
					sent += 16 << 10
				}
			case *http2.WindowUpdateFrame:
				if frame.StreamID == 0 {
					updated += int(frame.Increment)
				}
			}
		}
	}), speaking(ProtocolHTTP2))
	config := clientConfig(ca.SVID("/web"))
	for range clients {
		c := dialTLS(t, p.addr("web"), config)
		b := browse(t, c)
		b.send("GET /v1/a HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := b.r.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		raw := c.NetConn().(*net.TCPConn)
		if err := raw.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		_ = raw.Close()
		on <- struct{}{}
	}
	for range clients {
		if a := p.next(); a.HTTP == nil || a.HTTP.Status != 200 {
			t.Fatalf("record %+v", a)
		}
	}
	p.browser(ca).send("GET /v1/last HTTP/1.1\r\nHost: x\r\n\r\n")
	if n := <-lost; n > 320<<10 { // a quarter of a window of 1 MiB is told of at once, and a stream of each client may be on its way
		t.Errorf("%d bytes of the window are lost", n)
	}
}
