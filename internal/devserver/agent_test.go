package devserver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	expired     = types.PermissionDeniedDetails_AGENT_EXPIRED.Enum()
	notActive   = types.PermissionDeniedDetails_AGENT_NOT_ACTIVE.Enum()
	notAttested = types.PermissionDeniedDetails_AGENT_NOT_ATTESTED.Enum()
	banned      = types.PermissionDeniedDetails_AGENT_BANNED.Enum()
)

// ping is a call that only agents may make.
func ping(t testing.TB, c client) error {
	t.Helper()
	_, err := c.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "test"})
	return err
}

func TestAttestJoinToken(t *testing.T) {
	srv, _ := serve(t, Config{JoinTokens: []string{"from-config"}, AgentTTL: 10 * time.Minute})
	for _, token := range []string{"from-config", srv.JoinToken()} {
		key := newKey(t)
		resp, err := sendAttest(t, dial(t, srv, nil), tokenParams(token, newCSR(t, key)))
		if err != nil {
			t.Fatal(err)
		}
		result := resp.GetResult()
		if result.Reattestable {
			t.Error("join_token cannot re-attest")
		}
		cert := certificate(t, result.Svid, key)
		want := "spiffe://dev.test/spire/agent/join_token/" + token
		if got := agentID(cert).String(); got != want || "spiffe://"+result.Svid.Id.TrustDomain+result.Svid.Id.Path != want {
			t.Errorf("agent ID %s and %v, want %s", got, result.Svid.Id, want)
		}
		if result.Svid.ExpiresAt != cert.Leaf.NotAfter.Unix() {
			t.Errorf("expires_at %d, certificate %d", result.Svid.ExpiresAt, cert.Leaf.NotAfter.Unix())
		}
		if left := time.Until(cert.Leaf.NotAfter); left > 10*time.Minute || left < 9*time.Minute {
			t.Errorf("agent SVID lives %s", left)
		}
		if err := ping(t, dial(t, srv, cert)); err != nil {
			t.Error(err)
		}
		_, err = sendAttest(t, dial(t, srv, nil), tokenParams(token, newCSR(t, key)))
		wantCode(t, err, codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
		if err := ping(t, dial(t, srv, cert)); err != nil {
			t.Errorf("a used token shown again harmed the agent: %v", err)
		}
	}
	_, err := sendAttest(t, dial(t, srv, nil), tokenParams("unknown", newCSR(t, newKey(t))))
	wantCode(t, err, codes.InvalidArgument, "join token does not exist")
}

func TestAttestRefused(t *testing.T) {
	srv, _ := serve(t, Config{})
	csr := newCSR(t, newKey(t))
	change := func(f func(*agentv1.AttestAgentRequest_Params)) *agentv1.AttestAgentRequest {
		req := tokenParams(srv.JoinToken(), csr)
		f(req.GetParams())
		return req
	}
	tests := []struct {
		name string
		req  *agentv1.AttestAgentRequest
		code codes.Code
		want string
	}{
		{"nothing", &agentv1.AttestAgentRequest{}, codes.InvalidArgument, "missing params"},
		{"response first", &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{}}, codes.InvalidArgument, "missing params"},
		{"no data", change(func(p *agentv1.AttestAgentRequest_Params) { p.Data = nil }), codes.InvalidArgument, "missing attestation data"},
		{"no params", change(func(p *agentv1.AttestAgentRequest_Params) { p.Params = nil }), codes.InvalidArgument, "missing X509-SVID parameters"},
		{"no CSR", change(func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = nil }), codes.InvalidArgument, "missing CSR"},
		{"no type", change(func(p *agentv1.AttestAgentRequest_Params) { p.Data.Type = "" }), codes.InvalidArgument, "missing attestation data type"},
		{"no payload", change(func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = nil }), codes.InvalidArgument, "missing attestation data payload"},
		{"bad CSR", change(func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = []byte("x") }), codes.InvalidArgument, "failed to parse CSR"},
		{"huge CSR", change(func(p *agentv1.AttestAgentRequest_Params) { p.Params.Csr = make([]byte, maxCSR+1) }), codes.InvalidArgument, "failed to parse CSR: longer"},
		{"x509pop", change(func(p *agentv1.AttestAgentRequest_Params) { p.Data.Type = "x509pop" }), codes.FailedPrecondition, `could not find node attestor type "x509pop"; the development server knows join_token only`},
		{"huge message", change(func(p *agentv1.AttestAgentRequest_Params) { p.Data.Payload = make([]byte, maxMessage) }), codes.ResourceExhausted, "larger than max"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := sendAttest(t, dial(t, srv, nil), tt.req)
			wantCode(t, err, tt.code, tt.want)
		})
	}
	t.Run("closed", func(t *testing.T) {
		stream, err := dial(t, srv, nil).AttestAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		wantCode(t, err, codes.InvalidArgument, "failed to receive request")
	})
	t.Run("a failed attempt uses the token up", func(t *testing.T) {
		token := srv.JoinToken()
		c := dial(t, srv, nil)
		_, err := sendAttest(t, c, tokenParams(token, []byte("x")))
		wantCode(t, err, codes.InvalidArgument, "failed to parse CSR")
		_, err = sendAttest(t, c, tokenParams(token, csr))
		wantCode(t, err, codes.InvalidArgument, "join token does not exist")
	})
}

