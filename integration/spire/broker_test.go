//go:build integration

package spire_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

const pidReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"

// brokerHost is a node with the Broker API, and this process, which is root and
// has an SVID of the node's Workload API.
type brokerHost struct {
	*node
	t       *testing.T
	server  *server
	agentID string
	socket  string
	listen  string
	source  *workloadapi.X509Source
}

// newBrokerHost starts a node of which /mesh, this process, is a broker, that may
// name workloads by these types of references.
func newBrokerHost(t *testing.T, references string, entries ...entry) *brokerHost {
	t.Helper()
	h := &brokerHost{t: t, server: newServer(t, serverOptions{cacheReload: time.Second}), listen: stage.FreeAddress(t)}
	h.node = newNode(t, "brokered", proxyUser)
	h.agentID = h.joins(h.server)
	h.socket = filepath.Join(h.dir, "broker", "broker.sock")
	h.broker = fmt.Sprintf("socket: %s, listen: %q, brokers: [{id: %q, references: [%s]}]", h.socket, h.listen, h.server.id("/mesh"), references)
	entries = append(entries, entry{path: "/mesh", selector: fmt.Sprintf("unix:uid:%d", os.Geteuid())})
	for i := range entries {
		entries[i].parent = h.agentID
	}
	h.server.add(entries...)
	h.configure()
	h.Process = h.agent()
	h.Becomes(stage.Soon, "has synced the entries", func(s telemetry.Status) bool { return s.Agent.Entries == len(entries) })
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	var err error
	if h.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(h.workloadAPI())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.source.Close() })
	return h
}

// client connects as this process, with the SVID it has from the agent, which is
// to be the one that answers.
func (h *brokerHost) client(target string) broker.APIClient {
	h.t.Helper()
	config := tlsconfig.MTLSClientConfig(h.source, h.source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(h.agentID)))
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close() })
	return broker.NewAPIClient(conn)
}

func (h *brokerHost) local() broker.APIClient { return h.client("unix://" + h.socket) }

func (h *brokerHost) context() context.Context {
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*stage.Soon)
	h.t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
}

func packed(t *testing.T, m proto.Message) *broker.WorkloadReference {
	t.Helper()
	ref, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &broker.WorkloadReference{Reference: ref}
}

func ofProcess(t *testing.T, pid int) *broker.WorkloadReference {
	t.Helper()
	return packed(t, &broker.WorkloadPIDReference{Pid: int32(pid)})
}

// subscribe opens a stream and returns its first answer, or how it ended.
func (h *brokerHost) subscribe(client broker.APIClient, ref *broker.WorkloadReference) (grpc.ServerStreamingClient[broker.SubscribeToX509SVIDResponse], *broker.SubscribeToX509SVIDResponse, error) {
	h.t.Helper()
	stream, err := client.SubscribeToX509SVID(h.context(), &broker.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		h.t.Fatal(err)
	}
	first, err := stream.Recv()
	return stream, first, err
}

// endedWith checks the code, the google.rpc.ErrorInfo (empty: there is none) and
// the text of an error.
func endedWith(t *testing.T, err error, code codes.Code, reason, says string) {
	t.Helper()
	got := ""
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "spiffe.io" {
			got = info.Reason
		}
	}
	if status.Code(err) != code || got != reason || !strings.Contains(fmt.Sprint(err), says) {
		t.Errorf("got %v (%q), want %s (%q) that says %q", err, got, code, reason, says)
	}
}

// TestBroker has this process, a broker, fetch what another process has, until
// that one ends.
func TestBroker(t *testing.T) {
	t.Parallel()
	h := newBrokerHost(t, "{type_url: "+pidReference+"}", entry{path: "/web", selector: proxyUser.selector(), hint: "internal"})
	web := stage.Start(t, "web", "/bin/sleep", []string{"600"}, as(proxyUser))
	ref, local := ofProcess(t, web.PID()), h.local()

	stream, first, err := h.subscribe(local, ref)
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Svids) != 1 || first.Svids[0].SpiffeId != h.server.id("/web") || first.Svids[0].Hint != "internal" ||
		len(first.Svids[0].X509SvidKey) == 0 || len(first.Svids[0].Bundle) == 0 {
		t.Errorf("got %d SVIDs", len(first.Svids))
	}
	h.checkTokens(local, ref)
	h.checkRefusals(local, ref)

	stranger := stage.Start(t, "stranger", "/bin/sleep", []string{"600"}, as(otherProxyUser))
	_, _, err = h.subscribe(local, ofProcess(t, stranger.PID()))
	endedWith(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", "no registration entry matches the workload")

	web.Kill()
	_, err = stream.Recv()
	endedWith(t, err, codes.NotFound, "WORKLOAD_NOT_FOUND", "")
	_, _, err = h.subscribe(local, ref)
	endedWith(t, err, codes.NotFound, "WORKLOAD_NOT_FOUND", "")
}

