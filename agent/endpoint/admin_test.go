package endpoint

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	rpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// fakeAdminAgent is a fakeAgent with what the admin socket asks of it.
type fakeAdminAgent struct {
	*fakeAgent

	statusMu sync.Mutex // guards the following
	svid     []*x509.Certificate
	status   telemetry.AgentStatus
}

func (a *fakeAdminAgent) SVID() []*x509.Certificate {
	a.statusMu.Lock()
	defer a.statusMu.Unlock()
	return a.svid
}

func (a *fakeAdminAgent) Status() *telemetry.AgentStatus {
	a.statusMu.Lock()
	defer a.statusMu.Unlock()
	s := a.status
	return &s
}

func (a *fakeAdminAgent) JWTSVIDs() int { return 3 }

// adminFixture is a server of an admin socket, and what stands behind it.
type adminFixture struct {
	*fixture
	admin *fakeAdminAgent
}

// serveAdmin starts one, and stops it at the end of the test. This process is a
// delegate once it matches an entry of mesh.
func serveAdmin(t testing.TB, options ...func(*AdminConfig)) *adminFixture {
	t.Helper()
	f := &adminFixture{fixture: &fixture{
		t: t, ca: newAuthority(t, td), metrics: telemetry.NewMetrics(), log: &logBuffer{},
		agent:  &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})},
		socket: filepath.Join(t.TempDir(), "private", "admin.sock"),
	}}
	f.admin = &fakeAdminAgent{fakeAgent: f.agent}
	f.agent.Apply(registry.Update{HasEntries: true, Bundle: f.ca.bundle()})
	cfg := AdminConfig{
		Socket: f.socket, Agent: f.admin, TrustDomain: td, Metrics: f.metrics,
		Attestors: []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})},
		Delegates: []spiffeid.ID{mesh},
		Log:       hclog.New(&hclog.LoggerOptions{Output: f.log, Level: hclog.Debug}),
	}
	for _, option := range options {
		option(&cfg)
	}
	var err error
	f.server, err = ListenAdmin(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.server.Serve(ctx) }()
	f.stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() { must(t, f.stop()) })
	return f
}

var mesh = spiffeid.RequireFromPath(td, "/mesh")

// beDelegate registers this process as a delegate.
func (f *adminFixture) beDelegate() { f.register(f.entry("mesh", "/mesh")) }

// pod makes an entry of a process with a selector that none has here.
func pod(id string) registry.Entry {
	return registry.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Revision: 1, CreatedAt: time.Unix(1e9, 0),
		Selectors: []attestor.Selector{{Type: "k8s", Value: "pod-name:" + id}},
	}
}

func podSelectors(id string) []*types.Selector {
	return []*types.Selector{{Type: "k8s", Value: "pod-name:" + id}, {Type: "k8s", Value: "ns:shop"}}
}

func (f *adminFixture) delegated() delegatedidentityv1.DelegatedIdentityClient {
	return delegatedidentityv1.NewDelegatedIdentityClient(f.dial())
}

// subscribe opens a SubscribeToX509SVIDs stream.
func (f *adminFixture) subscribe(req *delegatedidentityv1.SubscribeToX509SVIDsRequest) grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse] {
	f.t.Helper()
	stream, err := f.delegated().SubscribeToX509SVIDs(testContext(f.t), req)
	must(f.t, err)
	return stream
}

// pathsOf returns the paths of a response's SVIDs.
func pathsOf(r *delegatedidentityv1.SubscribeToX509SVIDsResponse) (paths []string) {
	for _, s := range r.GetX509Svids() {
		paths = append(paths, s.GetX509Svid().GetId().GetPath())
	}
	return paths
}

