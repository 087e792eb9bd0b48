package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	rpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/testca"
)

// fakeBrokerAgent is a fakeAgent that has an SVID of its own.
type fakeBrokerAgent struct {
	*fakeAgent
	certificate func() (*tls.Certificate, error)
}

func (a *fakeBrokerAgent) Certificate() (*tls.Certificate, error) { return a.certificate() }

// brokerFixture is a server that brokers call, and what stands behind it.
type brokerFixture struct {
	*fixture
	own *testca.Authority // signs the agent's SVID and the brokers'
}

var anyKind = []ReferenceType{{TypeURL: AnyReference}}

// serveBrokers starts a server on a Unix socket, and stops it at the end of the
// test. /mesh is a broker.
func serveBrokers(t testing.TB, options ...func(*BrokerConfig)) *brokerFixture {
	t.Helper()
	own := testca.New(t, td.Name())
	f := &brokerFixture{own: own, fixture: &fixture{
		t: t, metrics: telemetry.NewMetrics(), log: &logBuffer{},
		ca:     &authority{t: t, cert: own.Cert, key: own.Key, td: td},
		agent:  &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})},
		socket: filepath.Join(t.TempDir(), "broker", "broker.sock"),
	}}
	f.agent.Apply(registry.Update{HasEntries: true, Bundle: f.ca.bundle()})
	svid := own.SVID("/spire/agent/one")
	cfg := BrokerConfig{
		Socket: f.socket, TrustDomain: td, Metrics: f.metrics,
		Agent:     &fakeBrokerAgent{f.agent, func() (*tls.Certificate, error) { return &svid, nil }},
		Attestors: []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})},
		Brokers:   []Broker{{ID: mesh, References: anyKind}},
		Log:       hclog.New(&hclog.LoggerOptions{Output: f.log, Level: hclog.Debug}),
	}
	for _, option := range options {
		option(&cfg)
	}
	var err error
	f.server, err = ListenBroker(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.server.Serve(ctx) }()
	f.stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() { must(t, f.stop()) })
	f.waitForBundle()
	return f
}

// waitForBundle returns once the door knows the trust bundle.
func (f *brokerFixture) waitForBundle() {
	f.t.Helper()
	eventually(f.t, "the door knows the bundle", func() bool {
		f.server.door.mu.Lock()
		defer f.server.door.mu.Unlock()
		return f.server.door.bundle != nil
	})
}

func overTCP(c *BrokerConfig) { c.Socket, c.Address = "", "127.0.0.1:0" }

// as connects as whoever has this certificate; the agent is not verified.
func (f *brokerFixture) as(cert ...tls.Certificate) *grpc.ClientConn {
	f.t.Helper()
	target := f.addr()
	if addr, ok := f.server.Addr().(*net.TCPAddr); ok {
		target = addr.String()
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		Certificates: cert, MinVersion: tls.VersionTLS12,
		InsecureSkipVerify: true, // whom it speaks to is looked at by a test of its own
	})))
	must(f.t, err)
	f.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (f *brokerFixture) client() broker.APIClient {
	return broker.NewAPIClient(f.as(f.own.SVID("/mesh")))
}

func withBrokerHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, brokerSecurityHeader, "true")
}

// byPID is a reference to a process.
func byPID(t testing.TB, pid int) *broker.WorkloadReference {
	t.Helper()
	ref, err := anypb.New(&broker.WorkloadPIDReference{Pid: int32(pid)}) // pids are small
	must(t, err)
	return &broker.WorkloadReference{Reference: ref}
}

// workloadProcess starts a process that matches what this one matches.
func workloadProcess(t testing.TB) *exec.Cmd {
	t.Helper()
	child := exec.Command("sleep", "600")
	must(t, child.Start())
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	})
	return child
}

// subscribe opens a SubscribeToX509SVID stream about a process.
func subscribe(t testing.TB, client broker.APIClient, ref *broker.WorkloadReference) grpc.ServerStreamingClient[broker.SubscribeToX509SVIDResponse] {
	t.Helper()
	stream, err := client.SubscribeToX509SVID(withBrokerHeader(testContext(t)), &broker.SubscribeToX509SVIDRequest{Reference: ref})
	must(t, err)
	return stream
}

// wantReason checks an error's code and google.rpc.ErrorInfo; an empty reason is
// none.
func wantReason(t testing.TB, err error, code codes.Code, reason string, parts ...string) {
	t.Helper()
	wantCode(t, err, code, parts...)
	got := ""
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "spiffe.io" {
			got = info.Reason
		}
	}
	if got != reason {
		t.Errorf("got reason %q of %v, want %q", got, err, reason)
	}
}

func idsOf(r *broker.SubscribeToX509SVIDResponse) (ids []string) {
	for _, s := range r.GetSvids() {
		ids = append(ids, strings.TrimPrefix(s.GetSpiffeId(), td.IDString()))
	}
	return ids
}

