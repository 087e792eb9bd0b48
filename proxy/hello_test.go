package proxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/proxy/policy"
)

// until waits until what is true.
func (r *running) until(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(patience); !is(); runtime.Gosched() {
		if time.Now().After(end) {
			r.t.Fatalf("still not so: %s", what)
		}
	}
}

// TestSilentClientsDelayNobody: clients that connect, send nothing or a bit of
// a hello and wait, 400 a second of them, keep those away that have business
// here neither by connections nor by handshakes.
func TestSilentClientsDelayNobody(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxConnections, in.MaxHandshakes = 200, 20
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca), Log: hclog.NewNullLogger()})
	addr, stop := p.addr("orders"), make(chan struct{})
	var flood sync.WaitGroup
	for n := range 4 {
		flood.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				c, err := net.Dial("tcp", addr)
				if err != nil {
					continue
				}
				_, _ = io.WriteString(c, "\x16\x03\x01\x02"[:n])
				flood.Go(func() {
					_, _ = c.Read(make([]byte, 1))
					_ = c.Close()
				})
			}
		})
	}
	p.until("the flood fills the connections", func() bool { return p.Status().Listeners[0].Accepted > 250 })
	cc := clientConfig(ca.SVID("/web"))
	var longest time.Duration
	for range 20 {
		begin := time.Now()
		c := dialTLS(t, addr, cc)
		say(t, c, "hello")
		_ = c.Close()
		longest = max(longest, time.Since(begin))
	}
	close(stop)
	p.stop()
	flood.Wait()
	t.Logf("the slowest of 20 clients took %s", longest)
	if longest > 5*time.Second { // half of what the silent may take, on a busy machine too
		t.Errorf("a client waited %s", longest)
	}
}