func TestDelegateBySelectors(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	f.beDelegate()
	web, admin, downstream := pod("web"), pod("admin"), pod("downstream")
	admin.Selectors, downstream.Selectors = web.Selectors, web.Selectors
	admin.Admin, downstream.Downstream = true, true
	web.Hint, web.FederatesWith = "internal", []spiffeid.TrustDomain{partner}
	f.agent.Apply(registry.Update{HasFederated: true, Federated: map[spiffeid.TrustDomain]*registry.Bundle{partner: newAuthority(t, partner).bundle()}})
	f.register(web, admin, downstream)
	stream := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("web")})
	first, err := stream.Recv()
	must(t, err)
	if len(first.X509Svids) != 1 {
		t.Fatalf("got %v, want /web and neither an admin's nor a downstream server's", pathsOf(first))
	}
	svid := first.X509Svids[0]
	cert, err := x509.ParseCertificate(svid.X509Svid.CertChain[0])
	must(t, err)
	key, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
	must(t, err)
	if svid.X509Svid.Id.TrustDomain != "example.org" || svid.X509Svid.Id.Path != "/web" || svid.X509Svid.Hint != "internal" ||
		svid.X509Svid.ExpiresAt != cert.NotAfter.Unix() || cert.URIs[0].String() != "spiffe://example.org/web" || key == nil ||
		len(first.FederatesWith) != 1 || first.FederatesWith[0] != "spiffe://partner.example" {
		t.Errorf("got %v", first)
	}
	f.sign(time.Hour)
	renewed, err := stream.Recv()
	must(t, err)
	if string(renewed.X509Svids[0].X509Svid.CertChain[0]) == string(svid.X509Svid.CertChain[0]) {
		t.Error("the second answer has the first's SVID")
	}
	f.entries = f.entries[:1]
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	if none, err := stream.Recv(); err != nil || len(none.X509Svids) != 0 {
		t.Errorf("once the entry is gone: got %v, %v, want an answer without SVIDs", none, err)
	}
}

func TestDelegateAsksAheadOfTheEntry(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	f.beDelegate()
	stream := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("late")})
	if none, err := stream.Recv(); err != nil || len(none.X509Svids) != 0 {
		t.Fatalf("got %v, %v, want an answer without SVIDs", none, err)
	}
	if f.agent.syncs == 0 {
		t.Error("nothing was known of the process, and the server was not asked")
	}
	f.register(pod("late"))
	if some, err := stream.Recv(); err != nil || strings.Join(pathsOf(some), " ") != "/late" {
		t.Errorf("got %v, %v, want /late", some, err)
	}
}

func TestDelegateByPID(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	f.beDelegate() // which matches children as well
	child := exec.Command("sleep", "600")
	must(t, child.Start())
	stream := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: int32(child.Process.Pid)})
	first, err := stream.Recv()
	must(t, err)
	if got := strings.Join(pathsOf(first), " "); got != "/mesh" {
		t.Errorf("got %s, want /mesh", got)
	}
	must(t, child.Process.Kill())
	_ = child.Wait()
	_, err = stream.Recv()
	wantCode(t, err, codes.NotFound, "not there any more")
	_, err = f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: int32(child.Process.Pid)}).Recv()
	wantCode(t, err, codes.NotFound, "no such process")
}

func TestDelegateMustBeAuthorized(t *testing.T) {
	t.Parallel()
	calls := map[string]func(*adminFixture) error{
		"SubscribeToX509SVIDs": func(f *adminFixture) error {
			_, err := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("web")}).Recv()
			return err
		},
		"SubscribeToX509Bundles": func(f *adminFixture) error {
			stream, err := f.delegated().SubscribeToX509Bundles(testContext(t), &delegatedidentityv1.SubscribeToX509BundlesRequest{})
			must(t, err)
			_, err = stream.Recv()
			return err
		},
		"FetchJWTSVIDs": func(f *adminFixture) error {
			_, err := f.delegated().FetchJWTSVIDs(testContext(t), &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Selectors: podSelectors("web")})
			return err
		},
		"SubscribeToJWTBundles": func(f *adminFixture) error {
			stream, err := f.delegated().SubscribeToJWTBundles(testContext(t), &delegatedidentityv1.SubscribeToJWTBundlesRequest{})
			must(t, err)
			_, err = stream.Recv()
			return err
		},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := serveAdmin(t)
			f.register(pod("web"))
			wantCode(t, call(f), codes.PermissionDenied, "no identity issued")
			f.register(f.entry("other", "/other"))
			wantCode(t, call(f), codes.PermissionDenied, "authorized_delegates")
			eventually(t, "the log tells", func() bool { return strings.Contains(f.log.String(), "not a delegate") })
			nobody := serveAdmin(t, func(c *AdminConfig) { c.Delegates = nil })
			nobody.beDelegate()
			wantCode(t, call(nobody), codes.PermissionDenied, "authorized_delegates")
		})
	}
}

