//go:build integration

package http_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// slow is a kind of client that holds a connection and does little with it.
type slow struct {
	name   string
	count  int
	first  string // what it sends at first
	drips  string // what it sends of one byte a second
	reads  bool   // what it is answered; otherwise it reads nothing
	secure bool   // it proves who it is
	status string // part of the answer, where one comes; empty: none
	reason string // part of the reason in the access record; empty: there is none
}

// slowClients are as many as open files allow: each costs the test one and the
// proxy one, and those that get through to the service another one in both.
var slowClients = []slow{
	{name: "drips a head", count: 3200, first: "GET /a HTTP/1.1\r\nHost: a.example\r\nX: ", drips: "y", reads: true, status: "408", reason: "the head of the request did not come within"},
	{name: "drips a head, in TLS", count: 500, first: "GET /a HTTP/1.1\r\nHost: a.example\r\nX: ", drips: "y", reads: true, secure: true, status: "408", reason: "the head of the request did not come within"},
	{name: "says nothing", count: 3000, reads: true},
	{name: "drips a body", count: 1000, first: "POST /sum HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100000\r\n\r\n", drips: "y", reads: true, status: "408", reason: "the body of the request came too slowly"},
	{name: "sends no body", count: 1000, first: "POST /sum HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n", reads: true, status: "408", reason: "the body of the request came too slowly"},
	{name: "reads nothing", count: 300, first: strings.Repeat("GET /flood/10000000 HTTP/1.1\r\nHost: a.example\r\n\r\n", 3), reason: "within the response"},
}

const (
	// patience is how long the proxy of these tests waits for a client.
	patience = 4 * time.Second
	// late bounds a good client's call beside all of them. On two idle cores
	// the slowest takes a tenth of it.
	late = 15 * time.Second
)

// TestSlowClients: nine thousand clients drip heads and bodies, or read
// nothing. A good client is served meanwhile, and they are gone when their
// time is over.
func TestSlowClients(t *testing.T) {
	h := newHouse(t, []string{mesh.Allow("client-may", mesh.ID("/client")), mesh.Allow("anybody-may", "unauthenticated")})
	times := fmt.Sprintf("timeouts: {handshake: %[1]s, head: %[1]s, stall: %[1]s, idle: %[1]s}", patience)
	address, secure := h.Inbound("slow", h.service.Address, times, "mode: permissive"), h.Inbound("slow-secure", h.service.Address, times)
	h.Configure()
	h.Reload()
	files, memory := stage.OpenFiles(t, h.PID()), stage.RSS(t, h.PID())
	good := h.goodClient()
	began := time.Now()
	var g sync.WaitGroup
	var all []*crowd
	for _, s := range slowClients {
		c := &crowd{slow: s, conns: make([]net.Conn, s.count), answers: make([]string, s.count)}
		all = append(all, c)
		c.come(t, map[bool]string{false: address, true: secure}[s.secure], h.own)
	}
	t.Logf("they have come within %s", time.Since(began).Round(time.Millisecond))
	most := stage.RSS(t, h.PID())
	for _, c := range all {
		g.Go(c.stay)
	}
	g.Wait()
	t.Logf("they have gone within %s", time.Since(began).Round(time.Millisecond))
	good.stop(t)
	most = max(most, stage.RSS(t, h.PID()))
	t.Logf("memory grew by %d MiB", (most-memory)>>20)
	for _, c := range all {
		c.check(t)
	}
	h.client.CloseIdleConnections()
	stage.Eventually(t, stage.Soon, "nothing is left", func() error {
		if live, now := h.Live(), stage.OpenFiles(t, h.PID()); live > 0 || now > files+300 { // idle connections to the service stay
			return fmt.Errorf("%d connections, %d files, %d before", live, now, files)
		}
		return nil
	})
	h.hasReasons(t)
	if h.Count("endpoint ejected") > 0 {
		t.Error("the service was left out for what its clients did")
	}
}

// TestLateHello: on a permissive listener, too, a client may take its time
// before it begins to speak TLS. Those of HTTP speak first.
func TestLateHello(t *testing.T) {
	t.Parallel()
	h := newHouse(t, []string{mesh.Allow("client-may", mesh.ID("/client"))}, "mode: permissive")
	c, err := net.DialTimeout("tcp", strings.TrimPrefix(h.base, "https://"), mesh.CallTime)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a silent client is told %d bytes, %v", n, err)
	}
	_ = c.SetDeadline(time.Now().Add(mesh.CallTime))
	if got := askOn(t, tls.Client(c, h.own.Client()), "GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n"); got != http.StatusOK {
		t.Errorf("status %d", got)
	}
}

// crowd are the clients of one kind.
type crowd struct {
	slow
	conns   []net.Conn
	answers []string
}

