package endpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

func TestX509Source(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	ctx := testContext(t)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(f.addr())))
	must(t, err)
	defer source.Close()
	first, err := source.GetX509SVID()
	must(t, err)
	if want := spiffeid.RequireFromPath(td, "/a"); first.ID != want {
		t.Errorf("got %s, want %s", first.ID, want)
	}
	bundle, err := source.GetX509BundleForTrustDomain(td)
	must(t, err)
	if _, _, err := x509svid.Verify(first.Certificates, bundle); err != nil {
		t.Errorf("the SVID does not verify against the bundle: %v", err)
	}

	f.sign(2 * time.Hour)
	must(t, waitFor(ctx, source.Updated()))
	second, err := source.GetX509SVID()
	must(t, err)
	if first.Certificates[0].SerialNumber.Cmp(second.Certificates[0].SerialNumber) == 0 {
		t.Error("the rotated SVID did not reach the source")
	}
}

func waitFor(ctx context.Context, event <-chan struct{}) error {
	select {
	case <-event:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestFetchX509Context(t *testing.T) {
	f := serve(t)
	other := newAuthority(t, partner)
	a, b := f.entry("a", "/a"), f.entry("b", "/b")
	a.Hint, b.Hint = "external", "external"
	b.CreatedAt = a.CreatedAt.Add(time.Second)
	b.FederatesWith = []spiffeid.TrustDomain{partner}
	f.register(a, b)
	f.agent.Apply(registry.Update{HasFederated: true, Federated: map[spiffeid.TrustDomain]*registry.Bundle{partner: other.bundle()}})

	got, err := workloadapi.FetchX509Context(testContext(t), workloadapi.WithAddr(f.addr()))
	must(t, err)
	var ids []string
	for _, svid := range got.SVIDs {
		ids = append(ids, svid.ID.Path()+" "+svid.Hint)
	}
	if want := []string{"/a external", "/b "}; !slices.Equal(ids, want) {
		t.Errorf("got %q, want %q", ids, want)
	}
	for _, ca := range []*authority{f.ca, other} {
		bundle, err := got.Bundles.GetX509BundleForTrustDomain(ca.td)
		must(t, err)
		if !bundle.HasX509Authority(ca.cert) {
			t.Errorf("the bundle of %s lacks its authority", ca.td)
		}
	}
	bundles, err := workloadapi.FetchX509Bundles(testContext(t), workloadapi.WithAddr(f.addr()))
	must(t, err)
	if bundles.Len() != 2 {
		t.Errorf("got %d bundles, want 2", bundles.Len())
	}
}

// contexts receives what go-spiffe's watcher is told.
type contexts struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func (c *contexts) OnX509ContextUpdate(u *workloadapi.X509Context) { c.updates <- u }
func (c *contexts) OnX509ContextWatchError(err error)              { c.errs <- err }

func TestWatchX509Context(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	ctx, cancel := context.WithCancel(testContext(t))
	watcher := &contexts{make(chan *workloadapi.X509Context, 16), make(chan error, 16)}
	watched := make(chan error, 1)
	go func() { watched <- workloadapi.WatchX509Context(ctx, watcher, workloadapi.WithAddr(f.addr())) }()
	defer func() { cancel(); <-watched }()

	if got := (<-watcher.updates).SVIDs; len(got) != 1 {
		t.Fatalf("got %d SVIDs, want 1", len(got))
	}
	f.register(f.entry("b", "/b"))
	for len((<-watcher.updates).SVIDs) != 2 {
	}

	f.entries = nil
	f.agent.Apply(registry.Update{HasEntries: true})
	wantCode(t, <-watcher.errs, codes.PermissionDenied, "no identity issued")

	f.register(f.entry("c", "/c"))
	for {
		select {
		case <-watcher.errs: // it calls again after a second
			continue
		case got := <-watcher.updates:
			if got.SVIDs[0].ID.Path() != "/c" {
				t.Errorf("got %s after the entry came back", got.SVIDs[0].ID)
			}
		}
		break
	}
}

func TestNoEntry(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	f.entries[0].Selectors = []attestor.Selector{{Type: "unix", Value: "uid:4294967294"}}
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	_, err := f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	if f.agent.syncs != 1 {
		t.Errorf("the server was asked %d times, want once", f.agent.syncs)
	}
	for _, part := range []string{"no identity issued", fmt.Sprintf("pid=%d", os.Getpid()), fmt.Sprintf("unix:uid:%d", os.Geteuid())} {
		if !strings.Contains(f.log.String(), part) {
			t.Errorf("the log does not say %q:\n%s", part, f.log)
		}
	}
	if n := f.counter("narthex_workload_api_requests_total", "FetchX509SVID", "PermissionDenied"); n != 1 {
		t.Errorf("counted %v denied calls, want 1", n)
	}
	_, err = f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	if n := strings.Count(f.log.String(), "no identity issued"); n != 1 {
		t.Errorf("the same denial is %d times in the log:\n%s", n, f.log)
	}
	if n := f.counter("narthex_attestation_duration_seconds", "unix", "ok"); n != 2 {
		t.Errorf("counted %v attestations, want 2", n)
	}
}

// Why a caller has nothing is one of three things, and it can tell which.
func TestThreeAnswersToACallerWithoutEntry(t *testing.T) {
	t.Parallel()
	never := errors.New("the agent is starting and has not attested its node yet")
	away := errors.New("sync entries: server spire:8081: unreachable (unreachable since 14:02:00)")
	for name, test := range map[string]struct {
		synced  bool
		unready error
		sync    error
		code    codes.Code
		say     string
	}{
		"not synced yet":  {false, never, never, codes.Unavailable, never.Error()},
		"no entry":        {true, nil, nil, codes.PermissionDenied, "no registration entry matches the caller"},
		"server away":     {true, nil, away, codes.Unavailable, "unreachable since 14:02:00"},
		"banned":          {true, errors.New("banned"), away, codes.Unavailable, "the agent is not ready: banned"},
		"server too slow": {true, nil, fmt.Errorf("wait: %w", context.DeadlineExceeded), codes.PermissionDenied, "no registration entry"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := serve(t)
			f.agent.setUnready(test.unready)
			f.agent.onSync = func(context.Context) error { return test.sync }
			if test.synced {
				f.agent.Apply(registry.Update{HasEntries: true})
			}
			_, err := f.fetch(testContext(t)).Recv()
			wantCode(t, err, test.code, test.say)
		})
	}
}

func TestEntryComesWithSync(t *testing.T) {
	f := serve(t)
	f.agent.onSync = func(context.Context) error {
		f.register(f.entry("a", "/a"))
		return nil
	}
	response, err := f.fetch(testContext(t)).Recv()
	must(t, err)
	if id := response.Svids[0].SpiffeId; id != "spiffe://example.org/a" {
		t.Errorf("got %s", id)
	}
}

func TestSyncIsBounded(t *testing.T) {
	f := serve(t)
	f.agent.onSync = func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	start := time.Now()
	_, err := f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.PermissionDenied)
	if took := time.Since(start); took > 10*syncWait {
		t.Errorf("the caller was held for %s", took)
	}
	if !strings.Contains(f.log.String(), "sync_error") {
		t.Errorf("the log does not tell of the failed sync:\n%s", f.log)
	}
}

