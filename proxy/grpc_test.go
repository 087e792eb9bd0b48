package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/narthex-id/narthex/internal/testca"
)

// callee serves gRPC on loopback, every method of every service by the same
// handler, and returns its address.
func callee(t testing.TB, handle grpc.StreamHandler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(handle), grpc.MaxRecvMsgSize(64<<20))
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); serving.Wait() })
	return l.Addr().String()
}

// dialGRPC calls over mTLS; in plaintext where ca is nil.
func dialGRPC(t testing.TB, addr string, ca *testca.Authority) *grpc.ClientConn {
	t.Helper()
	creds := insecure.NewCredentials()
	if ca != nil {
		creds = credentials.NewTLS(clientConfig(ca.SVID("/web")))
	}
	c, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func message(s string) *wrapperspb.BytesValue { return wrapperspb.Bytes([]byte(s)) }

// echoing says back each message, and at the end what it was told beside them.
func echoing(_ any, s grpc.ServerStream) error {
	told, _ := metadata.FromIncomingContext(s.Context())
	method, _ := grpc.MethodFromServerStream(s)
	if err := s.SetHeader(metadata.Pairs("x-method", method, "x-caller", strings.Join(told.Get("x-spiffe-id"), "|"))); err != nil {
		return err
	}
	s.SetTrailer(metadata.Pairs("x-told-bin", strings.Join(told.Get("x-bin"), "|")))
	if strings.HasSuffix(method, "/fails") {
		return status.Error(codes.FailedPrecondition, "not now: ü")
	}
	for {
		var m wrapperspb.BytesValue
		if err := s.RecvMsg(&m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := s.SendMsg(&m); err != nil {
			return err
		}
	}
}

var bidi = &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}

func opens(t testing.TB, ctx context.Context, c *grpc.ClientConn, method string) grpc.ClientStream {
	t.Helper()
	s, err := c.NewStream(ctx, bidi, method)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func echoes1(s grpc.ClientStream, text string) error {
	if err := s.SendMsg(message(text)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	var m wrapperspb.BytesValue
	if err := s.RecvMsg(&m); err != nil {
		return err
	}
	if string(m.Value) != text {
		return fmt.Errorf("echo of %d bytes is %d bytes", len(text), len(m.Value))
	}
	return nil
}

// calls is a proxy in front of a service of gRPC, and a client of it: through
// the proxy alone, or through a second one, by plaintext.
func calls(t *testing.T, service string, change ...func(*Config)) (*running, map[string]*grpc.ClientConn) {
	t.Helper()
	p, ca := web(t, service, append([]func(*Config){speaking(ProtocolAuto)}, change...)...)
	l := outbound(t, "out", p.addr("web"), "spiffe://example.org/orders")
	l.HTTP = &HTTP{}
	out := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, allowAll), Identities: source(t, ca.SVID("/web"), ca)})
	return p, map[string]*grpc.ClientConn{"one": dialGRPC(t, p.addr("web"), ca), "both": dialGRPC(t, out.addr("out"), nil)}
}

func TestGRPC(t *testing.T) {
	t.Parallel()
	_, clients := calls(t, callee(t, echoing))
	for name, c := range clients {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "x-bin", "a b"), patience)
			defer cancel()
			for _, size := range []int{0, 1, 20_000, 3 << 20} {
				s := opens(t, ctx, c, "/v1/echo")
				for range 5 {
					if err := echoes1(s, strings.Repeat("x", size)); err != nil {
						t.Fatal(size, err)
					}
				}
				head, err := s.Header()
				if err != nil || head.Get("x-caller")[0] != "spiffe://example.org/web" || head.Get("x-method")[0] != "/v1/echo" {
					t.Errorf("header %v, %v", head, err)
				}
				if err := s.CloseSend(); err != nil {
					t.Fatal(err)
				}
				if err := s.RecvMsg(message("")); !errors.Is(err, io.EOF) || s.Trailer().Get("x-told-bin")[0] != "a b" {
					t.Errorf("end %v, trailers %v", err, s.Trailer())
				}
			}
			var m wrapperspb.BytesValue
			if err := c.Invoke(ctx, "/v1/once", message("hello"), &m); err != nil || string(m.Value) != "hello" {
				t.Errorf("unary: %q, %v", m.Value, err)
			}
			err := c.Invoke(ctx, "/v1/fails", message("hello"), &m)
			if s := status.Convert(err); s.Code() != codes.FailedPrecondition || s.Message() != "not now: ü" {
				t.Errorf("trailers alone: %v", err)
			}
		})
	}
}