func TestDelegateStreamsEndWithItsEntry(t *testing.T) {
	t.Parallel()
	for name, take := range map[string]func(*adminFixture) codes.Code{
		"entry removed": func(f *adminFixture) codes.Code {
			f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries[1:]})
			return codes.PermissionDenied
		},
		"entry is another's": func(f *adminFixture) codes.Code {
			entries := append([]registry.Entry{f.entry("mesh", "/other")}, f.entries[1:]...)
			f.agent.Apply(registry.Update{HasEntries: true, Entries: entries})
			return codes.PermissionDenied
		},
		"agent banned": func(f *adminFixture) codes.Code {
			f.agent.setUnready(errors.New("banned"))
			f.agent.Apply(registry.Update{Wipe: true})
			return codes.PermissionDenied
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := serveAdmin(t)
			f.beDelegate()
			f.register(pod("web"))
			svids := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("web")})
			_, err := svids.Recv()
			must(t, err)
			bundles, err := f.delegated().SubscribeToX509Bundles(testContext(t), &delegatedidentityv1.SubscribeToX509BundlesRequest{})
			must(t, err)
			_, err = bundles.Recv()
			must(t, err)
			code := take(f)
			for err = nil; err == nil; { // a frame may be under way
				_, err = svids.Recv()
			}
			wantCode(t, err, code)
			for err = nil; err == nil; {
				_, err = bundles.Recv()
			}
			wantCode(t, err, code)
		})
	}
}

func TestDelegateIsAttestedAgain(t *testing.T) {
	t.Parallel()
	l := newLabels("k8s", "label:mesh")
	f := serveAdmin(t, func(c *AdminConfig) { c.Attestors = append(c.Attestors, l) })
	delegate := f.entry("mesh", "/mesh")
	delegate.Selectors = append(delegate.Selectors, attestor.Selector{Type: "k8s", Value: "label:mesh"})
	f.register(delegate, pod("web"))
	stream := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("web")})
	_, err := stream.Recv()
	must(t, err)
	l.set("label:other")
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
}

func TestDelegatedBundles(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	f.beDelegate() // which federates with nobody
	theirs := newAuthority(t, partner).bundle()
	own := f.ca.bundle()
	own.JWKS, theirs.JWKS = []byte(`{"keys":["own"]}`), []byte(`{"keys":["theirs"]}`)
	own.Sequence++
	f.agent.Apply(registry.Update{Bundle: own})
	x509s, err := f.delegated().SubscribeToX509Bundles(testContext(t), &delegatedidentityv1.SubscribeToX509BundlesRequest{})
	must(t, err)
	jwts, err := f.delegated().SubscribeToJWTBundles(testContext(t), &delegatedidentityv1.SubscribeToJWTBundlesRequest{})
	must(t, err)
	check := func(want ...string) {
		t.Helper()
		x, err := x509s.Recv()
		must(t, err)
		j, err := jwts.Recv()
		must(t, err)
		for _, domain := range want {
			if len(x.CaCertificates[domain]) == 0 || len(j.Bundles[domain]) == 0 {
				t.Errorf("got %v and %v, want those of %s", x, j, domain)
			}
		}
		if len(x.CaCertificates) != len(want) || len(j.Bundles) != len(want) {
			t.Errorf("got %d and %d bundles, want %d", len(x.CaCertificates), len(j.Bundles), len(want))
		}
	}
	check("spiffe://example.org")
	f.agent.Apply(registry.Update{HasFederated: true, Federated: map[spiffeid.TrustDomain]*registry.Bundle{partner: theirs}})
	check("spiffe://example.org", "spiffe://partner.example")
	f.agent.Apply(registry.Update{HasFederated: true})
	check("spiffe://example.org")
}