// come connects them, and has each send what it sends first.
func (c *crowd) come(t *testing.T, address string, own *mesh.SVID) {
	t.Helper()
	var g sync.WaitGroup
	const at = 8
	for part := range at {
		g.Go(func() {
			for i := part; i < c.count; i += at {
				conn, err := net.DialTimeout("tcp", address, mesh.CallTime)
				if err != nil {
					t.Errorf("one that %s: %v", c.name, err)
					return
				}
				t.Cleanup(func() { _ = conn.Close() })
				_ = conn.SetDeadline(time.Now().Add(2 * time.Minute))
				if !c.reads {
					_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
				}
				if c.secure {
					conn = tls.Client(conn, own.Client())
				}
				if _, err := io.WriteString(conn, c.first); err != nil {
					t.Errorf("one that %s: %v", c.name, err)
				}
				c.conns[i] = conn
			}
		})
	}
	g.Wait()
}

// stay has them do what they do until all are gone.
func (c *crowd) stay() {
	gone := make(chan struct{})
	var g sync.WaitGroup
	for i, conn := range c.conns {
		if conn == nil || !c.reads {
			continue
		}
		g.Go(func() {
			got, _ := io.ReadAll(conn) // a reset tells as much as an end
			c.answers[i] = string(got)
		})
	}
	var drips sync.WaitGroup
	drips.Go(func() {
		for tick := time.NewTicker(time.Second); ; {
			select {
			case <-gone:
				tick.Stop()
				return
			case <-tick.C:
			}
			for _, conn := range c.conns {
				if c.drips != "" && conn != nil {
					_, _ = io.WriteString(conn, c.drips)
				}
			}
		}
	})
	g.Wait()
	close(gone)
	drips.Wait()
}

// check wants each of them to have got the answer that is for its kind.
func (c *crowd) check(t *testing.T) {
	t.Helper()
	other := 0
	for _, answer := range c.answers {
		if (c.status == "" && answer != "") || !strings.HasPrefix(answer, "HTTP/1.1 "+c.status) && c.status != "" {
			if other++; other == 1 {
				t.Errorf("one that %s was answered %.200q, want %s", c.name, answer, c.status)
			}
		}
	}
	if other > 0 {
		t.Errorf("%d of %d that %s got another answer", other, c.count, c.name)
	}
}

// hasReasons wants a record of each of those that came to be a request, or
// that it is counted as dropped: thousands are gone in the same moment.
func (h *house) hasReasons(t *testing.T) {
	t.Helper()
	stage.Eventually(t, stage.Soon, "each has left its record", func() error {
		missing := map[string]int{}
		for _, s := range slowClients {
			if s.reason != "" {
				missing[s.reason] += s.count
			}
		}
		var others []telemetry.Access
		for _, a := range h.Records() {
			known := a.HTTP == nil || strings.HasPrefix(a.HTTP.Path, "/bytes/")
			for reason := range missing {
				if strings.Contains(a.Reason, reason) {
					missing[reason]--
					known = true
				}
			}
			if !known {
				others = append(others, a)
			}
		}
		left := 0
		for reason, n := range missing {
			if n < 0 {
				t.Fatalf("%d more records than there were clients say %q", -n, reason)
			}
			left += n
		}
		if dropped := int(h.Metric("narthex_access_log_dropped_total")); left > dropped {
			return fmt.Errorf("%d records are missing, %d were dropped: %v; others are %+v", left, dropped, missing, others[:min(len(others), 3)])
		}
		return nil
	})
}

// goodClient comes again and again while others do what they do, with a
// connection of its own each time and with one that it keeps.
type goodClient struct {
	g     sync.WaitGroup
	ended chan struct{}
	times []time.Duration
	errs  []error
}

func (h *house) goodClient() *goodClient {
	c := &goodClient{ended: make(chan struct{})}
	again := clientOf(h.t, h.own)
	c.g.Go(func() {
		for len(c.errs) < 10 {
			select {
			case <-c.ended:
				return
			default:
			}
			began := time.Now()
			_, err := mesh.FetchOK(h.client, h.base+"/bytes/1000")
			if err == nil {
				_, err = mesh.FetchOK(again, h.base+"/bytes/1000")
				again.CloseIdleConnections()
			}
			if err != nil {
				c.errs = append(c.errs, err)
			}
			c.times = append(c.times, time.Since(began))
		}
	})
	return c
}

// stop ends it and says how it went.
func (c *goodClient) stop(t *testing.T) {
	t.Helper()
	close(c.ended)
	c.g.Wait()
	for _, err := range c.errs {
		t.Errorf("a good client: %v", err)
	}
	if len(c.times) == 0 {
		t.Fatal("no good client came")
	}
	slices.Sort(c.times)
	worst := c.times[len(c.times)-1]
	t.Logf("%d times a good client: half within %s, all within %s", len(c.times), c.times[len(c.times)/2], worst)
	if worst > late {
		t.Errorf("it waited for %s", worst)
	}
}
