package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// fakeAPI is a Workload API whose answers a test sends: an update, or an
// error that ends the stream.
type fakeAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	answers chan any      // *workload.X509SVIDResponse, error
	bundles chan any      // *workload.JWTBundlesResponse, error
	tokens  chan any      // *workload.JWTSVIDResponse, error
	follows atomic.Int64  // streams of JWT bundles there were
	begun   atomic.Int32  // calls for X.509-SVIDs
	ended   chan struct{} // told that one has ended, where it is not nil
}

func (f *fakeAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	f.begun.Add(1)
	if f.ended != nil {
		defer func() { f.ended <- struct{}{} }()
	}
	return serveAnswers(f.answers, stream)
}

func (f *fakeAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	f.follows.Add(1)
	return serveAnswers(f.bundles, stream)
}

func (f *fakeAPI) FetchJWTSVID(ctx context.Context, _ *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	select {
	case a := <-f.tokens:
		if err, ok := a.(error); ok {
			return nil, err
		}
		return a.(*workload.JWTSVIDResponse), nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

func serveAnswers[T any](answers chan any, stream grpc.ServerStreamingServer[T]) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); strings.Join(md.Get("workload.spiffe.io"), "") != "true" {
		return status.Error(codes.InvalidArgument, "security header missing")
	}
	for {
		select {
		case a := <-answers:
			if err, ok := a.(error); ok {
				return err
			}
			if err := stream.Send(a.(*T)); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// startAPI serves a fake Workload API on socket.
func startAPI(t *testing.T, socket string) (*fakeAPI, func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeAPI{answers: make(chan any), bundles: make(chan any), tokens: make(chan any)}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, f)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	stop := func() { s.Stop(); <-done }
	t.Cleanup(stop)
	return f, stop
}

func (f *fakeAPI) answer(t *testing.T, a any) { t.Helper(); give(t, f.answers, a) }

func give(t *testing.T, to chan any, a any) {
	t.Helper()
	select {
	case to <- a:
	case <-time.After(patience):
		t.Fatal("nobody asks the Workload API")
	}
}

func update(t *testing.T, federated map[string][]byte, bundle *testca.Authority, certs ...tls.Certificate) *workload.X509SVIDResponse {
	t.Helper()
	r := &workload.X509SVIDResponse{FederatedBundles: federated}
	for _, c := range certs {
		key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		r.Svids = append(r.Svids, &workload.X509SVID{
			SpiffeId: c.Leaf.URIs[0].String(), X509Svid: c.Certificate[0], X509SvidKey: key, Bundle: bundle.Cert.Raw,
		})
	}
	return r
}

// until waits until the lease's answer is as wanted.
func until(t *testing.T, l Lease, what string, ok func(*Identity, error) bool) {
	t.Helper()
	late := time.After(patience)
	for {
		changed := l.Changed()
		id, err := l.Current()
		if ok(id, err) {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("%s: still %v, %v", what, id, err)
		}
	}
}

func presents(c tls.Certificate) func(*Identity, error) bool {
	return func(id *Identity, err error) bool { return err == nil && id.Certificate.Leaf.Equal(c.Leaf) }
}

func refusesWith(reason string) func(*Identity, error) bool {
	return func(_ *Identity, err error) bool { return err != nil && strings.Contains(err.Error(), reason) }
}

func TestWorkloadAPI(t *testing.T) {
	ca, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
	socket := t.TempDir() + "/api.sock"
	w, err := NewWorkloadAPI(WorkloadAPIConfig{Socket: socket, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	lease, err := w.Own(context.Background(), Pick{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lease.Current(); err == nil || !strings.Contains(err.Error(), "no identity") {
		t.Errorf("before the API is there: %v", err)
	}

	api, stop := startAPI(t, socket)
	first := ca.SVID("/orders")
	api.answer(t, update(t, map[string][]byte{"spiffe://partner.example": partner.Cert.Raw}, ca, first))
	until(t, lease, "first update", presents(first))
	id, err := lease.Current()
	if err != nil || len(lease.Trust().domains) != 2 {
		t.Fatalf("trust %+v, %v", id, err)
	}
	if again, _ := lease.Current(); again != id {
		t.Error("an identity that did not change has another pointer")
	}

	// The same again wakes nobody.
	changed := lease.Changed()
	api.answer(t, update(t, map[string][]byte{"spiffe://partner.example": partner.Cert.Raw}, ca, first))
	second := ca.SVID("/orders")
	api.answer(t, update(t, nil, ca, second)) // taken after the repeat was
	until(t, lease, "rotation", presents(second))
	<-changed

	// Taken back by a refusal, given again, taken back by an empty update.
	api.answer(t, status.Error(codes.PermissionDenied, "no identity issued"))
	until(t, lease, "refusal", refusesWith("is there an entry whose selectors match it?"))
	api.answer(t, update(t, nil, ca, second))
	until(t, lease, "given again", presents(second))
	api.answer(t, update(t, nil, ca))
	until(t, lease, "empty update", refusesWith("no SVIDs in response"))
	api.answer(t, update(t, nil, ca, first, second))
	until(t, lease, "given again", presents(first))

	// One of two is left out; a lease on that one ends, the other goes on.
	other := ca.SVID("/billing")
	api.answer(t, update(t, nil, ca, first, other))
	named, err := w.Own(context.Background(), Pick{SPIFFEID: mustID(t, other)})
	if err != nil {
		t.Fatal(err)
	}
	until(t, named, "by SPIFFE ID", presents(other))
	api.answer(t, update(t, nil, ca, first))
	until(t, named, "left out", refusesWith("none of them is spiffe://example.org/billing"))
	until(t, lease, "the other", presents(first))

	// An API that is away, also one that answers what the library gives up
	// on, takes nothing back.
	api.answer(t, status.Error(codes.Canceled, "shutting down"))
	stop()
	until(t, lease, "API away", presents(first))
	api, _ = startAPI(t, socket)
	api.answer(t, update(t, nil, ca, second))
	until(t, lease, "API back", presents(second))
	if r := w.Report(); r.Problem != "" || r.Source != "workload_api" || len(r.Identities) != 1 || r.Identities[0].SPIFFEID != "spiffe://example.org/orders" {
		t.Errorf("report %+v", r)
	}
}

func mustID(t *testing.T, c tls.Certificate) spiffeid.ID {
	t.Helper()
	id, err := checkLeaf(c.Leaf)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestWorkloadAPIIsAskedForLeases: a proxy without listeners asks nobody.
func TestWorkloadAPIIsAskedForLeases(t *testing.T) {
	ca := testca.New(t, "example.org")
	socket := t.TempDir() + "/api.sock"
	api, _ := startAPI(t, socket)
	api.ended = make(chan struct{}, 1)
	w, err := NewWorkloadAPI(WorkloadAPIConfig{Socket: socket, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	own := func() Lease {
		t.Helper()
		lease, err := w.Own(context.Background(), Pick{})
		if err != nil {
			t.Fatal(err)
		}
		return lease
	}
	if r := w.Report(); r.Problem != "" {
		t.Errorf("a problem though nothing is needed: %s", r.Problem)
	}
	first, second := own(), own()
	svid := ca.SVID("/orders")
	api.answer(t, update(t, nil, ca, svid))
	until(t, first, "first lease", presents(svid))
	first.Close()
	first.Close() // counts once
	if _, err := second.Current(); err != nil {
		t.Errorf("a lease ended with another: %v", err)
	}
	second.Close()
	<-api.ended
	if r := w.Report(); r.Problem != "" || len(r.Identities) != 0 {
		t.Errorf("without a lease: %+v", r)
	}

	third := own()
	if _, err := third.Current(); err == nil || !strings.Contains(err.Error(), "nothing received yet") {
		t.Errorf("what was held before the watch ended serves on: %v", err)
	}
	api.answer(t, update(t, nil, ca, svid))
	until(t, third, "third lease", presents(svid))
	if n := api.begun.Load(); n != 2 {
		t.Errorf("the API was called %d times, want once for each time that there were leases", n)
	}
}

// TestNoNewsIsWarnedOfLater: an agent that is replaced by a new version is away
// for a moment, each time.
func TestNoNewsIsWarnedOfLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &lines{}
		w := &WorkloadAPI{store: newStore("workload_api", errors.New("nothing yet")), log: hclog.New(&hclog.LoggerOptions{Output: log})}
		w.jwtSource = newJWTSource(t.Context(), nil, w.ring, WorkloadAPIConfig{})
		a := &apiWatch{WorkloadAPI: w, ctx: t.Context()}
		away := status.Error(codes.Unavailable, "connection refused")
		tests := []struct {
			after       time.Duration
			err         error // nil: an update
			infos, warn int   // lines so far
		}{
			{0, away, 1, 0}, // nothing came yet: waiting
			{time.Hour, away, 1, 0},
			{0, nil, 1, 0},
			{0, away, 2, 0},
			{3 * time.Second, away, 2, 0},
			{8 * time.Second, away, 2, 1},
			{time.Hour, away, 2, 1},
			{0, nil, 2, 1},
			{0, status.Error(codes.PermissionDenied, "no identity issued"), 2, 2},
		}
		for n, tt := range tests {
			time.Sleep(tt.after)
			if tt.err == nil {
				a.OnX509ContextUpdate(&workloadapi.X509Context{Bundles: x509bundle.NewSet()})
			} else {
				a.OnX509ContextWatchError(tt.err)
			}
			if infos, warn := log.count("[INFO]"), log.count("[WARN]"); infos != tt.infos || warn != tt.warn {
				t.Errorf("step %d: %d lines of INFO and %d of WARN, want %d and %d", n, infos, warn, tt.infos, tt.warn)
			}
		}
	})
}

func TestWorkloadAPIAddress(t *testing.T) {
	for _, bad := range []string{"api.sock", "http://x", "unix:api.sock"} {
		if w, err := NewWorkloadAPI(WorkloadAPIConfig{Socket: bad}); err == nil {
			_ = w.Close()
			t.Errorf("%q was taken", bad)
		}
	}
	for _, good := range []string{"/run/x.sock", "unix:/run/x.sock", "unix:///run/x.sock"} {
		w, err := NewWorkloadAPI(WorkloadAPIConfig{Socket: good})
		if err != nil {
			t.Errorf("%q: %v", good, err)
			continue
		}
		_ = w.Close()
	}
}

// TestOneBadSVID: it keeps neither the others nor the bundles from being used,
// and is said once.
func TestOneBadSVID(t *testing.T) {
	ca, next, partner := testca.New(t, "example.org"), testca.New(t, "example.org"), testca.New(t, "partner.example")
	socket := t.TempDir() + "/api.sock"
	log := &lines{}
	w, err := NewWorkloadAPI(WorkloadAPIConfig{Socket: socket, Log: hclog.New(&hclog.LoggerOptions{Output: log})})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	f, _ := startAPI(t, socket)
	lease, err := w.Own(context.Background(), Pick{})
	if err != nil {
		t.Fatal(err)
	}
	good, also := ca.SVID("/orders"), ca.SVID("/orders")
	noPath := ca.SVID("/x", func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}} })
	foreign := partner.SVID("/web")
	f.answer(t, update(t, nil, ca, good))
	until(t, lease, "the first", presents(good))

	u := update(t, nil, next, noPath, also, good)
	u.Svids[2].X509SvidKey = []byte("no key")
	bad := update(t, nil, partner, foreign).Svids[0]
	bad.X509Svid = bad.X509Svid[:50]
	u.Svids = append(u.Svids, bad)
	for range 2 {
		f.answer(t, u)
	}
	until(t, lease, "the good one among bad ones", presents(also))
	trust := lease.Trust()
	if d := trust.domains[ca.TrustDomain]; !d.holds([]*x509.Certificate{next.Cert}) || d.holds([]*x509.Certificate{ca.Cert}) {
		t.Error("the bundle of the update is not in force")
	}
	if d := trust.domains[partner.TrustDomain]; d == nil || !d.holds([]*x509.Certificate{partner.Cert}) {
		t.Error("the bundle of a bad SVID went with it")
	}
	f.answer(t, update(t, nil, ca, good)) // taken once the one before was
	until(t, lease, "whole again", presents(good))
	if n := log.count("gave an SVID that is not good"); n != 1 {
		t.Errorf("said %d times", n)
	}
	f.answer(t, &workload.X509SVIDResponse{Svids: []*workload.X509SVID{bad}})
	f.answer(t, update(t, nil, ca, also)) // the one before was an error; it asks again
	until(t, lease, "after an update with nothing good", presents(also))
}
