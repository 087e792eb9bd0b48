package expose

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestSilentClientsKeepNoProbeOut: whoever keeps connections open without a
// word, many more than are held, and comes again when they are closed.
func TestSilentClientsKeepNoProbeOut(t *testing.T) {
	s := start(t, Config{Health: "127.0.0.1:0", Process: "agent"})
	addr := s.HealthAddr().String()
	stop := make(chan struct{})
	var silent, held sync.WaitGroup
	defer silent.Wait()
	defer close(stop)
	for range 3 * maxConnections {
		held.Add(1)
		silent.Go(func() {
			for first := true; ; first = false {
				c, err := net.Dial("tcp", addr)
				if first {
					held.Done()
				}
				if err != nil {
					return // out of ports or files: enough of them are there
				}
				ended := make(chan struct{})
				go func() {
					_, _ = io.Copy(io.Discard, c) // until we are hung up on
					close(ended)
				}()
				select {
				case <-ended:
					_ = c.Close()
				case <-stop:
					_ = c.Close()
					<-ended
					return
				}
			}
		})
	}
	held.Wait()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	var probes sync.WaitGroup
	for range 4 {
		probes.Go(func() {
			for range 5 {
				resp, err := client.Get("http://" + addr + "/livez")
				if err != nil {
					t.Errorf("a probe was not answered: %v", err)
					continue
				}
				_ = resp.Body.Close()
			}
		})
	}
	probes.Wait()
}

// queue is a listener of connections in memory, which have said nothing.
type queue struct {
	waiting chan net.Conn
	closed  chan struct{}
}

func newQueue() *queue { return &queue{make(chan net.Conn, 10), make(chan struct{})} }

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.waiting:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error   { close(q.closed); return nil }
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }

// dial returns the client's end of a connection that waits to be accepted.
func (q *queue) dial() net.Conn {
	client, server := net.Pipe()
	q.waiting <- server
	return client
}

// take accepts one and returns how long that took.
func take(t *testing.T, l net.Listener) (net.Conn, time.Duration) {
	t.Helper()
	begin := time.Now()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c, time.Since(begin)
}

// isOpen reports whether the far end of c is, for one that sends nothing.
func isOpen(c net.Conn) bool {
	_ = c.SetReadDeadline(time.Now().Add(time.Nanosecond)) // fails where it is not
	_, err := c.Read(make([]byte, 1))
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func TestShedWaitsForTheYoung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		l := newShedding(q, 2)
		defer l.Close()
		first, second, third := q.dial(), q.dial(), q.dial()
		for range 2 {
			if c, took := take(t, l); took != 0 {
				t.Fatalf("waited %s for room that was there", took)
			} else {
				defer c.Close()
			}
		}
		c, took := take(t, l)
		defer c.Close()
		if took != young {
			t.Errorf("waited %s for the oldest to be old, want %s", took, young)
		}
		if isOpen(first) || !isOpen(second) || !isOpen(third) {
			t.Error("the oldest is not the one that was closed")
		}
		q.dial()
		c, took = take(t, l)
		defer c.Close()
		if took > time.Microsecond || isOpen(second) {
			t.Errorf("waited %s for one that is old by now", took)
		}
	})
}

func TestShedTakesTheRoomOfWhoLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		l := newShedding(q, 1)
		defer l.Close()
		q.dial()
		c, _ := take(t, l)
		time.AfterFunc(young/10, func() { _ = c.Close() })
		q.dial()
		c, took := take(t, l)
		defer c.Close()
		if took != young/10 {
			t.Errorf("waited %s, want %s", took, young/10)
		}
	})
}

// TestShedWhoSpeaksMakesRoomForTheSilent, but not without bound.
func TestShedWhoSpeaksMakesRoomForTheSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		l := newShedding(q, 2)
		defer l.Close()
		for range 4 {
			client := q.dial()
			c, took := take(t, l)
			defer c.Close()
			if took != 0 {
				t.Fatalf("waited %s for room that was there", took)
			}
			go func() { _, _ = client.Write([]byte("GET")) }()
			if _, err := c.Read(make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
		}
		q.dial()
		c, took := take(t, l)
		defer c.Close()
		if took != young {
			t.Errorf("one more than there may be was taken after %s, want %s", took, young)
		}
	})
}

func TestShedEndsWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		l := newShedding(q, 1)
		q.dial()
		c, _ := take(t, l)
		defer c.Close()
		late := q.dial()
		time.AfterFunc(young/10, func() { _ = l.Close() })
		begin := time.Now()
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) || time.Since(begin) != young/10 {
			t.Errorf("got %v after %s", err, time.Since(begin))
		}
		if isOpen(late) {
			t.Error("the one that was being accepted is left open")
		}
	})
}
