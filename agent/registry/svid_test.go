package registry

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func TestNewSVID(t *testing.T) {
	root, rootKey := certificate(t, authority("root"), nil, nil)
	intermediate, intermediateKey := certificate(t, authority("intermediate"), root, rootKey)
	leaf, key := certificate(t, workload("spiffe://example.org/web"), intermediate, intermediateKey)

	s, err := NewSVID([][]byte{leaf.Raw, intermediate.Raw}, key)
	if err != nil {
		t.Fatal(err)
	}
	if s.ID.String() != "spiffe://example.org/web" || s.Serial != "badcafe" ||
		!s.NotBefore.Equal(leaf.NotBefore) || !s.NotAfter.Equal(leaf.NotAfter) ||
		s.Authority != hex.EncodeToString(intermediate.SubjectKeyId) {
		t.Errorf("got %+v", s)
	}
	// What a workload will make of it.
	parsed, err := x509svid.ParseRaw(s.Chain, s.Key)
	if err != nil {
		t.Fatal(err)
	}
	if !parsed.PrivateKey.Public().(*ecdsa.PublicKey).Equal(key.Public()) || len(parsed.Certificates) != 2 {
		t.Error("the encoded key or chain is not the one given")
	}
	for _, tt := range []struct {
		authority *x509.Certificate
		want      bool
	}{{root, true}, {intermediate, true}, {leaf, false}} {
		if got := s.signedByAny([]string{"", "00", hex.EncodeToString(tt.authority.SubjectKeyId)}); got != tt.want {
			t.Errorf("signed by %v: got %v, want %v", tt.authority.Subject, got, tt.want)
		}
	}
}

func TestNewSVIDRefuses(t *testing.T) {
	root, rootKey := certificate(t, authority("root"), nil, nil)
	leaf, key := certificate(t, workload("spiffe://example.org/web"), root, rootKey)
	_, otherKey := certificate(t, workload("spiffe://example.org/web"), root, rootKey)
	signed := func(id string, change func(*x509.Certificate)) ([][]byte, crypto.Signer) {
		template := workload(id)
		change(template)
		c, k := certificate(t, template, root, rootKey)
		return [][]byte{c.Raw}, k
	}
	twoIDs, twoIDsKey := signed("spiffe://example.org/a", func(c *x509.Certificate) {
		c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/b"})
	})
	noID, noIDKey := signed("spiffe://example.org/a", func(c *x509.Certificate) { c.URIs = nil })
	ca, caKey := signed("spiffe://example.org/a", func(c *x509.Certificate) { c.IsCA = true })
	for _, tt := range []struct {
		name  string
		chain [][]byte
		key   crypto.Signer
	}{
		{"no chain", nil, key},
		{"not DER", [][]byte{[]byte("x")}, key},
		{"cut off", [][]byte{leaf.Raw[:50]}, key},
		{"another key", [][]byte{leaf.Raw}, otherKey},
		{"two SPIFFE IDs", twoIDs, twoIDsKey},
		{"no SPIFFE ID", noID, noIDKey},
		{"an authority", ca, caKey},
		{"the issuer is no authority", [][]byte{leaf.Raw, leaf.Raw}, key},
	} {
		if s, err := NewSVID(tt.chain, tt.key); s != nil || err == nil || !strings.HasPrefix(err.Error(), "encode SVID: ") {
			t.Errorf("%s: got %v, %v; want an error", tt.name, s, err)
		}
	}
}

func TestPrintingAnSVIDLeavesOutItsKey(t *testing.T) {
	s := &SVID{ID: spiffeid.RequireFromString("spiffe://example.org/web"), Serial: "1f", Key: []byte("secret"), Chain: []byte("chain")}
	const want = "SVID(spiffe://example.org/web, serial 1f)"
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q"} {
		for _, value := range []any{s, *s} {
			if got := fmt.Sprintf(verb, value); got != want {
				t.Errorf("%s of a %T: got %q", verb, value, got)
			}
		}
		for _, outer := range []any{Identity{SVID: s}, &View{Identities: []Identity{{SVID: s}}}, Update{SVIDs: map[string]*SVID{"e": s}}} {
			if got := fmt.Sprintf(verb, outer); strings.Contains(got, "secret") || strings.Contains(got, fmt.Sprintf("%x", "secret")) {
				t.Errorf("%s of a %T: %s", verb, outer, got)
			}
		}
	}
}

func TestBundleEqual(t *testing.T) {
	a, keyA := certificate(t, authority("a"), nil, nil)
	_, keyB := certificate(t, authority("b"), nil, nil)
	base := func() *Bundle {
		return &Bundle{
			TrustDomain: testDomain, X509: []*x509.Certificate{a}, DER: a.Raw,
			JWTKeys: map[string]crypto.PublicKey{"k1": keyA.Public()}, Tainted: []string{"aa"}, Sequence: 1, RefreshHint: time.Minute,
		}
	}
	for _, tt := range []struct {
		name        string
		change      func(*Bundle)
		equal, same bool
	}{
		{"nothing", func(*Bundle) {}, true, true},
		{"copies of the same", func(b *Bundle) { b.DER = bytes.Clone(b.DER) }, true, true},
		{"trust domain", func(b *Bundle) { b.TrustDomain = spiffeid.RequireTrustDomainFromString("other") }, false, false},
		{"authorities", func(b *Bundle) { b.DER = append(bytes.Clone(b.DER), b.DER...) }, false, false},
		{"JWT key", func(b *Bundle) { b.JWTKeys["k1"] = keyB.Public() }, false, false},
		{"JWT key ID", func(b *Bundle) { b.JWTKeys = map[string]crypto.PublicKey{"k2": keyA.Public()} }, false, false},
		{"no JWT key", func(b *Bundle) { b.JWTKeys = nil }, false, false},
		{"taint", func(b *Bundle) { b.Tainted = nil }, false, true},
		{"sequence", func(b *Bundle) { b.Sequence++ }, false, true},
		{"refresh hint", func(b *Bundle) { b.RefreshHint = 0 }, false, true},
	} {
		b := base()
		tt.change(b)
		if got := base().Equal(b); got != tt.equal {
			t.Errorf("%s: Equal: got %v, want %v", tt.name, got, tt.equal)
		}
		if got := b.servesSame(base()); got != tt.same {
			t.Errorf("%s: servesSame: got %v, want %v", tt.name, got, tt.same)
		}
	}
	var none *Bundle
	if !none.Equal(nil) || none.Equal(base()) || base().Equal(nil) {
		t.Error("a nil bundle equals nil, and nothing else")
	}
}

func authority(name string) *x509.Certificate {
	return &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SerialNumber: big.NewInt(1),
		URIs:         []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
		SubjectKeyId: []byte(name), Subject: pkix.Name{CommonName: name},
	}
}

func workload(id string) *x509.Certificate {
	return &x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, SerialNumber: big.NewInt(0x0badcafe), BasicConstraintsValid: true,
		URIs:         []*url.URL{spiffeid.RequireFromString(id).URL()},
		SubjectKeyId: []byte(id),
	}
}

// certificate signs a template for a new key, by itself if there is no parent.
func certificate(t *testing.T, template, parent *x509.Certificate, parentKey crypto.Signer) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.NotBefore, template.NotAfter = epoch, epoch.Add(time.Hour)
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c, key
}