func TestDelegatedJWTSVIDs(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	f.beDelegate()
	web, admin := pod("web"), pod("admin")
	admin.Selectors, admin.Admin, web.Hint = web.Selectors, true, "internal"
	f.register(web, admin)
	issued := time.Now().Truncate(time.Second)
	f.agent.mu.Lock()
	f.agent.onJWT = func(_ context.Context, e *registry.Entry, audience []string) (*registry.Token, error) {
		return &registry.Token{ID: e.SPIFFEID, Audience: audience, Compact: strings.Join(audience, "+"), IssuedAt: issued, ExpiresAt: issued.Add(time.Minute)}, nil
	}
	f.agent.mu.Unlock()
	ctx := testContext(t)
	got, err := f.delegated().FetchJWTSVIDs(ctx, &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"b", "a"}, Selectors: podSelectors("web")})
	must(t, err)
	if len(got.Svids) != 1 || got.Svids[0].Token != "a+b" || got.Svids[0].Id.Path != "/web" || got.Svids[0].Hint != "internal" ||
		got.Svids[0].IssuedAt != issued.Unix() || got.Svids[0].ExpiresAt != issued.Add(time.Minute).Unix() {
		t.Errorf("got %v", got)
	}
	got, err = f.delegated().FetchJWTSVIDs(ctx, &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Pid: int32(os.Getpid())})
	if err != nil || len(got.Svids) != 1 || got.Svids[0].Id.Path != "/mesh" {
		t.Errorf("by PID: got %v, %v", got, err)
	}
	_, err = f.delegated().FetchJWTSVIDs(ctx, &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Selectors: podSelectors("nobody")})
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	_, err = f.delegated().FetchJWTSVIDs(ctx, &delegatedidentityv1.FetchJWTSVIDsRequest{Selectors: podSelectors("web")})
	wantCode(t, err, codes.InvalidArgument, "audience")
}

func TestParseSubject(t *testing.T) {
	t.Parallel()
	many := make([]*types.Selector, maxSelectors+1)
	for i := range many {
		many[i] = &types.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", i)}
	}
	for name, test := range map[string]struct {
		req  *delegatedidentityv1.SubscribeToX509SVIDsRequest
		want string
	}{
		"neither":      {&delegatedidentityv1.SubscribeToX509SVIDsRequest{}, "either selectors or non-zero PID"},
		"both":         {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: 1, Selectors: podSelectors("a")}, "either selectors or non-zero PID"},
		"negative PID": {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: -1}, "want the number of a process"},
		"no type":      {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Value: "v"}}}, "selector 1 has no type"},
		"no value":     {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "t"}}}, "selector 1 has no type or no value"},
		"nil":          {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{nil}}, "selector 1 has no type"},
		"colon":        {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "a:b", Value: "v"}}}, "a type with a colon"},
		"too long":     {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "a", Value: strings.Repeat("v", maxSelectorLength)}}}, "at most 4096"},
		"too many":     {&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: many}, "a process may have 1024"},
	} {
		_, err := parseSubject(test.req)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want it to say %q", name, err, test.want)
		}
	}
	if got, err := parseSubject(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("a")}); err != nil || len(got) != 2 || got[0].String() != "k8s:pod-name:a" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestDebugInfo(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	ctx := testContext(t)
	client := debugv1.NewDebugClient(f.dial())
	f.agent.setUnready(errDown)
	_, err := client.GetInfo(ctx, &debugv1.GetInfoRequest{})
	wantCode(t, err, codes.Unavailable, "the agent has no SVID of its own", "unreachable since")
	f.agent.setUnready(nil)
	id := spiffeid.RequireFromPath(td, "/spire/agent/join_token/1")
	chain, err := x509.ParseCertificates(f.ca.svid(id, time.Hour).Chain)
	must(t, err)
	f.admin.statusMu.Lock()
	f.admin.svid = chain
	f.admin.status = telemetry.AgentStatus{LastSync: time.Unix(1e9, 0), Identities: make([]telemetry.Identity, 2)}
	f.admin.statusMu.Unlock()
	info, err := client.GetInfo(ctx, &debugv1.GetInfoRequest{})
	must(t, err)
	if len(info.SvidChain) != 2 || info.SvidChain[0].Id.GetPath() != id.Path() || info.SvidChain[0].ExpiresAt != chain[0].NotAfter.Unix() ||
		info.SvidChain[1].Id.GetTrustDomain() != "example.org" || !strings.Contains(info.SvidChain[1].Subject, "example.org") ||
		info.CachedX509SvidsCount != 2 || info.CachedJwtSvidsCount != 3 || info.LastSyncSuccess != 1e9 || info.Uptime < 0 {
		t.Errorf("got %v", info)
	}
	other, err := x509.ParseCertificates(newAuthority(t, td).svid(id, time.Hour).Chain)
	must(t, err)
	f.admin.statusMu.Lock()
	f.admin.svid = other
	f.admin.statusMu.Unlock()
	_, err = client.GetInfo(ctx, &debugv1.GetInfoRequest{})
	wantCode(t, err, codes.Internal, "does not verify")
}

