package fetch

import (
	"context"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/testca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// api is a Workload API that gives what a test says.
type api struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	t      *testing.T
	socket string
	ca     *testca.Authority
	jwt    *testca.JWTAuthority

	mu      sync.Mutex // guards the following
	refuse  error      // every call
	x509    *workload.X509SVIDResponse
	tokens  func(*workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error)
	keys    []string // of the JWT bundle; nil: not implemented
	changed chan struct{}
}

// newAPI makes one that does not serve yet.
func newAPI(t *testing.T) *api {
	t.Helper()
	dir, err := os.MkdirTemp("", "nx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &api{
		t: t, socket: filepath.Join(dir, "api.sock"), ca: testca.New(t, "example.org"), jwt: testca.NewJWT(t, "example.org", "key-1"),
		changed: make(chan struct{}),
	}
}

// serve serves until the function it returns is called, or the test ends.
func (a *api) serve() (stop func()) {
	a.t.Helper()
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, a)
	var g sync.WaitGroup
	g.Go(func() { _ = s.Serve(l) })
	stop = sync.OnceFunc(func() { s.Stop(); g.Wait() })
	a.t.Cleanup(stop)
	return stop
}

// client is one of the API's.
func (a *api) client() *Client {
	a.t.Helper()
	c, err := Dial("unix:" + a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { c.Close() })
	return c
}

// set changes what is given, and says so on every stream.
func (a *api) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	close(a.changed)
	a.changed = make(chan struct{})
}

// svid is an identity of the API's CA as it is on the wire.
func (a *api) svid(path, hint string, edit ...func(*x509.Certificate)) *workload.X509SVID {
	a.t.Helper()
	cert := a.ca.SVID(path, edit...)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		a.t.Fatal(err)
	}
	return &workload.X509SVID{
		SpiffeId: a.ca.TrustDomain.IDString() + path, Hint: hint,
		X509Svid: cert.Certificate[0], X509SvidKey: key, Bundle: a.ca.Cert.Raw,
	}
}

// stream sends what next returns, again after each change.
func (a *api) stream(ctx context.Context, next func() error) error {
	for {
		a.mu.Lock()
		changed, err := a.changed, a.refuse
		if err == nil {
			err = next()
		}
		a.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func (a *api) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return a.stream(s.Context(), func() error { return s.Send(a.x509) })
}

func (a *api) FetchX509Bundles(_ *workload.X509BundlesRequest, s workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return a.stream(s.Context(), func() error {
		return s.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{a.ca.TrustDomain.IDString(): a.ca.Cert.Raw}})
	})
}

func (a *api) FetchJWTBundles(_ *workload.JWTBundlesRequest, s workload.SpiffeWorkloadAPI_FetchJWTBundlesServer) error {
	return a.stream(s.Context(), func() error {
		if a.keys == nil {
			return status.Error(codes.Unimplemented, "no tokens here")
		}
		return s.Send(&workload.JWTBundlesResponse{Bundles: map[string][]byte{a.jwt.TrustDomain.IDString(): testca.JWKS(a.keys...)}})
	})
}

func (a *api) FetchJWTSVID(_ context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refuse != nil {
		return nil, a.refuse
	}
	return a.tokens(r)
}

func (a *api) ValidateJWTSVID(_ context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refuse != nil {
		return nil, a.refuse
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: "spiffe://example.org/web"}, nil
}

// token answers requests with a token that lives so long.
func (a *api) token(path string, life time.Duration) func(*workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	return func(r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
		return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{
			SpiffeId: a.jwt.TrustDomain.IDString() + path, Svid: a.jwt.SVID(path, time.Now(), life, r.Audience...),
		}}}, nil
	}
}
