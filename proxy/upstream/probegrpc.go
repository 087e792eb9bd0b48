package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

const (
	// maxService bounds the name of a service that a check asks about.
	maxService = 255
	// maxReply and maxReplyHead bound what is read of the answer, in bytes: it
	// is one number.
	maxReply     = 4 << 10
	maxReplyHead = 16 << 10
)

// checkGRPC returns why a gRPC service cannot be asked about, or nil.
func (h *Health) checkGRPC() error {
	switch {
	case !h.GRPC && h.Service == "":
		return nil
	case !h.GRPC:
		return errors.New("health: a service without grpc")
	case h.Path != "":
		return errors.New("health: a path and grpc: want one of them")
	case h.Interval == 0:
		return errors.New("health: grpc without an interval")
	case len(h.Service) > maxService || !visible(h.Service):
		return fmt.Errorf("health: service %q: want at most %d visible ASCII characters", h.Service, maxService)
	}
	return nil
}

// askGRPC asks how the service is, over a connection that stands, in plaintext.
// It returns why the answer is not good, or nil, and ends with ctx. What the far
// end sent is in no error but for the statuses.
func (t *target) askGRPC(ctx context.Context, c net.Conn) error {
	var used atomic.Bool
	client, err := grpc.NewClient("passthrough:///"+t.key.address,
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used.Swap(true) {
				return nil, errors.New("a check has one connection")
			}
			return c, nil
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority(t.healthHost()), grpc.WithUserAgent("narthex"),
		grpc.WithNoProxy(), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(), grpc.WithDisableHealthCheck(),
		grpc.WithMaxHeaderListSize(maxReplyHead), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)))
	if err != nil {
		return fmt.Errorf("grpc health: %w", err)
	}
	defer func() { _ = client.Close() }()
	service := t.key.health.Service
	reply, err := health.NewHealthClient(client).Check(ctx, &health.HealthCheckRequest{Service: service})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case status.Code(err) == codes.DeadlineExceeded && passed(ctx):
		return context.DeadlineExceeded // the far end, which is told the deadline, was first to say so
	case err != nil:
		return fmt.Errorf("grpc health of %q: %w", service, unserved(status.Code(err)))
	case reply.GetStatus() != health.HealthCheckResponse_SERVING:
		return fmt.Errorf("grpc health of %q: answered %s", service, reply.GetStatus())
	}
	return nil
}

// passed tells whether ctx's deadline is over, which ctx may be late to say.
func passed(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ok && !time.Now().Before(deadline)
}

// unserved says what the status of a check that failed means.
func unserved(code codes.Code) error {
	switch code {
	case codes.Unimplemented:
		return errors.New("it has no health service (grpc.health.v1): add one, or use health without grpc")
	case codes.NotFound:
		return errors.New("its health service does not know that name: use one it knows, or none for the server as a whole")
	case codes.Unavailable: // which is what the client says of a far end that speaks something else, too
		return errors.New("status Unavailable, or no answer of HTTP/2 without TLS")
	}
	return fmt.Errorf("status %s", code)
}
