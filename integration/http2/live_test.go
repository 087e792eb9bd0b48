//go:build integration

package http2_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

const (
	// atOnce bounds how long a stream lives that the rules allow no more.
	atOnce = 5 * time.Second
	// cut is how a client of gRPC sees that: its answer has begun, and ends with
	// trailers that say so.
	cut = codes.PermissionDenied
	// other is a service that goes on.
	other = "/test.Other/Stream"
)

// TestRulesEndStreams: a stream that the rules allow no more ends, its
// neighbours on the same connection go on.
func TestRulesEndStreams(t *testing.T) {
	t.Parallel()
	for _, w := range ways[1:] {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			r := w.open(t, newCalls(t).far)
			cc := r.conn(t)
			goes, stays := talkOn(t, r, stream), talkOn(t, r, other)
			sharing := make([]talk, 20)
			for i := range sharing {
				var err error
				if sharing[i], err = begin(t.Context(), cc, map[bool]string{false: stream, true: other}[i%2 > 0]); err == nil {
					err = sharing[i].say("hello")
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			last := r.nodes()[len(r.nodes())-1]
			records := len(last.Records())
			last.ChangeRules(mesh.Allow("client-elsewhere", r.caller.ID, "grpc: {services: [test.Other]}"))
			began := time.Now()
			wantStatus(t, "a stream that the rules allow no more", goes.end(), cut)
			for i := 0; i < len(sharing); i += 2 {
				wantStatus(t, "one of ten that the rules allow no more", sharing[i].end(), cut)
			}
			if took := time.Since(began); took > atOnce {
				t.Errorf("they end after %s", took)
			}
			for i := 1; i < len(sharing); i += 2 {
				if err := sharing[i].say("hello again"); err != nil {
					t.Errorf("one that may go on: %v", err)
				}
			}
			if err := stays.say(long); err != nil {
				t.Errorf("one that may go on, on a connection of its own: %v", err)
			}
			last.Record(records, "of a stream that was ended", func(a telemetry.Access) bool {
				return a.HTTP != nil && a.HTTP.Path == stream && a.Closed == "policy"
			})
			_, err := call(t.Context(), cc, unary, []byte("hello"))
			wantStatus(t, "a call of what the rules allow no more", err, codes.PermissionDenied)
		})
	}
}

// talkOn begins a call on a connection of its own, and says something.
func talkOn(t *testing.T, r *route, method string) talk {
	t.Helper()
	s, err := begin(t.Context(), r.conn(t), method)
	if err == nil {
		err = s.say("hello")
	}
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return s
}

// TestDrainedStreams: with on_policy_change: drain a stream may go on until
// the drain's time is over.
func TestDrainedStreams(t *testing.T) {
	t.Parallel()
	r := way{in: true}.open(t, newCalls(t).far, "on_policy_change: drain", "timeouts: {drain: 3s}")
	s := talkOn(t, r, stream)
	r.in.ChangeRules(mesh.Allow("client-elsewhere", r.caller.ID, "grpc: {services: [test.Other]}"))
	if err := s.say("hello again"); err != nil {
		t.Errorf("within the drain: %v", err)
	}
	began := time.Now()
	wantStatus(t, "at the drain's end", s.end(), cut)
	if took := time.Since(began); took > 3*time.Second+atOnce {
		t.Errorf("it ends after %s", took)
	}
}

