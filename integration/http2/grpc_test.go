//go:build integration

package http2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestInterop: gRPC's own cases hold between grpc-go's ends.
func TestInterop(t *testing.T) {
	t.Parallel()
	interop := filepath.Join(interopTools, "grpcinterop")
	serve := func(t *testing.T, files ...string) (address string) {
		t.Helper()
		address = stage.FreeAddress(t)
		stage.Listens(t, stage.Start(t, "grpcinterop", interop, append([]string{"serve", address}, files...)), address)
		return address
	}
	through(t, "", func(t *testing.T) far {
		return far{address: serve(t), secure: func(t *testing.T, own *mesh.SVID) string {
			return serve(t, own.CertFile, own.KeyFile, own.CA.Bundle)
		}}
	}, func(t *testing.T, r *route) {
		for _, c := range strings.Fields(stage.Must(t, interop, "cases")) {
			t.Run(c, func(t *testing.T) {
				if said, err := stage.Tell(t, interop, append([]string{"call", c, r.address}, r.files()...)...); err != nil {
					t.Errorf("%v\n%s", err, said)
				}
			})
		}
	})
}

// TestCalls: calls of all kinds, as grpc-go makes them.
func TestCalls(t *testing.T) {
	t.Parallel()
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			service := newCalls(t)
			r := w.open(t, service.far)
			cc := r.conn(t)
			callsEcho(t, cc)
			callsStream(t, cc)
			callsEnd(t, cc, service)
		})
	}
}

func callsEcho(t *testing.T, cc *grpc.ClientConn) {
	said := metadata.Pairs("x-say", "hello", "x-say-bin", "\x00\xff\x80")
	ctx := metadata.NewOutgoingContext(t.Context(), said)
	for _, size := range []int{0, 1, 16 << 10, 3 << 20} {
		var header, trailer metadata.MD
		message := []byte(strings.Repeat("x", size))
		got, err := call(ctx, cc, unary, message, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil || !bytes.Equal(got, message) {
			t.Errorf("a message of %d bytes: %d came back, %v", size, len(got), err)
		}
		for key, want := range said {
			if !slices.Equal(header[key], want) || !slices.Equal(trailer[key], want) {
				t.Errorf("%s: %q and %q came back, want %q", key, header[key], trailer[key], want)
			}
		}
		if got, err := call(ctx, cc, unary, message, grpc.UseCompressor(gzip.Name)); err != nil || !bytes.Equal(got, message) {
			t.Errorf("a compressed message of %d bytes: %d came back, %v", size, len(got), err)
		}
	}
}

func callsStream(t *testing.T, cc *grpc.ClientConn) {
	s, err := begin(t.Context(), cc, stream)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		if err := s.say(fmt.Sprint("message ", i)); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	if err := s.say(long); err != nil {
		t.Error(err)
	}
	_ = s.CloseSend()
	if err := s.end(); err != nil {
		t.Errorf("a stream that both have ended: %v", err)
	}
}

// callsEnd ends calls otherwise than well. The service notices, each time.
func callsEnd(t *testing.T, cc *grpc.ClientConn, service *calls) {
	s, err := begin(t.Context(), cc, failing)
	if err == nil {
		err = s.say("hello")
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, want := status.Convert(s.end()), status.Convert(failure); got.Code() != want.Code() || got.Message() != want.Message() {
		t.Errorf("the service's failure is told as %v, want %v", got, want)
	}

	for what, c := range map[string]struct {
		context func() (context.Context, context.CancelFunc)
		want    codes.Code
	}{
		"the deadline":     {func() (context.Context, context.CancelFunc) { return context.WithTimeout(t.Context(), time.Second) }, codes.DeadlineExceeded},
		"the cancellation": {func() (context.Context, context.CancelFunc) { return context.WithCancel(t.Context()) }, codes.Canceled},
	} {
		before := service.cancelled.Load()
		ctx, cancel := c.context()
		s, err := begin(ctx, cc, holding)
		if err == nil {
			err = s.say("hello")
		}
		if err != nil {
			t.Fatal(err)
		}
		if c.want == codes.Canceled {
			cancel()
		}
		wantStatus(t, what, s.end(), c.want)
		cancel()
		stage.Eventually(t, stage.Soon, "the service learns of "+what, func() error {
			if service.cancelled.Load() == before {
				return fmt.Errorf("it has not")
			}
			return nil
		})
	}
}

// TestRefusedCalls: what is refused is told as gRPC tells it, and leaves its
// record.
func TestRefusedCalls(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		way  way
		by   func(r *route) *mesh.Node
	}{
		{"inbound", way{in: true}, func(r *route) *mesh.Node { return r.in }},
		{"outbound", way{out: true}, func(r *route) *mesh.Node { return r.out }},
		{"both, by the far one", way{in: true, out: true}, func(r *route) *mesh.Node { return r.in }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			service := newCalls(t)
			r := c.way.open(t, service.far)
			n, cc := c.by(r), r.conn(t)
			rule := mesh.Allow("client-may", r.caller.ID, "grpc: {services: [test.Calls], methods: [Unary]}")
			n.ChangeRules(rule)
			if _, err := call(t.Context(), cc, unary, []byte("hello")); err != nil {
				t.Errorf("the method that is allowed: %v", err)
			}
			began, records := service.began.Load(), len(n.Records())
			s, err := begin(t.Context(), cc, stream)
			if err == nil {
				err = s.say("hello")
			}
			wantStatus(t, "another method", err, codes.PermissionDenied)
			_, err = call(t.Context(), cc, "/test.Other/Unary", []byte("hello"))
			wantStatus(t, "another service", err, codes.PermissionDenied)
			if service.began.Load() > began {
				t.Error("what was refused has come to the service")
			}
			n.Record(records, "of "+stream, func(a telemetry.Access) bool {
				return a.HTTP != nil && a.HTTP.Path == stream && a.HTTP.Status == http.StatusForbidden && a.Outcome == "failure"
			})
			if n == r.out {
				return // which limits nothing
			}
			n.Policy("rules:\n  - " + rule + "\nlimits:\n  - " + fmt.Sprintf("{id: few, from: [%q], per: identity, rps: 0.1, burst: 1}", r.caller.ID))
			n.Reload()
			wantCode(t, "beyond a limit", cc, codes.ResourceExhausted)
		})
	}
	t.Run("no service", func(t *testing.T) {
		t.Parallel()
		for _, w := range ways[1:] {
			r := w.open(t, far{address: stage.FreeAddress(t), speaks: []string{"h2"}})
			_, err := call(t.Context(), r.conn(t), unary, []byte("hello"))
			wantStatus(t, w.name, err, codes.Unavailable)
		}
	})
}