func TestLogLevel(t *testing.T) {
	t.Parallel()
	var log hclog.Logger
	f := serveAdmin(t, func(c *AdminConfig) { c.Log.SetLevel(hclog.Warn); log = c.Log })
	sub := log.Named("other")
	client := loggerv1.NewLoggerClient(f.dial())
	ctx := testContext(t)
	check := func(got *types.Logger, err error, want types.LogLevel) {
		t.Helper()
		must(t, err)
		if got.CurrentLevel != want || got.LaunchLevel != types.LogLevel_WARN {
			t.Errorf("got %v, want %v now and WARN at launch", got, want)
		}
	}
	got, err := client.GetLogger(ctx, &loggerv1.GetLoggerRequest{})
	check(got, err, types.LogLevel_WARN)
	for set, want := range map[types.LogLevel]types.LogLevel{
		types.LogLevel_TRACE: types.LogLevel_TRACE, types.LogLevel_DEBUG: types.LogLevel_DEBUG, types.LogLevel_INFO: types.LogLevel_INFO,
		types.LogLevel_WARN: types.LogLevel_WARN, types.LogLevel_ERROR: types.LogLevel_ERROR,
		types.LogLevel_FATAL: types.LogLevel_ERROR, types.LogLevel_PANIC: types.LogLevel_ERROR,
	} {
		got, err := client.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: set})
		check(got, err, want)
		if sub.IsDebug() != (want >= types.LogLevel_DEBUG) {
			t.Errorf("at %s another part of the agent logs otherwise", want)
		}
	}
	got, err = client.ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{})
	check(got, err, types.LogLevel_WARN)
	for _, level := range []types.LogLevel{types.LogLevel_UNSPECIFIED, 8, -1} {
		_, err = client.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: level})
		wantCode(t, err, codes.InvalidArgument, "log level")
	}
	if n := strings.Count(f.log.String(), "level was changed"); n != 8 {
		t.Errorf("the log tells of %d changes, want 8", n)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	l := newLabels("k8s", "ns:shop")
	f := serveAdmin(t, func(c *AdminConfig) { c.Attestors = append(c.Attestors, l) })
	near, far := f.entry("near", "/near"), pod("far")
	near.Selectors = append(near.Selectors, attestor.Selector{Type: "k8s", Value: "sa:web"})
	near.Selectors[0].Value = fmt.Sprintf("uid:%d", os.Geteuid())
	f.register(f.entry("a", "/a"), near, far)
	f.admin.statusMu.Lock()
	f.admin.status = telemetry.AgentStatus{Server: "spire:8081", Reachable: true, LastSync: time.Unix(1e9, 0), Entries: 3}
	f.admin.statusMu.Unlock()
	ctx := testContext(t)
	e, err := Explain(ctx, f.dial(), int32(os.Getpid()))
	must(t, err)
	if e.PID != os.Getpid() || int(e.UID) != os.Geteuid() || e.Problem != "" || len(e.Attestors) != 2 ||
		e.Attestors[0].Type != "unix" || len(e.Attestors[0].Selectors) == 0 || strings.Join(e.Attestors[1].Selectors, " ") != "k8s:ns:shop" {
		t.Errorf("the process: got %+v", e)
	}
	if e.MatchedCount != 1 || e.Matched[0].SPIFFEID != "spiffe://example.org/a" || e.Matched[0].ExpiresAt.IsZero() {
		t.Errorf("what matches: got %+v", e.Matched)
	}
	if len(e.Nearest) != 2 || e.Nearest[0].ID != "near" || strings.Join(e.Nearest[0].Missing, " ") != "k8s:sa:web" || e.Nearest[1].ID != "far" {
		t.Errorf("what comes near: got %+v", e.Nearest)
	}
	if s := e.Server; !s.Synced || s.Address != "spire:8081" || !s.LastSync.Equal(time.Unix(1e9, 0)) || s.Entries != 3 {
		t.Errorf("the server: got %+v", s)
	}
	l.change(func() { l.err = errors.New("the kubelet is away") })
	e, err = Explain(ctx, f.dial(), int32(os.Getpid()))
	must(t, err)
	if e.Attestors[1].Problem != "the kubelet is away" {
		t.Errorf("got %+v, want the reason why the attestor failed", e.Attestors[1])
	}
	for _, pid := range []int32{0, -1} {
		_, err = Explain(ctx, f.dial(), pid)
		wantCode(t, err, codes.InvalidArgument, "not a PID")
	}
	_, err = Explain(ctx, f.dial(), 1<<22+1)
	wantCode(t, err, codes.NotFound, "no such process")
}

