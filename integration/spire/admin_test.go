//go:build integration

package spire_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// delegateSVIDs reads a stream of a delegate until it has these identities, or
// none, and returns the SPIFFE IDs' paths as they came.
func delegateSVIDs(t *testing.T, stream grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse], want ...string) {
	t.Helper()
	for {
		answer, err := stream.Recv()
		if err != nil {
			t.Fatalf("waiting for %v: %v", want, err)
		}
		var paths []string
		for _, s := range answer.GetX509Svids() {
			if len(s.GetX509SvidKey()) == 0 || len(s.GetX509Svid().GetCertChain()) == 0 {
				t.Errorf("%v has no key or no certificate", s.GetX509Svid().GetId())
			}
			paths = append(paths, s.GetX509Svid().GetId().GetPath())
		}
		if slices.Sort(paths); slices.Equal(paths, want) {
			return
		}
	}
}

// endsWith reads a stream until it ends, which it is to do with this code.
func endsWith(t *testing.T, code codes.Code, receive func() error) {
	t.Helper()
	var err error
	for err == nil {
		err = receive()
	}
	if status.Code(err) != code {
		t.Errorf("the stream ended with %v, want %s", err, code)
	}
}

// TestAdminSocket has this process, a delegate, fetch identities of others by
// selectors and by PID, until its own entry is gone, and an operator ask what the
// agent knows.
func TestAdminSocket(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "delegating", proxyUser)
	agent := n.joins(server)
	n.admin, n.delegates = filepath.Join(n.dir, "private", "admin.sock"), []string{server.id("/mesh")}
	ids := server.add(
		entry{path: "/mesh", parent: agent, selector: fmt.Sprintf("unix:uid:%d", os.Geteuid())},
		entry{path: "/web", parent: agent, selector: proxyUser.selector()},
		entry{path: "/far", parent: agent, selector: "k8s:ns:shop"},
	)
	n.start("agent")
	n.Becomes(stage.Soon, "its entries are synced", func(s telemetry.Status) bool { return s.Agent.Entries == 3 })

	child := stage.Start(t, "web", "/bin/sleep", []string{"600"}, as(proxyUser))
	conn, err := grpc.NewClient("unix://"+n.admin, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	client := delegatedidentityv1.NewDelegatedIdentityClient(conn)
	web := []*types.Selector{{Type: "unix", Value: strings.TrimPrefix(proxyUser.selector(), "unix:")}}
	subscribe := func(req *delegatedidentityv1.SubscribeToX509SVIDsRequest) grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse] {
		t.Helper()
		stream, err := client.SubscribeToX509SVIDs(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	bySelectors := subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: web})
	byPID := subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: int32(child.PID())})
	delegateSVIDs(t, bySelectors, "/web")
	delegateSVIDs(t, byPID, "/web")
	checkDelegatedTokens(t, ctx, client, server, web)
	checkExplained(t, n)
	checkLogLevel(t, n)

	server.remove(ids[1])
	delegateSVIDs(t, bySelectors)
	server.add(entry{path: "/web2", parent: agent, selector: proxyUser.selector()})
	delegateSVIDs(t, bySelectors, "/web2")
	child.Kill()
	endsWith(t, codes.NotFound, func() error { _, err := byPID.Recv(); return err })
	server.remove(ids[0])
	endsWith(t, codes.PermissionDenied, func() error { _, err := bySelectors.Recv(); return err })
	stream := subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: web})
	endsWith(t, codes.PermissionDenied, func() error { _, err := stream.Recv(); return err })
	server.add(entry{path: "/no-delegate", parent: agent, selector: fmt.Sprintf("unix:uid:%d", os.Geteuid())})
	stage.Eventually(t, stage.Soon, "an identity that is not a delegate's is refused as such", func() error {
		stream := subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: web})
		_, err := stream.Recv()
		if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "authorized_delegates") {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
}

