package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// hurried has a listener wait for next to nothing.
func hurried(c *Config) {
	s := &c.Listeners[0].Timeouts
	s.Head, s.Stall = 300*time.Millisecond, 300*time.Millisecond
}

// soon has services answer within a moment.
func soon(c *Config) { c.Listeners[0].Timeouts.Response = 300 * time.Millisecond }

// ends waits for the end of the connection, and returns the GOAWAY before it.
func (f *framed) ends() (last *http2.GoAwayFrame) {
	f.t.Helper()
	for {
		frame, err := f.next()
		if err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				f.t.Errorf("the connection goes on")
			}
			return last
		}
		if g, ok := frame.(*http2.GoAwayFrame); ok {
			last = g
		}
	}
}

// A client that does not come to the point loses its connection.
func TestHTTP2ClientsThatSayNothing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		told bool // why it ends
		do   func(f *framed)
	}{
		{"no preface", false, func(*framed) {}},
		{"no settings", true, func(f *framed) { _, _ = f.Write([]byte(http2.ClientPreface)) }},
		{"half a frame", true, func(f *framed) {
			_, _ = f.Write([]byte(http2.ClientPreface))
			f.must(f.WriteSettings())
			_, _ = f.Write([]byte{0, 0, 9, 1, 4})
		}},
		{"half a head", true, func(f *framed) {
			_, _ = f.Write([]byte(http2.ClientPreface))
			f.must(f.WriteSettings())
			f.must(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.block(":method:GET")}))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p, ca := web(t, origin(t, echoes), speaking(ProtocolAuto), hurried)
			config := clientConfig(ca.SVID("/web"))
			config.NextProtos = []string{protocolH2}
			f := framedOn(t, dialTLS(t, p.addr("web"), config))
			test.do(f)
			told := false
			for frame, err := f.ReadFrame(); err == nil; frame, err = f.ReadFrame() { // and answers nothing
				g, ok := frame.(*http2.GoAwayFrame)
				told = told || ok && g.ErrCode == http2.ErrCodeEnhanceYourCalm
			}
			if told != test.told {
				t.Errorf("is told why: %t", told)
			}
			if a := p.next(); a.Action != "connection" || !strings.Contains(a.Reason, "no whole head, or no settings") {
				t.Errorf("record %+v", a)
			}
		})
	}
}

// Who is waited for too long ends one stream, and no other.
func TestHTTP2Waits(t *testing.T) {
	t.Parallel()
	large := bytes.Repeat([]byte("x"), 1<<20)
	both(t, func(t *testing.T, protocol Protocol) {
		on := make(chan struct{})
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/v1/never", "/v1/takes-none":
				select {
				case <-on:
				case <-r.Context().Done():
				}
			case "/v1/large":
				_, _ = w.Write(large)
			default:
				echoes(w, r)
			}
		}), speaking(protocol), hurried, func(c *Config) {
			c.Listeners[0].UpstreamProtocol = protocol
			c.Listeners[0].Timeouts.Response = 2 * time.Second // which a service on a busy machine keeps to
		})
		defer close(on)
		f := framedClient(t, p.addr("web"), ca, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000})
		record := func(status int, why string) {
			t.Helper()
			if a := p.next(); a.HTTP == nil || a.HTTP.Status != status || !strings.Contains(a.Reason, why) {
				t.Errorf("record %+v %+v, want %d %s", a, a.HTTP, status, why)
			}
		}
		f.asks(1, true, "GET", "/v1/never")
		if a := f.answer(1); a.status != "504" {
			t.Errorf("no answer: %+v", a)
		}
		record(504, "the service sent nothing")
		f.asks(3, false, "POST", "/v1/takes-none", "te:trailers", "content-type:application/grpc")
		f.asks(5, true, "POST", "/v1/takes-none", "te:trailers", "content-type:application/grpc", "grpc-timeout:100m")
		if a := f.answer(5); a.status != "200" || a.trailers["grpc-status"] != "4" {
			t.Errorf("past its time: %+v", a)
		}
		record(504, "the service sent nothing")
		f.must(f.WriteRSTStream(3, http2.ErrCodeCancel)) // it had said of no time
		record(statusLeft, "CANCEL")
		f.asks(7, true, "GET", "/v1/large")
		f.content(7)
		if a := f.answer(7); !a.wasReset || a.reset != http2.ErrCodeInternal {
			t.Errorf("takes no more than a part: %.200v", a)
		}
		record(200, "the client takes nothing")
		for stream := uint32(9); ; stream += 2 { // a busy machine takes longer than a moment
			f.asks(stream, true, "GET", "/v1/fine")
			a := f.answer(stream)
			if a.status == "200" {
				return
			}
			if a.status != "504" || stream > 99 {
				t.Fatalf("after it: %+v", a)
			}
		}
	})
}

// A body that does not come is waited for where its service waits for it.
func TestHTTP2SlowBody(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), speaking(ProtocolHTTP1), hurried)
	f := framedClient(t, p.addr("web"), ca)
	f.asks(1, false, "POST", "/v1/a")
	f.must(f.WriteData(1, false, []byte("some")))
	if a := f.answer(1); a.status != "408" {
		t.Errorf("%+v", a)
	}
}

// A service that takes nothing ends the requests that wait for it.
func TestHTTP2ServiceTakesNothing(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		done := make(chan struct{})
		var once sync.Once
		stop := func() { once.Do(func() { close(done) }) }
		t.Cleanup(stop)
		handle := func(net.Conn) { <-done }
		if protocol == ProtocolHTTP2 {
			handle = func(c net.Conn) {
				f := framedOn(t, c)
				_, _ = io.ReadFull(c, make([]byte, len(http2.ClientPreface)))
				_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
				_ = f.WriteWindowUpdate(0, 1<<30)
				<-done
			}
		}
		p, ca := web(t, serve(t, handle), speaking(protocol), hurried)
		client := modern(t, ca)
		for tries := 1; ; tries++ {
			resp, err := client.Post("https://"+p.addr("web")+"/v1/a", "text/plain", io.LimitReader(forever{}, 50<<20))
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode == 504 {
				break
			}
			if resp.StatusCode != 408 || tries == 10 { // of a client that a busy machine keeps from sending
				t.Fatal(resp.Status)
			}
		}
		p.stop() // which waits for the connection to the service
		stop()
	})
}

type forever struct{}

func (forever) Read(b []byte) (int, error) { return len(b), nil }

// A client that reads nothing at all loses its connection; the service's goes
// on for others.
func TestHTTP2ClientReadsNothing(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		gone := make(chan struct{}, 8)
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v1/endless" {
				for {
					if _, err := w.Write(make([]byte, 32<<10)); err != nil {
						break
					}
				}
				gone <- struct{}{}
				return
			}
			echoes(w, r)
		}), speaking(protocol), hurried)
		f := framedClient(t, p.addr("web"), ca, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
		f.must(f.WriteWindowUpdate(0, 1<<30))
		f.asks(1, true, "GET", "/v1/endless")
		f.asks(3, true, "GET", "/v1/endless")
		other := framedClient(t, p.addr("web"), ca)
		for n := range 20 {
			stream := uint32(2*n + 1)
			other.asks(stream, true, "GET", "/v1/a")
			if a := other.answer(stream); a.status != "200" {
				t.Errorf("another client: %+v", a)
			}
		}
		<-gone
		<-gone
	})
}

// An idle connection is ended, and a silent stream of one that is not.
func TestHTTP2Idle(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		begun, gone := make(chan struct{}, 1), make(chan struct{}, 1)
		p, ca := web(t, origin(t, trickles(begun, gone)), speaking(protocol), func(c *Config) { c.Listeners[0].Timeouts.Idle = 400 * time.Millisecond })
		f := framedClient(t, p.addr("web"), ca)
		f.asks(1, true, "GET", "/v1/a")
		<-begun
		if a := f.answer(1); a.status != "200" || !a.wasReset {
			t.Errorf("%+v", a)
		}
		<-gone
		if last := f.ends(); last == nil || last.ErrCode != http2.ErrCodeNo || last.LastStreamID != 1 {
			t.Errorf("last words %v", last)
		}
	})
}

// While the proxy drains, streams that run end well, and those that come later
// are known not to have been looked at.
func TestHTTP2Drain(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		begun, on := make(chan struct{}, 1), make(chan struct{})
		p, ca := web(t, origin(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v1/slow" {
				begun <- struct{}{}
				<-on
			}
			echoes(w, r)
		}), speaking(protocol), func(c *Config) { c.Listeners[0].Timeouts.Drain = 10 * time.Second })
		f, idle := framedClient(t, p.addr("web"), ca), framedClient(t, p.addr("web"), ca)
		f.asks(1, true, "GET", "/v1/slow")
		<-begun
		idle.asks(1, true, "GET", "/v1/a")
		idle.answer(1)
		var stopping sync.WaitGroup
		stopping.Go(p.stop)
		first, err := f.next()
		if g, ok := first.(*http2.GoAwayFrame); !ok || g.LastStreamID != 1<<31-1 || g.ErrCode != http2.ErrCodeNo {
			t.Fatalf("%v %v", first, err)
		}
		f.asks(3, true, "GET", "/v1/crossed")
		if a := f.answer(3); a.status != "200" {
			t.Errorf("one that crossed the first word: %+v", a)
		}
		last, err := f.next()
		if g, ok := last.(*http2.GoAwayFrame); !ok || g.LastStreamID != 3 || g.ErrCode != http2.ErrCodeNo {
			t.Fatalf("%v %v", last, err)
		}
		f.asks(5, true, "GET", "/v1/after")
		close(on)
		if a := f.answer(1); a.status != "200" || a.wasReset {
			t.Errorf("one that ran: %+v", a)
		}
		f.ends()
		if g := idle.ends(); g == nil || g.ErrCode != http2.ErrCodeNo {
			t.Errorf("the idle one: %v", g)
		}
		stopping.Wait()
	})
}

// A service that takes nothing is found out in time, also by a client that is
// silent, and whose call has said of no time.
func TestHTTP2ServiceStalls(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{})
	p, ca := web(t, origin(t, func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	}), speaking(ProtocolHTTP2), func(c *Config) { c.Listeners[0].Timeouts.Stall = 4 * parkAfter })
	f := framedClient(t, p.addr("web"), ca)
	f.asks(1, false, "POST", "/v1/a", "te:trailers", "content-type:application/grpc")
	<-asked
	c := p.table.of(nil)[0]
	c.mu.Lock()
	pass := c.http.(*front).live[0]
	c.mu.Unlock()
	pass.mu.Lock()
	pass.to.noteSlow(1)
	pass.mu.Unlock()
	if a := f.answer(1); a.status != "200" || a.trailers["grpc-status"] != "14" {
		t.Errorf("%+v", a)
	}
}
