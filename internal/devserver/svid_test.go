package devserver

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
)

func TestX509SVIDProfile(t *testing.T) {
	e := workload("orders")
	e.TTL = 90 * time.Second
	e.DNSNames = []string{"orders.internal", "*.orders.internal"}
	srv, _ := serve(t, Config{Entries: []Entry{e, workload("default")}, SVIDTTL: 10 * time.Minute})
	c, _ := agent(t, srv)
	key := otherKey(t) // another curve than the authority's
	svid := sign(t, c, idOf(e), newCSR(t, key))
	if svid.Id.Path != "/orders" || len(svid.CertChain) != 1 {
		t.Errorf("SVID %v with %d certificates", svid.Id, len(svid.CertChain))
	}
	roots, err := x509bundle.Parse(testTD, srv.BundlePEM())
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.ParseAndVerify(svid.CertChain, roots)
	if err != nil || id != e.SPIFFEID {
		t.Errorf("%s: %v", id, err)
	}
	leaf, ca := certificate(t, svid, key).Leaf, roots.X509Authorities()[0]
	if !leaf.BasicConstraintsValid || leaf.IsCA {
		t.Error("basic constraints")
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("key usage %b", leaf.KeyUsage)
	}
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	if len(leaf.URIs) != 1 || !slices.Equal(leaf.DNSNames, e.DNSNames) || leaf.Subject.CommonName != "orders.internal" {
		t.Errorf("names %v %v %s", leaf.URIs, leaf.DNSNames, leaf.Subject)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) || string(leaf.AuthorityKeyId) != string(ca.SubjectKeyId) || len(leaf.SubjectKeyId) != 20 {
		t.Error("keys")
	}
	if left := time.Until(leaf.NotAfter); left > 90*time.Second || left < 60*time.Second || svid.ExpiresAt != leaf.NotAfter.Unix() {
		t.Errorf("lives %s; expires_at %d", left, svid.ExpiresAt)
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life < 100*time.Second-time.Second || life > 101*time.Second {
		t.Errorf("lifetime with backdating %s", life)
	}
	if leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() < 64 || leaf.SerialNumber.BitLen() > 129 {
		t.Errorf("serial %s", leaf.SerialNumber)
	}
	byDefault := certificate(t, sign(t, c, idOf(workload("default")), newCSR(t, key)), key).Leaf
	if left := time.Until(byDefault.NotAfter); left > 10*time.Minute || left < 9*time.Minute {
		t.Errorf("without a TTL of its own it lives %s", left)
	}
}

func TestBatchNewX509SVID(t *testing.T) {
	srv, _ := serve(t, Config{})
	c, cert := agent(t, srv)
	mine, others := workload("mine"), workload("others")
	mine.ParentID = agentID(cert)
	others.ParentID = spiffeid.RequireFromPath(testTD, "/spire/agent/other")
	if err := srv.SetEntries([]Entry{mine, others}); err != nil {
		t.Fatal(err)
	}
	csr := newCSR(t, newKey(t))
	forged := slices.Clone(csr)
	forged[len(forged)-1] ^= 1
	params := []struct {
		id, want string
		csr      []byte
		code     codes.Code
	}{
		{idOf(mine), "OK", csr, codes.OK},
		{"", "missing entry ID", csr, codes.InvalidArgument},
		{idOf(mine), "missing CSR", nil, codes.InvalidArgument},
		{idOf(others), "entry not found or not authorized", csr, codes.NotFound},
		{"unknown", "entry not found or not authorized", csr, codes.NotFound},
		{idOf(mine), "malformed CSR", []byte("x"), codes.InvalidArgument},
		{idOf(mine), "malformed CSR: longer", make([]byte, maxCSR+1), codes.InvalidArgument},
		{idOf(mine), "invalid CSR signature", forged, codes.InvalidArgument},
		{idOf(mine), "OK", csr, codes.OK},
	}
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, p := range params {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: p.id, Csr: p.csr})
	}
	resp, err := c.BatchNewX509SVID(t.Context(), req)
	if err != nil || len(resp.Results) != len(params) {
		t.Fatal(resp, err)
	}
	for i, r := range resp.Results {
		want := params[i]
		if r.Status.Code != int32(want.code) || !strings.Contains(r.Status.Message, want.want) || (r.Svid != nil) != (want.code == codes.OK) {
			t.Errorf("result %d: %v, want %s %q", i, r, want.code, want.want)
		}
	}
}

