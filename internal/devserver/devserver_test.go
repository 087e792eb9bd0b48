package devserver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/attestor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testTD = spiffeid.RequireTrustDomainFromString("dev.test")

// clock is a Config.Now that stands still until it is moved.
type clock struct {
	mu  sync.Mutex // guards the following
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// serve starts a server and returns it with a function that ends it, which is
// called at the end of the test if not before.
func serve(t testing.TB, cfg Config) (*Server, func()) {
	t.Helper()
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = testTD
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx) }()
	var once sync.Once
	end := func() {
		once.Do(func() {
			cancel()
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Cleanup(end)
	return srv, end
}

// client is the four services over one connection.
type client struct {
	agentv1.AgentClient
	entryv1.EntryClient
	svidv1.SVIDClient
	bundlev1.BundleClient
}

// dial connects as a real agent does: TLS, the server must be
// spiffe://<td>/spire/server by its bundle, with id as client certificate.
func dial(t testing.TB, srv *Server, id *tls.Certificate) client {
	t.Helper()
	roots, err := x509bundle.Parse(srv.td, srv.BundlePEM())
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			peer, _, err := x509svid.Verify(cs.PeerCertificates, roots, x509svid.WithTime(srv.now()))
			if err == nil && peer.String() != srv.td.IDString()+"/spire/server" {
				err = fmt.Errorf("server is %s", peer)
			}
			return err
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if id == nil {
				return &tls.Certificate{}, nil
			}
			return id, nil
		},
	}
	conn, err := grpc.NewClient(srv.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{agentv1.NewAgentClient(conn), entryv1.NewEntryClient(conn), svidv1.NewSVIDClient(conn), bundlev1.NewBundleClient(conn)}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func tokenParams(token string, csr []byte) *agentv1.AttestAgentRequest {
	return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}
}

func sendAttest(t testing.TB, c client, req *agentv1.AttestAgentRequest) (*agentv1.AttestAgentResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := c.AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(req); err != nil {
		return nil, err
	}
	return stream.Recv()
}

// attest attests a new agent with token and returns its SVID.
func attest(t testing.TB, srv *Server, token string) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	resp, err := sendAttest(t, dial(t, srv, nil), tokenParams(token, newCSR(t, key)))
	if err != nil {
		t.Fatal(err)
	}
	return certificate(t, resp.GetResult().Svid, key)
}

func certificate(t testing.TB, svid *types.X509SVID, key *ecdsa.PrivateKey) *tls.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(svid.CertChain[0])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: svid.CertChain, PrivateKey: key, Leaf: leaf}
}

func agentID(cert *tls.Certificate) spiffeid.ID {
	return spiffeid.RequireFromURI(cert.Leaf.URIs[0])
}

// agent attests and returns a connection as that agent.
func agent(t testing.TB, srv *Server) (client, *tls.Certificate) {
	t.Helper()
	cert := attest(t, srv, srv.JoinToken())
	return dial(t, srv, cert), cert
}

func wantCode(t testing.TB, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("got %v, want %s with %q", err, code, text)
	}
}

// wantDenied wants PermissionDenied with the reason, or without any.
func wantDenied(t testing.TB, err error, reason *types.PermissionDeniedDetails_Reason) {
	t.Helper()
	wantCode(t, err, codes.PermissionDenied, "authorization denied for method /spire.api.server.")
	var got *types.PermissionDeniedDetails
	for _, d := range status.Convert(err).Details() {
		got, _ = d.(*types.PermissionDeniedDetails)
	}
	switch {
	case reason == nil && got != nil:
		t.Errorf("details %v, want none", got)
	case reason != nil && (got == nil || got.Reason != *reason):
		t.Errorf("details %v, want %s", got, reason)
	}
}

func workload(name string, selectors ...string) Entry {
	e := Entry{SPIFFEID: spiffeid.RequireFromPath(testTD, "/"+name)}
	if selectors == nil {
		selectors = []string{"uid:1000"}
	}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, attestor.Selector{Type: "unix", Value: s})
	}
	return e
}

func TestStartUpIsQuick(t *testing.T) {
	best := time.Hour
	for range 3 {
		begin := time.Now()
		srv, end := serve(t, Config{Entries: []Entry{workload("a")}})
		if _, err := dial(t, srv, nil).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
			t.Fatal(err)
		}
		best = min(best, time.Since(begin))
		end()
	}
	t.Logf("from New to the first answer: %s", best)
	if best > 100*time.Millisecond {
		t.Errorf("from New to the first answer took %s, want under 100 ms", best)
	}
}