func TestHeader(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	client := workload.NewSpiffeWorkloadAPIClient(f.dial())
	for _, test := range []struct {
		name   string
		values []string
		code   codes.Code
	}{
		{"missing", nil, codes.InvalidArgument},
		{"empty", []string{""}, codes.InvalidArgument},
		{"false", []string{"false"}, codes.InvalidArgument},
		{"capital", []string{"True"}, codes.InvalidArgument},
		{"twice", []string{"true", "true"}, codes.InvalidArgument},
		{"right", []string{"true"}, codes.OK},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			ctx = metadata.NewOutgoingContext(ctx, metadata.MD{securityHeader: test.values})
			stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			must(t, err)
			_, err = stream.Recv()
			wantCode(t, err, test.code)
			if test.code != codes.OK && !strings.Contains(err.Error(), `"workload.spiffe.io"`) {
				t.Errorf("%q does not name the header", err)
			}
			_, err = client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{})
			if test.code == codes.OK {
				wantCode(t, err, codes.InvalidArgument, "audience")
			} else {
				wantCode(t, err, test.code, `"workload.spiffe.io"`)
			}
		})
	}
}

func TestNotReady(t *testing.T) {
	f := serve(t)
	f.agent.setUnready(errDown)
	f.agent.Apply(registry.Update{Wipe: true})
	_, err := f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.Unavailable, errDown.Error())

	// A caller that waits is answered as soon as the agent is ready.
	stream := f.fetch(testContext(t))
	eventually(t, "the caller is attested", func() bool {
		return f.counter("narthex_attestation_duration_seconds", "unix", "ok") == 2
	})
	f.agent.setUnready(nil)
	f.register(f.entry("a", "/a"))
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}

	// An agent that is banned takes back what it gave, and says why.
	f.agent.setUnready(errors.New("the server banned this agent"))
	f.agent.Apply(registry.Update{Wipe: true})
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "banned")
}

