package endpoint

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// healthServer tells whether the agent can answer: SERVING once it is ready,
// for the server as a whole ("") and for the Workload API.
type healthServer struct {
	*health.Server
	agent Agent
}

func newHealth(agent Agent) *healthServer {
	return &healthServer{health.NewServer(), agent}
}

func (h *healthServer) refresh() {
	now := grpc_health_v1.HealthCheckResponse_SERVING
	if h.agent.Unready() != nil {
		now = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	h.SetServingStatus("", now)
	h.SetServingStatus(workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName, now)
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
