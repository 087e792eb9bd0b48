package spire

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestBundle(t *testing.T) {
	one, two, key := newAuthority(t), newAuthority(t), newKey(t)
	pkix, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	answer := bundleOf("example.org", one, two)
	answer.X509Authorities[1].Tainted = true
	answer.JwtAuthorities = []*types.JWTKey{{KeyId: "k2", PublicKey: pkix, Tainted: true}, {KeyId: "k1", PublicKey: pkix}}
	answer.WitAuthorities = []*types.WITKey{{KeyId: "w1", PublicKey: pkix}}
	s := newServer(t)
	s.bundle = func() (*types.Bundle, error) { return answer, nil }
	s.start(t)
	got, err := s.client(t).Bundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.TrustDomain != exampleOrg || len(got.X509) != 2 || !got.X509[0].Equal(one.cert) || !got.X509[1].Equal(two.cert) {
		t.Errorf("authorities: %+v", got)
	}
	if !slices.Equal(got.DER, slices.Concat(one.cert.Raw, two.cert.Raw)) {
		t.Error("DER is not the authorities one after the other")
	}
	if want := []string{hex.EncodeToString(two.cert.SubjectKeyId)}; !slices.Equal(got.Tainted, want) {
		t.Errorf("tainted %v, want %v", got.Tainted, want)
	}
	if len(got.JWTKeys) != 2 || !key.PublicKey.Equal(got.JWTKeys["k1"]) || len(got.WITKeys) != 1 || !key.PublicKey.Equal(got.WITKeys["w1"]) {
		t.Errorf("JWT keys %v, WIT keys %v", got.JWTKeys, got.WITKeys)
	}
	if !slices.Equal(got.TaintedKeys, []string{"k2"}) {
		t.Errorf("tainted keys %v", got.TaintedKeys)
	}
	// In the order of key IDs, so that equal bundles are equal bytes.
	if jwks, err := jwtbundle.Parse(exampleOrg, got.JWKS); err != nil || len(jwks.JWTAuthorities()) != 2 ||
		bytes.Index(got.JWKS, []byte(`"k1"`)) > bytes.Index(got.JWKS, []byte(`"k2"`)) || bytes.Contains(got.JWKS, []byte(`"use"`)) {
		t.Errorf("JWKS %s: %v", got.JWKS, err)
	}
	if jwks, err := witbundle.Parse(exampleOrg, got.WITJWKS); err != nil || !jwks.HasWITAuthority("w1") {
		t.Errorf("JWKS %s: %v", got.WITJWKS, err)
	}
	if got.Sequence != 7 || got.RefreshHint != time.Minute {
		t.Errorf("sequence %d, refresh hint %s", got.Sequence, got.RefreshHint)
	}

	// What an SVID signed by it will have as authority key id.
	leaf, err := x509.ParseCertificate(two.sign(key.Public(), agentID))
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(leaf.AuthorityKeyId) != got.Tainted[0] {
		t.Error("an SVID of the tainted authority is not recognised")
	}
}

func TestBundleMalformed(t *testing.T) {
	tests := map[string]func(*types.Bundle){
		"no trust domain":    func(b *types.Bundle) { b.TrustDomain = "" },
		"other trust domain": func(b *types.Bundle) { b.TrustDomain = "other.org" },
		"no authority":       func(b *types.Bundle) { b.X509Authorities = nil },
		"broken authority":   func(b *types.Bundle) { b.X509Authorities[0].Asn1 = []byte("x") },
		"JWT key without id": func(b *types.Bundle) { b.JwtAuthorities = []*types.JWTKey{{}} },
		"broken JWT key":     func(b *types.Bundle) { b.JwtAuthorities = []*types.JWTKey{{KeyId: "k"}} },
		"WIT key without id": func(b *types.Bundle) { b.WitAuthorities = []*types.WITKey{{}} },
	}
	var answer *types.Bundle
	s := newServer(t)
	s.bundle = func() (*types.Bundle, error) { return answer, nil }
	s.start(t)
	c := s.client(t)
	for name, damage := range tests {
		answer = bundleOf("example.org", s.ca)
		damage(answer)
		if got, err := c.Bundle(t.Context()); !errors.Is(err, ErrBadAnswer) || got != nil {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
	for hint, want := range map[int64]time.Duration{-5: 0, 0: 0, 1 << 62: 365 * 24 * time.Hour} {
		answer = bundleOf("example.org", s.ca)
		answer.RefreshHint = hint
		if got, err := c.Bundle(t.Context()); err != nil || got.RefreshHint != want {
			t.Errorf("refresh hint %d: got %v, %v", hint, got, err)
		}
	}
}

func TestFederatedBundle(t *testing.T) {
	other := newAuthority(t)
	s := newServer(t)
	s.foreign = func(td string) (*types.Bundle, error) {
		switch td {
		case "partner.org":
			return bundleOf(td, other), nil
		case "empty.org": // as a new federation is, before its first refresh
			return bundleOf(td), nil
		case "liar.org":
			return bundleOf("partner.org", other), nil
		}
		return nil, status.Error(codes.NotFound, "bundle not found")
	}
	s.start(t)
	c := s.client(t)
	partner := spiffeid.RequireTrustDomainFromString("partner.org")
	got, err := c.FederatedBundle(t.Context(), partner)
	if err != nil || got.TrustDomain != partner || len(got.X509) != 1 || !got.X509[0].Equal(other.cert) {
		t.Errorf("got %+v, %v", got, err)
	}
	got, err = c.FederatedBundle(t.Context(), spiffeid.RequireTrustDomainFromString("empty.org"))
	if err != nil || len(got.X509) != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
	_, err = c.FederatedBundle(t.Context(), spiffeid.RequireTrustDomainFromString("nobody.org"))
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "nobody.org") {
		t.Errorf("got %v, want %v", err, ErrNotFound)
	}
	_, err = c.FederatedBundle(t.Context(), spiffeid.RequireTrustDomainFromString("liar.org"))
	if !errors.Is(err, ErrBadAnswer) {
		t.Errorf("got %v, want %v", err, ErrBadAnswer)
	}
}

// An authority without a subject key id is tainted by the one its
// certificates have by RFC 5280, which crypto/x509 makes as well.
func TestKeyIDWithoutExtension(t *testing.T) {
	a := newAuthority(t)
	bare := *a.cert
	bare.SubjectKeyId = nil
	id, err := keyID(&bare)
	if err != nil || len(id) != 40 {
		t.Errorf("got %q, %v", id, err)
	}
	if again, err := keyID(&bare); err != nil || again != id {
		t.Errorf("got %q, %v after %q", again, err, id)
	}
	bare.RawSubjectPublicKeyInfo = []byte("x")
	if id, err := keyID(&bare); err == nil {
		t.Errorf("broken key: got %q", id)
	}
}

// Under insecure bootstrap anyone can send these.
func FuzzParseBundle(f *testing.F) {
	b := bundleOf("example.org", newAuthority(f))
	b.X509Authorities[0].Tainted = true
	seed, err := proto.Marshal(b)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		b := &types.Bundle{}
		if proto.Unmarshal(data, b) != nil {
			return
		}
		got, err := parseBundle(b, exampleOrg)
		if err != nil {
			return
		}
		parsed, err := x509.ParseCertificates(got.DER)
		if err != nil || len(parsed) != len(got.X509) || len(got.Tainted) > len(got.X509) || got.RefreshHint < 0 {
			t.Errorf("accepted %+v", got)
		}
	})
}