func TestConfigRefused(t *testing.T) {
	bad := func(change func(*Config)) Config {
		cfg := Config{TrustDomain: testTD, Entries: []Entry{workload("a")}}
		change(&cfg)
		return cfg
	}
	entry := func(change func(*Entry)) Config {
		return bad(func(c *Config) { change(&c.Entries[0]) })
	}
	tests := []struct {
		name string
		cfg  Config
		want string
	}{
		{"no trust domain", bad(func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} }), "trust domain is missing"},
		{"all interfaces", bad(func(c *Config) { c.Listen = "0.0.0.0:0" }), "not a loopback address"},
		{"no host", bad(func(c *Config) { c.Listen = ":0" }), "not a loopback address"},
		{"another host", bad(func(c *Config) { c.Listen = "192.0.2.1:0" }), "not a loopback address"},
		{"a name", bad(func(c *Config) { c.Listen = "example.org:0" }), "not a loopback address"},
		{"unix URL", bad(func(c *Config) { c.Listen = "unix:///tmp/s" }), "loopback TCP only"},
		{"unix", bad(func(c *Config) { c.Listen = "unix:s" }), "loopback TCP only"},
		{"a path", bad(func(c *Config) { c.Listen = "/tmp/s" }), "loopback TCP only"},
		{"no port", bad(func(c *Config) { c.Listen = "127.0.0.1" }), "not a host:port"},
		{"port name", bad(func(c *Config) { c.Listen = "127.0.0.1:https" }), "not a number"},
		{"negative TTL", bad(func(c *Config) { c.SVIDTTL = -1 }), "lifetime of the SVID"},
		{"short agent TTL", bad(func(c *Config) { c.AgentTTL = time.Millisecond }), "lifetime of the agent"},
		{"long CA TTL", bad(func(c *Config) { c.CATTL = maxTTL + 1 }), "lifetime of the CA"},
		{"token", bad(func(c *Config) { c.JoinTokens = []string{"good", "a/b"} }), "join token 2 of 2"},
		{"empty token", bad(func(c *Config) { c.JoinTokens = []string{""} }), "join token 1 of 1"},
		{"no ID", entry(func(e *Entry) { e.SPIFFEID = spiffeid.ID{} }), "no SPIFFE ID"},
		{"foreign ID", entry(func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://other/a") }), "not in the trust domain"},
		{"trust domain ID", entry(func(e *Entry) { e.SPIFFEID = testTD.ID() }), "no path"},
		{"reserved ID", entry(func(e *Entry) { e.SPIFFEID = spiffeid.RequireFromPath(testTD, "/spire/agent/x") }), "reserved"},
		{"foreign parent", entry(func(e *Entry) { e.ParentID = spiffeid.RequireFromString("spiffe://other/a") }), "parent"},
		{"entry ID", entry(func(e *Entry) { e.ID = "a b" }), "entry ID"},
		{"long entry ID", entry(func(e *Entry) { e.ID = strings.Repeat("a", 256) }), "entry ID"},
		{"no selector", entry(func(e *Entry) { e.Selectors = nil }), "no selector"},
		{"selector without value", entry(func(e *Entry) { e.Selectors[0].Value = "" }), "not TYPE:VALUE"},
		{"selector type", entry(func(e *Entry) { e.Selectors[0].Type = "a:b" }), "not TYPE:VALUE"},
		{"entry TTL", entry(func(e *Entry) { e.TTL = -time.Second }), "lifetime"},
		{"hint", entry(func(e *Entry) { e.Hint = strings.Repeat("é", 1025) }), "hint"},
		{"DNS name", entry(func(e *Entry) { e.DNSNames = []string{"a..b"} }), "not a DNS name"},
		{"DNS dash", entry(func(e *Entry) { e.DNSNames = []string{"-a.b"} }), "not a DNS name"},
		{"federates with itself", entry(func(e *Entry) { e.FederatesWith = []spiffeid.TrustDomain{testTD} }), "cannot federate"},
		{"twice", bad(func(c *Config) { c.Entries = append(c.Entries, c.Entries[0]) }), "entry 2 of 2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			srv, err := New(tt.cfg)
			if err == nil {
				srv.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if strings.Contains(fmt.Sprint(err), "a/b") {
				t.Error("the error shows a token")
			}
		})
	}
}