// checkTokens fetches JWT-SVIDs and the bundles that verify them.
func (h *brokerHost) checkTokens(client broker.APIClient, ref *broker.WorkloadReference) {
	t, ctx := h.t, h.context()
	t.Helper()
	tokens, err := client.FetchJWTSVID(ctx, &broker.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"orders"}, SpiffeId: h.server.id("/web")})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := client.SubscribeToJWTBundles(ctx, &broker.SubscribeToJWTBundlesRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := keys.Recv()
	if err != nil {
		t.Fatal(err)
	}
	svid, err := jwtsvid.ParseInsecure(tokens.Svids[0].Svid, []string{"orders"})
	if err != nil || len(tokens.Svids) != 1 || svid.ID.String() != h.server.id("/web") {
		t.Errorf("got %d tokens: %v", len(tokens.Svids), err)
	}
	if id := tokenKey(t, tokens.Svids[0].Svid); !strings.Contains(string(bundles.Bundles[h.server.td.IDString()]), id) {
		t.Errorf("the bundle has no key %s", id)
	}
	_, err = client.FetchJWTSVID(ctx, &broker.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"orders"}, SpiffeId: h.server.id("/mesh")})
	endedWith(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", "")
	certificates, err := client.SubscribeToX509Bundles(ctx, &broker.SubscribeToX509BundlesRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := certificates.Recv(); err != nil || len(got.Bundles) != 1 || len(got.Bundles[h.server.td.IDString()]) == 0 {
		t.Errorf("got %d bundles, %v", len(got.GetBundles()), err)
	}
}

// checkRefusals asks for what is not given.
func (h *brokerHost) checkRefusals(local broker.APIClient, ref *broker.WorkloadReference) {
	t := h.t
	t.Helper()
	_, _, err := h.subscribe(h.client(h.listen), ref)
	endedWith(t, err, codes.PermissionDenied, "", "own node")
	_, _, err = h.subscribe(local, nil)
	endedWith(t, err, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID", "")
	_, _, err = h.subscribe(local, ofProcess(t, -1))
	endedWith(t, err, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID", "pid is -1")
	_, err = local.FetchJWTSVID(t.Context(), &broker.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"orders"}})
	endedWith(t, err, codes.InvalidArgument, "", "broker.spiffe.io")
}

// TestNotABroker has this process be what it was not: the entry by which it is a
// broker is another's.
func TestNotABroker(t *testing.T) {
	t.Parallel()
	h := newBrokerHost(t, `{type_url: "*"}`)
	_, first, err := h.subscribe(h.local(), ofProcess(t, os.Getpid()))
	if err != nil || len(first.Svids) != 1 {
		t.Fatalf("as a broker: %v", err)
	}
	ids := h.server.add(entry{path: "/clerk", parent: h.agentID, selector: fmt.Sprintf("unix:uid:%d", os.Geteuid())})
	h.source.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*stage.Soon)
	defer cancel()
	clerk := func(svids []*x509svid.SVID) *x509svid.SVID {
		for _, s := range svids {
			if s.ID.Path() == "/clerk" {
				return s
			}
		}
		return svids[0]
	}
	stage.Eventually(t, stage.Soon, "it is /clerk", func() (err error) {
		if h.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(h.workloadAPI()), workloadapi.WithDefaultX509SVIDPicker(clerk)); err != nil {
			return err
		}
		if svid, err := h.source.GetX509SVID(); err != nil || svid.ID.Path() != "/clerk" {
			return errors.Join(err, h.source.Close(), fmt.Errorf("it is %v", svid))
		}
		return nil
	})
	_, _, err = h.subscribe(h.local(), ofProcess(t, os.Getpid()))
	endedWith(t, err, codes.PermissionDenied, "", h.server.id("/clerk")+" is no broker")
	h.server.remove(ids...)
}

// TestBrokerHandover has another agent take the place of the one that a broker is
// connected to.
func TestBrokerHandover(t *testing.T) {
	t.Parallel()
	h := newBrokerHost(t, `{type_url: "*"}`)
	client, ref := h.local(), ofProcess(t, os.Getpid())
	stream, _, err := h.subscribe(client, ref)
	if err != nil {
		t.Fatal(err)
	}
	h.succeed()
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unavailable || errors.Is(err, io.EOF) {
		t.Errorf("a held stream ended with %v, want Unavailable", err)
	}
	if _, first, err := h.subscribe(client, ref); err != nil || len(first.Svids) != 1 {
		t.Errorf("of the next agent: %v", err)
	}
	_, _, err = h.subscribe(h.client(h.listen), ref)
	endedWith(t, err, codes.PermissionDenied, "", "own node")
	h.Stop()
	if _, err := os.Lstat(h.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}