// What we refuse is told as gRPC tells it.
func TestGRPCRefused(t *testing.T) {
	t.Parallel()
	p, clients := calls(t, callee(t, echoing), func(c *Config) {
		c.Listeners[0].HTTP.MaxBody = 1000
		c.Policy = rulesOf(t, webReads+"limits:\n  - {id: few, from: [\"spiffe://example.org/web\"], rps: 0.001, burst: 4}\n")
	})
	dead, deadClients := calls(t, "127.0.0.1:1")
	for _, name := range []string{"one", "both"} {
		c := clients[name]
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			for _, test := range []struct {
				client *grpc.ClientConn
				method string
				size   int
				code   codes.Code
				status int
			}{
				{c, "/v2/echo", 3, codes.PermissionDenied, 403},
				{c, "/v1/../v1/echo", 3, codes.InvalidArgument, 400},
				{c, "/v1/echo", 2000, codes.ResourceExhausted, 413},
				{deadClients[name], "/v1/echo", 3, codes.Unavailable, 502},
				{c, "/v1/echo", 3, codes.OK, 200},
			} {
				var m wrapperspb.BytesValue
				err := test.client.Invoke(ctx, test.method, message(strings.Repeat("x", test.size)), &m)
				if status.Code(err) != test.code {
					t.Errorf("%s: %v, want %s", test.method, err, test.code)
				}
				if test.code != codes.OK && !strings.Contains(status.Convert(err).Message(), "request ") {
					t.Errorf("%s: %v", test.method, err)
				}
				from := p
				if test.client != c {
					from = dead
				}
				if name == "both" && test.status == 400 {
					continue // the first of them refuses it
				}
				a := from.next()
				if a.HTTP == nil || a.HTTP.Status != test.status || a.Protocol != "h2" || (a.Outcome == "success") != (test.code == codes.OK) {
					t.Errorf("%s: record %+v %+v", test.method, a, a.HTTP)
				}
			}
		})
	}
	err := clients["one"].Invoke(t.Context(), "/v1/echo", message(""), message(""))
	if a := p.next(); status.Code(err) != codes.ResourceExhausted || a.HTTP.Status != 429 || a.Limit != "few" {
		t.Errorf("more than the limit: %v, record %+v", err, a)
	}
}

// Who cancels is told to the other side, whichever it is.
func TestGRPCCancelled(t *testing.T) {
	t.Parallel()
	ended := make(chan error, 1)
	p, clients := calls(t, callee(t, func(_ any, s grpc.ServerStream) error {
		if err := s.SendMsg(message("hi")); err != nil {
			return err
		}
		if method, _ := grpc.MethodFromServerStream(s); strings.HasSuffix(method, "/leaves") {
			return status.Error(codes.Aborted, "enough")
		}
		<-s.Context().Done()
		ended <- s.Context().Err()
		return s.Context().Err()
	}))
	for name, c := range clients {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			mine, leave := context.WithCancel(ctx)
			s := opens(t, mine, c, "/v1/waits")
			if err := s.RecvMsg(message("")); err != nil {
				t.Fatal(err)
			}
			leave()
			<-ended
			if a := p.next(); a.HTTP.Status != 200 || a.Closed != "peer" || !strings.Contains(a.Reason, "CANCEL") {
				t.Errorf("record %+v %+v", a, a.HTTP)
			}
			mine, leave = context.WithTimeout(ctx, 2*time.Second)
			defer leave()
			s = opens(t, mine, c, "/v1/waits")
			if err := s.RecvMsg(message("")); err != nil {
				t.Fatal(err)
			}
			if err := s.RecvMsg(message("")); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("past its time: %v", err)
			}
			<-ended
			p.next()
			s = opens(t, ctx, c, "/v1/leaves")
			if err := s.RecvMsg(message("")); err != nil {
				t.Fatal(err)
			}
			for err := error(nil); err == nil; {
				err = s.SendMsg(message("more"))
			}
			if err := s.RecvMsg(message("")); status.Code(err) != codes.Aborted {
				t.Errorf("the service left: %v", err)
			}
			p.next()
		})
	}
}