func TestBrokerFetchesX509SVIDs(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	web, admin, downstream := f.entry("web", "/web"), f.entry("admin", "/admin"), f.entry("downstream", "/downstream")
	web.Hint, web.FederatesWith = "internal", []spiffeid.TrustDomain{partner}
	admin.Admin, downstream.Downstream = true, true
	other := spiffeid.RequireTrustDomainFromString("other.example")
	admin.FederatesWith = []spiffeid.TrustDomain{other}
	f.agent.Apply(registry.Update{HasFederated: true, Federated: map[spiffeid.TrustDomain]*registry.Bundle{
		partner: newAuthority(t, partner).bundle(), other: newAuthority(t, other).bundle(),
		spiffeid.RequireTrustDomainFromString("third.example"): newAuthority(t, other).bundle(),
	}})
	f.register(web, admin, downstream)
	stream := subscribe(t, f.client(), byPID(t, workloadProcess(t).Process.Pid))
	first, err := stream.Recv()
	must(t, err)
	if ids := idsOf(first); len(ids) != 1 || ids[0] != "/web" {
		t.Fatalf("got %v, want /web and neither an admin's nor a downstream server's", ids)
	}
	svid := first.Svids[0]
	cert, err := x509.ParseCertificate(svid.X509Svid)
	must(t, err)
	key, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
	must(t, err)
	if key == nil || svid.Hint != "internal" || cert.URIs[0].String() != "spiffe://example.org/web" || string(svid.Bundle) != string(f.own.Cert.Raw) {
		t.Errorf("got %v", svid)
	}
	if len(first.FederatedBundles) != 1 || len(first.FederatedBundles["spiffe://partner.example"]) == 0 {
		t.Errorf("got bundles of %d domains, want partner.example's", len(first.FederatedBundles))
	}
	f.sign(time.Hour)
	renewed, err := stream.Recv()
	must(t, err)
	if string(renewed.Svids[0].X509Svid) == string(svid.X509Svid) {
		t.Error("the second answer has the first's SVID")
	}
	if f.counter("narthex_broker_streams", "SubscribeToX509SVID") != 1 {
		t.Error("the open stream is not counted")
	}
	f.entries = f.entries[1:] // those that are hidden stay
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	_, err = stream.Recv()
	wantReason(t, err, codes.PermissionDenied, workloadNotEntitled)
	eventually(t, "the end is counted", func() bool {
		return f.counter("narthex_broker_requests_total", "SubscribeToX509SVID", "PermissionDenied") == 1
	})
}

func TestBrokerFetchesBundles(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	jwt := testca.NewJWT(t, td.Name(), "k1")
	f.agent.Apply(registry.Update{
		Bundle: withJWT(f.ca.bundle(), jwt), HasFederated: true,
		Federated: map[spiffeid.TrustDomain]*registry.Bundle{partner: withJWT(newAuthority(t, partner).bundle(), jwt)},
	})
	client, ref := f.client(), byPID(t, workloadProcess(t).Process.Pid)
	ctx := withBrokerHeader(testContext(t))
	certificates, err := client.SubscribeToX509Bundles(ctx, &broker.SubscribeToX509BundlesRequest{Reference: ref})
	must(t, err)
	_, err = certificates.Recv()
	wantReason(t, err, codes.PermissionDenied, workloadNotEntitled, "no registration entry matches the workload")

	web := f.entry("web", "/web")
	f.register(web) // which federates with nobody
	certificates, err = client.SubscribeToX509Bundles(ctx, &broker.SubscribeToX509BundlesRequest{Reference: ref})
	must(t, err)
	keys, err := client.SubscribeToJWTBundles(ctx, &broker.SubscribeToJWTBundlesRequest{Reference: ref})
	must(t, err)
	for _, domains := range [][]string{{"spiffe://example.org"}, {"spiffe://example.org", "spiffe://partner.example"}} {
		x, err := certificates.Recv()
		must(t, err)
		j, err := keys.Recv()
		must(t, err)
		if len(x.Bundles) != len(domains) || len(j.Bundles) != len(domains) {
			t.Errorf("got %d and %d bundles, want those of %v", len(x.Bundles), len(j.Bundles), domains)
		}
		for _, d := range domains {
			if len(x.Bundles[d]) == 0 || !strings.Contains(string(j.Bundles[d]), "k1") {
				t.Errorf("%s: got %d bytes and %s", d, len(x.Bundles[d]), j.Bundles[d])
			}
		}
		web.FederatesWith = []spiffeid.TrustDomain{partner}
		f.entries = []registry.Entry{web}
		f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	}
}