func TestCannotBeSigned(t *testing.T) {
	f := serve(t)
	f.agent.Apply(registry.Update{HasEntries: true, Entries: []registry.Entry{f.entry("a", "/a")}})
	f.agent.Due(time.Now())
	f.agent.Apply(registry.Update{Failed: map[string]error{"a": errors.New("the authority is on holiday")}})
	_, err := f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.Unavailable, "could not be signed", "the authority is on holiday")

	// Bundles need no SVID.
	bundles, err := workload.NewSpiffeWorkloadAPIClient(f.dial()).FetchX509Bundles(withHeader(testContext(t)), &workload.X509BundlesRequest{})
	must(t, err)
	if _, err := bundles.Recv(); err != nil {
		t.Error(err)
	}
}

func TestNeverSendsExpired(t *testing.T) {
	f := serve(t)
	f.entries = []registry.Entry{f.entry("a", "/a"), f.entry("b", "/b")}
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	f.agent.Apply(registry.Update{SVIDs: map[string]*registry.SVID{
		"a": f.ca.svid(f.entries[0].SPIFFEID, -time.Second),
		"b": f.ca.svid(f.entries[1].SPIFFEID, time.Hour),
	}})
	stream := f.fetch(testContext(t))
	response, err := stream.Recv()
	must(t, err)
	if len(response.Svids) != 1 || response.Svids[0].SpiffeId != "spiffe://example.org/b" {
		t.Errorf("got %v", response.Svids)
	}
	f.sign(-time.Second) // nothing that could be sent
	f.sign(time.Hour)
	response, err = stream.Recv()
	must(t, err)
	if len(response.Svids) != 2 {
		t.Errorf("got %d SVIDs, want 2", len(response.Svids))
	}
}

func TestUnauthenticatedVerifiers(t *testing.T) {
	for _, allow := range []bool{false, true} {
		f := serve(t, func(c *Config) { c.AllowUnauthenticatedVerifiers = allow })
		stream, err := workload.NewSpiffeWorkloadAPIClient(f.dial()).FetchX509Bundles(withHeader(testContext(t)), &workload.X509BundlesRequest{})
		must(t, err)
		response, err := stream.Recv()
		if !allow {
			wantCode(t, err, codes.PermissionDenied)
			continue
		}
		must(t, err)
		if len(response.Bundles) != 1 || response.Bundles["spiffe://example.org"] == nil {
			t.Errorf("got %v", response.Bundles)
		}
		if _, err := f.fetch(testContext(t)).Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("SVIDs for anybody: %v", err)
		}
	}
}

func TestBundleStreamSkipsRotations(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	stream, err := workload.NewSpiffeWorkloadAPIClient(f.dial()).FetchX509Bundles(withHeader(testContext(t)), &workload.X509BundlesRequest{})
	must(t, err)
	_, err = stream.Recv()
	must(t, err)
	f.sign(time.Hour) // not of interest to this stream
	next := newAuthority(t, td)
	f.agent.Apply(registry.Update{Bundle: next.bundle()})
	response, err := stream.Recv()
	must(t, err)
	if got := response.Bundles[td.IDString()]; !slices.Equal(got, next.cert.Raw) {
		t.Error("the next answer is not the next bundle")
	}
}

func TestClientGoesAway(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	ctx, cancel := context.WithCancel(testContext(t))
	stream := f.fetch(ctx)
	_, err := stream.Recv()
	must(t, err)
	if n := f.server.Streams(); n != 1 {
		t.Errorf("%d streams are open, want 1", n)
	}
	cancel()
	eventually(t, "the stream has ended", func() bool {
		return f.counter("narthex_workload_api_requests_total", "FetchX509SVID", "Canceled") == 1
	})
	if n := f.counter("narthex_workload_api_streams", "FetchX509SVID"); n != 0 {
		t.Errorf("the metric says %v streams", n)
	}
	f.server.frames.mu.Lock()
	defer f.server.frames.mu.Unlock()
	if n := len(f.server.frames.live); n != 0 {
		t.Errorf("%d frames are held for nobody", n)
	}
}

