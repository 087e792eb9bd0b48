//go:build integration

package http_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestTermUnderLoad: clients keep their connections and ask without pause when
// SIGTERM comes. Every request is answered, each connection is told that it
// ends, and nobody waits for the drain's end.
func TestTermUnderLoad(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		from func(t *testing.T, p *mesh.Pair) (n *mesh.Node, dial func() net.Conn)
	}{
		{"inbound", func(t *testing.T, p *mesh.Pair) (*mesh.Node, func() net.Conn) {
			return p.In, func() net.Conn { return dialTLS(t, p.Secure, p.Client) }
		}},
		{"outbound", func(t *testing.T, p *mesh.Pair) (*mesh.Node, func() net.Conn) {
			return p.Out, func() net.Conn { return dialPlain(t, p.Entry) }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := mesh.NewPair(t, mesh.NewService(t).Address, "timeouts: {drain: 10m}")
			n, dial := c.from(t, p)
			const clients = 8
			l := newLoad(clients, dial)
			stage.Eventually(t, stage.Soon, "there is load, of each of them", func() error {
				if answered, here := l.answered.Load(), l.here.Load(); answered < 200 || here < clients {
					return fmt.Errorf("%d requests of %d clients are answered", answered, here)
				}
				return nil
			})
			began := time.Now()
			n.Signal(syscall.SIGTERM)
			l.g.Wait()
			select {
			case <-n.Done:
			case <-time.After(stage.Soon):
				t.Error("it does not end when all its clients have gone")
			}
			t.Logf("%d requests answered; all gone %s after SIGTERM", l.answered.Load(), time.Since(began).Round(time.Millisecond))
			if failed := l.failed.Load(); failed > 0 {
				t.Errorf("%d requests failed, the first: %v", failed, l.first.Load())
			}
			if told := l.told.Load(); told != clients {
				t.Errorf("%d of %d clients were told that their connection ends", told, clients)
			}
		})
	}
}

// load is clients with a connection each, who ask until they are told that it
// ends.
type load struct {
	g                      sync.WaitGroup
	here                   atomic.Int64 // clients that were answered once
	answered, failed, told atomic.Int64
	first                  atomic.Value // error of the first that failed
}

// newLoad has them come. They are not net/http's: that one may dial anew
// whenever it likes.
func newLoad(clients int, dial func() net.Conn) *load {
	l := &load{}
	for i := range clients {
		c := dial()
		l.g.Go(func() {
			for n := 0; ; n++ {
				raw := "GET /any HTTP/1.1\r\nHost: a.example\r\n\r\n"
				if (n+i)%2 > 0 {
					raw = "POST /any HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello"
				}
				last, err := asked(c, raw)
				if err != nil {
					l.failed.Add(1)
					l.first.CompareAndSwap(nil, fmt.Errorf("%.4s after %d: %w", raw, n, err))
					return
				}
				if l.answered.Add(1); n == 0 {
					l.here.Add(1)
				}
				if last {
					l.told.Add(1)
					return
				}
			}
		})
	}
	return l
}

// asked makes a request, which is to be answered with 200, and reports whether
// the connection ends behind it.
func asked(c net.Conn, raw string) (last bool, err error) {
	if _, err := io.WriteString(c, raw); err != nil {
		return false, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if _, err = io.Copy(io.Discard, resp.Body); err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", resp.StatusCode)
	}
	return resp.Close, err
}

// TestTermWithinRequest: a request that is under way when SIGTERM comes is
// served to its end, and the connection ends with it.
func TestTermWithinRequest(t *testing.T) {
	t.Parallel()
	service := mesh.NewService(t)
	p := mesh.NewPair(t, service.Address, "timeouts: {drain: 10m}")
	answers := make(chan mesh.Answer)
	go func() {
		defer close(answers)
		a, err := mesh.Fetch(clientOf(t, nil), http.MethodPost, "http://"+p.Entry+"/stall", strings.NewReader("hello"))
		if err != nil {
			t.Error(err)
		}
		answers <- a
	}()
	stage.Eventually(t, stage.Soon, "the request is with the service", func() error {
		if service.Began.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	for _, n := range []*mesh.Node{p.In, p.Out} {
		n.Signal(syscall.SIGTERM)
		n.Says(stage.Soon, "draining")
	}
	close(service.Open)
	if a := <-answers; a.Status != http.StatusOK || !a.Last {
		t.Errorf("%+v", a)
	}
	for _, n := range []*mesh.Node{p.In, p.Out} {
		select {
		case <-n.Done:
		case <-time.After(stage.Soon):
			t.Errorf("%s does not end when its last request has", n.Name)
		}
	}
}

// TestIdleWhenTermComes: connections on which nothing is asked do not keep it.
func TestIdleWhenTermComes(t *testing.T) {
	t.Parallel()
	p := mesh.NewPair(t, mesh.NewService(t).Address, "timeouts: {drain: 10m}")
	c := dialTLS(t, p.Secure, p.Client)
	if got := askOn(t, c, "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"); got != http.StatusOK {
		t.Fatal(got)
	}
	began := time.Now()
	p.In.Signal(syscall.SIGTERM)
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		t.Errorf("it is told %d bytes, %v", n, err)
	}
	t.Logf("closed %s after SIGTERM", time.Since(began).Round(time.Millisecond))
	select {
	case <-p.In.Done:
	case <-time.After(stage.Soon):
		t.Error("it waits for a client that asks nothing")
	}
}