func TestBrokerFetchesJWTSVIDs(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	jwt := testca.NewJWT(t, td.Name(), "k1")
	f.agent.onJWT = func(_ context.Context, e *registry.Entry, audience []string) (*registry.Token, error) {
		return &registry.Token{ID: e.SPIFFEID, Audience: audience, Compact: jwt.SVID(e.SPIFFEID.Path(), time.Now(), time.Minute, audience...)}, nil
	}
	admin := f.entry("b", "/admin")
	admin.Admin = true
	f.register(f.entry("a", "/a"), admin, f.entry("c", "/c"))
	client, child := f.client(), workloadProcess(t)
	for _, test := range []struct {
		id     string
		aud    []string
		ref    *broker.WorkloadReference
		want   string
		code   codes.Code
		reason string
	}{
		{aud: []string{"x"}, ref: byPID(t, child.Process.Pid), want: "/a /c"},
		{id: "spiffe://example.org/c", aud: []string{"x"}, ref: byPID(t, child.Process.Pid), want: "/c"},
		{id: "spiffe://example.org/admin", aud: []string{"x"}, ref: byPID(t, child.Process.Pid), code: codes.PermissionDenied, reason: workloadNotEntitled},
		{id: "spiffe://example.org/z", aud: []string{"x"}, ref: byPID(t, child.Process.Pid), code: codes.PermissionDenied, reason: workloadNotEntitled},
		{id: "z", aud: []string{"x"}, ref: byPID(t, child.Process.Pid), code: codes.InvalidArgument},
		{ref: byPID(t, child.Process.Pid), code: codes.InvalidArgument},
		{aud: []string{"x"}, code: codes.InvalidArgument, reason: workloadReferenceInvalid},
	} {
		resp, err := client.FetchJWTSVID(withBrokerHeader(testContext(t)), &broker.FetchJWTSVIDRequest{Reference: test.ref, Audience: test.aud, SpiffeId: test.id})
		wantReason(t, err, test.code, test.reason)
		var got []string
		for _, s := range resp.GetSvids() {
			got = append(got, strings.TrimPrefix(s.SpiffeId, td.IDString()))
			if strings.Count(s.Svid, ".") != 2 {
				t.Errorf("%s has no token", s.SpiffeId)
			}
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%q: got %v, want %s", test.id, got, test.want)
		}
	}
}

func TestBrokerStreamEndsWithTheWorkload(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	f.register(f.entry("web", "/web"))
	client, child := f.client(), workloadProcess(t)
	stream := subscribe(t, client, byPID(t, child.Process.Pid))
	_, err := stream.Recv()
	must(t, err)
	must(t, child.Process.Kill())
	_, err = stream.Recv() // nobody has waited for it yet: it is a zombie
	wantReason(t, err, codes.NotFound, workloadNotFound, "not there any more")
	_, err = subscribe(t, client, byPID(t, child.Process.Pid)).Recv()
	wantReason(t, err, codes.NotFound, workloadNotFound)
	_ = child.Wait()
	_, err = subscribe(t, client, byPID(t, child.Process.Pid)).Recv()
	wantReason(t, err, codes.NotFound, workloadNotFound, "no such process")
}

func TestBrokerReferences(t *testing.T) {
	t.Parallel()
	pid := byPID(t, os.Getpid()).Reference
	longer := append(slices.Clone(pid.Value), 0x10, 7) // a field that there is not
	only := func(kinds ...ReferenceType) func(*BrokerConfig) {
		return func(c *BrokerConfig) { c.Brokers[0].References = kinds }
	}
	named := only(ReferenceType{TypeURL: PIDReference, OverTCP: true})
	for name, test := range map[string]struct {
		options []func(*BrokerConfig)
		ref     *anypb.Any
		code    codes.Code
		reason  string
		says    string
	}{
		"named":          {options: []func(*BrokerConfig){named}, ref: pid},
		"every":          {ref: pid},
		"none":           {code: codes.InvalidArgument, reason: workloadReferenceInvalid, says: "no workload reference"},
		"empty":          {ref: &anypb.Any{Value: pid.Value}, code: codes.InvalidArgument, reason: workloadReferenceInvalid},
		"unknown":        {ref: &anypb.Any{TypeUrl: "type.googleapis.com/x", Value: pid.Value}, code: codes.InvalidArgument, reason: workloadReferenceInvalid, says: "it knows"},
		"no attestor":    {ref: podRef(t, "shop", "web", "").Reference, code: codes.InvalidArgument, reason: workloadReferenceInvalid, says: "no attestor of this agent knows objects of type pods.core"},
		"another prefix": {ref: &anypb.Any{TypeUrl: "x/spiffe.broker.WorkloadPIDReference", Value: pid.Value}, code: codes.InvalidArgument, reason: workloadReferenceInvalid},
		"not allowed":    {options: []func(*BrokerConfig){only(ReferenceType{TypeURL: "x"})}, ref: pid, code: codes.PermissionDenied, says: "agent.broker.brokers"},
		"over TCP":       {options: []func(*BrokerConfig){overTCP, named}, ref: pid, code: codes.PermissionDenied, says: "own node"},
		"every over TCP": {options: []func(*BrokerConfig){overTCP, only(ReferenceType{TypeURL: AnyReference, OverTCP: true})}, ref: pid, code: codes.PermissionDenied, says: "own node"},
		"not a message":  {ref: &anypb.Any{TypeUrl: PIDReference, Value: []byte{0xff}}, code: codes.InvalidArgument, reason: workloadReferenceInvalid},
		"no pid":         {ref: &anypb.Any{TypeUrl: PIDReference}, code: codes.InvalidArgument, reason: workloadReferenceInvalid, says: "pid is 0"},
		"negative":       {ref: byPID(t, -7).Reference, code: codes.InvalidArgument, reason: workloadReferenceInvalid, says: "pid is -7"},
		"more":           {ref: &anypb.Any{TypeUrl: PIDReference, Value: longer}, code: codes.InvalidArgument, reason: workloadReferenceInvalid, says: "more than a PID"},
		"long":           {ref: &anypb.Any{TypeUrl: PIDReference, Value: make([]byte, maxPIDBytes+1)}, code: codes.InvalidArgument, reason: workloadReferenceInvalid},
		"nobody":         {ref: byPID(t, 1<<22).Reference, code: codes.NotFound, reason: workloadNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := serveBrokers(t, test.options...)
			f.register(f.entry("web", "/web"))
			_, err := subscribe(t, f.client(), &broker.WorkloadReference{Reference: test.ref}).Recv()
			wantReason(t, err, test.code, test.reason)
			if !strings.Contains(fmt.Sprint(err), test.says) {
				t.Errorf("got %v, want it to say %q", err, test.says)
			}
		})
	}
}

