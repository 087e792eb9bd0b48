package extauthz

import (
	"context"
	"net/http"
	"strconv"
	"time"

	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// admit lets those call who may, as of now: what was so at the handshake may
// have changed.
func (v *service) admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	s := v.settings.Load()
	if v.removed.Load() {
		return nil, status.Error(codes.Unavailable, "nobody is answered here any more")
	}
	if s.onUnix() {
		return handle(ctx, req) // the socket's mode has said who may
	}
	who := clientOf(ctx)
	if who == nil { // cannot happen: the handshake gives everybody one
		return nil, status.Error(codes.Unauthenticated, "the connection has no client")
	}
	err := who.stands(s, time.Now())
	if err != nil {
		return nil, v.turnAway(s, who, err.Error())
	}
	if why := v.set.config.Bars(who.peer); why != "" {
		return nil, v.turnAway(s, who, why)
	}
	return handle(ctx, req)
}

// turnAway refuses a client whose word is not taken, which to Envoy is a
// service that fails.
func (v *service) turnAway(s *settings, who *client, why string) error {
	v.set.meters.checks.With(s.Name, "not_client").Inc()
	v.logRefusal("ext_authz: client refused", "client", who.peer.ID, "reason", telemetry.Tidy(why))
	return status.Error(codes.Unauthenticated, "the client may not ask here: see the log")
}

func clientOf(ctx context.Context) *client {
	if p, ok := peer.FromContext(ctx); ok {
		c, _ := p.AuthInfo.(*client)
		return c
	}
	return nil
}

// Check implements envoy.service.auth.v3.Authorization.
func (v *service) Check(ctx context.Context, c *auth.CheckRequest) (*auth.CheckResponse, error) {
	began := time.Now()
	s := v.settings.Load()
	q := &question{}
	q.Listener, q.Time = s.Name, began
	r := &telemetry.Access{Action: "check", Listener: s.Name, Direction: q.Direction.String(), HTTP: &telemetry.AccessHTTP{}}
	after := ""
	if wrong := q.read(c); wrong != nil {
		r.HTTP.Status, r.Reason = wrong.status, wrong.err.Error()
	} else {
		r.HTTP.Status, after = v.set.config.Ask(&q.Request, s.Audit, r)
	}
	r.HTTP.RequestID = requestID(q, c.GetAttributes().GetRequest().GetHttp().GetId())
	v.account(ctx, q, r, began)
	if r.HTTP.Status == 0 {
		return passes(), nil
	}
	return refuses(r.HTTP.Status, r.HTTP.RequestID, after, q.http.GRPC()), nil
}

// account counts and records what came of a question.
func (v *service) account(ctx context.Context, q *question, r *telemetry.Access, began time.Time) {
	code := r.HTTP.Status
	v.checks.Add(1)
	v.set.meters.checks.With(q.Listener, resultOf(code, r)).Inc()
	r.Outcome, r.Reason = "success", telemetry.Tidy(r.Reason)
	if code != 0 {
		v.denied.Add(1)
		r.Outcome = "failure"
	}
	r.Time = time.Now()
	r.Duration = r.Time.Sub(began)
	r.Source, r.Port, r.ServerName = q.sender, q.Port, q.SNI
	r.Serial = q.From.Serial
	if !q.From.ID.IsZero() {
		r.From = q.From.ID.String()
	}
	if !q.To.ID.IsZero() {
		r.To = q.To.ID.String()
	}
	if c := clientOf(ctx); c != nil {
		r.Via = c.peer.ID.String()
	}
	h := r.HTTP
	h.Method, h.Host, h.Path = q.http.Method, q.http.Host, q.http.Path
	for i := range q.http.Headers {
		if q.http.Headers[i].Name == "user-agent" {
			h.UserAgent = q.http.Headers[i].Value
			break
		}
	}
	v.set.config.Access.Write(r)
	if code != 0 {
		v.logRefusal("request refused", "source", r.Source, "from", r.From, "to", r.To, "method", telemetry.Tidy(h.Method), "path", telemetry.Tidy(h.Path), "status", code, "request_id", h.RequestID, "reason", r.Reason)
	}
}

// resultOf is the word of the metric for what came of a question.
func resultOf(code int, r *telemetry.Access) string {
	switch {
	case code == http.StatusTooManyRequests:
		return "limited"
	case r.Decision != "":
		return r.Decision
	}
	return "refused_" + strconv.Itoa(code)
}

// health says whether a service can answer (grpc.health.v1). Watch is not
// served: it would keep calls open that nothing ever ends.
type health struct {
	grpc_health_v1.UnimplementedHealthServer
	v *service
}

// Check implements grpc.health.v1.Health.
func (h *health) Check(_ context.Context, r *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	switch r.GetService() {
	case "", auth.Authorization_ServiceDesc.ServiceName:
		return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
	}
	return nil, status.Error(codes.NotFound, "there is no such service here")
}