// TestSilentGoFirst: of the silent the oldest, and nobody who spoke.
func TestSilentGoFirst(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxConnections = 3
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	live := dialTLS(t, p.addr("orders"), cc)
	say(t, live, "hello")
	var silent []net.Conn
	for range 2 {
		c, err := net.Dial("tcp", p.addr("orders"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		silent = append(silent, c)
		p.until("it is accepted", func() bool { return p.Status().Listeners[0].Active == 1+len(silent) })
	}
	say(t, dialTLS(t, p.addr("orders"), cc), "in its place")
	gone(t, silent[0])
	if a := p.next(); a.Source != silent[0].LocalAddr().String() || !strings.HasPrefix(a.Reason, "we waited for its TLS handshake") || a.Outcome != "failure" {
		t.Errorf("access record %+v", a)
	}
	say(t, live, "still there")
	later := tls.Client(silent[1], cc)
	_ = later.SetDeadline(time.Now().Add(patience))
	say(t, later, "not so silent")
}

// stalled sends a TLS hello and then no more.
func stalled(t *testing.T, addr string) net.Conn {
	t.Helper()
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	_ = raw.SetReadDeadline(time.Now().Add(patience))
	hello := &firstWrite{Conn: raw}
	_ = tls.Client(hello, &tls.Config{InsecureSkipVerify: true}).Handshake()
	if _, err := raw.Read(make([]byte, 1)); err != nil {
		t.Fatalf("read a server's hello: %v", err)
	}
	return raw
}

// firstWrite reads nothing, so that a client ends when it has written once.
type firstWrite struct{ net.Conn }

func (firstWrite) Read([]byte) (int, error) { return 0, io.EOF }

// TestStalledHandshakesHoldNobodyUp: clients that send a hello and wait have
// no turn while they do, and with the limit of connections reached they go
// first.
func TestStalledHandshakesHoldNobodyUp(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxConnections, in.MaxHandshakes = 20, 1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	addr, cc := p.addr("orders"), clientConfig(ca.SVID("/web"))
	live := dialTLS(t, addr, cc)
	say(t, live, "hello")
	var waiting []net.Conn
	for range 19 {
		waiting = append(waiting, stalled(t, addr))
	}
	say(t, dialTLS(t, addr, cc), "past them all")
	if a := p.next(); a.Source != waiting[0].LocalAddr().String() || !strings.HasPrefix(a.Reason, "we waited for its TLS handshake") {
		t.Errorf("access record %+v", a)
	}
	say(t, live, "still there")
}

// TestNoWorkForWhoHasLeft: a client that went while it waited for its turn
// gets none.
func TestNoWorkForWhoHasLeft(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxHandshakes = 1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	l := p.world.Load().named("orders")
	l.handshakes.force() // another one's handshake takes its time
	raw, err := net.Dial("tcp", p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	_ = tls.Client(&firstWrite{Conn: raw}, &tls.Config{InsecureSkipVerify: true}).Handshake()
	waiting := func() int { l.handshakes.mu.Lock(); defer l.handshakes.mu.Unlock(); return l.handshakes.waiting.Len() }
	p.until("it waits", func() bool { return waiting() == 1 })
	_ = raw.Close()
	l.handshakes.give()
	if a := p.next(); a.Reason != "the peer closed the connection during the handshake" {
		t.Errorf("access record %+v", a)
	}
	if l.handshakes.taken != 0 {
		t.Error("its turn was not given back")
	}
}

// TestNextSilentMakesRoom: when all connections are taken and nobody is
// waited for, the first one that is gives up its place.
func TestNextSilentMakesRoom(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	l := p.world.Load().named("orders")
	c := newConn(l, &net.TCPConn{}, l.settings()) // one that is closed already
	c.request.Direction = policy.Inbound
	l.makeRoom()
	if l.waits(c, false); c.ended() == nil {
		t.Error("it keeps its place")
	}
	other := newConn(l, c.down, l.settings())
	other.request.Direction = policy.Inbound
	if l.waits(other, false); other.ended() != nil {
		t.Error("one place was wanted, and two were given up")
	}
	l.heard(other)
}

// TestSilentWhileRoomIsMade: who begins to be waited for at the very moment
// at which all listeners are asked for a place gives up its own.
func TestSilentWhileRoomIsMade(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	c := Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)}
	for i := range 20 {
		in.Name = fmt.Sprint("other-", i)
		c.Listeners = append(c.Listeners, in)
	}
	p := run(t, c)
	l := p.world.Load().named("orders")
	for round := range 5000 {
		c := newConn(l, &net.TCPConn{}, l.settings()) // one that is closed already
		c.request.Direction = policy.Inbound
		var g sync.WaitGroup
		var begun atomic.Bool
		g.Go(func() { begun.Store(true); p.makeRoom() })
		for !begun.Load() {
			runtime.Gosched()
		}
		for begin := time.Now(); time.Since(begin) < time.Duration(round%100)*100*time.Nanosecond; {
		}
		l.waits(c, false)
		g.Wait()
		if c.ended() == nil {
			t.Fatalf("round %d: it keeps its place, and nobody asks for it again", round)
		}
		p.want(false)
	}
}

// TestRaisedLimitLetsThoseWhoWaitIn: also those who waited under the old one.
func TestRaisedLimitLetsThoseWhoWaitIn(t *testing.T) {
	ca := testca.New(t, "example.org")
	in := inbound("orders", serve(t, echo))
	in.MaxConnections = 1
	p := run(t, Config{Listeners: []Listener{in}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	cc := clientConfig(ca.SVID("/web"))
	first := dialTLS(t, p.addr("orders"), cc)
	say(t, first, "hello")
	raw, err := net.Dial("tcp", p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	l := p.world.Load().named("orders")
	p.until("it waits", func() bool { l.slots.mu.Lock(); defer l.slots.mu.Unlock(); return l.slots.waiting.Len() == 1 })
	c := p.config
	in.MaxConnections = 2
	c.Listeners = []Listener{in}
	if _, err := p.Apply(c); err != nil {
		t.Fatal(err)
	}
	second := tls.Client(raw, cc)
	_ = second.SetDeadline(time.Now().Add(patience))
	say(t, second, "hello")
	say(t, first, "still there")
}

// dripping writes a byte at a time.
type dripping struct{ net.Conn }

func (d dripping) Write(b []byte) (int, error) {
	for n := range b {
		if _, err := d.Conn.Write(b[n : n+1]); err != nil {
			return n, err
		}
	}
	return len(b), nil
}

// TestHelloInPieces: a hello may come as slowly as it likes within its time.
func TestHelloInPieces(t *testing.T) {
	ca := testca.New(t, "example.org")
	path := t.TempDir() + "/in.sock"
	tcp, unixes := inbound("orders", serve(t, echo)), inbound("unix", serve(t, echo))
	unixes.Bind = "unix:" + path
	p := run(t, Config{Listeners: []Listener{tcp, unixes}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/orders"), ca)})
	for network, addr := range map[string]string{"tcp": p.addr("orders"), "unix": path} {
		raw, err := net.Dial(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = raw.Close() }()
		c := tls.Client(dripping{raw}, clientConfig(ca.SVID("/web")))
		_ = c.SetDeadline(time.Now().Add(patience))
		say(t, c, "over "+network)
	}
}

// TestGateAgain: who was through before comes before who is new.
func TestGateAgain(t *testing.T) {
	var g gate
	g.resize(1)
	g.force()
	through := make(chan bool)
	for _, again := range []bool{false, true} {
		go func() { g.take(nil, nil, again); through <- again }()
		for waits := 0; waits == 0; runtime.Gosched() {
			g.mu.Lock()
			waits = map[bool]int{false: g.waiting.Len(), true: g.again.Len()}[again]
			g.mu.Unlock()
		}
	}
	for _, again := range []bool{true, false} {
		g.give()
		if got := <-through; got != again {
			t.Errorf("let through: again %v, want %v", got, again)
		}
	}
}

func TestGate(t *testing.T) {
	var g gate
	g.resize(1)
	if !g.try() || g.try() {
		t.Fatal("a gate for one lets others through")
	}
	stop, late := make(chan struct{}), make(chan time.Time)
	close(stop)
	if g.take(stop, nil, false) {
		t.Error("let through after stop")
	}
	through := make(chan string, 3)
	var all sync.WaitGroup
	for n := range 3 {
		all.Go(func() {
			if g.take(nil, late, false) {
				through <- fmt.Sprint(n)
			}
		})
		for waits := 0; waits != n+1; runtime.Gosched() {
			g.mu.Lock()
			waits = g.waiting.Len()
			g.mu.Unlock()
		}
	}
	g.give()
	if who := <-through; who != "0" {
		t.Errorf("%s came before the first", who)
	}
	g.resize(2)
	if who := <-through; who != "1" {
		t.Errorf("%s came before the second", who)
	}
	close(late)
	all.Wait()
	if g.taken != 2 || g.waiting.Len() != 0 || g.try() {
		t.Errorf("%d are through, %d wait", g.taken, g.waiting.Len())
	}
}
