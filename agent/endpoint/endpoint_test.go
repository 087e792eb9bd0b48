package endpoint

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	partner = spiffeid.RequireTrustDomainFromString("partner.example")
)

func TestMain(m *testing.M) {
	if run := childProcesses[os.Getenv("ENDPOINT_TEST_CHILD")]; run != nil {
		run()
		return
	}
	goleak.VerifyTestMain(m)
}

// authority is a certificate authority of one trust domain.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	td   spiffeid.TrustDomain
}

func newAuthority(t testing.TB, td spiffeid.TrustDomain) *authority {
	a := &authority{t: t, td: td, key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: td.Name()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	return a
}

func (a *authority) bundle() *registry.Bundle {
	return &registry.Bundle{TrustDomain: a.td, X509: []*x509.Certificate{a.cert}, DER: a.cert.Raw}
}

func (a *authority) svid(id spiffeid.ID, ttl time.Duration) *registry.SVID {
	a.t.Helper()
	key := newKey(a.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		URIs: []*url.URL{id.URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	must(a.t, err)
	svid, err := registry.NewSVID([][]byte{der}, key)
	must(a.t, err)
	return svid
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

// fakeAgent is an agent around a real registry, with a server that a test
// can make do things.
type fakeAgent struct {
	*registry.Registry

	mu      sync.Mutex // guards the following
	unready error
	problem error
	syncs   int
	user    string // who had the last one made
	onSync  func(context.Context) error
	onJWT   func(context.Context, *registry.Entry, []string) (*registry.Token, error)
	onWIT   func(context.Context, *registry.Entry) (*registry.Token, time.Time, error)
}

func (a *fakeAgent) Sync(ctx context.Context, user string, _ []attestor.Selector) error {
	a.mu.Lock()
	a.syncs++
	a.user = user
	f := a.onSync
	a.mu.Unlock()
	if f != nil {
		return f(ctx)
	}
	return nil
}

func (a *fakeAgent) Unready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.unready
}

func (a *fakeAgent) Problem() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.problem
}

func (a *fakeAgent) JWTSVID(ctx context.Context, entry *registry.Entry, audience []string) (*registry.Token, error) {
	a.mu.Lock()
	f := a.onJWT
	a.mu.Unlock()
	if f == nil {
		return nil, ErrNoTokens
	}
	return f(ctx, entry, audience)
}

func (a *fakeAgent) WITSVID(ctx context.Context, entry *registry.Entry) (*registry.Token, time.Time, error) {
	a.mu.Lock()
	f := a.onWIT
	a.mu.Unlock()
	if f == nil {
		return nil, time.Time{}, ErrNoTokens
	}
	return f(ctx, entry)
}

func (a *fakeAgent) setUnready(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unready = err
}

// fixture is a server on a socket, and what stands behind it.
type fixture struct {
	t       testing.TB
	agent   *fakeAgent
	ca      *authority
	server  *Server
	socket  string
	metrics *telemetry.Metrics
	log     *logBuffer
	entries []registry.Entry
	stop    func() error
}

// serve starts a server, configured further by the options, and stops it at
// the end of the test.
func serve(t testing.TB, options ...func(*Config)) *fixture {
	t.Helper()
	f := listen(t, options...)
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

// listen makes a server that is not served yet.
func listen(t testing.TB, options ...func(*Config)) *fixture {
	t.Helper()
	f := &fixture{
		t: t, ca: newAuthority(t, td), metrics: telemetry.NewMetrics(), log: &logBuffer{},
		agent:  &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})},
		socket: filepath.Join(t.TempDir(), "public", "api.sock"),
	}
	f.agent.Apply(registry.Update{HasEntries: true, Bundle: f.ca.bundle()})
	cfg := Config{
		Socket: f.socket, Agent: f.agent, Metrics: f.metrics,
		Attestors: []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})},
		Log:       hclog.New(&hclog.LoggerOptions{Output: f.log, Level: hclog.Debug}),
	}
	for _, option := range options {
		option(&cfg)
	}
	var err error
	f.server, err = Listen(cfg)
	must(t, err)
	return f
}

// entry makes an entry that this test process matches.
func (f *fixture) entry(id, path string) registry.Entry {
	return registry.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(td, path), Revision: 1, CreatedAt: time.Unix(1e9, 0),
		Selectors: []attestor.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Geteuid())}},
	}
}

// register adds entries and signs them.
func (f *fixture) register(entries ...registry.Entry) {
	f.t.Helper()
	f.entries = append(f.entries, entries...)
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	f.sign(time.Hour)
}

// sign signs all entries anew.
func (f *fixture) sign(ttl time.Duration) {
	f.t.Helper()
	svids := map[string]*registry.SVID{}
	for _, e := range f.entries {
		svids[e.ID] = f.ca.svid(e.SPIFFEID, ttl)
	}
	f.agent.Apply(registry.Update{SVIDs: svids})
}

func (f *fixture) addr() string { return "unix://" + f.socket }

// dial connects a plain gRPC client.
func (f *fixture) dial() *grpc.ClientConn {
	f.t.Helper()
	conn, err := grpc.NewClient(f.addr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(f.t, err)
	f.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// fetch opens a FetchX509SVID stream on a connection of its own.
func (f *fixture) fetch(ctx context.Context) workload.SpiffeWorkloadAPI_FetchX509SVIDClient {
	f.t.Helper()
	stream, err := workload.NewSpiffeWorkloadAPIClient(f.dial()).FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	must(f.t, err)
	return stream
}

// counter returns a counter or gauge, or how often a histogram observed.
func (f *fixture) counter(name string, labels ...string) (value float64) {
	f.metrics.Each(func(s telemetry.Sample) {
		if s.Name == name && slices.Equal(s.LabelValues, labels) {
			value = s.Value + float64(s.Count)
		}
	})
	return value
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, securityHeader, "true")
}

// patience bounds what must happen soon, on a machine that is busy.
const patience = 30 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for what no event tells of.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !is(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantCode checks an error's code, and that its text has all of the parts.
func wantCode(t testing.TB, err error, code codes.Code, parts ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("got %v, want code %s", err, code)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got %q, want it to say %q", err, part)
		}
	}
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu   sync.Mutex // guards the following
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

var errDown = errors.New("server spire:8081 unreachable since 14:02: connection refused")

func TestListenConfig(t *testing.T) {
	if _, err := Listen(Config{Socket: "/tmp/x"}); err == nil {
		t.Error("a server without an agent was made")
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer tcp.Close()
	agent := &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})}
	if _, err := Listen(Config{Listener: tcp, Agent: agent}); err == nil || !strings.Contains(err.Error(), "unix") {
		t.Errorf("a tcp listener: got %v, want an error", err)
	}
}

func TestInheritedListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "inherited.sock")
	l, err := net.Listen("unix", path)
	must(t, err)
	f := serve(t, func(c *Config) { c.Listener = l })
	f.socket = path
	f.register(f.entry("a", "/a"))
	if _, err := f.fetch(testContext(t)).Recv(); err != nil {
		t.Fatal(err)
	}
	must(t, f.stop())
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the inherited socket's file is gone: %v", err)
	}
}

func TestCloseUnserved(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	s, err := Listen(Config{Socket: socket, Agent: &fakeAgent{Registry: registry.New(registry.Options{TrustDomain: td})}})
	must(t, err)
	must(t, s.Close())
	must(t, s.Close())
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}
