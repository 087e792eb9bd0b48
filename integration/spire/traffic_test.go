//go:build integration

package spire_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// service is what stands behind an inbound listener: it answers each line
// with the same line and its own name before it.
type service struct {
	name    string
	address string
	dialled atomic.Int64 // connections it has been given
}

func newService(t *testing.T, name string) *service {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{name: name, address: l.Addr().String()}
	var g sync.WaitGroup
	var mu sync.Mutex
	live := map[net.Conn]bool{}
	g.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.dialled.Add(1)
			mu.Lock()
			live[c] = true
			mu.Unlock()
			g.Go(func() {
				s.serve(c)
				mu.Lock()
				delete(live, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range live {
			_ = c.Close()
		}
		mu.Unlock()
		g.Wait()
	})
	return s
}

func (s *service) serve(c net.Conn) {
	defer c.Close()
	for lines := bufio.NewScanner(c); lines.Scan(); {
		if _, err := fmt.Fprintf(c, "%s: %s\n", s.name, lines.Text()); err != nil {
			return
		}
	}
}

// callTime bounds one request and its answer.
const callTime = time.Minute

// caller is a connection to a service, by way of proxies or not.
type caller struct {
	net.Conn
	in *bufio.Reader
	n  int
}

func dial(address string) (*caller, error) {
	c, err := net.DialTimeout("tcp", address, callTime)
	if err != nil {
		return nil, err
	}
	return newCaller(c), nil
}

func newCaller(c net.Conn) *caller { return &caller{Conn: c, in: bufio.NewReader(c)} }

// ask sends one line and reads the answer.
func (c *caller) ask(service string) error {
	c.n++
	line := fmt.Sprintf("request %d", c.n)
	if err := c.SetDeadline(time.Now().Add(callTime)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return err
	}
	answer, err := c.in.ReadString('\n')
	if err != nil {
		return err
	}
	if want := service + ": " + line; strings.TrimSpace(answer) != want {
		return fmt.Errorf("answer %q, want %q", answer, want)
	}
	return nil
}

// ends waits until the other end has closed the connection.
func (c *caller) ends(within time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	_, err := c.in.ReadByte()
	var timeout net.Error
	switch {
	case err == nil:
		return errors.New("it sent something")
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("it is still open after %s", within)
	}
	return nil
}

// call makes one request on a connection of its own.
func call(address, service string) error {
	c, err := dial(address)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.ask(service)
}

// refused fails the test unless a call gets no answer, and no byte of it
// reaches the service.
func refused(t *testing.T, address string, s *service) {
	t.Helper()
	before := s.dialled.Load()
	if err := call(address, s.name); err == nil {
		t.Errorf("a call of %s by %s was answered; it must be refused", s.name, address)
	}
	if after := s.dialled.Load(); after != before {
		t.Errorf("%s was dialled for a call that is to be refused", s.name)
	}
}

// traffic is calls without a pause: on new connections, and on one that lives
// all the while.
type traffic struct {
	t       *testing.T
	long    *caller // the connection that lives
	stopped chan struct{}
	g       sync.WaitGroup

	mu       sync.Mutex // guards the following
	calls    int
	failures []string
}

// pace is the pause between two calls.
const pace = 25 * time.Millisecond

// newTraffic calls service at address until finish.
func newTraffic(t *testing.T, address, service string) *traffic {
	t.Helper()
	long, err := dial(address)
	if err == nil {
		err = long.ask(service)
	}
	if err != nil {
		t.Fatalf("the first call of %s by %s: %v", service, address, err)
	}
	tr := &traffic{t: t, long: long, stopped: make(chan struct{})}
	tr.repeat("on a new connection", func() error { return call(address, service) })
	tr.repeat("on the long connection", func() error { return long.ask(service) })
	t.Cleanup(tr.end)
	return tr
}

func (tr *traffic) repeat(what string, ask func() error) {
	begun := time.Now()
	tr.g.Go(func() {
		tick := time.NewTicker(pace)
		defer tick.Stop()
		for {
			select {
			case <-tr.stopped:
				return
			case <-tick.C:
			}
			err := ask()
			tr.mu.Lock()
			tr.calls++
			if err != nil && len(tr.failures) < 20 {
				tr.failures = append(tr.failures, fmt.Sprintf("after %s, %s: %v", time.Since(begun).Round(time.Millisecond), what, err))
			}
			tr.mu.Unlock()
		}
	})
}

func (tr *traffic) end() {
	select {
	case <-tr.stopped:
	default:
		close(tr.stopped)
	}
	tr.g.Wait()
	_ = tr.long.Close()
}

// finish ends the traffic and fails the test if a call has failed.
func (tr *traffic) finish() {
	tr.t.Helper()
	tr.end()
	for _, f := range tr.failures {
		tr.t.Errorf("a request failed %s", f)
	}
	tr.t.Logf("%d requests, %d failed", tr.calls, len(tr.failures))
}
