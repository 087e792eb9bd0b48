package proxy

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/internal/testca"
)

// allParked waits until no stream of the proxy has a goroutine.
func (r *running) allParked() {
	r.t.Helper()
	until := time.Now().Add(patience)
	for tick := time.Tick(10 * time.Millisecond); ; <-tick {
		moving := 0
		conns := r.table.of(nil)
		for _, c := range conns {
			c.mu.Lock()
			for _, s := range c.streams {
				if s != nil && s.state.Load() != parked || c.streams[0] == nil {
					moving++
				}
			}
			c.mu.Unlock()
		}
		if len(conns) > 0 && moving == 0 {
			return
		}
		if time.Now().After(until) {
			r.t.Fatalf("%d streams of %d connections still have a goroutine", moving, len(conns))
		}
	}
}

func parkingProxy(t *testing.T, handle func(net.Conn)) (*running, *tls.Config) {
	t.Helper()
	ca := testca.New(t, "example.org")
	p := run(t, Config{
		Listeners: []Listener{inbound("orders", serve(t, handle))}, Policy: rulesOf(t, allowWeb),
		Identities: source(t, ca.SVID("/orders"), ca),
	})
	return p, clientConfig(ca.SVID("/web"))
}

func TestParkedConnectionGoesOn(t *testing.T) {
	t.Parallel()
	p, cc := parkingProxy(t, echo)
	conns := make([]*tls.Conn, 8)
	for i := range conns {
		conns[i] = dialTLS(t, p.addr("orders"), cc)
		say(t, conns[i], "hello")
	}
	for range 2 { // parked for the first time, and again
		p.allParked()
		for _, c := range conns {
			_ = c.SetDeadline(time.Now().Add(patience))
			say(t, c, "still there?")
		}
	}
	p.allParked()
	for _, c := range conns {
		_ = c.SetDeadline(time.Now().Add(patience))
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
			t.Errorf("after half-close: %q, %v", rest, err)
		}
		if a := p.next(); a.Closed != "peer" || a.BytesIn != 29 || a.BytesOut != 29 {
			t.Errorf("record: %+v", a)
		}
	}
}

func TestParkedConnectionIsEnded(t *testing.T) {
	for name, c := range map[string]struct {
		do     func(t *testing.T, p *running, c *tls.Conn)
		closed string
	}{
		"by the policy": {func(t *testing.T, p *running, _ *tls.Conn) {
			if a := p.apply(denyAll); a.Asked != 1 || a.Closed != 1 {
				t.Errorf("%+v", a)
			}
		}, "policy"},
		"by the peer": {func(_ *testing.T, _ *running, c *tls.Conn) { abort(c.NetConn()) }, "peer"},
		"by SIGTERM":  {func(_ *testing.T, p *running, _ *tls.Conn) { go p.stop() }, "drain"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, cc := parkingProxy(t, echo)
			conn := dialTLS(t, p.addr("orders"), cc)
			say(t, conn, "hello")
			p.allParked()
			c.do(t, p, conn)
			if a := p.next(); a.Closed != c.closed {
				t.Errorf("closed by %q (%s), want %q", a.Closed, a.Reason, c.closed)
			}
			gone(t, conn)
		})
	}
}

// A stream that is parked in the midst of a record goes on where it was.
func TestParkedInMidRecord(t *testing.T) {
	t.Parallel()
	p, cc := parkingProxy(t, echo)
	raw, err := net.Dial("tcp", p.addr("orders"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	slow := &slowed{Conn: raw}
	c := tls.Client(slow, cc)
	say(t, c, "hello")
	slow.hold = 7
	if _, err := c.Write([]byte("in two parts")); err != nil {
		t.Fatal(err)
	}
	p.allParked()
	if _, err := raw.Write(slow.held); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 12)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "in two parts" {
		t.Errorf("%q, %v", got, err)
	}
}

// What is held for half a record is what came of it, not what its head says will
// come.
func TestParkedHoldsWhatCame(t *testing.T) {
	t.Parallel()
	p, cc := parkingProxy(t, echo)
	c := dialTLS(t, p.addr("orders"), cc)
	say(t, c, "hello")
	if _, err := c.NetConn().Write([]byte{23, 3, 3, 0x47, 0}); err != nil {
		t.Fatal(err)
	}
	p.allParked()
	for _, conn := range p.table.of(nil) {
		conn.mu.Lock()
		s := conn.streams[0]
		conn.mu.Unlock()
		if w := s.src.(*secured).wire; s.state.CompareAndSwap(parked, moving) { // ours for a moment
			if w.w-w.r != recordHead || len(*w.buf) > bufferSizes[0] {
				t.Errorf("%d bytes are held for %d", len(*w.buf), w.w-w.r)
			}
			s.state.Store(parked)
		}
	}
}

// slowed keeps the last bytes of a write back.
type slowed struct {
	net.Conn
	hold int
	held []byte
}

func (s *slowed) Write(b []byte) (int, error) {
	n := len(b) - s.hold
	s.held = bytes.Clone(b[n:])
	if _, err := s.Conn.Write(b[:n]); err != nil {
		return 0, err
	}
	return len(b), nil
}

// What crypto/tls held for the records it read is given back when a stream
// is parked. A release of Go that keeps it elsewhere is to be noticed here.
func TestParkedHoldsNoTLSBuffers(t *testing.T) {
	t.Parallel()
	if !buffers.known {
		t.Fatal("crypto/tls.Conn has another layout: see shed.go")
	}
	p, cc := parkingProxy(t, echo)
	c := dialTLS(t, p.addr("orders"), cc)
	text := string(bytes.Repeat([]byte("x"), 64<<10))
	say(t, c, text)
	p.allParked()
	for _, conn := range p.table.of(nil) {
		for _, s := range conn.streams {
			if sec, ok := s.src.(*secured); ok && s.state.CompareAndSwap(parked, moving) { // ours for a moment
				v := reflect.ValueOf(sec.Conn).Elem()
				for _, name := range []string{"rawInput", "hand"} {
					b := (*bytes.Buffer)(unsafe.Pointer(v.FieldByName(name).UnsafeAddr()))
					if b.Cap() > 0 {
						t.Errorf("%s still holds %d bytes", name, b.Cap())
					}
				}
				if sec.wire.buf != nil || sec.buf != nil {
					t.Error("a buffer of ours is held")
				}
				s.state.Store(parked)
			}
		}
	}
	say(t, c, text)
}

// Whatever the sizes of writes and of what the network makes of them, what is
// sent is what arrives, both ways, with either version.
func TestBytesArriveAsSent(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			t.Parallel()
			p, cc := parkingProxy(t, echo)
			cc.MaxVersion = version
			raw, err := net.Dial("tcp", p.addr("orders"))
			if err != nil {
				t.Fatal(err)
			}
			c := tls.Client(&chopped{Conn: raw}, cc)
			t.Cleanup(func() { _ = c.Close() })
			sent := make([]byte, 3<<20)
			_, _ = rand.Read(sent)
			failed := make(chan error, 1)
			go func() {
				rest := sent
				for n := 1; len(rest) > 0; n = n*3%70_001 + 1 {
					n := min(n, len(rest))
					if _, err := c.Write(rest[:n]); err != nil {
						failed <- err
						return
					}
					rest = rest[n:]
				}
				failed <- c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err = errors.Join(err, <-failed); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, sent) {
				t.Errorf("%d bytes came back for %d, and not the same", len(got), len(sent))
			}
		})
	}
}