func TestSlowReaderGetsTheNewest(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	stream := f.fetch(testContext(t))
	_, err := stream.Recv()
	must(t, err)

	// Bundles of 40 KB fill what is in flight to a client that does not read.
	const updates = 100
	big := f.ca.bundle()
	for i := range updates {
		b := *big
		b.DER = slices.Concat(slices.Repeat(big.DER, 40_000/len(big.DER)), slices.Repeat([]byte{0}, i))
		b.Sequence = uint64(i + 1)
		f.agent.Apply(registry.Update{Bundle: &b})
	}
	f.entries[0].Hint, f.entries[0].Revision = "newest", 2
	f.register()
	for n := 1; ; n++ {
		response, err := stream.Recv()
		must(t, err)
		if response.Svids[0].Hint == "newest" {
			if n >= updates/2 {
				t.Errorf("%d of %d answers were queued for a client that did not read", n, updates)
			}
			return
		}
	}
}

func TestManyStreams(t *testing.T) {
	const clients = 200
	f := serve(t)
	f.register(f.entry("a", "/a"))
	ctx := testContext(t)
	var got, done sync.WaitGroup
	got.Add(clients)
	rotated := make(chan struct{})
	for range clients {
		stream := f.fetch(ctx)
		done.Go(func() {
			_, err := stream.Recv()
			got.Done()
			if err != nil {
				t.Error(err)
				return
			}
			<-rotated
			if _, err := stream.Recv(); err != nil {
				t.Error(err)
			}
		})
	}
	got.Wait()
	if n := f.server.Streams(); n != clients {
		t.Errorf("%d streams are open, want %d", n, clients)
	}
	f.server.frames.mu.Lock()
	if n := len(f.server.frames.live); n != 1 {
		t.Errorf("%d answers are in memory for callers entitled to one", n)
	}
	f.server.frames.mu.Unlock()
	f.sign(time.Hour)
	close(rotated)
	done.Wait()
}

