package grpctext

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func TestMessage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ message, want string }{
		{"", ""},
		{"no identity issued", "no identity issued"},
		{`connection error: desc = "transport: Error while dialing: dial unix a.sock: connect: no such file or directory"`, "dial unix a.sock: connect: no such file or directory"},
		{`last connection error: connection error: desc = "transport: authentication handshake failed: \"x\""`, `authentication handshake failed: "x"`},
		{`connection error: desc = "not closed`, `connection error: desc = "not closed`},
		{"transport: is closing", "is closing"},
	} {
		if got := Message(c.message); got != c.want {
			t.Errorf("%q: got %q, want %q", c.message, got, c.want)
		}
	}
}

func TestPlain(t *testing.T) {
	t.Parallel()
	refused := status.Error(codes.PermissionDenied, "no identity issued")
	if got := Plain(refused); got.Error() != "no identity issued" || status.Code(got) != codes.PermissionDenied || !errors.Is(got, refused) || OfConnection(got) {
		t.Errorf("a refusal: %v", got)
	}
	if got := Plain(nil); got != nil || OfConnection(nil) {
		t.Errorf("no error: %v", got)
	}
	if got := Plain(context.Canceled); got != context.Canceled { //nolint:errorlint // The very same.
		t.Errorf("no status: %v", got)
	}
}

// TestNobodyThere has gRPC itself say that nobody is there: its words may change.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "none.sock")
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	got := Plain(err)
	if !OfConnection(err) || status.Code(got) != codes.Unavailable || !strings.HasPrefix(got.Error(), "dial unix "+socket+": ") {
		t.Errorf("got %v", got)
	}
}