// wantCode makes calls until one ends otherwise than well, which has to be so.
func wantCode(t *testing.T, what string, cc *grpc.ClientConn, want codes.Code) {
	t.Helper()
	for range 5 {
		if _, err := call(t.Context(), cc, unary, []byte("hello")); err != nil {
			wantStatus(t, what, err, want)
			return
		}
	}
	t.Errorf("%s: five calls end well", what)
}

// TestFormOfRefusal: a refusal is a response of trailers alone (the gRPC
// protocol, "Trailers-Only"), with status 200, whatever it is refused for.
func TestFormOfRefusal(t *testing.T) {
	t.Parallel()
	r := way{in: true}.open(t, far{address: mesh.NewService(t).Address})
	r.in.ChangeRules(mesh.Allow("client-may", r.caller.ID, `http: {paths: ["/stall"]}`))
	for _, c := range []struct {
		name, path string
		want       codes.Code
	}{
		{"may not", "/test.Calls/Unary", codes.PermissionDenied},
		{"a path that not everybody reads alike", "/test.Calls/../Unary", codes.InvalidArgument},
		{"the time that the client gave is over", "/stall", codes.DeadlineExceeded},
	} {
		a, err := mesh.Fetch(r.client(t), http.MethodPost, r.url(c.path), message("hello"), "Content-Type: application/grpc", "Te: trailers", "Grpc-Timeout: 500m")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if a.Status != http.StatusOK || a.Header.Get("Grpc-Status") != fmt.Sprint(int(c.want)) || a.Header.Get("Content-Type") != "application/grpc" || a.Body != "" {
			t.Errorf("%s: %d %v %q, want 200 and grpc-status %d", c.name, a.Status, a.Header, a.Body, c.want)
		}
	}
}

// message is one of gRPC, as a body has it.
func message(text string) io.Reader {
	return bytes.NewReader(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(text))), text...))
}