func TestBatchSizes(t *testing.T) {
	e := workload("a")
	srv, _ := serve(t, Config{Entries: []Entry{e}})
	c, _ := agent(t, srv)
	batch := func(n int) *svidv1.BatchNewX509SVIDRequest {
		return &svidv1.BatchNewX509SVIDRequest{Params: slices.Repeat([]*svidv1.NewX509SVIDParams{{EntryId: idOf(e), Csr: newCSR(t, newKey(t))}}, n)}
	}
	_, err := c.BatchNewX509SVID(t.Context(), batch(0))
	wantCode(t, err, codes.InvalidArgument, "missing parameters")
	_, err = c.BatchNewX509SVID(t.Context(), batch(signBurst+1))
	wantCode(t, err, codes.ResourceExhausted, "rate (501) exceeds burst size (500)")
	resp, err := c.BatchNewX509SVID(t.Context(), batch(signBurst))
	if err != nil || len(resp.Results) != signBurst {
		t.Fatalf("%d results, %v", len(resp.GetResults()), err)
	}
	serials := make(map[string]bool)
	for _, r := range resp.Results {
		serials[certificate(t, r.Svid, nil).Leaf.SerialNumber.String()] = true
	}
	if len(serials) != signBurst {
		t.Errorf("%d serials for %d certificates", len(serials), signBurst)
	}
}

func TestSVIDsEndWithTheirAuthority(t *testing.T) {
	clk := newClock()
	e := workload("a")
	srv, _ := serve(t, Config{Entries: []Entry{e}, Now: clk.Now, CATTL: 10 * time.Minute, SVIDTTL: time.Hour, AgentTTL: 9 * time.Minute})
	c, cert := agent(t, srv)
	if cert.Leaf.NotAfter.After(srv.ca.signer().cert.NotAfter) {
		t.Error("the agent's SVID outlives the authority")
	}
	clk.advance(4 * time.Minute)
	svid := sign(t, c, idOf(e), newCSR(t, newKey(t)))
	if svid.ExpiresAt != srv.ca.signer().cert.NotAfter.Unix() {
		t.Errorf("expires at %d, the authority at %d", svid.ExpiresAt, srv.ca.signer().cert.NotAfter.Unix())
	}
	clk.advance(4 * time.Minute) // 2 minutes left: fewer than a JWT-SVID's 5
	resp, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: idOf(e), Audience: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	if resp.Svid.ExpiresAt != srv.ca.signer().cert.NotAfter.Unix() {
		t.Errorf("token expires at %d, its key at %d", resp.Svid.ExpiresAt, srv.ca.signer().cert.NotAfter.Unix())
	}
}

func TestNewJWTSVID(t *testing.T) {
	e := workload("a")
	srv, _ := serve(t, Config{Entries: []Entry{e}})
	c, _ := agent(t, srv)
	_, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: "x", Audience: []string{"a"}})
	wantCode(t, err, codes.NotFound, "entry not found or not authorized")
	_, err = c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: idOf(e)})
	wantCode(t, err, codes.InvalidArgument, "at least one audience is required")
	_, err = c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: idOf(e), Audience: []string{""}})
	wantCode(t, err, codes.Internal, "audience: cannot be empty")

	resp, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: idOf(e), Audience: []string{"x", "", "y"}})
	if err != nil {
		t.Fatal(err)
	}
	header, payload := verifyJWT(t, c, resp.Svid.Token)
	if header["alg"] != "ES256" || header["typ"] != "JWT" {
		t.Errorf("header %v", header)
	}
	if payload.Subject != "spiffe://dev.test/a" || !slices.Equal(payload.Audience, []string{"x", "y"}) {
		t.Errorf("claims %+v", payload)
	}
	if payload.Expires-payload.IssuedAt != 300 || payload.Expires != resp.Svid.ExpiresAt || payload.IssuedAt != resp.Svid.IssuedAt || resp.Svid.Id.Path != "/a" {
		t.Errorf("claims %+v in %v", payload, resp.Svid.Id)
	}
}

// verifyJWT checks a token against the keys in the bundle.
func verifyJWT(t *testing.T, c client, token string) (map[string]string, claims) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%d parts", len(parts))
	}
	decode := func(part string, v any) []byte {
		raw, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil {
			t.Fatal(err)
		}
		if v != nil {
			if err := json.Unmarshal(raw, v); err != nil {
				t.Fatal(err)
			}
		}
		return raw
	}
	var header map[string]string
	decode(parts[0], &header)
	var payload claims
	decode(parts[1], &payload)
	sig := decode(parts[2], nil)

	bundle, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range bundle.JwtAuthorities {
		if k.KeyId != header["kid"] {
			continue
		}
		pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
		if len(sig) != 64 || !ecdsa.Verify(pub.(*ecdsa.PublicKey), digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
			t.Error("bad signature")
		}
		return header, payload
	}
	t.Errorf("no key %q in the bundle", header["kid"])
	return header, payload
}

func TestNewSerial(t *testing.T) {
	if n, err := newSerial(); err != nil || n.Sign() <= 0 {
		t.Error(n, err)
	}
	if _, err := keyID(rand.Reader); err == nil {
		t.Error("made an ID for what is no key")
	}
}
