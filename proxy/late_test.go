package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// TestLateTurn: a peer that went away, or was slow, when it had waited for our
// turn is told from one that did so by itself.
func TestLateTurn(t *testing.T) {
	for name, c := range map[string]struct {
		queue, peer time.Duration
		late        bool
	}{
		"no queue":              {0, 0, false},
		"a moment":              {10 * time.Millisecond, 0, false},
		"long":                  {4 * time.Second, 2 * time.Second, true},
		"its own slowness":      {2 * time.Second, 4 * time.Second, false},
		"silent from the start": {0, 8 * time.Second, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &listener{}
				l.handshakes.resize(1)
				near, far := net.Pipe()
				defer far.Close()
				defer near.Close()
				turn := &turns{c: &conn{l: l, question: question{request: policy.Request{Direction: policy.Outbound}}}, end: pipe{near}, until: time.Now().Add(10 * time.Second)}
				l.handshakes.force() // somebody else's
				go func() {
					time.Sleep(c.queue)
					l.handshakes.give()
				}()
				synctest.Wait()
				if err := turn.take(); err != nil {
					t.Fatal(err)
				}
				turn.give()
				time.Sleep(c.peer)
				turn.answered()
				if got := turn.late(); got != c.late {
					t.Errorf("late is %t: queued %s, waited %s", got, turn.queued, turn.waited)
				}
			})
		})
	}
}

// pipe is an end that is no socket.
type pipe struct{ net.Conn }

func (pipe) CloseWrite() error { return nil }

// TestBlame: an endpoint is not blamed for our lateness, and what it is blamed
// for is fit for the log, whatever it sent.
func TestBlame(t *testing.T) {
	set := upstream.NewSet(upstream.Options{Dial: func(context.Context, string, string) (net.Conn, error) { return nil, nil }})
	t.Cleanup(set.Close)
	g, err := set.Take("out", []string{"127.0.0.1:1"}, upstream.Settings{Ejection: upstream.Ejection{After: 1, For: time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	blame := func(err error) (failed uint64, why string) {
		chosen, dialErr := g.Dial(context.Background(), time.Second)
		if dialErr != nil {
			t.Fatal(dialErr)
		}
		c := conn{chosen: chosen}
		c.blame(err)
		c.chosen.Close()
		list, _ := g.Status(1)
		return list[0].Failed, list[0].Problem
	}
	if failed, _ := blame(&handshakeError{refusal: refusal{"refused", "closed"}, err: io.EOF, late: true}); failed != 0 {
		t.Errorf("a peer that we kept waiting failed %d times", failed)
	}
	evil := "subject CN=x\n2026-01-01 [INFO] all is well\x1b[2J" + strings.Repeat("x", 1<<16)
	failed, why := blame(&handshakeError{refusal: refusal{"refused", evil}, err: errors.New(evil)})
	if failed != 1 || strings.ContainsAny(why, "\n\x1b") || len(why) > 2*telemetry.MaxReason {
		t.Errorf("failed %d times, for %.200q", failed, why)
	}
}

// TestProvenClientKeepsItsPlace: a client that proves itself in the moment in
// which its place was to be another's is not ended for that.
func TestProvenClientKeepsItsPlace(t *testing.T) {
	l := &listener{proxy: &Proxy{table: newTable()}}
	var clients [2]*conn
	for i := range clients {
		near, far := net.Pipe()
		t.Cleanup(func() { _ = far.Close(); _ = near.Close() })
		clients[i] = newConn(l, pipe{near}, &settings{})
		clients[i].index = -1
		l.waits(clients[i], false)
	}
	clients[0].phase = copying
	l.makeRoom()
	if clients[0].closing != nil || clients[1].closing == nil {
		t.Errorf("ended %v and %v, want the second alone", clients[0].closing, clients[1].closing)
	}
}

// TestDripGoesFirst: a client that drips its handshake, so that it was never
// waited for longest, goes before one that is silent for a round trip.
func TestDripGoesFirst(t *testing.T) {
	l := &listener{proxy: &Proxy{table: newTable()}}
	l.handshakes.resize(1)
	var clients [2]*conn
	for i := range clients {
		near, far := net.Pipe()
		t.Cleanup(func() { _ = far.Close(); _ = near.Close() })
		clients[i] = newConn(l, pipe{near}, &settings{})
		clients[i].index = -1
		l.waits(clients[i], false)
	}
	drip := &turns{c: clients[1], end: clients[1].down, until: time.Now().Add(patience)}
	for range manyWaits + 1 {
		if err := drip.take(); err != nil {
			t.Fatal(err)
		}
		drip.give()
	}
	l.makeRoom()
	if clients[0].closing != nil || clients[1].closing == nil {
		t.Errorf("ended %v and %v, want the one that drips", clients[0].closing, clients[1].closing)
	}
}

// A wait for the service that is found to be over in the moment in which it agrees
// to change the protocol ends nothing that is said from then on.
func TestSwitchedJustInTime(t *testing.T) {
	t.Parallel()
	asked, on := make(chan struct{}), make(chan struct{})
	p, ca := web(t, serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		close(asked)
		<-on
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n")
		_, _ = io.Copy(c, r)
	}))
	b := p.browser(ca)
	b.send("GET /v1/chat HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n")
	<-asked
	c := p.table.of(nil)[0]
	c.mu.Lock() // as who finds it does
	close(on)
	if resp, err := http.ReadResponse(b.r, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols { //nolint:bodyclose // of 101 there is none
		t.Errorf("%v %v", resp, err)
	}
	c.http.(*downstream).late[serviceSends].Store(true)
	c.interruptTarget()
	c.mu.Unlock()
	b.send("hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(b.r, got); err != nil || string(got) != "hello" {
		t.Errorf("%q %v", got, err)
	}
}
