package endpoint

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// healthServer tells whether the agent can answer: SERVING once it is ready,
// for the server as a whole ("") and for each of its own services.
type healthServer struct {
	*health.Server
	agent    Agent
	services []string
}

func newHealth(agent Agent, services ...string) *healthServer {
	return &healthServer{health.NewServer(), agent, append(services, "")}
}

func (h *healthServer) refresh() {
	now := grpc_health_v1.HealthCheckResponse_SERVING
	if h.agent.Unready() != nil {
		now = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	for _, service := range h.services {
		h.SetServingStatus(service, now)
	}
}

// Check tells how it is at this moment. A watch, which the embedded server
// answers, learns it within a second.
func (h *healthServer) Check(ctx context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	h.refresh()
	return h.Server.Check(ctx, req)
}

// Watch streams how it is, from this moment on.
func (h *healthServer) Watch(req *grpc_health_v1.HealthCheckRequest, stream grpc.ServerStreamingServer[grpc_health_v1.HealthCheckResponse]) error {
	h.refresh()
	return h.Server.Watch(req, stream)
}
