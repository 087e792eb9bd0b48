package spire

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")
	serverID   = "spiffe://example.org/spire/server"
	agentID    = "spiffe://example.org/spire/agent/join_token/one"
)

// authority is a CA of one self-signed certificate.
type authority struct {
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	serial atomic.Int64
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "test authority"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) roots() []*x509.Certificate { return []*x509.Certificate{a.cert} }

// sign returns a certificate for key with the given URI SANs.
func (a *authority) sign(key crypto.PublicKey, uris ...string) []byte {
	return a.signUntil(key, time.Now().Add(time.Hour), uris...)
}

func (a *authority) signUntil(key crypto.PublicKey, notAfter time.Time, uris ...string) []byte {
	return a.signFor(key, time.Now().Add(-time.Hour), notAfter, uris...)
}

func (a *authority) signFor(key crypto.PublicKey, notBefore, notAfter time.Time, uris ...string) []byte {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1 + a.serial.Add(1)),
		NotBefore:    notBefore,
		NotAfter:     notAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key, a.key)
	if err != nil {
		panic(err)
	}
	return der
}

func (a *authority) identity(t testing.TB, id string) *Identity {
	t.Helper()
	key := newKey(t)
	return &Identity{Chain: [][]byte{a.sign(key.Public(), id)}, Key: key}
}

func newCSR(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// server is a SPIRE Server as far as agents see one. Its fields are set before
// start; a nil func is an unimplemented method.
type server struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer

	ca      *authority
	id      string                                                // in its certificate
	expired bool                                                  // its certificate
	tls     func(*tls.Config)                                     // changes what start has set
	attest  func(agentv1.Agent_AttestAgentServer) error           // AttestAgent
	status  func(context.Context) error                           // PostStatus
	renew   func(csr []byte) ([][]byte, error)                    // RenewAgent
	bundle  func() (*types.Bundle, error)                         // GetBundle
	foreign func(string) (*types.Bundle, error)                   // GetFederatedBundle
	entries func() []*types.Entry                                 // SyncAuthorizedEntries as SPIRE has it, GetAuthorizedEntries
	sync    func(entryv1.Entry_SyncAuthorizedEntriesServer) error // instead of entries
	sign    func(*svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error)
	jwt     func(*svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error)
	wit     func(*svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error)

	moreIDs []string // in its certificate, beside id

	addr   string
	serial string // of its certificate
	grpc   *grpc.Server
	done   chan struct{}

	unpaged bool // has no SyncAuthorizedEntries

	// ended tells of the end of each connection; begun and resumed count
	// handshakes.
	ended          chan struct{}
	begun, resumed atomic.Int64
	// asked counts the ids clients wanted in full.
	asked atomic.Int64
}

// newServer returns a server that accepts any agent and has no entries.
func newServer(t testing.TB) *server {
	s := &server{ca: newAuthority(t), id: serverID, addr: "127.0.0.1:0", ended: make(chan struct{}, 100)}
	s.status = func(context.Context) error { return nil }
	s.bundle = func() (*types.Bundle, error) { return bundleOf("example.org", s.ca), nil }
	s.entries = func() []*types.Entry { return nil }
	s.attest = func(stream agentv1.Agent_AttestAgentServer) error {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		return stream.Send(s.attested(req, agentID))
	}
	return s
}

func bundleOf(td string, authorities ...*authority) *types.Bundle {
	b := &types.Bundle{TrustDomain: td, SequenceNumber: 7, RefreshHint: 60}
	for _, a := range authorities {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: a.cert.Raw})
	}
	return b
}

// attested is the result of an attestation that began with req.
func (s *server) attested(req *agentv1.AttestAgentRequest, uris ...string) *agentv1.AttestAgentResponse {
	key, err := csrKey(req.GetParams().GetParams().GetCsr())
	if err != nil {
		panic(err)
	}
	return attestResult(s.ca.sign(key, uris...))
}

func attestResult(chain ...[]byte) *agentv1.AttestAgentResponse {
	return &agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: &types.X509SVID{CertChain: chain}, Reattestable: true},
	}}
}

