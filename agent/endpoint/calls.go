package endpoint

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// securityHeader keeps requests that a process was tricked into sending away
// from the API: SPIFFE Workload API §4.
const securityHeader = "workload.spiffe.io"

// errStopping ends calls at shutdown. Never Canceled: go-spiffe's clients
// stop watching for ever on that and on InvalidArgument.
var errStopping = status.Error(codes.Unavailable, "the agent is shutting down: call again")

// unaryCall and streamCall stand before every method.
func (s *Server) unaryCall(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (answer any, err error) {
	if err = s.admit(ctx, info.FullMethod); err == nil {
		var free func()
		ctx, free = s.tie(ctx)
		answer, err = handler(ctx, req)
		free()
	}
	return answer, s.finish(info.FullMethod, err)
}

func (s *Server) streamCall(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	err := s.admit(stream.Context(), info.FullMethod)
	switch {
	case err != nil:
	case isWorkloadAPI(info.FullMethod):
		s.meter.open(info.FullMethod, 1)
		err = handler(srv, &heldStream{stream})
		s.meter.open(info.FullMethod, -1)
	default:
		ctx, free := s.tie(stream.Context())
		err = handler(srv, &tiedStream{stream, ctx})
		free()
	}
	return s.finish(info.FullMethod, err)
}

// admit is what a call has to pass: limits first, as they cost nothing, then
// the header.
func (s *Server) admit(ctx context.Context, method string) error {
	c := connOf(ctx)
	if c.refusal != nil {
		return c.refusal
	}
	if err := s.limits.request(c.user, time.Now()); err != nil {
		return err
	}
	if isWorkloadAPI(method) {
		return checkHeader(ctx)
	}
	return nil
}

// tie returns a context that ends with ctx and with the server. The caller
// frees it.
func (s *Server) tie(ctx context.Context) (_ context.Context, free func()) {
	ctx, cancel := context.WithCancel(ctx)
	detach := context.AfterFunc(s.stop, cancel)
	return ctx, func() { detach(); cancel() }
}

// tiedStream is a stream whose context ends with the server too.
type tiedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (t *tiedStream) Context() context.Context { return t.ctx }

// heldStream is a stream that may stay for months. A goroutine's stack grows
// to what it needed once and, at this depth of gRPC, does not shrink again, so
// whatever needs a deep one is done elsewhere: 4 KiB less for each stream.
// Its context is gRPC's own, another KiB less: watch ends with the server by
// Server.held.
type heldStream struct{ grpc.ServerStream }

func (h *heldStream) RecvMsg(m any) error {
	return elsewhere(func() error { return h.ServerStream.RecvMsg(m) })
}

func (h *heldStream) SendMsg(m any) error {
	return elsewhere(func() error { return h.ServerStream.SendMsg(m) })
}

// elsewhere runs f on a stack of its own and returns what f does.
func elsewhere(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return <-done
}

// finish gives the end of a call its code and counts it.
func (s *Server) finish(method string, err error) error {
	if err != nil {
		if s.stop.Err() != nil {
			err = errStopping
		} else if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			err = status.FromContextError(err).Err()
		}
	}
	s.meter.count(method, status.Code(err))
	return err
}

func isWorkloadAPI(method string) bool {
	return strings.HasPrefix(method, "/"+workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/")
}

func checkHeader(ctx context.Context) error {
	values := metadata.ValueFromIncomingContext(ctx, securityHeader)
	switch {
	case len(values) == 0:
		return status.Errorf(codes.InvalidArgument, "the gRPC metadata %q is missing: a Workload API client sends it with the value \"true\"", securityHeader)
	case len(values) > 1 || values[0] != "true":
		return status.Errorf(codes.InvalidArgument, "the gRPC metadata %q must be there once, with the value \"true\"; got %q", securityHeader, values)
	}
	return nil
}

// unknownMethod answers calls of methods that are not served, so that they
// count against the limits like others.
func unknownMethod(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	return status.Errorf(codes.Unimplemented, "method %q is not served here", method)
}

// complain logs a line about a connection that never came to a call. Anybody
// may cause such lines, so all together get no more than one user does.
func (s *Server) complain(msg string, args ...any) {
	if muted, ok := s.limits.mayLog(s.limits.nobody, time.Now()); ok {
		s.log.Warn(msg, append(args, "muted", muted)...)
	}
}

// note logs a line about a caller.
func (s *Server) note(c *conn, msg string, args ...any) {
	if muted, ok := s.limits.mayLog(c.user, time.Now()); ok {
		s.log.Warn(msg, append(args, "pid", c.process.PID, "uid", c.process.UID, "gid", c.process.GID, "muted", muted)...)
	}
}

// meter counts calls. Its labels are bounded: methods that are served, codes
// that gRPC has, attestors that are configured.
type meter struct {
	streams      atomic.Int64 // open calls of streaming Workload API methods
	methods      map[string]*methodMeter
	other        *methodMeter
	attestations map[string]outcomes
}

// methodMeter counts the calls of one method.
type methodMeter struct {
	name  string
	open  *telemetry.Gauge // nil unless it is a streaming method of the Workload API
	codes *telemetry.Family[telemetry.Counter]
}

type outcomes struct{ ok, failed *telemetry.Histogram }

func newMeter(m *telemetry.Metrics, services map[string]grpc.ServiceInfo, attestors []attestor.Workload) *meter {
	open := m.Gauge("narthex_workload_api_streams", "Open streams of the Workload API.", "method")
	codes := m.Counter("narthex_workload_api_requests_total", "Calls on the Workload API socket that have ended.", "method", "code")
	took := m.Histogram("narthex_attestation_duration_seconds", "Time to attest a workload.", telemetry.DurationBounds, "attestor", "result")
	r := &meter{methods: map[string]*methodMeter{}, other: &methodMeter{name: "other", codes: codes}, attestations: map[string]outcomes{}}
	for service, info := range services {
		for _, method := range info.Methods {
			full := "/" + service + "/" + method.Name
			mm := &methodMeter{name: method.Name, codes: codes}
			if method.IsServerStream && isWorkloadAPI(full) {
				mm.open = open.With(method.Name)
			}
			r.methods[full] = mm
		}
	}
	for _, a := range attestors {
		r.attestations[a.Type()] = outcomes{ok: took.With(a.Type(), "ok"), failed: took.With(a.Type(), "error")}
	}
	return r
}

func (m *meter) open(method string, by int) {
	if mm := m.methods[method]; mm != nil && mm.open != nil {
		mm.open.Add(float64(by))
		m.streams.Add(int64(by))
	}
}

func (m *meter) count(method string, code codes.Code) {
	mm := m.methods[method]
	if mm == nil {
		mm = m.other
	}
	mm.codes.With(mm.name, code.String()).Inc()
}

func (m *meter) attested(o attestor.Outcome) {
	if h, known := m.attestations[o.Type]; !known {
		return
	} else if o.Err != nil {
		h.failed.Observe(o.Duration.Seconds())
	} else {
		h.ok.Observe(o.Duration.Seconds())
	}
}