func TestWithoutCertificate(t *testing.T) {
	srv, _ := serve(t, Config{})
	c := dial(t, srv, nil)
	if _, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
		t.Errorf("anyone may read the bundle: %v", err)
	}
	wantDenied(t, ping(t, c), nil)
	_, err := c.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
	wantDenied(t, err, nil)
	_, err = c.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	wantDenied(t, err, nil)
	_, err = c.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{})
	wantDenied(t, err, nil)
	_, err = c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{})
	wantDenied(t, err, nil)
	_, err = c.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{})
	wantDenied(t, err, nil)
	stream, err := c.SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantDenied(t, err, nil)
}

func TestAdminMethodsRefused(t *testing.T) {
	srv, _ := serve(t, Config{})
	c, _ := agent(t, srv)
	_, err := c.ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	wantDenied(t, err, nil)
	_, err = c.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{})
	wantDenied(t, err, nil)
	_, err = c.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{})
	wantDenied(t, err, nil)
	_, err = c.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{})
	wantDenied(t, err, nil)
	_, err = c.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{})
	wantCode(t, err, codes.Unimplemented, "WIT functionality is disabled")
}

func TestForeignCertificates(t *testing.T) {
	clk := newClock()
	srv, _ := serve(t, Config{Now: clk.Now, AgentTTL: time.Minute})
	_, old := agent(t, srv)
	clk.advance(2 * time.Minute)
	selfSigned := func(uris ...string) *tls.Certificate {
		key := newKey(t)
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: clk.Now().Add(-time.Hour), NotAfter: clk.Now().Add(time.Hour)}
		for _, u := range uris {
			uri, err := url.Parse(u)
			if err != nil {
				t.Fatal(err)
			}
			tmpl.URIs = append(tmpl.URIs, uri)
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	for name, cert := range map[string]*tls.Certificate{
		"self-signed":        selfSigned("spiffe://dev.test/spire/agent/join_token/x"),
		"other trust domain": selfSigned("spiffe://other.test/spire/agent/join_token/x"),
		"no SPIFFE ID":       selfSigned(),
		"two SPIFFE IDs":     selfSigned("spiffe://dev.test/a", "spiffe://dev.test/b"),
		"expired":            old,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := dial(t, srv, cert).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			wantCode(t, err, codes.Unavailable, "")
		})
	}
}

func TestNoResumption(t *testing.T) {
	srv, _ := serve(t, Config{})
	_, cert := agent(t, srv)
	cache := tls.NewLRUClientSessionCache(4)
	for range 2 {
		conn, err := tls.Dial("tcp", srv.Addr().String(), &tls.Config{
			InsecureSkipVerify: true, ClientSessionCache: cache, ServerName: "s", NextProtos: []string{"h2"},
			Certificates: []tls.Certificate{*cert},
		})
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1) // reading takes in tickets, if there were any
		if _, err := conn.Read(buf); err != nil {
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		conn.Close()
	}
}

func TestRenew(t *testing.T) {
	srv, _ := serve(t, Config{})
	before, cert := agent(t, srv)
	renew := func(c client) *tls.Certificate {
		key := newKey(t)
		resp, err := c.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key)}})
		if err != nil {
			t.Fatal(err)
		}
		return certificate(t, resp.Svid, key)
	}
	forgotten := renew(before)
	next := renew(before)
	if agentID(next) != agentID(cert) || next.Leaf.SerialNumber.Cmp(cert.Leaf.SerialNumber) == 0 {
		t.Errorf("renewed %s %s from %s %s", agentID(next), next.Leaf.SerialNumber, agentID(cert), cert.Leaf.SerialNumber)
	}
	if err := ping(t, before); err != nil {
		t.Errorf("the old SVID before the new one's first use: %v", err)
	}
	wantDenied(t, ping(t, dial(t, srv, forgotten)), notActive)
	after := dial(t, srv, next)
	if err := ping(t, after); err != nil {
		t.Errorf("the new SVID: %v", err)
	}
	wantDenied(t, ping(t, before), notActive)
	if err := ping(t, after); err != nil {
		t.Errorf("the new SVID again: %v", err)
	}
	_, err := after.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
	wantCode(t, err, codes.InvalidArgument, "params cannot be nil")
	_, err = after.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{}})
	wantCode(t, err, codes.InvalidArgument, "missing CSR")
}