func TestExplainIsForTheOperator(t *testing.T) {
	t.Parallel()
	c := &conn{subject: subject{process: &attestor.Process{UID: uint32(os.Geteuid()) + 1}}}
	_, err := new(explainer).explainProcess(withPeer(t.Context(), c), os.Getpid())
	wantCode(t, err, codes.PermissionDenied, "ask as root")
}

func TestAdminSocketFile(t *testing.T) {
	t.Parallel()
	agent := &fakeAdminAgent{fakeAgent: &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})}}
	listen := func(socket, apart string) error {
		s, err := ListenAdmin(AdminConfig{Socket: socket, Apart: apart, Agent: agent, TrustDomain: td, Log: hclog.NewNullLogger()})
		if err != nil {
			return err
		}
		info, err := os.Stat(socket)
		must(t, err)
		if info.Mode().Perm() != 0o770 {
			t.Errorf("the socket has mode %04o, want 0770", info.Mode().Perm())
		}
		return s.Close()
	}
	dir := t.TempDir()
	must(t, listen(dir+"/run/private/admin.sock", dir+"/run/public/api.sock"))
	for path, want := range map[string]os.FileMode{"/run": 0o755, "/run/private": 0o700} {
		info, err := os.Stat(dir + path)
		must(t, err)
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", path, info.Mode().Perm(), want)
		}
	}
	must(t, os.Mkdir(dir+"/run/public", 0o755))
	must(t, os.Symlink(dir+"/run/public", dir+"/run/link"))
	must(t, os.Mkdir(dir+"/open", 0o777))
	must(t, os.Chmod(dir+"/open", 0o1777))
	for socket, want := range map[string]string{
		dir + "/run/public/admin.sock":         "directory of the Workload API's socket",
		dir + "/run/public/private/admin.sock": "directory of the Workload API's socket",
		dir + "/run/link/admin.sock":           "directory of the Workload API's socket",
		dir + "/open/admin.sock":               "everybody may write to",
	} {
		if err := listen(socket, dir+"/run/public/api.sock"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want it to say %q", socket, err, want)
		}
	}
	must(t, listen(dir+"/run/publicly/admin.sock", dir+"/run/public/api.sock"))
}

func TestAdminHealthAndReflection(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	ctx := testContext(t)
	for _, service := range []string{"", "spire.agent.debug.v1.Debug", "spire.api.agent.logger.v1.Logger", "spire.api.agent.delegatedidentity.v1.DelegatedIdentity", "narthex.agent.v1.Explain"} {
		answer, err := grpc_health_v1.NewHealthClient(f.dial()).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil || answer.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("%q: got %v, %v", service, answer, err)
		}
	}
	stream, err := rpb.NewServerReflectionClient(f.dial()).ServerReflectionInfo(ctx)
	must(t, err)
	must(t, stream.Send(&rpb.ServerReflectionRequest{MessageRequest: &rpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "narthex.agent.v1.Explain"}}))
	answer, err := stream.Recv()
	must(t, err)
	if len(answer.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("got %v, want the file of the service", answer)
	}
	must(t, stream.CloseSend())
}

// TestAdminStops has delegates told to call again when the agent ends.
func TestAdminStops(t *testing.T) {
	t.Parallel()
	f := serveAdmin(t)
	f.beDelegate()
	byPID := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: int32(os.Getpid())})
	bySelectors := f.subscribe(&delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: podSelectors("web")})
	for _, stream := range []grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse]{byPID, bySelectors} {
		_, err := stream.Recv()
		must(t, err)
	}
	if n := f.counter("narthex_admin_streams", "SubscribeToX509SVIDs"); n != 2 {
		t.Errorf("counted %v streams, want 2", n)
	}
	must(t, f.stop())
	for _, stream := range []grpc.ServerStreamingClient[delegatedidentityv1.SubscribeToX509SVIDsResponse]{byPID, bySelectors} {
		_, err := stream.Recv()
		wantCode(t, err, codes.Unavailable)
	}
	if n := len(f.server.held.watches) + len(f.server.frames.live); n != 0 {
		t.Errorf("%d things are held for nobody", n)
	}
	if _, err := net.Dial("unix", f.socket); err == nil {
		t.Error("the socket is still served")
	}
}