func checkDelegatedTokens(t *testing.T, ctx context.Context, client delegatedidentityv1.DelegatedIdentityClient, server *server, web []*types.Selector) {
	t.Helper()
	tokens, err := client.FetchJWTSVIDs(ctx, &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{server.id("/orders")}, Selectors: web})
	if err != nil {
		t.Fatal(err)
	}
	if len(tokens.Svids) != 1 || tokens.Svids[0].Id.Path != "/web" || tokens.Svids[0].IssuedAt == 0 || strings.Count(tokens.Svids[0].Token, ".") != 2 {
		t.Errorf("got %d tokens", len(tokens.Svids))
	}
	certificates, err := client.SubscribeToX509Bundles(ctx, &delegatedidentityv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := certificates.Recv(); err != nil || len(got.CaCertificates[server.td.IDString()]) == 0 {
		t.Errorf("bundles of certificates: got %v, %v", got, err)
	}
	keys, err := client.SubscribeToJWTBundles(ctx, &delegatedidentityv1.SubscribeToJWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := keys.Recv()
	if err != nil || !strings.Contains(string(got.Bundles[server.td.IDString()]), tokenKey(t, tokens.Svids[0].Token)) {
		t.Errorf("bundles of keys: got %v, %v, want the key of the token", got, err)
	}
}

// checkExplained has a process explained that is another user's.
func checkExplained(t *testing.T, n *node) {
	t.Helper()
	stranger := stage.Start(t, "stranger", "/bin/sleep", []string{"600"}, as(otherProxyUser))
	pid := fmt.Sprint(stranger.PID())
	out, err := stage.Tell(t, stage.Narthex, "explain", "--pid", pid, "-c", n.configFile())
	if err == nil {
		t.Error("a process that no entry matches is explained with exit status 0")
	}
	for _, want := range []string{"no entry matches", otherProxyUser.selector(), "misses " + proxyUser.selector(), "misses k8s:ns:shop (this agent has no attestor k8s"} {
		if !strings.Contains(out, want) {
			t.Errorf("`narthex explain` does not say %q:\n%s", want, out)
		}
	}
	var e endpoint.Explanation
	out = stage.Must(t, stage.Narthex, "explain", "--pid", fmt.Sprint(os.Getpid()), "--admin-socket", n.admin, "--format", "json")
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&e); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if e.MatchedCount != 1 || !strings.HasSuffix(e.Matched[0].SPIFFEID, "/mesh") || !e.Server.Synced || e.Server.Entries != 3 {
		t.Errorf("this process: got %+v", e)
	}
	asUser := exec.Command(stage.Narthex, "explain", "--pid", pid, "--admin-socket", n.admin)
	asUser.SysProcAttr = &syscall.SysProcAttr{}
	as(otherProxyUser)(asUser)
	if out, err := asUser.CombinedOutput(); err == nil || !strings.Contains(string(out), "permission denied") {
		t.Errorf("another user asks: %v: %s", err, out)
	}
}

func checkLogLevel(t *testing.T, n *node) {
	t.Helper()
	logger := func(args ...string) string {
		t.Helper()
		return stage.Must(t, stage.Narthex, append(append([]string{"logger"}, args...), "-c", n.configFile())...)
	}
	for _, step := range []struct{ args, want string }{
		{"get", "level debug, at start debug"},
		{"set warn", "level warn, at start debug"},
		{"get", "level warn, at start debug"},
		{"reset", "level debug, at start debug"},
	} {
		if out := logger(strings.Fields(step.args)...); strings.TrimSpace(out) != step.want {
			t.Errorf("narthex logger %s says %q, want %q", step.args, out, step.want)
		}
	}
	// The stock agent's command speaks the same.
	out := stage.Must(t, filepath.Join(tools, "spire-agent"), "logger", "get", "-socketPath", n.admin)
	if !strings.Contains(out, "debug") {
		t.Errorf("`spire-agent logger get` says %q", out)
	}
}