// chopped writes in pieces that have nothing to do with records.
type chopped struct {
	net.Conn
	n int
}

func (c *chopped) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		c.n = c.n*5%20_011 + 1
		n := min(c.n, len(rest))
		if _, err := c.Conn.Write(rest[:n]); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(b), nil
}

// An event that was read for one stream does not wake the next that is parked
// in its place.
func TestLotTellsOccupantsApart(t *testing.T) {
	l, err := newLot()
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	first, second := &sleeper{}, &sleeper{}
	l.enter(first)
	was := first.place
	l.leave(first)
	l.enter(second)
	if second.place.slot != was.slot {
		t.Fatalf("slot %d was not used again", was.slot)
	}
	if got := l.at(was.slot, was.turn); got != nil {
		t.Error("an old event finds who is there now")
	}
	if l.at(second.place.slot, second.place.turn) != second {
		t.Error("who is there is not found")
	}
}

// A connection without a socket (there is none in production) is not parked
// and works all the same.
func TestEndsWithoutSockets(t *testing.T) {
	ours, theirs := net.Pipe()
	p := newBare(halfPipe{ours})
	if p.socket() != nil {
		t.Fatal("a pipe has a socket")
	}
	go func() { _, _ = theirs.Write([]byte("hi")); _ = theirs.Close() }()
	b, err := p.next()
	if string(b) != "hi" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	p.release()
	if _, err := p.next(); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("at its end: %v", err)
	}
}

// A request that comes in the moment in which its connection is asked to park is
// looked after: its service is not waited for longer than by any other.
func TestRequestOvertakesParking(t *testing.T) {
	t.Parallel()
	target, _ := scripted(t, func(c net.Conn, n int64) bool {
		if n == 1 {
			writes200(c, "ok")
		} // else nothing, ever
		return true
	})
	p, ca := web(t, target, soon)
	b := p.browser(ca)
	if status, _ := b.get("/v1/a"); status != 200 {
		t.Fatal(status)
	}
	c := p.table.of(nil)[0]
	p.until("the connection is asked to park", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		asked := c.streams[0].state.CompareAndSwap(moving, kicked) // the bytes come before the interrupt
		if asked {
			p.table.schedule(c, c.nextDue())
		}
		return asked || c.streams[0].state.Load() == parked
	})
	if status, body := b.get("/v1/a"); status != 504 {
		t.Errorf("%d %q, want 504", status, body)
	}
}

// A client that begins to speak HTTP/2 in the moment in which its connection is
// ended for its silence has it ended.
func TestEndedAsItBeginsToSpeak(t *testing.T) {
	t.Parallel()
	ca := testca.New(t, "example.org")
	l := outbound(t, "out", "127.0.0.1:1", "spiffe://example.org/orders")
	l.HTTP = &HTTP{}
	p := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	f := framedOn(t, dialPlain(t, p.addr("out")))
	var c *conn
	p.until("the connection is asked to park", func() bool {
		if conns := p.table.of(nil); len(conns) == 0 {
			return false
		} else {
			c = conns[0]
		}
		c.mu.Lock()
		s := c.streams[0]
		if s != nil && s.state.CompareAndSwap(moving, kicked) { // the bytes come before the interrupt
			return true
		}
		if s != nil {
			s.wake()
		}
		c.mu.Unlock()
		return false
	})
	if _, err := f.Write([]byte(http2.ClientPreface)); err != nil {
		t.Error(err)
	}
	if err := f.WriteSettings(); err != nil {
		t.Error(err)
	}
	p.until("they were read", func() bool { return c.in.Load() > 0 })
	c.http.(*downstream).leave(closing{"peer", "idle"})
	c.mu.Unlock()
	for err := error(nil); err == nil; { // it is read alone: what is written may find it ended
		if _, err = f.ReadFrame(); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection goes on")
		}
	}
	if a := p.next(); a.Reason != "idle" {
		t.Errorf("record %+v", a)
	}
}
