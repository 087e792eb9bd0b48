package agent_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/testca"
)

// fake is a server for what the development server does not do: it fails when it
// is told to, signs when it is let, and says of nodes what a test wants.
type fake struct {
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	entryv1.UnimplementedEntryServer
	svidv1.UnimplementedSVIDServer

	t    *testing.T
	ca   *testca.Authority
	addr string
	stop func()

	mu           sync.Mutex // guards the following
	old          bool       // has no SyncAuthorizedEntries
	reattestable bool
	agentTTL     time.Duration
	clock        time.Duration // by how much its clock is ahead of ours
	renewErr     error
	entries      []*types.Entry
	entriesErr   error
	authorities  []*testca.Authority // of the bundle
	federated    map[string]*testca.Authority
	federatedErr error
	statusErr    error
	versions     []string   // that agents told
	attested     int        // times
	signed       [][]string // entry IDs of each call that was answered
	signs        chan struct{}
}

// newFake returns a server that takes any node. It listens after start.
func newFake(t *testing.T, addr string) *fake {
	t.Helper()
	ca := testca.New(t, td.Name())
	return &fake{t: t, ca: ca, addr: addr, agentTTL: time.Hour, reattestable: true, authorities: []*testca.Authority{ca}, federated: map[string]*testca.Authority{}}
}

func (f *fake) start() *fake {
	f.t.Helper()
	listener, err := net.Listen("tcp", f.addr)
	if err != nil {
		f.t.Fatal(err)
	}
	f.addr = listener.Addr().String()
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{f.ca.SVID("/spire/server")}, ClientAuth: tls.RequestClientCert,
	})))
	agentv1.RegisterAgentServer(server, f)
	bundlev1.RegisterBundleServer(server, f)
	entryv1.RegisterEntryServer(server, f)
	svidv1.RegisterSVIDServer(server, f)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	f.stop = sync.OnceFunc(func() { server.Stop(); <-done })
	f.t.Cleanup(f.stop)
	return f
}

// change changes what the server does from now on.
func (f *fake) change(how func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	how()
}

// is reads what has been asked of the server.
func (f *fake) is(what func() bool) func() bool {
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return what()
	}
}

func (f *fake) sign(csr []byte, path string, ttl time.Duration) ([][]byte, error) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	now := time.Now().Add(f.clock)
	template := f.ca.SVID(path).Leaf
	template.NotBefore, template.NotAfter = now.Add(-time.Second), now.Add(ttl)
	der, err := x509.CreateCertificate(rand.Reader, template, f.ca.Cert, request.PublicKey, f.ca.Key)
	return [][]byte{der}, err
}

func (f *fake) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	request, err := stream.Recv()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	chain, err := f.sign(request.GetParams().GetParams().GetCsr(), "/spire/agent/fake/one", f.agentTTL)
	if err != nil {
		return err
	}
	f.attested++
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: &types.X509SVID{CertChain: chain}, Reattestable: f.reattestable,
	}}})
}

func (f *fake) RenewAgent(_ context.Context, request *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.renewErr != nil {
		return nil, f.renewErr
	}
	chain, err := f.sign(request.GetParams().GetCsr(), "/spire/agent/fake/one", f.agentTTL)
	return &agentv1.RenewAgentResponse{Svid: &types.X509SVID{CertChain: chain}}, err
}

func (f *fake) PostStatus(_ context.Context, request *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.versions = append(f.versions, request.GetAgentVersion())
	return &agentv1.PostStatusResponse{}, f.statusErr
}

func bundle(td string, authorities ...*testca.Authority) *types.Bundle {
	b := &types.Bundle{TrustDomain: td}
	for _, a := range authorities {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: a.Cert.Raw})
	}
	return b
}

func (f *fake) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return bundle(td.Name(), f.authorities...), nil
}

func (f *fake) GetFederatedBundle(_ context.Context, request *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := f.federated[request.GetTrustDomain()]
	switch {
	case f.federatedErr != nil:
		return nil, f.federatedErr
	case a == nil:
		return nil, status.Error(codes.NotFound, "no such bundle")
	}
	return bundle(request.GetTrustDomain(), a), nil
}

func (f *fake) GetAuthorizedEntries(context.Context, *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &entryv1.GetAuthorizedEntriesResponse{Entries: f.entries}, f.entriesErr
}

func (f *fake) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.old:
		return status.Error(codes.Unimplemented, "unknown method SyncAuthorizedEntries")
	case f.entriesErr != nil:
		return f.entriesErr
	}
	return stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: f.entries})
}

func (f *fake) BatchNewX509SVID(ctx context.Context, request *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	if len(request.GetParams()) > 500 {
		return nil, status.Error(codes.ResourceExhausted, "rate (500) exceeded")
	}
	if f.signs != nil {
		select {
		case <-f.signs:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := &svidv1.BatchNewX509SVIDResponse{}
	var ids []string
	for _, p := range request.GetParams() {
		result := &svidv1.BatchNewX509SVIDResponse_Result{}
		i := slices.IndexFunc(f.entries, func(e *types.Entry) bool { return e.GetId() == p.GetEntryId() })
		if i < 0 {
			result.Status = &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}
		} else {
			chain, err := f.sign(p.GetCsr(), f.entries[i].GetSpiffeId().GetPath(), time.Hour)
			if err != nil {
				return nil, err
			}
			result.Status, result.Svid = &types.Status{}, &types.X509SVID{CertChain: chain}
		}
		ids = append(ids, p.GetEntryId())
		answer.Results = append(answer.Results, result)
	}
	f.signed = append(f.signed, ids)
	return answer, nil
}

// entryFor is an entry whose path is its ID, for processes of a uid.
func entryFor(id, uid string, federates ...string) *types.Entry {
	return &types.Entry{
		Id: id, SpiffeId: &types.SPIFFEID{TrustDomain: td.Name(), Path: "/" + id},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:" + uid}}, FederatesWith: federates, CreatedAt: 1,
	}
}

// denial is a refusal with its reason, as SPIRE Server tells it.
func denial(t *testing.T, reason types.PermissionDeniedDetails_Reason) error {
	t.Helper()
	st, err := status.New(codes.PermissionDenied, "no").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

// forwarder is one address before several servers: what a Service of Kubernetes
// is to an agent.
type forwarder struct {
	net.Listener
	mu     sync.Mutex // guards the following
	to     string
	conns  map[net.Conn]struct{}
	copies sync.WaitGroup
}

func newForwarder(t *testing.T, to string) *forwarder {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{Listener: listener, to: to, conns: map[net.Conn]struct{}{}}
	f.copies.Go(f.serve)
	t.Cleanup(func() { f.Close(); f.turn(""); f.copies.Wait() })
	return f
}

func (f *forwarder) serve() {
	for {
		in, err := f.Accept()
		if err != nil {
			return
		}
		f.mu.Lock()
		out, err := net.Dial("tcp", f.to)
		if err != nil {
			in.Close()
		} else {
			f.conns[in], f.conns[out] = struct{}{}, struct{}{}
			for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
				f.copies.Go(func() { _, _ = io.Copy(way[0], way[1]); way[0].Close(); way[1].Close() })
			}
		}
		f.mu.Unlock()
	}
}

// turn ends all connections. New ones lead to another server.
func (f *forwarder) turn(to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.to = to
	for c := range f.conns {
		c.Close()
	}
	clear(f.conns)
}