func (s *server) start(t testing.TB) *server {
	t.Helper()
	listener, err := net.Listen("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	s.addr = listener.Addr().String()
	key := newKey(t)
	notAfter := time.Now().Add(time.Hour)
	if s.expired {
		notAfter = time.Now().Add(-time.Minute)
	}
	cert := s.ca.signUntil(key.Public(), notAfter, append([]string{s.id}, s.moreIDs...)...)
	if parsed, err := x509.ParseCertificate(cert); err == nil { // some tests make one that is none
		s.serial = parsed.SerialNumber.Text(16)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}},
		ClientAuth:   tls.RequestClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			s.begun.Add(1)
			if cs.DidResume {
				s.resumed.Add(1)
			}
			return nil
		},
	}
	if s.tls != nil {
		s.tls(config)
	}
	s.grpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.StatsHandler(connStats{s.ended}))
	agentv1.RegisterAgentServer(s.grpc, s)
	bundlev1.RegisterBundleServer(s.grpc, s)
	entryv1.RegisterEntryServer(s.grpc, s)
	svidv1.RegisterSVIDServer(s.grpc, s)
	s.done = make(chan struct{})
	go func() {
		defer close(s.done)
		_ = s.grpc.Serve(listener)
	}()
	t.Cleanup(s.stop)
	return s
}

func (s *server) stop() {
	s.grpc.Stop()
	<-s.done
}

// client returns a client that trusts the server and has an identity.
func (s *server) client(t testing.TB) *Client {
	t.Helper()
	c := s.bareClient(t)
	c.SetRoots(s.ca.roots())
	c.SetIdentity(s.ca.identity(t, agentID))
	return c
}

func (s *server) bareClient(t testing.TB) *Client {
	t.Helper()
	c, err := New(Config{Address: s.addr, TrustDomain: exampleOrg})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// connStats reports the end of connections.
type connStats struct{ ended chan struct{} }

func (connStats) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (connStats) HandleRPC(context.Context, stats.RPCStats)                         {}
func (connStats) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (h connStats) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, ok := s.(*stats.ConnEnd); ok {
		h.ended <- struct{}{}
	}
}

// callerSerial is the serial number of the caller's certificate, 0 for none.
func callerSerial(ctx context.Context) int64 {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return 0
	}
	return info.State.PeerCertificates[0].SerialNumber.Int64()
}

func denied(t testing.TB, reason types.PermissionDeniedDetails_Reason) error {
	t.Helper()
	st, err := status.New(codes.PermissionDenied, "no").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func (s *server) AttestAgent(stream agentv1.Agent_AttestAgentServer) error { return s.attest(stream) }

func (s *server) PostStatus(ctx context.Context, _ *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	return &agentv1.PostStatusResponse{}, s.status(ctx)
}

func (s *server) RenewAgent(_ context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	chain, err := s.renew(req.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	return &agentv1.RenewAgentResponse{Svid: &types.X509SVID{CertChain: chain}}, nil
}

func (s *server) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	return s.bundle()
}

func (s *server) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	return s.foreign(req.GetTrustDomain())
}

func (s *server) BatchNewX509SVID(_ context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	return s.sign(req)
}

func (s *server) NewJWTSVID(_ context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	return s.jwt(req)
}

func (s *server) BatchNewWITSVID(_ context.Context, req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	return s.wit(req)
}

func (s *server) GetAuthorizedEntries(_ context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	if !req.GetOutputMask().GetRevisionNumber() {
		return nil, status.Error(codes.InvalidArgument, "no revision number")
	}
	return &entryv1.GetAuthorizedEntriesResponse{Entries: s.entries()}, nil
}

// serverPage is SPIRE Server's page of entries.
const serverPage = 500

func (s *server) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	switch {
	case s.unpaged:
		return status.Error(codes.Unimplemented, "unknown method")
	case s.sync != nil:
		return s.sync(stream)
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(first.GetIds()) > 0 || !first.GetOutputMask().GetRevisionNumber() || !first.GetOutputMask().GetCreatedAt() {
		return status.Error(codes.InvalidArgument, "first request")
	}
	entries := s.entries()
	if len(entries) <= serverPage {
		return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: entries})
	}
	byID := map[string]*types.Entry{}
	for page := range slices.Chunk(entries, serverPage) {
		answer := &entryv1.SyncAuthorizedEntriesResponse{More: page[len(page)-1] != entries[len(entries)-1]}
		for _, e := range page {
			byID[e.Id] = e
			answer.EntryRevisions = append(answer.EntryRevisions, &entryv1.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
			return nil
		}
		if err != nil {
			return err
		}
		if len(req.GetIds()) > serverPage || !slices.IsSorted(req.GetIds()) {
			return status.Error(codes.InvalidArgument, "ids")
		}
		s.asked.Add(int64(len(req.GetIds())))
		answer := &entryv1.SyncAuthorizedEntriesResponse{}
		for _, id := range req.GetIds() {
			if e := byID[id]; e != nil {
				answer.Entries = append(answer.Entries, e)
			}
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
	}
}

// gate holds callers until it is opened, and tells when one has come.
type gate struct {
	arrived chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate() *gate { return &gate{arrived: make(chan struct{}, 100), open: make(chan struct{})} }

func (g *gate) pass(ctx context.Context) error {
	g.arrived <- struct{}{}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }
