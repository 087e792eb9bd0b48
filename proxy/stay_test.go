package proxy

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
)

// scripted serves HTTP/1.1: handle is told of each request, counted over all
// connections, and answers it by itself. Where it returns false the connection
// ends.
func scripted(t testing.TB, handle func(c net.Conn, n int64) bool) (target string, conns *atomic.Int64) {
	t.Helper()
	var requests atomic.Int64
	conns = new(atomic.Int64)
	return serve(t, func(c net.Conn) {
		conns.Add(1)
		r := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(r); err != nil || !handle(c, requests.Add(1)) {
				return
			}
		}
	}), conns
}

func writes200(c net.Conn, body string) {
	_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body) // fails where nobody waits for it
}

// Requests one after the other go over one connection, by whichever version they
// came: who stays with it for one is sent away for the other.
func TestStays(t *testing.T) {
	t.Parallel()
	target, conns := scripted(t, func(c net.Conn, n int64) bool { writes200(c, fmt.Sprint(n)); return true })
	p, ca := web(t, target, speaking(ProtocolHTTP1))
	f := framedClient(t, p.addr("web"), ca)
	b := p.browser(ca)
	for n := range 30 {
		want := fmt.Sprint(n + 1)
		if n%3 == 2 {
			if status, body := b.get("/v1/a"); status != 200 || body != want {
				t.Fatalf("over HTTP/1.1: %d %q, want %s", status, body, want)
			}
		} else {
			f.asks(uint32(2*n+1), true, "GET", "/v1/a")
			if a := f.answer(uint32(2*n + 1)); a.status != "200" || a.body != want {
				t.Fatalf("over HTTP/2: %+v, want %s", a, want)
			}
		}
		p.next()
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections to the service, want one", n)
	}
}

// What a service says unasked, or its end, is nothing to the next request: that
// goes over another connection.
func TestStaysNoLonger(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, more string
		ends       bool
	}{
		{"ends", "", true},
		{"speaks", "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged", false},
		{"speaks and ends", "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			on := make(chan struct{})
			told := make(chan struct{})
			target, conns := scripted(t, func(c net.Conn, n int64) bool {
				writes200(c, "true")
				<-on
				_, _ = c.Write([]byte(test.more)) // fails where that is known
				if !test.ends {
					defer func() { _, _ = c.Read(make([]byte, 1)); told <- struct{}{} }() // which ends the connection
					return false
				}
				_ = c.Close()
				told <- struct{}{}
				return false
			})
			p, ca := web(t, target, speaking(ProtocolHTTP1))
			f := framedClient(t, p.addr("web"), ca)
			for n := range 10 {
				f.asks(uint32(2*n+1), true, "GET", "/v1/a")
				if a := f.answer(uint32(2*n + 1)); a.status != "200" || a.body != "true" {
					t.Fatalf("%d: %+v", n, a)
				}
				p.next()
				on <- struct{}{}
				<-told
			}
			if n := conns.Load(); n < 10 {
				t.Errorf("%d connections to the service, want one for each", n)
			}
		})
	}
}

// A client that leaves while its request is with the service takes the connection
// along, and no other.
func TestStaysWhileClientLeaves(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 100)
	on := make(chan struct{})
	target, _ := scripted(t, func(c net.Conn, n int64) bool {
		if n%2 == 0 {
			asked <- struct{}{}
			<-on
		}
		writes200(c, fmt.Sprint(n))
		return true
	})
	p, ca := web(t, target, speaking(ProtocolHTTP1))
	f := framedClient(t, p.addr("web"), ca)
	stream := uint32(1)
	for n := int64(1); n < 20; n += 2 {
		f.asks(stream, true, "GET", "/v1/a")
		if a := f.answer(stream); a.body != fmt.Sprint(n) {
			t.Fatalf("%+v, want %d", a, n)
		}
		p.next()
		f.asks(stream+2, true, "GET", "/v1/a")
		<-asked
		f.must(f.WriteRSTStream(stream+2, 8))
		if r := p.next(); r.HTTP.Status != statusLeft {
			t.Fatalf("record %+v", r)
		}
		on <- struct{}{}
		stream += 4
	}
}

// What is ended, or given back unused, is read by who stays with it until that
// one has left.
func TestStaysUntilSentAway(t *testing.T) {
	t.Parallel()
	for name, letGo := range map[string]func(*call){
		"dropped":  (*call).dropBackend,
		"returned": (*call).returnBackend,
		"interrupted": func(x *call) {
			x.w.gone.Store(true)
			x.c.mu.Lock()
			x.q.interruptTarget()
			x.c.mu.Unlock()
			x.returnBackend()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target, _ := scripted(t, func(net.Conn, int64) bool { return true })
			for range 100 {
				raw, err := net.Dial("tcp", target)
				if err != nil {
					t.Fatal(err)
				}
				b := newBackend(backed{raw: raw}, raw.(end))
				var hosts sync.WaitGroup
				b.stay.begin(&hosts)
				left := make(chan *courier)
				go func() { left <- b.await(&hosts) }()
				x := &call{c: &conn{}, q: &question{up: raw}, w: &waits{}, b: b}
				letGo(x)
				if b.untouched() { // it was given back
					_ = b.raw.Close()
				}
				if c := <-left; c != nil || x.b != nil {
					t.Fatalf("answers %v, has %v", c, x.b)
				}
			}
		})
	}
}
