//go:build integration

package http_test

import (
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

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestTermUnderLoad: clients keep their connections and ask without pause when
// SIGTERM comes. Every request is answered, each connection is told that it
// ends, and nobody waits for the drain's end.
func TestTermUnderLoad(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		from func(p *pair) (n *node, url string, own *svid)
	}{
		{"inbound", func(p *pair) (*node, string, *svid) { return p.in, "https://" + p.secure, p.client }},
		{"outbound", func(p *pair) (*node, string, *svid) { return p.out, "http://" + p.entry, nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, newService(t).address, "timeouts: {drain: 1m}")
			n, url, own := c.from(p)
			l := newLoad(t, 8, url, own)
			stage.Eventually(t, stage.Soon, "there is load", func() error {
				if answered := l.answered.Load(); answered < 200 {
					return fmt.Errorf("%d requests are answered", answered)
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
			if told := l.told.Load(); told != 8 {
				t.Errorf("%d of 8 clients were told that their connection ends", told)
			}
		})
	}
}

// load is clients with a connection each, who ask until they are told that it
// ends.
type load struct {
	g                      sync.WaitGroup
	answered, failed, told atomic.Int64
	first                  atomic.Value // error of the first that failed
}

func newLoad(t *testing.T, clients int, url string, own *svid) *load {
	t.Helper()
	l := &load{}
	for i := range clients {
		client := clientOf(t, own)
		l.g.Go(func() {
			for n := 0; ; n++ {
				method, body := http.MethodGet, io.Reader(nil)
				if (n+i)%2 > 0 { // of which net/http sends none again by itself
					method, body = http.MethodPost, strings.NewReader("hello")
				}
				a, err := fetch(client, method, url+"/any", body)
				switch {
				case err != nil && isRefusedDial(err):
					return
				case err != nil:
					l.failed.Add(1)
					l.first.CompareAndSwap(nil, fmt.Errorf("%s: %w", method, err))
					return
				case a.status != http.StatusOK:
					l.failed.Add(1)
					l.first.CompareAndSwap(nil, fmt.Errorf("%s: %d", method, a.status))
					return
				}
				l.answered.Add(1)
				if a.last {
					l.told.Add(1)
					return
				}
			}
		})
	}
	return l
}

// isRefusedDial reports whether nobody listened any more: nothing was asked.
func isRefusedDial(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" && errors.Is(err, syscall.ECONNREFUSED)
}

// TestTermWithinRequest: a request that is under way when SIGTERM comes is
// served to its end, and the connection ends with it.
func TestTermWithinRequest(t *testing.T) {
	t.Parallel()
	service := newService(t)
	p := newPair(t, service.address)
	answers := make(chan answer)
	go func() {
		defer close(answers)
		a, err := fetch(clientOf(t, nil), http.MethodPost, "http://"+p.entry+"/stall", strings.NewReader("hello"))
		if err != nil {
			t.Error(err)
		}
		answers <- a
	}()
	stage.Eventually(t, stage.Soon, "the request is with the service", func() error {
		if service.began.Load() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	for _, n := range []*node{p.in, p.out} {
		n.Signal(syscall.SIGTERM)
		n.Says(stage.Soon, "draining")
	}
	close(service.open)
	if a := <-answers; a.status != http.StatusOK || !a.last {
		t.Errorf("%+v", a)
	}
	for _, n := range []*node{p.in, p.out} {
		select {
		case <-n.Done:
		case <-time.After(stage.Soon):
			t.Errorf("%s does not end when its last request has", n.name)
		}
	}
}

// TestIdleWhenTermComes: connections on which nothing is asked do not keep it.
func TestIdleWhenTermComes(t *testing.T) {
	t.Parallel()
	p := newPair(t, newService(t).address, "timeouts: {drain: 1m}")
	c := dialTLS(t, p.secure, p.client)
	if got := askOn(t, c, "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"); got != http.StatusOK {
		t.Fatal(got)
	}
	began := time.Now()
	p.in.Signal(syscall.SIGTERM)
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		t.Errorf("it is told %d bytes, %v", n, err)
	}
	t.Logf("closed %s after SIGTERM", time.Since(began).Round(time.Millisecond))
	select {
	case <-p.in.Done:
	case <-time.After(stage.Soon):
		t.Error("it waits for a client that asks nothing")
	}
}