// TestTermUnderCalls: SIGTERM comes while clients call without pause. Each
// call ends well, or was never sent; a stream that is open may end what it
// does.
func TestTermUnderCalls(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		way  way
		node func(r *route) *mesh.Node
	}{
		{"inbound", way{in: true}, func(r *route) *mesh.Node { return r.in }},
		{"outbound", way{out: true}, func(r *route) *mesh.Node { return r.out }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := c.way.open(t, newCalls(t).far, "timeouts: {drain: 1m}")
			n := c.node(r)
			s := talkOn(t, r, stream)
			l := callAlways(t, r, 8)
			stage.Eventually(t, stage.Soon, "there is load", func() error {
				if ended := l.well.Load(); ended < 500 {
					return fmt.Errorf("%d calls have ended", ended)
				}
				return nil
			})
			n.Signal(syscall.SIGTERM)
			l.g.Wait()
			t.Logf("%d calls ended well", l.well.Load())
			if lost := l.lost.Load(); lost > 0 {
				t.Errorf("%d calls are lost, the first: %v", lost, l.first.Load())
			}
			if err := s.say("hello again"); err != nil {
				t.Errorf("the stream that is open: %v", err)
			}
			if err := n.Alive(); err != nil {
				t.Error(err)
			}
			_ = s.CloseSend()
			if err := s.end(); err != nil {
				t.Errorf("the stream that both have ended: %v", err)
			}
			select {
			case <-n.Done:
			case <-time.After(stage.Soon):
				t.Error("it does not end when its last stream has")
			}
		})
	}
}

// calling is clients who call until nobody listens any more.
type calling struct {
	g          sync.WaitGroup
	well, lost atomic.Int64
	first      atomic.Value // error of the first that is lost
}

func callAlways(t *testing.T, r *route, clients int) *calling {
	t.Helper()
	l := &calling{}
	for range clients {
		cc := r.conn(t)
		l.g.Go(func() {
			for {
				_, err := call(t.Context(), cc, unary, []byte("hello"))
				switch {
				case err == nil:
					l.well.Add(1)
				case status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "connection refused"):
					return // it was not sent
				default:
					l.lost.Add(1)
					l.first.CompareAndSwap(nil, err)
					return
				}
			}
		})
	}
	return l
}

// TestIdleWhenTermComes: a connection of HTTP/2 on which nothing is asked does
// not keep it, and is told GOAWAY.
func TestIdleWhenTermComes(t *testing.T) {
	t.Parallel()
	for _, w := range ways[1:] {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			r := w.open(t, far{address: mesh.NewService(t).Address}, "timeouts: {drain: 1m}")
			client := r.client(t)
			if _, err := mesh.FetchOK(client, r.url("/bytes/10")); err != nil {
				t.Fatal(err)
			}
			idle := newPeer(t, r)
			idle.handshake(t)
			for _, n := range r.nodes() {
				n.Signal(syscall.SIGTERM)
			}
			if got := idle.end(mesh.CallTime); got != (ending{goaway: true}) {
				t.Errorf("who asks nothing is told %s, want GOAWAY with NO_ERROR", got)
			}
			for _, n := range r.nodes() {
				select {
				case <-n.Done:
				case <-time.After(stage.Soon):
					t.Errorf("%s waits for a client that asks nothing", n.Name)
				}
			}
			if _, err := mesh.FetchOK(client, r.url("/bytes/10")); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a client that comes late: %v", err)
			}
		})
	}
}

// TestClientLeaves: a client that goes takes the service's work with it.
func TestClientLeaves(t *testing.T) {
	t.Parallel()
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			service := mesh.NewService(t)
			r := w.open(t, far{address: service.Address})
			client := r.client(t)
			var g sync.WaitGroup
			defer g.Wait()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			for range 10 {
				g.Go(func() {
					req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url("/stall"), nil)
					if err != nil {
						t.Error(err)
						return
					}
					if resp, err := client.Do(req); err == nil {
						_ = resp.Body.Close()
					}
				})
			}
			stage.Eventually(t, stage.Soon, "the requests are with the service", func() error {
				if began := service.Began.Load(); began < 10 {
					return fmt.Errorf("%d are", began)
				}
				return nil
			})
			cancel()
			stage.Eventually(t, stage.Soon, "the service is done with them", func() error {
				if busy := service.Busy.Load(); busy > 0 {
					return fmt.Errorf("%d are still there", busy)
				}
				return nil
			})
		})
	}
}