func TestBrokerOfAnotherPIDNamespace(t *testing.T) {
	t.Parallel()
	by := &brokerConn{door: &door{local: true}, id: mesh, may: permissions{PIDReference: false}}
	_, err := by.readReference(byPID(t, os.Getpid()))
	wantReason(t, err, codes.PermissionDenied, "", "hostPID")
}

func TestBrokerMustBeOne(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	f.register(f.entry("web", "/web"))
	_, err := subscribe(t, broker.NewAPIClient(f.as(f.own.SVID("/other"))), byPID(t, os.Getpid())).Recv()
	wantReason(t, err, codes.PermissionDenied, "", "spiffe://example.org/other is no broker")
	if !strings.Contains(f.log.String(), "not a broker") {
		t.Error("the log does not tell")
	}
	for name, cert := range map[string][]tls.Certificate{
		"nobody":               nil,
		"another trust domain": {testca.New(t, partner.Name()).SVID("/mesh")},
		"another authority":    {testca.New(t, td.Name()).SVID("/mesh")},
		"expired":              {f.own.SVID("/mesh", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })},
		"no SVID":              {f.own.SVID("/mesh", func(c *x509.Certificate) { c.URIs = nil })},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(testContext(t), patience)
			defer cancel()
			_, err := broker.NewAPIClient(f.as(cert...)).FetchJWTSVID(withBrokerHeader(ctx), &broker.FetchJWTSVIDRequest{Audience: []string{"a"}})
			wantCode(t, err, codes.Unavailable)
		})
	}
}

func TestBrokerHeader(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	conn := f.as(f.own.SVID("/mesh"))
	stream, err := broker.NewAPIClient(conn).SubscribeToX509SVID(testContext(t), &broker.SubscribeToX509SVIDRequest{})
	must(t, err)
	_, err = stream.Recv()
	wantCode(t, err, codes.InvalidArgument, "broker.spiffe.io")
	_, err = broker.NewAPIClient(conn).FetchJWTSVID(withHeader(testContext(t)), &broker.FetchJWTSVIDRequest{})
	wantCode(t, err, codes.InvalidArgument, "broker.spiffe.io")
	health := grpc_health_v1.NewHealthClient(conn)
	_, err = health.Check(testContext(t), &grpc_health_v1.HealthCheckRequest{})
	wantCode(t, err, codes.InvalidArgument, "broker.spiffe.io")
	for _, service := range []string{"", "spiffe.broker.API"} {
		is, err := health.Check(withBrokerHeader(testContext(t)), &grpc_health_v1.HealthCheckRequest{Service: service})
		must(t, err)
		if is.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("%q: got %v", service, is)
		}
	}
}

