//go:build integration

package tcp_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// road is the way of a caller to a service: an outbound proxy, mutual TLS, an
// inbound proxy.
type road struct {
	ca      *authority
	out, in *node
	address string // where callers come
	door    string // of the inbound proxy
}

// newRoad starts both proxies before a service; more is further YAML of both
// listeners.
func newRoad(t *testing.T, target string, more ...string) *road {
	t.Helper()
	r := &road{ca: newAuthority(t, "example.org")}
	r.in = newNode(t, "in", r.ca.leaf("/server"), r.ca)
	r.door = r.in.inbound("in", target, more...)
	r.in.rules(allow("client-may", r.ca.id("/client")))
	r.out = newNode(t, "out", r.ca.leaf("/client"), r.ca)
	r.address = r.out.outbound("out", r.door, r.ca.id("/server"), more...)
	r.out.rules(allow("to-server", r.ca.id("/client")))
	r.in.start()
	r.out.start()
	return r
}

// meeting lets a test hold both ends of a connection: what the caller has and
// what the service was given.
type meeting struct {
	*road
	came chan net.Conn
	done chan struct{}
}

func newMeeting(t *testing.T, more ...string) *meeting {
	t.Helper()
	m := &meeting{came: make(chan net.Conn), done: make(chan struct{})}
	s := serve(t, func(c net.Conn) {
		select {
		case m.came <- c:
			<-m.done
		case <-m.done:
		}
	})
	t.Cleanup(func() { close(m.done) }) // before the service ends
	m.road = newRoad(t, s.address, more...)
	return m
}

// meet returns both ends of a new connection, on which a byte has gone both
// ways.
func (m *meeting) meet(t *testing.T) (caller, service *net.TCPConn) {
	t.Helper()
	caller = dial(t, m.address)
	select {
	case c := <-m.came:
		service = c.(*net.TCPConn)
	case <-time.After(callTime):
		t.Fatal("the service was not dialled")
	}
	t.Cleanup(func() { _ = service.Close() })
	for _, c := range []*net.TCPConn{caller, service} {
		if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
			t.Fatal(err)
		}
	}
	pass(t, caller, service, "hello")
	pass(t, service, caller, "hello yourself")
	return caller, service
}

// pass sends text from one end and reads it at the other.
func pass(t *testing.T, from, to net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(from, text); err != nil {
		t.Fatalf("send %q: %v", text, err)
	}
	got := make([]byte, len(text))
	if n, err := io.ReadFull(to, got); err != nil || string(got) != text {
		t.Fatalf("%q came as %q, %v", text, got[:n], err)
	}
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// TestEnds ends connections through both proxies in every way there is. Each
// end learns how the other one left.
func TestEnds(t *testing.T) {
	t.Parallel()
	m := newMeeting(t)
	t.Run("half-closed", func(t *testing.T) {
		for _, first := range []string{"caller", "service"} {
			a, b := m.meet(t)
			if first == "service" {
				a, b = b, a
			}
			if _, err := io.WriteString(a, "last words"); err != nil {
				t.Fatal(err)
			}
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(b); err != nil || string(got) != "last words" {
				t.Errorf("%s first: the other end read %q, %v", first, got, err)
			}
			pass(t, b, a, "and so much that is said afterwards")
			if err := b.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(a); err != nil || len(got) > 0 {
				t.Errorf("%s first: at the end it read %q, %v", first, got, err)
			}
		}
	})
	t.Run("closed", func(t *testing.T) {
		for _, first := range []string{"caller", "service"} {
			a, b := m.meet(t)
			if first == "service" {
				a, b = b, a
			}
			if _, err := io.WriteString(a, "last words"); err != nil {
				t.Fatal(err)
			}
			a.Close()
			if got, err := io.ReadAll(b); err != nil || string(got) != "last words" {
				t.Errorf("%s first: the other end read %q, %v", first, got, err)
			}
		}
	})
	t.Run("reset", func(t *testing.T) {
		for _, first := range []string{"caller", "service"} {
			a, b := m.meet(t)
			if first == "service" {
				a, b = b, a
			}
			skip := len(m.in.Records())
			reset(a)
			if _, err := io.ReadAll(b); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s first: the other end read %v, want a reset", first, err)
			}
			m.in.Record(skip, "reset", func(a telemetry.Access) bool { return a.Closed == "peer" && a.Decision == "allow" })
		}
	})
	t.Run("at-once", func(t *testing.T) { m.atOnce(t) })
	m.in.quiet()
	m.out.quiet()
}

