package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/narthex-id/narthex/internal/testca"
)

// moody serves requests in ways that are drawn by lot.
func moody(w http.ResponseWriter, r *http.Request) {
	switch rand.IntN(40) {
	case 0:
		panic(http.ErrAbortHandler)
	case 1: // answers before it has read anything
		_, _ = io.WriteString(w, "early")
	case 2:
		_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 1000))
		_, _ = w.Write(make([]byte, 200_000))
	case 3:
		_, _ = io.Copy(io.Discard, r.Body) // else a server of HTTP/1.1 does not see its client go
		<-r.Context().Done()
	case 4:
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "part")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case 5, 6, 7, 8, 9:
		_, _ = io.WriteString(w, "early")
	default:
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	}
}

// mortal is an origin of both versions whose connections are cut now and then.
type mortal struct {
	addr string

	mu    sync.Mutex // guards the following
	conns map[net.Conn]bool
}

func (m *mortal) cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.conns {
		_ = c.Close()
	}
	clear(m.conns)
}

func newMortal(t testing.TB, h http.HandlerFunc) *mortal {
	t.Helper()
	m := &mortal{conns: map[net.Conn]bool{}}
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.conns[c] = true
		return ctx
	}
	s.Start()
	t.Cleanup(func() { m.cut(); s.Close() })
	m.addr = strings.TrimPrefix(s.URL, "http://")
	return m
}

// rash is a client that seldom waits for what it has asked for.
func rash(ctx context.Context, client *http.Client, url string) error {
	mine, leave := context.WithCancel(ctx)
	defer leave()
	if rand.IntN(3) == 0 {
		var cancel context.CancelFunc
		mine, cancel = context.WithTimeout(mine, time.Duration(rand.IntN(20))*time.Millisecond)
		defer cancel()
	}
	size := 5000
	if rand.IntN(20) == 0 {
		size = 300_000
	}
	body := bytes.Repeat([]byte("x"), rand.IntN(size))
	req, err := http.NewRequestWithContext(mine, http.MethodPost, url, io.MultiReader(bytes.NewReader(body)))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil // as it may be
	}
	defer func() { _ = resp.Body.Close() }()
	if rand.IntN(3) == 0 {
		_, _ = io.CopyN(io.Discard, resp.Body, 100)
		return nil
	}
	got, err := io.ReadAll(resp.Body)
	switch whole := err == nil && resp.StatusCode == http.StatusOK; {
	case !whole || string(got) == "early" || len(got) == 200_000 || bytes.Equal(got, body):
		return nil
	}
	return errors.New("an answer that looks whole and is not")
}

// leaves is a client that takes next to nothing and cuts its connection.
func leaves(t *testing.T, p *running, ca *testca.Authority) {
	t.Helper()
	f := framedClient(t, p.addr("web"), ca, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	for n := range uint32(5) {
		f.asks(2*n+1, false, "POST", "/v1/a")
	}
	_, _ = f.next()
	_ = f.Close()
}

// Everything that can go wrong goes wrong at once, and afterwards nothing is
// held any more.
func TestHTTP2Crowd(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, protocol Protocol) {
		m := newMortal(t, moody)
		p, ca := web(t, m.addr, speaking(protocol), func(c *Config) {
			c.Listeners[0].Timeouts.Response, c.Listeners[0].Timeouts.Stall = time.Second, time.Second
			c.Listeners[0].Timeouts.Handshake = patience
			c.Listeners[0].HTTP.MaxBody = 250_000
		})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		var all sync.WaitGroup
		var asked atomic.Int64
		for n := range 20 { // connections, of ten clients each; those of HTTP/1.1 have one each
			client := modern(t, ca)
			if n%4 == 0 {
				transport := client.Transport.(*http.Transport)
				transport.Protocols.SetHTTP2(false)
				transport.Protocols.SetHTTP1(true)
				transport.MaxIdleConnsPerHost = 10
			}
			for range 10 {
				all.Go(func() {
					for ctx.Err() == nil {
						asked.Add(1)
						if err := rash(ctx, client, "https://"+p.addr("web")+"/v1/a"); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
		}
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ctx.Err() == nil; n++ {
			<-tick.C
			switch n % 10 {
			case 3:
				m.cut()
			case 5:
				p.apply(strings.Replace(webReads, "/v1/**", "/v2/**", 1))
			case 6:
				p.apply(webReads)
			case 8:
				leaves(t, p, ca)
			}
		}
		all.Wait()
		t.Log(asked.Load(), "requests")
		p.until("nothing is lent any more", func() bool { return p.active() == 0 })
		p.stop()
	})
}