func TestBrokerReflection(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		options []func(*BrokerConfig)
		code    codes.Code
	}{"unix": {nil, codes.OK}, "tcp": {[]func(*BrokerConfig){overTCP}, codes.Unimplemented}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := serveBrokers(t, test.options...)
			stream, err := rpb.NewServerReflectionClient(f.as(f.own.SVID("/mesh"))).ServerReflectionInfo(withBrokerHeader(testContext(t)))
			must(t, err)
			_ = stream.Send(&rpb.ServerReflectionRequest{MessageRequest: &rpb.ServerReflectionRequest_ListServices{}})
			answer, err := stream.Recv()
			wantCode(t, err, test.code)
			if err == nil && !strings.Contains(fmt.Sprint(answer), "spiffe.broker.API") {
				t.Errorf("got %v", answer)
			}
		})
	}
}

// TestBrokerStands has what let a broker in end while it holds a stream.
func TestBrokerStands(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		ttl  time.Duration
		ends func(*brokerFixture)
	}{
		"its SVID expires": {2 * time.Second, func(*brokerFixture) {}},
		"its authority is taken back": {time.Hour, func(f *brokerFixture) {
			f.agent.Apply(registry.Update{Bundle: testcaBundle(testca.New(t, td.Name()))})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := serveBrokers(t)
			f.register(f.entry("web", "/web"))
			cert := f.own.SVID("/mesh", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(test.ttl) })
			stream := subscribe(t, broker.NewAPIClient(f.as(cert)), byPID(t, workloadProcess(t).Process.Pid))
			_, err := stream.Recv()
			must(t, err)
			test.ends(f)
			for err == nil { // with its authority goes the workload's bundle
				_, err = stream.Recv()
			}
			wantCode(t, err, codes.Unavailable)
			eventually(t, "the log tells", func() bool { return strings.Contains(f.log.String(), "broker's connection closed") })
		})
	}
	t.Run("another authority is added", func(t *testing.T) {
		t.Parallel()
		f := serveBrokers(t)
		f.register(f.entry("web", "/web"))
		stream := subscribe(t, f.client(), byPID(t, workloadProcess(t).Process.Pid))
		_, err := stream.Recv()
		must(t, err)
		both := testcaBundle(f.own, testca.New(t, td.Name()))
		f.agent.Apply(registry.Update{Bundle: both})
		for got := f.own.Cert.Raw; string(got) != string(both.DER); {
			answer, err := stream.Recv()
			must(t, err)
			got = answer.Svids[0].Bundle
		}
	})
}

// testcaBundle is a bundle of several authorities of one trust domain.
func testcaBundle(all ...*testca.Authority) *registry.Bundle {
	b := &registry.Bundle{TrustDomain: all[0].TrustDomain, Sequence: uint64(time.Now().UnixNano())} // after 1970
	for _, a := range all {
		b.X509, b.DER = append(b.X509, a.Cert), append(b.DER, a.Cert.Raw...)
	}
	return b
}

func TestBrokerSeesTheAgent(t *testing.T) {
	t.Parallel()
	own := testca.New(t, td.Name())
	var mu sync.Mutex
	svid, problem := own.SVID("/spire/agent/one"), error(nil)
	f := serveBrokers(t, func(c *BrokerConfig) {
		c.Agent.(*fakeBrokerAgent).certificate = func() (*tls.Certificate, error) {
			mu.Lock()
			defer mu.Unlock()
			return &svid, problem
		}
	})
	seen := func() (id string, err error) {
		conn, err := tls.Dial("unix", f.socket, &tls.Config{
			NextProtos: []string{"h2"}, Certificates: []tls.Certificate{f.own.SVID("/mesh")},
			InsecureSkipVerify: true, // looked at below
			MinVersion:         tls.VersionTLS12,
		})
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].URIs[0].Path, nil
	}
	for _, want := range []string{"/spire/agent/one", "/spire/agent/two"} {
		mu.Lock()
		svid = own.SVID(want)
		mu.Unlock()
		if got, err := seen(); err != nil || got != want {
			t.Errorf("got %s, %v, want %s", got, err, want)
		}
	}
	mu.Lock()
	problem = errors.New("not attested")
	mu.Unlock()
	if got, err := seen(); err == nil {
		t.Errorf("an agent without an SVID showed %s", got)
	}
}

func TestBrokerWithoutHTTP2(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t)
	conn, err := tls.Dial("unix", f.socket, &tls.Config{
		Certificates: []tls.Certificate{f.own.SVID("/mesh")}, MinVersion: tls.VersionTLS12,
		InsecureSkipVerify: true, // its peer is of no interest
	})
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes", n)
	}
	eventually(t, "the log tells", func() bool { return strings.Contains(f.log.String(), "ALPN") })
}

