package upstream

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// serveGRPC serves what register adds until the test ends, and returns the
// target.
func serveGRPC(t *testing.T, network, address string, register func(*grpc.Server)) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if network == "unix" {
		return unixPrefix + address
	}
	return l.Addr().String()
}

// checkOnce checks the endpoint of a target once, and returns its problem.
func checkOnce(t *testing.T, target string, h Health) string {
	t.Helper()
	s := NewSet(Options{})
	defer s.Close()
	h.Interval, h.UnhealthyAfter = time.Hour, 1
	g := take(t, s, Settings{Health: h}, target)
	g.targets[0].addresses()[0].check(t.Context())
	list, _ := g.Status(1)
	if list[0].Healthy != (list[0].Problem == "") {
		t.Errorf("status %+v", list[0])
	}
	return list[0].Problem
}

// odd is a health service that answers as the name of the service says.
type odd struct {
	healthpb.UnimplementedHealthServer
}

func (odd) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	switch r.Service {
	case "silent":
		<-ctx.Done()
		return nil, ctx.Err()
	case "cancels":
		return nil, status.Error(codes.Canceled, "\x1b[2J")
	case "late":
		return nil, status.Error(codes.DeadlineExceeded, "\x1b[2J")
	case "unknown":
		return &healthpb.HealthCheckResponse{Status: 77}, nil
	case "authority":
		head, _ := metadata.FromIncomingContext(ctx)
		if got := head.Get(":authority"); len(got) != 1 || got[0] != "orders.example" || !strings.HasPrefix(head.Get("user-agent")[0], "narthex") {
			return nil, status.Errorf(codes.InvalidArgument, "%v", got)
		}
		return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
	}
	return nil, status.Error(codes.Unavailable, strings.Repeat("\x1b[2J", 1<<10))
}

// TestGRPC: what counts as a good answer, over TCP and a Unix socket.
func TestGRPC(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:1")
	t.Setenv("HTTPS_PROXY", "http://192.0.2.1:1")
	watched := health.NewServer()
	watched.SetServingStatus("up", healthpb.HealthCheckResponse_SERVING)
	watched.SetServingStatus("down", healthpb.HealthCheckResponse_NOT_SERVING)
	register := func(s *grpc.Server) { healthpb.RegisterHealthServer(s, watched) }
	tcp := serveGRPC(t, "tcp", "127.0.0.1:0", register)
	socket := serveGRPC(t, "unix", filepath.Join(t.TempDir(), "s"), register)
	none := serveGRPC(t, "tcp", "127.0.0.1:0", func(*grpc.Server) {})
	strange := serveGRPC(t, "tcp", "127.0.0.1:0", func(s *grpc.Server) { healthpb.RegisterHealthServer(s, odd{}) })
	for _, c := range []struct{ name, target, service, problem string }{
		{"server as a whole", tcp, "", ""},
		{"service", tcp, "up", ""},
		{"unix", socket, "up", ""},
		{"host", strange, "authority", ""},
		{"down", tcp, "down", `grpc health of "down": answered NOT_SERVING`},
		{"not known", tcp, "other", `grpc health of "other": its health service does not know that name: use one it knows, or none for the server as a whole`},
		{"no health service", none, "", `grpc health of "": it has no health service (grpc.health.v1): add one, or use health without grpc`},
		{"unknown state", strange, "unknown", `grpc health of "unknown": answered 77`},
		{"unavailable", strange, "", `grpc health of "": status Unavailable`},
		{"cancels", strange, "cancels", `grpc health of "cancels": status Canceled`},
		{"late", strange, "late", `grpc health of "late": status DeadlineExceeded`},
		{"silent", strange, "silent", "no answer within 1s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := c.problem
			if want != "" {
				want = "health check: " + want
			}
			h := Health{GRPC: true, Service: c.service, Host: "orders.example", Timeout: 20 * time.Second}
			if c.name == "silent" {
				h.Timeout = time.Second
			}
			if got := checkOnce(t, c.target, h); got != want {
				t.Errorf("problem %q, want %q", got, want)
			}
		})
	}
}

