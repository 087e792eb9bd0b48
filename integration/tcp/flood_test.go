//go:build integration

package tcp_test

import (
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// recorder keeps what a TLS client writes first, and answers nothing.
type recorder struct {
	net.Conn
	first []byte
}

func (r *recorder) Write(b []byte) (int, error) {
	r.first = append(r.first, b...)
	return len(b), nil
}

func (*recorder) Read([]byte) (int, error) { return 0, io.EOF }

// clientHello is what a TLS client opens with. It may be sent any number of
// times: a server cannot tell.
func clientHello() []byte {
	var r recorder
	_ = tls.Client(&r, &tls.Config{InsecureSkipVerify: true}).Handshake()
	return r.first
}

// TestFloodOfHandshakes: thousands of clients stall after their hello, others
// send garbage and hellos that they do not follow up as fast as they can, and
// good clients are let in and served meanwhile, none of them late.
func TestFloodOfHandshakes(t *testing.T) {
	const (
		stalled = 5000
		calls   = 50
		late    = 30 * time.Second // a tenth of what those who stall may
	)
	d := newDoor(t, "timeouts: {handshake: 5m}")
	hello := clientHello()
	standing := dialTLS(t, d.address, d.client)

	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for range stalled / 8 {
				c, err := net.DialTimeout("tcp", d.address, callTime)
				if err == nil {
					t.Cleanup(func() { _ = c.Close() })
					_ = c.SetReadDeadline(time.Now().Add(callTime))
					if _, err = c.Write(hello); err == nil {
						_, err = io.ReadFull(c, make([]byte, 1))
					}
				}
				if err != nil {
					t.Errorf("a client that stalls: %v", err)
					return
				}
			}
		})
	}
	g.Wait()
	if live := d.live(); live != stalled+1 {
		t.Errorf("%d connections are open, want %d", live, stalled+1)
	}
	t.Logf("memory with %d clients that stall: %d MiB", stalled, stage.RSS(t, d.PID())>>20)

	stop := make(chan struct{})
	var strangers atomic.Int64
	flood := func(first []byte, answered bool) {
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := net.DialTimeout("tcp", d.address, callTime)
			if err != nil {
				t.Errorf("a client of the flood: %v", err)
				return
			}
			_ = c.SetDeadline(time.Now().Add(callTime))
			_, _ = c.Write(first)
			if answered { // they go as soon as we have worked for them
				_, _ = io.ReadFull(c, make([]byte, 1))
			}
			_ = c.Close()
			strangers.Add(1)
		}
	}
	garbage := make([]byte, 600)
	_, _ = rand.Read(garbage)
	copy(garbage, hello[:5]) // a record that is none
	for _, first := range [][]byte{hello, []byte("GET / HTTP/1.1\r\n\r\n"), garbage} {
		g.Go(func() { flood(first, true) })
		g.Go(func() { flood(first, false) })
	}
	begin := time.Now()
	var slowest, slowestStanding time.Duration
	for n := range calls {
		since := time.Now()
		c := dialTLS(t, d.address, d.client)
		if err := ask(c, fmt.Sprint("call ", n)); err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		_ = c.Close()
		slowest = max(slowest, time.Since(since))
		since = time.Now()
		if err := ask(standing, fmt.Sprint("line ", n)); err != nil {
			t.Fatalf("line %d on a connection that stands: %v", n, err)
		}
		slowestStanding = max(slowestStanding, time.Since(since))
	}
	took := time.Since(begin)
	close(stop)
	g.Wait()
	t.Logf("%d calls in %s beside %d strangers a second: the slowest call %s, the slowest line on a connection that stands %s",
		calls, took.Round(time.Millisecond), int64(float64(strangers.Load())/took.Seconds()), slowest, slowestStanding)
	if slowest > late || slowestStanding > late {
		t.Errorf("longer than %s", late)
	}
}

// dialTLS connects to address as s, which has to work.
func dialTLS(t *testing.T, address string, s *svid) *tls.Conn {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: callTime}, "tcp", address, s.client())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