// TestBrokerHandshakes has somebody who proves nothing hold as many connections
// as it can: others come in all the same.
func TestBrokerHandshakes(t *testing.T) {
	t.Parallel()
	f := serveBrokers(t, overTCP)
	d := f.server.door
	for range maxHandshakesOfOne {
		if !d.enter("192.0.2.7") {
			t.Fatal("refused too early")
		}
	}
	if d.enter("192.0.2.7") {
		t.Error("one address has more handshakes than it may")
	}
	for i := range maxHandshakes - maxHandshakesOfOne {
		if !d.enter(fmt.Sprint(i)) {
			t.Fatal("another address is refused")
		}
	}
	if d.enter("192.0.2.8") {
		t.Error("all together have more handshakes than they may")
	}
	for range maxHandshakesOfOne {
		d.leave("192.0.2.7")
	}
	for i := range maxHandshakes - maxHandshakesOfOne {
		d.leave(fmt.Sprint(i))
	}
	d.mu.Lock()
	underway, from := d.underway, len(d.handshakes)
	d.mu.Unlock()
	if underway != 0 || from != 0 {
		t.Errorf("%d handshakes of %d addresses are left", underway, from)
	}
	silent, err := net.Dial("tcp", f.server.Addr().String())
	must(t, err)
	defer silent.Close()
	eventually(t, "it is counted", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.handshakes["127.0.0.1"] == 1
	})
	must(t, f.stop()) // which waits for no handshake
}

func TestBrokersHaveLimits(t *testing.T) {
	t.Parallel()
	other := spiffeid.RequireFromPath(td, "/other")
	f := serveBrokers(t, func(c *BrokerConfig) { c.Brokers = append(c.Brokers, Broker{ID: other, References: anyKind}) })
	f.register(f.entry("web", "/web"))
	f.server.limits.mu.Lock()
	f.server.limits.perUID.streams = 1
	f.server.limits.mu.Unlock()
	pid := workloadProcess(t).Process.Pid
	client := f.client()
	_, err := subscribe(t, client, byPID(t, pid)).Recv()
	must(t, err)
	_, err = subscribe(t, client, byPID(t, pid)).Recv()
	wantCode(t, err, codes.ResourceExhausted, "broker spiffe://example.org/mesh holds 1 calls")
	_, err = subscribe(t, broker.NewAPIClient(f.as(f.own.SVID("/other"))), byPID(t, pid)).Recv()
	must(t, err)
}

func TestListenBrokerConfig(t *testing.T) {
	t.Parallel()
	agent := &fakeBrokerAgent{fakeAgent: &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})}}
	dir := t.TempDir()
	writable := filepath.Join(dir, "writable")
	must(t, os.Mkdir(writable, 0o777))
	must(t, os.Chmod(writable, 0o777))
	brokers := []Broker{{ID: mesh, References: anyKind}}
	for name, test := range map[string]struct {
		cfg  BrokerConfig
		says string
	}{
		"no agent":             {BrokerConfig{Socket: dir + "/s"}, "no agent"},
		"no broker":            {BrokerConfig{Socket: dir + "/s", Agent: agent, TrustDomain: td}, "nobody"},
		"another trust domain": {BrokerConfig{Socket: dir + "/s", Agent: agent, TrustDomain: partner, Brokers: brokers}, "not of trust domain"},
		"shown to workloads":   {BrokerConfig{Socket: dir + "/s", Apart: dir + "/api.sock", Agent: agent, TrustDomain: td, Brokers: brokers}, "shown to workloads"},
		"everybody's":          {BrokerConfig{Socket: writable + "/s", Agent: agent, TrustDomain: td, Brokers: brokers}, "everybody may write"},
		"no address":           {BrokerConfig{Address: "nowhere", Agent: agent, TrustDomain: td, Brokers: brokers}, "listen for brokers"},
	} {
		if _, err := ListenBroker(test.cfg); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q", name, err, test.says)
		}
	}
	f := serveBrokers(t)
	info, err := os.Stat(f.socket)
	must(t, err)
	above, err := os.Stat(filepath.Dir(f.socket))
	must(t, err)
	if info.Mode().Perm() != 0o770 || above.Mode().Perm() != 0o700 {
		t.Errorf("the socket has mode %o in a directory of mode %o", info.Mode().Perm(), above.Mode().Perm())
	}
}

// pods is an attestor of pods, as k8s is, of no processes.
type pods struct {
	*labels // of the pod shop/web

	podMu sync.Mutex // guards the following
	uid   string     // of it; empty: it is not there
	asked []attestor.Object
	watch []func() // those who follow it
}

func newPods(values ...string) *pods { return &pods{labels: newLabels("k8s", values...), uid: "1-a"} }

func (*pods) Attest(context.Context, *attestor.Process) ([]attestor.Selector, error) { return nil, nil }

func (*pods) Follow(*attestor.Process, []attestor.Selector, func()) (stop func()) { return func() {} }

func (*pods) Knows(plural, group string) bool { return plural == "pods" && group == "core" }