// A service that breaks off once a call's time is over did so for that.
func TestGRPCBrokenOffPastItsTime(t *testing.T) {
	t.Parallel()
	addr := framedService(t, func(f *framed) {
		if head := f.request(); head != nil {
			<-time.After(300 * time.Millisecond) // longer than the call's
			f.must(f.WriteRSTStream(head.StreamID, http2.ErrCodeCancel))
			f.request()
		}
	})
	p, ca := web(t, addr, speaking(ProtocolHTTP2))
	f := framedClient(t, p.addr("web"), ca)
	f.asks(1, true, "POST", "/v1/late", "te:trailers", "content-type:application/grpc", "grpc-timeout:200m")
	if a := f.answer(1); a.status != "200" || a.trailers["grpc-status"] != "4" {
		t.Errorf("%+v", a)
	}
}

// A reader that is slow holds its sender up, and nobody else.
func TestGRPCBackPressure(t *testing.T) {
	t.Parallel()
	const each, count = 32 << 10, 400
	sent := make(chan int, count+1)
	on := make(chan struct{})
	_, clients := calls(t, callee(t, func(_ any, s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		var m wrapperspb.BytesValue
		switch {
		case strings.HasSuffix(method, "/down"):
			for n := range count {
				if err := s.SendMsg(wrapperspb.Bytes(bytes.Repeat([]byte("x"), each))); err != nil {
					return err
				}
				sent <- n
			}
			return nil
		case strings.HasSuffix(method, "/up"):
			<-on
			for {
				if err := s.RecvMsg(&m); err != nil {
					if errors.Is(err, io.EOF) {
						return nil
					}
					return err
				}
			}
		}
		return echoing(nil, s)
	}))
	c := clients["both"]
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	down, up := opens(t, ctx, c, "/v1/down"), opens(t, ctx, c, "/v1/up")
	var sending sync.WaitGroup
	uploaded := make(chan int, count+1)
	sending.Go(func() {
		for n := range count {
			if err := up.SendMsg(wrapperspb.Bytes(bytes.Repeat([]byte("x"), each))); err != nil {
				t.Error(err)
				return
			}
			uploaded <- n
		}
		_ = up.CloseSend()
	})
	stops := func(c chan int) {
		t.Helper()
		n := 0
		for {
			select {
			case n = <-c:
				continue
			case <-time.After(time.Second):
			}
			break
		}
		if n > 200 { // 6 MiB: the windows of four connections and their sockets
			t.Errorf("%d messages went to a reader that takes none", n)
		}
	}
	stops(sent)
	stops(uploaded)
	if err := echoes1(opens(t, ctx, c, "/v1/echo"), "meanwhile"); err != nil {
		t.Error(err)
	}
	close(on)
	for range count {
		var m wrapperspb.BytesValue
		if err := down.RecvMsg(&m); err != nil || len(m.Value) != each {
			t.Fatal(len(m.Value), err)
		}
	}
	if err := down.RecvMsg(message("")); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	sending.Wait()
	if err := up.RecvMsg(message("")); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}
