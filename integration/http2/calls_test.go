//go:build integration

package http2_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // which the service understands
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// raw is a codec of messages that are bytes: no test here is about protobuf.
type raw struct{}

func (raw) Name() string { return "raw" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = raw{}

// Methods of the service.
const (
	unary   = "/test.Calls/Unary"   // gives back the message, and x-say of the metadata as header and trailer
	stream  = "/test.Calls/Stream"  // gives back each message as it comes
	failing = "/test.Calls/Failing" // gives back one message, then fails
	holding = "/test.Calls/Holding" // gives back one message, then waits until it is cancelled
)

// failure is how failing fails. Its message is one that has to be escaped.
var failure = status.Error(codes.FailedPrecondition, "not today: 100% ☃\n")

// calls is a gRPC service.
type calls struct {
	far
	began     atomic.Int64 // calls
	ended     atomic.Int64 // calls
	cancelled atomic.Int64 // of holding
}

// newCalls starts one.
func newCalls(t *testing.T) *calls {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &calls{far: far{address: l.Addr().String(), speaks: []string{"h2"}}}
	s := grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(c.serve))
	var g sync.WaitGroup
	g.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		g.Wait()
	})
	return c
}

func (c *calls) serve(_ any, s grpc.ServerStream) error {
	c.began.Add(1)
	defer c.ended.Add(1)
	method, _ := grpc.MethodFromServerStream(s)
	said, _ := metadata.FromIncomingContext(s.Context())
	for _, key := range []string{"x-say", "x-say-bin"} {
		if v := said.Get(key); len(v) > 0 {
			if err := s.SetHeader(metadata.Pairs(key, v[0])); err != nil {
				return err
			}
			s.SetTrailer(metadata.Pairs(key, v[0]))
		}
	}
	for {
		var message []byte
		if err := s.RecvMsg(&message); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := s.SendMsg(&message); err != nil {
			return err
		}
		switch method {
		case unary:
			return nil
		case failing:
			return failure
		case holding:
			<-s.Context().Done()
			c.cancelled.Add(1)
			return s.Context().Err()
		}
	}
}

// conn returns a connection of gRPC that begins where callers come.
func (r *route) conn(t *testing.T) *grpc.ClientConn {
	t.Helper()
	creds := insecure.NewCredentials()
	if r.own != nil {
		creds = credentials.NewTLS(r.own.Client())
	}
	cc, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{}), grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// call makes a unary call.
func call(ctx context.Context, cc *grpc.ClientConn, method string, message []byte, how ...grpc.CallOption) (answer []byte, err error) {
	err = cc.Invoke(ctx, method, &message, &answer, how...)
	return answer, err
}

// talk is a call whose messages go both ways.
type talk struct{ grpc.ClientStream }

func begin(ctx context.Context, cc *grpc.ClientConn, method string, how ...grpc.CallOption) (talk, error) {
	s, err := cc.NewStream(ctx, &grpc.StreamDesc{StreamName: method, ServerStreams: true, ClientStreams: true}, method, how...)
	return talk{s}, err
}

// say sends a message and wants it back.
func (s talk) say(message string) error {
	sent, got := []byte(message), []byte(nil)
	if err := s.SendMsg(&sent); err != nil && !errors.Is(err, io.EOF) { // what ended it is told by the other way
		return err
	}
	if err := s.RecvMsg(&got); err != nil {
		return err
	}
	if string(got) != message {
		return fmt.Errorf("%d bytes came back, other than the %d that were sent", len(got), len(message))
	}
	return nil
}

// end waits until the call ends, and returns how.
func (s talk) end() error {
	var got []byte
	if err := s.RecvMsg(&got); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// wantStatus wants a call to have ended with that code.
func wantStatus(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

var long = strings.Repeat("sixteen bytes -\n", 64<<10) // 1 MiB