func (p *pods) AttestObject(ctx context.Context, o attestor.Object) (string, []attestor.Selector, error) {
	p.podMu.Lock()
	p.asked = append(p.asked, o)
	uid := p.uid
	p.podMu.Unlock()
	if uid == "" || o.Name != "" && o.Name != "web" || o.UID != "" && o.UID != uid {
		return "", nil, fmt.Errorf("%s: %w", o, attestor.ErrNoObject)
	}
	found, err := p.labels.Attest(ctx, nil)
	return uid, found, err
}

func (p *pods) FollowObject(o attestor.Object, _ []attestor.Selector, changed func()) (stop func()) {
	p.podMu.Lock()
	defer p.podMu.Unlock()
	if o.UID == p.uid {
		p.watch = append(p.watch, changed)
	} else {
		changed()
	}
	return func() {}
}

// becomes has another pod be shop/web, or none.
func (p *pods) becomes(uid string) {
	p.podMu.Lock()
	p.uid = uid
	told := p.watch
	p.watch = nil
	p.podMu.Unlock()
	for _, changed := range told {
		changed()
	}
}

// podRef is a reference to a pod.
func podRef(t testing.TB, namespace, name, uid string) *broker.WorkloadReference {
	t.Helper()
	ref := &broker.KubernetesObjectReference{Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: uid}
	if namespace+name != "" {
		ref.Key = &broker.KubernetesObjectKey{Namespace: namespace, Name: name}
	}
	packed, err := anypb.New(ref)
	must(t, err)
	return &broker.WorkloadReference{Reference: packed}
}

// servePods starts a server on whose node the pod shop/web has an entry.
func servePods(t testing.TB, options ...func(*BrokerConfig)) (*brokerFixture, *pods) {
	t.Helper()
	p := newPods("ns:shop")
	f := serveBrokers(t, append(options, func(c *BrokerConfig) { c.Attestors = append(c.Attestors, p) })...)
	web := f.entry("web", "/web")
	web.Selectors = []attestor.Selector{{Type: "k8s", Value: "ns:shop"}}
	f.register(web)
	return f, p
}

func TestBrokerNamesPods(t *testing.T) {
	t.Parallel()
	pod := podRef(t, "shop", "web", "")
	packed := func(ref *broker.KubernetesObjectReference) *broker.WorkloadReference {
		any, err := anypb.New(ref)
		must(t, err)
		return &broker.WorkloadReference{Reference: any}
	}
	pods := &broker.KubernetesObjectType{Plural: "pods", Group: "core"}
	longer := append(slices.Clone(pod.Reference.Value), 0x28, 7)
	for name, test := range map[string]struct {
		ref    *broker.WorkloadReference
		code   codes.Code
		reason string
		says   string
	}{
		"by name":        {ref: pod},
		"by UID":         {ref: podRef(t, "", "", "1-a")},
		"by both":        {ref: podRef(t, "shop", "web", "1-a")},
		"another UID":    {podRef(t, "shop", "web", "1-b"), codes.NotFound, workloadNotFound, "UID 1-b"},
		"nobody":         {podRef(t, "shop", "other", ""), codes.NotFound, workloadNotFound, "pods.core shop/other"},
		"neither":        {podRef(t, "", "", ""), codes.InvalidArgument, workloadReferenceInvalid, "neither"},
		"no namespace":   {podRef(t, "", "web", ""), codes.InvalidArgument, workloadReferenceInvalid, "without namespace"},
		"no name":        {podRef(t, "shop", "", "1-a"), codes.InvalidArgument, workloadReferenceInvalid, "or name"},
		"no type":        {packed(&broker.KubernetesObjectReference{Uid: "1"}), codes.InvalidArgument, workloadReferenceInvalid, "no type"},
		"another type":   {packed(&broker.KubernetesObjectReference{Type: &broker.KubernetesObjectType{Plural: "deployments", Group: "apps"}, Uid: "1"}), codes.InvalidArgument, workloadReferenceInvalid, "deployments.apps"},
		"no UID":         {podRef(t, "", "", "x"), codes.InvalidArgument, workloadReferenceInvalid, "no UID"},
		"no name at all": {podRef(t, "shop/web", "web", ""), codes.InvalidArgument, workloadReferenceInvalid, "RFC 1123"},
		"long":           {podRef(t, "shop", strings.Repeat("w", maxKubernetesBytes), ""), codes.InvalidArgument, workloadReferenceInvalid, "at most"},
		"long name":      {podRef(t, "shop", strings.Repeat("w", maxKubernetesName+1), ""), codes.InvalidArgument, workloadReferenceInvalid, "RFC 1123"},
		"more":           {&broker.WorkloadReference{Reference: &anypb.Any{TypeUrl: KubernetesReference, Value: longer}}, codes.InvalidArgument, workloadReferenceInvalid, "more than"},
		"not a message":  {&broker.WorkloadReference{Reference: &anypb.Any{TypeUrl: KubernetesReference, Value: []byte{0xff}}}, codes.InvalidArgument, workloadReferenceInvalid, "not the message"},
		"empty key":      {packed(&broker.KubernetesObjectReference{Type: pods, Uid: "1-a", Key: &broker.KubernetesObjectKey{}}), codes.InvalidArgument, workloadReferenceInvalid, "without namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, _ := servePods(t)
			answer, err := subscribe(t, f.client(), test.ref).Recv()
			wantReason(t, err, test.code, test.reason)
			if !strings.Contains(fmt.Sprint(err), test.says) {
				t.Errorf("got %v, want it to say %q", err, test.says)
			}
			if ids := idsOf(answer); err == nil && (len(ids) != 1 || ids[0] != "/web") {
				t.Errorf("got %v, want /web", ids)
			}
		})
	}
}