func TestListenAccepted(t *testing.T) {
	for _, listen := range []string{"", "127.0.0.1:0", "localhost:0", "127.1.2.3:0"} {
		srv, err := New(Config{TrustDomain: testTD, Listen: listen})
		if err != nil {
			t.Errorf("%q: %v", listen, err)
			continue
		}
		if !srv.Addr().(*net.TCPAddr).IP.IsLoopback() {
			t.Errorf("%q listens on %s", listen, srv.Addr())
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestSaysNotForProduction(t *testing.T) {
	var out bytes.Buffer
	log := hclog.New(&hclog.LoggerOptions{Output: &out})
	srv, end := serve(t, Config{Log: log})
	attest(t, srv, srv.JoinToken())
	end()
	if !strings.Contains(out.String(), "[WARN]") || !strings.Contains(out.String(), "NOT FOR PRODUCTION") {
		t.Errorf("log: %s", out.String())
	}
}

func TestBusyAddress(t *testing.T) {
	srv, _ := serve(t, Config{})
	other, err := New(Config{TrustDomain: testTD, Listen: srv.Addr().String()})
	if err == nil {
		other.Close()
		t.Fatal("two servers on one address")
	}
	if want := "stop it, or listen on another port (0 takes a free one)"; !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestServeEndsUnderOpenStreams(t *testing.T) {
	srv, end := serve(t, Config{})
	c, _ := agent(t, srv)
	waiting, err := dial(t, srv, nil).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	end()
	if took := time.Since(begin); took > gracefulStopAfter+3*time.Second {
		t.Errorf("ended after %s", took)
	}
	if _, err := waiting.Recv(); err == nil {
		t.Error("a stream outlived the server")
	}
}

func TestServeWithEndedContext(t *testing.T) {
	srv, err := New(Config{TrustDomain: testTD})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := srv.Serve(ctx); err != nil {
		t.Error(err)
	}
}

func TestServeAfterClose(t *testing.T) {
	srv, err := New(Config{TrustDomain: testTD})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
	if err := srv.Serve(t.Context()); !errors.Is(err, grpc.ErrServerStopped) {
		t.Errorf("got %v", err)
	}
}

func TestBundlePEM(t *testing.T) {
	srv, err := New(Config{TrustDomain: testTD})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	block, rest := pem.Decode(srv.BundlePEM())
	if block == nil || len(rest) > 0 {
		t.Fatalf("not one PEM block: %q", srv.BundlePEM())
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !ca.IsCA || len(ca.URIs) != 1 || ca.URIs[0].String() != "spiffe://dev.test" || ca.KeyUsage&x509.KeyUsageCertSign == 0 || ca.PermittedURIDomains != nil {
		t.Errorf("profile of the authority: %+v", ca)
	}
	if life := ca.NotAfter.Sub(ca.NotBefore); life < defaultCATTL {
		t.Errorf("default lifetime %s", life)
	}
}

// TestManyAtOnce is for the race detector: everything at the same time.
func TestManyAtOnce(t *testing.T) {
	srv, _ := serve(t, Config{Entries: []Entry{workload("a"), workload("b")}, Dir: t.TempDir() + "/state"})
	id := srv.entries.authorized(spiffeid.ID{})[0].entry.Id
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c, cert := agent(t, srv)
			for range 5 {
				key := newKey(t)
				resp, err := c.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: id, Csr: newCSR(t, key)}}})
				if err != nil || resp.Results[0].Status.Code != 0 {
					t.Errorf("sign: %v %v", resp, err)
				}
				if _, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
					t.Error(err)
				}
				if got := syncWhole(t, c, nil); len(got) < 2 {
					t.Errorf("%d entries", len(got))
				}
			}
			if i%2 == 0 {
				if err := srv.Ban(agentID(cert)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 5 {
			if err := srv.SetEntries([]Entry{workload("a"), workload("b"), workload(fmt.Sprint("c", i))}); err != nil {
				t.Error(err)
			}
			if err := srv.RotateCA(); err != nil {
				t.Error(err)
			}
			srv.JoinToken()
			srv.BundlePEM()
		}
	})
	wg.Wait()
}
