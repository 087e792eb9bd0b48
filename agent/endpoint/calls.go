package endpoint

import (
	"context"
	"errors"
	"slices"
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

// A security header keeps requests that a process was tricked into sending away
// from an API: SPIFFE Workload Endpoint §3, SPIFFE Broker Endpoint §3.
const (
	securityHeader       = "workload.spiffe.io"
	brokerSecurityHeader = "broker.spiffe.io"
)

// errStopping ends calls at shutdown. Never Canceled: go-spiffe's clients
// stop watching for ever on that and on InvalidArgument.
var errStopping = status.Error(codes.Unavailable, "the agent is shutting down: call again")

// registrar registers services with every method as a stream. gRPC reads the
// request of a unary method before anybody may look at the call; of a stream
// it reads nothing, so that all calls pass streamCall first.
type registrar struct {
	*grpc.Server
	server *Server
}

// RegisterService implements grpc.ServiceRegistrar.
func (r registrar) RegisterService(desc *grpc.ServiceDesc, impl any) {
	streams := *desc
	streams.Methods, streams.Streams = nil, slices.Clone(desc.Streams)
	for _, method := range desc.Methods {
		handler := func(srv any, stream grpc.ServerStream) error {
			answer, err := method.Handler(srv, stream.Context(), stream.RecvMsg, nil)
			if err != nil {
				return err
			}
			return stream.SendMsg(answer)
		}
		info := &grpc.StreamServerInfo{FullMethod: "/" + desc.ServiceName + "/" + method.MethodName}
		streams.Streams = append(streams.Streams, grpc.StreamDesc{
			StreamName: method.MethodName,
			// gRPC has interceptors for streams that stream only.
			Handler: func(srv any, stream grpc.ServerStream) error {
				return r.server.streamCall(srv, stream, info, handler)
			},
		})
	}
	r.Server.RegisterService(&streams, impl)
}

// streamCall stands before every method.
func (s *Server) streamCall(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	c := connOf(stream.Context())
	err := c.refusal
	if err == nil {
		// Limits come first, as they cost nothing.
		if err = s.limits.beginStream(c.user, time.Now()); err == nil {
			counted := &countedStream{ServerStream: stream, server: s, conn: c}
			defer counted.end()
			err = s.call(counted, srv, info, handler)
		}
	}
	return s.finish(info.FullMethod, err)
}

// call answers a call within the limits.
func (s *Server) call(stream *countedStream, srv any, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := s.checkHeader(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	if s.meter.isHeld(info.FullMethod) {
		s.meter.open(info.FullMethod, 1)
		defer s.meter.open(info.FullMethod, -1)
		return handler(srv, &heldStream{stream})
	}
	ctx, free := s.tie(stream.Context())
	defer free()
	return handler(srv, &tiedStream{stream, ctx})
}

// tie returns a context that ends with ctx and with the server. The caller
// frees it.
func (s *Server) tie(ctx context.Context) (_ context.Context, free func()) {
	ctx, cancel := context.WithCancel(ctx)
	detach := context.AfterFunc(s.stop, cancel)
	return ctx, func() { detach(); cancel() }
}

// countedStream is a stream each of whose messages counts as a request: one
// stream of reflection or of SDS answers as many as its client sends. It counts
// as a call until end, and as long as its answers are unread.
type countedStream struct {
	grpc.ServerStream
	server   *Server
	conn     *conn
	received bool // the first message, which was counted as the call
	unread   unread
}

// RecvMsg is called by one goroutine at a time, as gRPC has it.
func (s *countedStream) RecvMsg(m any) error {
	if !s.received {
		s.received = true
		return s.server.receiveFirst(s.ServerStream, m)
	}
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.server.limits.request(s.conn.user, time.Now())
}

// tiedStream is a stream whose context ends with the server too.
type tiedStream struct {
	*countedStream
	ctx context.Context
}

func (t *tiedStream) Context() context.Context { return t.ctx }

// heldStream is a stream that may stay for months: see deep. Its context is
// gRPC's own, another KiB less: who serves it ends with the server by
// Server.held.
type heldStream struct{ *countedStream }

func (h *heldStream) SendMsg(m any) error {
	return h.server.deep.do(func() error { return h.countedStream.SendMsg(m) })
}

// receiveFirst receives the request of a call, for which the client has so
// much time. After an error the handler returns: that ends the stream, and
// with it a RecvMsg that still waits.
func (s *Server) receiveFirst(stream grpc.ServerStream, m any) error {
	received := make(chan error, 1)
	s.deep.start(func() { received <- stream.RecvMsg(m) })
	within := s.limits.FirstMessage
	late := time.NewTimer(within)
	defer late.Stop()
	select {
	case err := <-received:
		return err
	case <-late.C:
		return status.Errorf(codes.DeadlineExceeded, "the call was opened and no request came within %s", within)
	}
}

// finish gives the end of a call its code and counts it.
func (s *Server) finish(method string, err error) error {
	if err != nil {
		if s.stop.Err() != nil || s.yielding.Load() {
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

// checkHeader looks for the security header of the API: brokers send theirs with
// every call, whatever the method.
func (s *Server) checkHeader(ctx context.Context, method string) error {
	header, client := securityHeader, "a Workload API client"
	switch {
	case s.door != nil:
		header, client = brokerSecurityHeader, "a broker"
	case !isWorkloadAPI(method):
		return nil
	}
	values := metadata.ValueFromIncomingContext(ctx, header)
	switch {
	case len(values) == 0:
		return status.Errorf(codes.InvalidArgument, "the gRPC metadata %q is missing: %s sends it with the value \"true\"", header, client)
	case len(values) > 1 || values[0] != "true":
		return status.Errorf(codes.InvalidArgument, "the gRPC metadata %q must be there once, with the value \"true\"; got %q", header, values)
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
func (s *Server) note(c *subject, msg string, args ...any) {
	if muted, ok := s.limits.mayLog(c.user, time.Now()); ok {
		if c.object != nil {
			args = append(args, "object", c.object.String())
		} else {
			args = append(args, "pid", c.process.PID, "uid", c.process.UID, "gid", c.process.GID)
		}
		if c.user.house != "" {
			args = append(args, "pod", c.user.house)
		}
		if c.user.broker != "" {
			args = append(args, "broker", c.user.broker)
		}
		s.log.Warn(msg, append(args, "muted", muted)...)
	}
}

// meter counts calls. Its labels are bounded: methods that are served, codes
// that gRPC has, attestors that are configured.
type meter struct {
	streams      atomic.Int64 // open calls of methods that are held
	methods      map[string]*methodMeter
	other        *methodMeter
	attestations map[string]outcomes
}

// methodMeter counts the calls of one method.
type methodMeter struct {
	name  string
	held  bool             // a streaming method of the Workload API, of SDS, of delegates or of brokers
	open  *telemetry.Gauge // of such a method
	codes *telemetry.Family[telemetry.Counter]
}

type outcomes struct{ ok, failed *telemetry.Histogram }

// meterNames are the metrics of one socket.
type meterNames struct {
	streams  func(*telemetry.Metrics) *telemetry.Family[telemetry.Gauge]
	requests func(*telemetry.Metrics) *telemetry.Family[telemetry.Counter]
}

var workloadAPIMetrics = meterNames{
	streams: func(m *telemetry.Metrics) *telemetry.Family[telemetry.Gauge] {
		return m.Gauge("narthex_workload_api_streams", "Open streams of the Workload API and of SDS.", "method")
	},
	requests: func(m *telemetry.Metrics) *telemetry.Family[telemetry.Counter] {
		return m.Counter("narthex_workload_api_requests_total", "Calls on the Workload API socket that have ended.", "method", "code")
	},
}

func newMeter(m *telemetry.Metrics, names meterNames, services map[string]grpc.ServiceInfo, attestors []attestor.Workload) *meter {
	open, codes := names.streams(m), names.requests(m)
	took := m.Histogram("narthex_attestation_duration_seconds", "Time to attest a workload.", telemetry.DurationBounds, "attestor", "result")
	r := &meter{methods: map[string]*methodMeter{}, other: &methodMeter{name: "other", codes: codes}, attestations: map[string]outcomes{}}
	for service, info := range services {
		for _, method := range info.Methods {
			full := "/" + service + "/" + method.Name
			mm := &methodMeter{name: method.Name, codes: codes}
			if method.IsServerStream && (isWorkloadAPI(full) || isSDS(full) || isDelegated(full) || isBrokerAPI(full)) {
				mm.held, mm.open = true, open.With(method.Name)
			}
			r.methods[full] = mm
		}
	}
	for _, a := range attestors {
		r.attestations[a.Type()] = outcomes{ok: took.With(a.Type(), "ok"), failed: took.With(a.Type(), "error")}
	}
	return r
}

// isHeld tells whether streams of the method stay open for as long as what they
// are about.
func (m *meter) isHeld(method string) bool {
	mm := m.methods[method]
	return mm != nil && mm.held
}

// open counts a stream of a method that isHeld.
func (m *meter) open(method string, by int) {
	m.methods[method].open.Add(float64(by))
	m.streams.Add(int64(by))
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