func TestBrokerNamesPodsOverTCP(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		may  ReferenceType
		code codes.Code
	}{
		{ReferenceType{TypeURL: KubernetesReference, OverTCP: true}, codes.OK},
		{ReferenceType{TypeURL: AnyReference, OverTCP: true}, codes.OK},
		{ReferenceType{TypeURL: KubernetesReference}, codes.PermissionDenied},
		{ReferenceType{TypeURL: AnyReference}, codes.PermissionDenied},
		{ReferenceType{TypeURL: PIDReference, OverTCP: true}, codes.PermissionDenied},
	} {
		f, _ := servePods(t, overTCP, func(c *BrokerConfig) { c.Brokers[0].References = []ReferenceType{test.may} })
		_, err := subscribe(t, f.client(), podRef(t, "shop", "web", "")).Recv()
		wantCode(t, err, test.code)
	}
}

// TestBrokerStreamEndsWithThePod: another pod of its name is another pod.
func TestBrokerStreamEndsWithThePod(t *testing.T) {
	t.Parallel()
	for _, becomes := range []string{"", "1-b"} {
		f, p := servePods(t)
		stream := subscribe(t, f.client(), podRef(t, "shop", "web", ""))
		_, err := stream.Recv()
		must(t, err)
		p.becomes("1-a") // which changes nothing
		p.becomes(becomes)
		_, err = stream.Recv()
		wantReason(t, err, codes.NotFound, workloadNotFound, "UID 1-a")
	}
}

func TestBrokerIsToldOfPodsInVain(t *testing.T) {
	t.Parallel()
	f, p := servePods(t)
	p.mu.Lock()
	p.err = errors.New("the kubelet is away")
	p.mu.Unlock()
	_, err := subscribe(t, f.client(), podRef(t, "shop", "web", "")).Recv()
	wantReason(t, err, codes.Unavailable, "", "the kubelet is away")
	p.mu.Lock()
	p.err, p.values = nil, []string{"ns:other"}
	p.mu.Unlock()
	_, err = subscribe(t, f.client(), podRef(t, "shop", "web", "")).Recv()
	wantReason(t, err, codes.PermissionDenied, workloadNotEntitled)
	eventually(t, "the log names the pod", func() bool {
		return strings.Contains(f.log.String(), "pods.core shop/web") && strings.Contains(f.log.String(), "spiffe://example.org/mesh")
	})
}

// FuzzReference reads what a broker can send: it is refused with a reason, or
// names a process.
func FuzzReference(f *testing.F) {
	for _, pid := range []int32{0, 1, -1, 1 << 30} {
		value, err := proto.Marshal(&broker.WorkloadPIDReference{Pid: pid})
		must(f, err)
		f.Add(PIDReference, value)
	}
	for _, ref := range []*broker.WorkloadReference{podRef(f, "shop", "web", ""), podRef(f, "", "", "1-a"), podRef(f, "shop", "web", "1-a"), podRef(f, "", "web", ""), podRef(f, "", "", "")} {
		f.Add(KubernetesReference, ref.Reference.Value)
	}
	f.Add("", []byte{8, 7})
	by := &brokerConn{door: &door{local: true, server: &Server{objects: []attestor.Objects{newPods()}}}, id: mesh, may: permissions{AnyReference: false}, pids: true}
	f.Fuzz(func(t *testing.T, kind string, value []byte) {
		r, err := by.readReference(&broker.WorkloadReference{Reference: &anypb.Any{TypeUrl: kind, Value: value}})
		if err != nil {
			wantReason(t, err, codes.InvalidArgument, workloadReferenceInvalid)
			return
		}
		switch o := r.object; {
		case kind == PIDReference && o == nil && r.pid > 0 && len(value) <= maxPIDBytes:
		case kind == KubernetesReference && o != nil && r.pid == 0 && len(value) <= maxKubernetesBytes &&
			o.Plural == "pods" && o.Group == "core" && (o.Namespace == "") == (o.Name == "") && o.Name+o.UID != "":
		default:
			t.Errorf("%q of %d bytes was read as pid %d and object %v", kind, len(value), r.pid, o)
		}
	})
}