func TestShutdown(t *testing.T) {
	f := serve(t)
	f.register(f.entry("a", "/a"))
	ctx := testContext(t)
	stream := f.fetch(ctx)
	_, err := stream.Recv()
	must(t, err)
	conn := f.dial()
	health, err := grpc_health_v1.NewHealthClient(conn).Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
	must(t, err)
	_, err = health.Recv()
	must(t, err)
	// A client in the middle of its handshake does not hold the end up.
	idle, err := net.Dial("unix", f.socket)
	must(t, err)
	defer idle.Close()

	start := time.Now()
	must(t, f.stop())
	if took := time.Since(start); took > 10*drainTimeout {
		t.Errorf("took %s to stop", took)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
	for err = nil; err == nil; {
		_, err = health.Recv()
	}
	wantCode(t, err, codes.Unavailable)
	if _, err := os.Lstat(f.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestHealthAndReflection(t *testing.T) {
	f := serve(t)
	ctx := testContext(t)
	conn := f.dial()
	health := grpc_health_v1.NewHealthClient(conn)
	check := func(want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, service := range []string{"", "SpiffeWorkloadAPI"} {
			got, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
			must(t, err)
			if got.Status != want {
				t.Errorf("%q is %s, want %s", service, got.Status, want)
			}
		}
	}
	check(grpc_health_v1.HealthCheckResponse_SERVING)
	f.agent.setUnready(errDown)
	check(grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	watch, err := health.Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
	must(t, err)
	f.agent.setUnready(nil)
	for {
		got, err := watch.Recv()
		must(t, err)
		if got.Status == grpc_health_v1.HealthCheckResponse_SERVING {
			break
		}
	}
	reflection, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	must(t, err)
	must(t, reflection.Send(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	}))
	list, err := reflection.Recv()
	must(t, err)
	if !strings.Contains(list.String(), `"SpiffeWorkloadAPI"`) {
		t.Errorf("reflection lists %s", list)
	}
	err = conn.Invoke(ctx, "/Some/Method", &workload.X509SVIDRequest{}, &workload.X509SVIDResponse{})
	wantCode(t, err, codes.Unimplemented, "/Some/Method")
	if n := f.counter("narthex_workload_api_requests_total", "other", "Unimplemented"); n != 1 {
		t.Errorf("counted %v other calls, want 1", n)
	}
}

// failing is an attestor that cannot tell.
type failing struct{}

func (failing) Type() string { return "failing" }
func (failing) Attest(context.Context, *attestor.Process) ([]attestor.Selector, error) {
	return nil, errors.New("the kubelet is away")
}

func TestAttestationFails(t *testing.T) {
	f := serve(t, func(c *Config) { c.Attestors = []attestor.Workload{failing{}} })
	_, err := f.fetch(testContext(t)).Recv()
	wantCode(t, err, codes.Unavailable, "the kubelet is away")
	if n := f.counter("narthex_attestation_duration_seconds", "failing", "error"); n != 1 {
		t.Errorf("counted %v failures, want 1", n)
	}
}

// childProcesses are what this test binary does instead of testing when it is
// started with their name.
var childProcesses = map[string]func(){
	"parent": parentProcess,
	"heir":   heirProcess,
}

func TestHeirIsNotServed(t *testing.T) {
	for name, happens := range map[string]func(*fixture, *labels){
		"rotation": func(f *fixture, _ *labels) { f.sign(time.Hour) },
		"change":   func(_ *fixture, l *labels) { l.set("label:b") },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLabels("k8s", "label:a")
			f := serve(t, func(c *Config) { c.Attestors = append(c.Attestors, l) })
			f.register(f.entry("a", "/a"))
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "ENDPOINT_TEST_CHILD=parent", "ENDPOINT_TEST_SOCKET="+f.socket)
			cmd.Stderr = os.Stderr
			in, err := cmd.StdinPipe()
			must(t, err)
			// Not StdoutPipe: the heir writes to it after the parent was waited for.
			out, w, err := os.Pipe()
			must(t, err)
			defer out.Close()
			cmd.Stdout = w
			must(t, cmd.Start())
			must(t, w.Close())
			lines := bufio.NewScanner(out)
			if !lines.Scan() || lines.Text() != "spiffe://example.org/a" {
				t.Fatalf("the child said %q, want its identity", lines.Text())
			}
			must(t, in.Close()) // the parent exits, the heir holds the connection
			must(t, cmd.Wait())
			happens(f, l)
			if !lines.Scan() || lines.Text() != "Unauthenticated" {
				t.Errorf("the heir of the connection was told %q, want Unauthenticated", lines.Text())
			}
		})
	}
}

// parentProcess connects, leaves the connection to a child and exits when its
// input ends.
func parentProcess() {
	conn, err := net.Dial("unix", os.Getenv("ENDPOINT_TEST_SOCKET"))
	fail(err)
	file, err := conn.(*net.UnixConn).File()
	fail(err)
	heir := exec.Command(os.Args[0])
	heir.Env = append(os.Environ(), "ENDPOINT_TEST_CHILD=heir")
	heir.ExtraFiles = []*os.File{file}
	heir.Stdout, heir.Stderr = os.Stdout, os.Stderr
	fail(heir.Start())
	_, err = io.Copy(io.Discard, os.Stdin)
	fail(err)
}

// heirProcess calls on a connection that another process made.
func heirProcess() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	inherited, err := net.FileConn(os.NewFile(3, "inherited"))
	fail(err)
	conn, err := grpc.NewClient("passthrough:///inherited", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return inherited, nil }))
	fail(err)
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	fail(err)
	response, err := stream.Recv()
	fail(err)
	fmt.Println(response.Svids[0].SpiffeId)
	_, err = stream.Recv()
	fmt.Println(status.Code(err))
}

func fail(err error) {
	if err != nil {
		panic(err)
	}
}

// What is not signed yet may be so for a reason, of which a caller is told.
func TestNotSignedYet(t *testing.T) {
	f := serve(t)
	f.agent.Apply(registry.Update{HasEntries: true, Entries: []registry.Entry{f.entry("a", "/a")}})
	f.agent.problem = errors.New("the clock is wrong")
	ctx, cancel := context.WithTimeout(testContext(t), time.Second)
	defer cancel()
	_, err := f.fetch(ctx).Recv()
	wantCode(t, err, codes.Unavailable, "not signed yet", "the clock is wrong")
}