// TestGRPCElsewhere: far ends that speak something else, or nothing.
func TestGRPCElsewhere(t *testing.T) {
	for name, answer := range map[string]string{
		"HTTP/1.1": "HTTP/1.1 400 Bad Request\r\n\r\n\x1b[2J", "closes": "", "SSH": "SSH-2.0-x\r\n", "long": strings.Repeat("\x00", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			served := make(chan struct{})
			go func() {
				defer close(served)
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, answer)
				_ = c.Close()
			}()
			got := checkOnce(t, l.Addr().String(), Health{GRPC: true, Timeout: 20 * time.Second})
			if want := `health check: grpc health of "": ` + errNotHTTP2.Error(); got != want {
				t.Errorf("problem %q, want %q", got, want)
			}
			<-served
		})
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if got := checkOnce(t, l.Addr().String(), Health{GRPC: true}); !strings.Contains(got, "connection refused") {
		t.Errorf("nobody there: %q", got)
	}
}

// TestGRPCNone: services of HTTP/2 that answer otherwise than gRPC does.
func TestGRPCNone(t *testing.T) {
	for _, c := range []struct {
		name, problem string
		answer        http.HandlerFunc
	}{
		{"no such path", "answered with status 404", http.NotFound},
		{"a page", errNotGRPC.Error(), func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }},
		{"no status", errNotGRPC.Error(), says("\x00\x00\x00\x00\x02\x08\x01", "")},
		{"a bad status", errNotGRPC.Error(), says("\x00\x00\x00\x00\x02\x08\x01", "fine")},
		{"a status that nobody knows", "status Code(77)", says("", "77")},
		{"no message", errNotGRPC.Error(), says("", "0")},
		{"compressed", errNotGRPC.Error(), says("\x01\x00\x00\x00\x02\x08\x01", "0")},
		{"cut short", errNotGRPC.Error(), says("\x00\x00\x00\x00\x03\x08\x01", "0")},
		{"two messages", errNotGRPC.Error(), says(strings.Repeat("\x00\x00\x00\x00\x02\x08\x01", 2), "0")},
		{"garbage", errNotGRPC.Error(), says("\x00\x00\x00\x00\x02\xff\xff", "0")},
		{"long", errNotGRPC.Error(), says(strings.Repeat("\x00", 1<<20), "0")},
		{"as it should", "", says("\x00\x00\x00\x00\x02\x08\x01", "0")},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := c.problem
			if want != "" {
				want = `health check: grpc health of "": ` + want
			}
			if got := checkOnce(t, serveHTTP2(t, c.answer), Health{GRPC: true, Timeout: 20 * time.Second}); got != want {
				t.Errorf("problem %q, want %q", got, want)
			}
		})
	}
}

// says answers with a message and a status.
func says(message, status string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
		_, _ = io.WriteString(w, message)
	}
}

// TestGRPCEnds: a check that waits for its answer ends with the set.
func TestGRPCEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := NewSet(Options{})
	g := take(t, s, Settings{Health: Health{Interval: time.Millisecond, Timeout: time.Hour, GRPC: true}}, l.Addr().String())
	s.Start()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	_, _ = io.Copy(io.Discard, c) // ends
	_ = c.Close()
	if list, _ := g.Status(1); !list[0].Healthy {
		t.Errorf("status %+v", list[0])
	}
}

func TestHealthGRPCRefused(t *testing.T) {
	for _, h := range []Health{
		{GRPC: true},
		{Service: "x", Interval: 1},
		{GRPC: true, Path: "/", Interval: 1},
		{GRPC: true, Service: "a b", Interval: 1},
		{GRPC: true, Service: strings.Repeat("x", maxService+1), Interval: 1},
		{GRPC: true, Host: "a\r\nb", Interval: 1},
	} {
		if err := (Settings{Health: h}).Check(); err == nil {
			t.Errorf("%+v is taken", h)
		}
	}
	if err := (Settings{Health: Health{GRPC: true, Service: "shop.Orders", Host: "orders", Interval: 1}}).Check(); err != nil {
		t.Error(err)
	}
}

// FuzzAskGRPC: a check by gRPC.
func FuzzAskGRPC(f *testing.F) { fuzzHTTP2(f, Health{GRPC: true}) }