func TestPostStatusVersionBound(t *testing.T) {
	srv, _ := serve(t, Config{})
	c, _ := agent(t, srv)
	for _, version := range []string{"", "1.0", strings.Repeat("v", 255)} {
		if _, err := c.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: version}); err != nil {
			t.Error(err)
		}
	}
	_, err := c.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: strings.Repeat("v", 256)})
	wantCode(t, err, codes.InvalidArgument, "agent version is too long")
}

func TestBanAndEvict(t *testing.T) {
	srv, _ := serve(t, Config{})
	c, cert := agent(t, srv)
	id := agentID(cert)

	if err := srv.Evict(id); err != nil {
		t.Fatal(err)
	}
	wantDenied(t, ping(t, c), notAttested)
	if err := srv.Evict(id); err == nil {
		t.Error("evicted twice")
	}
	if err := srv.Ban(id); err == nil {
		t.Error("banned an agent that is not attested")
	}

	token := srv.JoinToken()
	cert = attest(t, srv, token)
	c = dial(t, srv, cert)
	if err := srv.Ban(agentID(cert)); err != nil {
		t.Fatal(err)
	}
	wantDenied(t, ping(t, c), banned)
	wantDenied(t, ping(t, dial(t, srv, cert)), banned)

	// A token is used once, so that only a server that is told the same token
	// again meets a banned agent in attestation.
	srv.nodes.mu.Lock()
	srv.nodes.tokens[token] = struct{}{}
	srv.nodes.mu.Unlock()
	_, err := sendAttest(t, dial(t, srv, nil), tokenParams(token, newCSR(t, newKey(t))))
	wantCode(t, err, codes.PermissionDenied, "failed to attest: agent is banned")
	if len(status.Convert(err).Details()) > 0 {
		t.Error("the real server sends no details here")
	}
}

func TestBannedWhileRenewing(t *testing.T) {
	srv, _ := serve(t, Config{})
	_, cert := agent(t, srv)
	if err := srv.Ban(agentID(cert)); err != nil {
		t.Fatal(err)
	}
	// The call was authorized before the ban and comes to its end after it.
	a := &agentService{s: srv}
	if err := a.update(agentID(cert), func(n *node) { n.NewSerial = "1" }); err != nil {
		t.Fatal(err)
	}
	if !srv.nodes.isBanned(agentID(cert).String()) || srv.nodes.known[agentID(cert).String()].NewSerial != "" {
		t.Error("renewal undid a ban")
	}
	err := a.update(spiffeid.RequireFromPath(testTD, "/spire/agent/none"), func(*node) {})
	wantCode(t, err, codes.NotFound, "agent not found")
}

func TestExpiredOnLiveConnection(t *testing.T) {
	clk := newClock()
	srv, _ := serve(t, Config{Now: clk.Now, AgentTTL: time.Minute})
	c, _ := agent(t, srv)
	if err := ping(t, c); err != nil {
		t.Fatal(err)
	}
	clk.advance(2 * time.Minute)
	wantDenied(t, ping(t, c), expired)
}

func TestWorkloadIsNoAgent(t *testing.T) {
	srv, _ := serve(t, Config{Entries: []Entry{workload("a")}})
	c, _ := agent(t, srv)
	key := newKey(t)
	signed := sign(t, c, srv.entries.authorized(spiffeid.ID{})[0].entry.Id, newCSR(t, key))
	wantDenied(t, ping(t, dial(t, srv, certificate(t, signed, key))), notAttested)
}

func TestServerCertificate(t *testing.T) {
	clk := newClock()
	srv, _ := serve(t, Config{Now: clk.Now})
	fetch := func() *x509.Certificate {
		conn, err := tls.Dial("tcp", srv.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0]
	}
	first := fetch()
	if first.URIs[0].String() != "spiffe://dev.test/spire/server" {
		t.Errorf("server is %s", first.URIs)
	}
	if err := srv.RotateCA(); err != nil {
		t.Fatal(err)
	}
	if !fetch().Equal(first) {
		t.Error("the server changed its certificate before agents could know the new authority")
	}
	clk.advance(31 * time.Minute)
	second := fetch()
	if second.Equal(first) {
		t.Error("the server kept its certificate beyond its half-life")
	}
	if err := second.CheckSignatureFrom(srv.ca.signer().cert); err != nil {
		t.Errorf("not signed by the new authority: %v", err)
	}
}

func sign(t testing.TB, c client, entryID string, csr []byte) *types.X509SVID {
	t.Helper()
	resp, err := c.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entryID, Csr: csr}}})
	if err != nil {
		t.Fatal(err)
	}
	if resp.Results[0].Status.Code != int32(codes.OK) {
		t.Fatal(resp.Results[0].Status)
	}
	return resp.Results[0].Svid
}

func otherKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
