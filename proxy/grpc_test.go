package proxy

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

const webCalls = `version: 1
rules:
  - {id: calls, effect: allow, from: ["spiffe://example.org/web"], grpc: {services: [grpc.health.v1.Health]}}
`

// callee is a gRPC server, and callers of it through proxies.
func callee(t testing.TB) (*health.Server, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	service := health.NewServer()
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, service)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return service, l.Addr().String()
}

func dialCalls(t testing.TB, address string, creds credentials.TransportCredentials) grpc_health_v1.HealthClient {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return grpc_health_v1.NewHealthClient(c)
}

// TestCalls: unary and streaming calls of gRPC through one proxy and through
// two, statuses of the service and of ours, and a stream that ends with its
// rule.
func TestCalls(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	service, address := callee(t)
	p, ca := web(t, address, speaking(ProtocolAuto))
	p.apply(webCalls)
	l := outbound(t, "out", p.addr("web"), "spiffe://example.org/orders")
	l.HTTP = &HTTP{Versions: []string{protocolH2}}
	out := run(t, Config{Listeners: []Listener{l}, Policy: rulesOf(t, webCalls), Identities: source(t, ca.SVID("/web"), ca)})
	for name, client := range map[string]grpc_health_v1.HealthClient{
		"inbound": dialCalls(t, p.addr("web"), credentials.NewTLS(clientConfig(ca.SVID("/web")))),
		"both":    dialCalls(t, out.addr("out"), insecure.NewCredentials()),
	} {
		p.apply(webCalls)
		service.SetServingStatus("shop", grpc_health_v1.HealthCheckResponse_SERVING)
		r, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "shop"})
		if err != nil || r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Fatalf("%s: %v, %v", name, r, err)
		}
		if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "none"}); status.Code(err) != codes.NotFound {
			t.Errorf("%s: a status of the service: %v", name, err)
		}
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		watch, err := client.Watch(short, &grpc_health_v1.HealthCheckRequest{Service: "shop"})
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = watch.Recv()
		}
		if cancel(); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s: a deadline: %v", name, err)
		}
		watch, err = client.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: "shop"})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []grpc_health_v1.HealthCheckResponse_ServingStatus{grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING} {
			if r, err := watch.Recv(); err != nil || r.Status != want {
				t.Fatalf("%s: %v, %v", name, r, err)
			}
			service.SetServingStatus("shop", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
		}
		p.apply(webReads)
		if _, err := watch.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: a stream that is not allowed any more: %v", name, err)
		}
		if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: a call that is not allowed: %v", name, err)
		}
	}
}