// atOnce is about callers who leave before they are connected, and services
// that leave without a word.
func (m *meeting) atOnce(t *testing.T) {
	c := dial(t, m.address)
	s := <-m.came
	if _, err := io.WriteString(s, "no time for you"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "no time for you" {
		t.Errorf("of a service that left at once came %q, %v", got, err)
	}
	for range 20 {
		reset(dial(t, m.address))
	}
	c = dial(t, m.address)
	if _, err := io.WriteString(c, "to whom it may concern"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	deadline := time.After(callTime)
	for found := false; !found; {
		select {
		case s := <-m.came:
			got, err := io.ReadAll(s)
			found = string(got) == "to whom it may concern" && err == nil
			if !found && (len(got) > 0 || (err != nil && !isReset(err))) {
				t.Errorf("a caller that left at once: %q, %v", got, err)
			}
			s.Close()
		case <-deadline:
			t.Fatal("what a caller sent before it closed did not come")
		}
	}
}

// TestTruncation cuts TLS without a close_notify. What anybody on the network
// can do must not look like the end of a file: the plaintext side sees a
// reset.
func TestTruncation(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run("inbound-"+tls.VersionName(version), func(t *testing.T) {
			m := newMeeting(t)
			raw := dial(t, m.door)
			config := m.ca.leaf("/client").client()
			config.MinVersion, config.MaxVersion = version, version
			c := tls.Client(raw, config)
			if _, err := io.WriteString(c, "half of a "); err != nil {
				t.Fatal(err)
			}
			s := <-m.came
			got := make([]byte, 10)
			if _, err := io.ReadFull(s, got); err != nil {
				t.Fatal(err)
			}
			raw.Close() // a FIN, and no close_notify
			if err := s.SetDeadline(time.Now().Add(callTime)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(s); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the service read %v, want a reset", err)
			}
			m.in.Record(0, "truncated", func(a telemetry.Access) bool { return a.Reason == "client: ended without TLS close_notify" })
		})
		t.Run("outbound-"+tls.VersionName(version), func(t *testing.T) {
			ca := newAuthority(t, "example.org")
			config := ca.leaf("/server").server()
			config.MinVersion, config.MaxVersion = version, version
			called := make(chan struct{}) // a reset must not come before the caller knows that it is connected
			far := serveTLS(t, config, func(c net.Conn) {
				_, _ = io.WriteString(c, "half of a ")
				<-called
				_ = c.(*tls.Conn).NetConn().Close()
			})
			n := newNode(t, "out", ca.leaf("/client"), ca)
			n.rules(allow("all", ca.id("/client")))
			address := n.outbound("out", far.address, ca.id("/server"))
			n.start()
			c := dial(t, address)
			close(called)
			if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the caller read %q, %v, want a reset", got, err)
			}
			n.Record(0, "truncated", func(a telemetry.Access) bool { return a.Reason == "target: ended without TLS close_notify" })
		})
	}
}

// bulk sends size random bytes to an echo at address and reads them back at
// the same time. What comes back has to be what was sent.
func bulk(ctx context.Context, address string, size int) error {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return bulkOn(ctx, c, size)
}

// bulkOn does it on c, which it closes.
func bulkOn(ctx context.Context, c net.Conn, size int) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	block := make([]byte, 1<<20)
	if _, err := rand.Read(block); err != nil {
		return err
	}
	sent, came := sha256.New(), sha256.New()
	var sending error
	var g sync.WaitGroup
	g.Go(func() {
		_, sending = io.CopyN(io.MultiWriter(c, sent), repeat(block), int64(size))
	})
	n, err := io.CopyN(came, c, int64(size))
	if err != nil {
		c.Close()
	}
	g.Wait()
	switch {
	case err != nil:
		return fmt.Errorf("%d of %d bytes came back: %w", n, size, errors.Join(err, sending))
	case sending != nil:
		return fmt.Errorf("send: %w", sending)
	case !bytes.Equal(sent.Sum(nil), came.Sum(nil)):
		return errors.New("what came back is not what was sent")
	}
	return nil
}

// repeat reads block, each time with its first bytes changed.
func repeat(block []byte) io.Reader {
	readers := make([]io.Reader, 1024)
	for i := range readers {
		readers[i] = io.MultiReader(bytes.NewReader([]byte(fmt.Sprint(i))), bytes.NewReader(block))
	}
	return io.MultiReader(readers...)
}

// TestBulk moves much both ways at once through both proxies, on several
// connections.
func TestBulk(t *testing.T) {
	t.Parallel()
	r := newRoad(t, serve(t, echo).address)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			if err := bulk(ctx, r.address, 32<<20); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
}
