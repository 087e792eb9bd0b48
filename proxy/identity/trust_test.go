package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestVerifiedChainsAreRemembered: for the very same chain, under the same
// authorities, while all of it is valid.
func TestVerifiedChainsAreRemembered(t *testing.T) {
	root := testca.New(t, "example.org")
	middle := root.Intermediate()
	web := middle.SVID("/web")
	chain, now := []*x509.Certificate{web.Leaf, middle.Cert}, time.Now()
	trust := newTrust(testca.Bundles(root))
	d := trust.domains[root.TrustDomain]
	verify := func(trust *Trust, chain []*x509.Certificate, at time.Time) error {
		_, err := trust.Verify(chain, at)
		return err
	}
	for range 2 {
		if err := verify(trust, chain, now); err != nil || len(d.verified) != 1 {
			t.Fatalf("%v, %d chains remembered", err, len(d.verified))
		}
	}
	for what, err := range map[string]error{
		"without its intermediate": verify(trust, chain[:1], now),
		"after its end":            verify(trust, chain, web.Leaf.NotAfter.Add(time.Second)),
		"before its beginning":     verify(trust, chain, web.Leaf.NotBefore.Add(-time.Second)),
		"under other authorities":  verify(trust.next(testca.Bundles(testca.New(t, "example.org"))), chain, now),
		"under none":               verify(trust.next(nil), chain, now),
	} {
		if err == nil {
			t.Errorf("%s it verifies", what)
		}
	}
	if len(d.verified) != 1 {
		t.Errorf("%d chains remembered, though only one verified", len(d.verified))
	}
	for n := range maxVerified + 10 {
		d.remember([32]byte{byte(n), byte(n >> 8), 1}, []path{chain})
	}
	if len(d.verified) != maxVerified {
		t.Errorf("%d chains remembered, the bound is %d", len(d.verified), maxVerified)
	}
	short := *middle.Cert
	short.NotAfter = now.Add(-time.Second)
	d.remember(sumOf(chain), []path{{web.Leaf, &short, root.Cert}})
	if v := d.verified[sumOf(chain)]; !v.to.Equal(short.NotAfter) {
		t.Errorf("remembered until %s, past the end of an intermediate", v.to)
	}
}

// signer is a CA of any kind of key, so that a test can make one that is not
// as it should be.
type signer struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

// issue signs a certificate for key, after edit changed its template. Without
// a parent it signs itself.
func issue(t *testing.T, parent *signer, key crypto.Signer, edit ...func(*x509.Certificate)) *signer {
	t.Helper()
	now := time.Now()
	c := &x509.Certificate{
		SerialNumber: testca.NewSerial(t), Subject: pkix.Name{CommonName: testca.NewSerial(t).Text(16)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), BasicConstraintsValid: true,
	}
	for _, e := range edit {
		e(c)
	}
	by := &signer{t: t, cert: c, key: key}
	if parent != nil {
		by = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{t, parsed, key}
}

func asCA(c *x509.Certificate) {
	c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
}

func asWeb(c *x509.Certificate) {
	c.KeyUsage = x509.KeyUsageDigitalSignature
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/web"}}
}

// TestChains: what a chain must be, beyond what TestBadClients shows on the
// wire.
func TestChains(t *testing.T) {
	p256 := func() crypto.Signer { return testca.NewKey(t) }
	curve := func(c elliptic.Curve) crypto.Signer {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	ofRSA := func(bits int) crypto.Signer {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, rsa1024 := ofRSA(2048), ofRSA(1024)
	root := issue(t, nil, p256(), asCA)
	rsaRoot, weakRoot := issue(t, nil, rsa2048, asCA), issue(t, nil, rsa1024, asCA)
	partnerRoot := issue(t, nil, p256(), asCA)
	middle := func(parent *signer, edit ...func(*x509.Certificate)) *signer {
		return issue(t, parent, p256(), append([]func(*x509.Certificate){asCA}, edit...)...)
	}
	web := func(parent *signer, edit ...func(*x509.Certificate)) *signer {
		return issue(t, parent, p256(), append([]func(*x509.Certificate){asWeb}, edit...)...)
	}
	uris := func(list ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, u := range list {
				parsed, err := url.Parse(u)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, parsed)
			}
		}
	}
	below := func(m *signer, edit ...func(*x509.Certificate)) []*signer { return []*signer{web(m, edit...), m} }
	deep := []*signer{root}
	for len(deep) < maxChain+1 {
		deep = append([]*signer{middle(deep[0])}, deep...)
	}
	short := middle(root, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	shorter := middle(short)
	self := issue(t, nil, p256(), asWeb)
	trust := newTrust(map[spiffeid.TrustDomain][]*x509.Certificate{
		spiffeid.RequireTrustDomainFromString("example.org"):     {root.cert, rsaRoot.cert, weakRoot.cert, self.cert},
		spiffeid.RequireTrustDomainFromString("partner.example"): {partnerRoot.cert},
	})
	for _, test := range []struct {
		name   string
		chain  []*signer
		result string // empty: it is good
		why    string
	}{
		{"plain", []*signer{web(root)}, "", ""},
		{"below an intermediate", below(middle(root)), "", ""},
		{"with its root", append(below(middle(root)), root), "", ""},
		{"with a stranger's certificate beside", append(below(middle(root)), partnerRoot), "", ""},
		{"RSA 2048", []*signer{issue(t, rsaRoot, rsa2048, asWeb)}, "", ""},
		{"P-384", []*signer{issue(t, root, curve(elliptic.P384()), asWeb)}, "", ""},
		{"Ed25519", []*signer{issue(t, root, ed, asWeb)}, "", ""},
		{"the longest ID", []*signer{web(root, uris("spiffe://example.org/"+strings.Repeat("x", maxSPIFFEID-len("spiffe://example.org/"))))}, "", ""},
		{"DNS names beside", []*signer{web(root, func(c *x509.Certificate) { c.DNSNames = []string{"web"} })}, "", ""},
		{"without key usages", []*signer{web(root, func(c *x509.Certificate) { c.KeyUsage, c.ExtKeyUsage = 0, nil })}, "", ""},
		{"constrained to its domain", below(middle(root, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} })), "", ""},

		{"none", nil, "no_certificate", "sent none"},
		{"SPIFFE IDs twice", []*signer{web(root, uris("spiffe://example.org/web", "spiffe://example.org/admin"))}, "not_svid", "more than one URI SAN"},
		{"another URI beside", []*signer{web(root, uris("spiffe://example.org/web", "https://example.org/"))}, "not_svid", "more than one URI SAN"},
		{"another URI alone", []*signer{web(root, uris("https://example.org/web"))}, "not_svid", "scheme is missing or invalid"},
		{"an ID with a query", []*signer{web(root, uris("spiffe://example.org/web?admin=1"))}, "not_svid", "path segment characters"},
		{"an ID with dots", []*signer{web(root, uris("spiffe://example.org/a/../web"))}, "not_svid", "dot segments"},
		{"an ID without a path", []*signer{web(root, uris("spiffe://example.org"))}, "not_svid", "must have a path"},
		{"an ID too long", []*signer{web(root, uris("spiffe://example.org/"+strings.Repeat("x", maxSPIFFEID-len("spiffe://example.org/")+1)))}, "not_svid", "at most 2048"},
		{"a CA as leaf", []*signer{web(root, asCA)}, "not_svid", "must not be a CA"},
		{"may sign certificates", []*signer{web(root, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })}, "not_svid", "must not be allowed to sign"},
		{"may sign CRLs", []*signer{web(root, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })}, "not_svid", "must not be allowed to sign"},
		{"may not sign handshakes", []*signer{web(root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })}, "not_svid", "digital signatures"},
		{"for code", []*signer{web(root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })}, "untrusted", "incompatible key usage"},
		{"an intermediate for code", below(middle(root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })), "untrusted", "incompatible key usage"},
		{"an unknown critical extension", []*signer{web(root, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		})}, "untrusted", "unhandled critical extension"},
		{"its intermediate has expired", below(middle(root, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), "expired", "expired"},
		{"its intermediate is no CA", below(web(root)), "untrusted", "authority"},
		{"its intermediate may not sign", below(middle(root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })), "untrusted", "authority"},
		{"its intermediate is missing", below(middle(root))[:1], "untrusted", "not signed by an authority in the bundle of example.org"},
		{"constrained to another domain", below(middle(root, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"partner.example"} })), "untrusted", "not permitted by any constraint"},
		{"excluded", below(middle(root, func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} })), "untrusted", "excluded by constraint"},
		{"longer than an authority allows", []*signer{web(shorter), shorter, short}, "untrusted", "too many intermediates"},
		{"longer than we take", append([]*signer{web(deep[0])}, deep...), "not_svid", "at most 10 are accepted"},
		{"larger than we take", []*signer{web(root, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: make([]byte, maxChainBytes)}}
		})}, "not_svid", "bytes, at most"},
		{"another domain's authority", []*signer{web(partnerRoot)}, "untrusted", "not signed by an authority in the bundle of example.org"},
		{"another domain's authority beside", []*signer{web(partnerRoot), partnerRoot, root}, "untrusted", "not signed by an authority"},
		{"ours for another domain", []*signer{web(root, uris("spiffe://partner.example/web"))}, "untrusted", "not signed by an authority in the bundle of partner.example"},
		{"in the bundle itself", []*signer{self}, "untrusted", "signed by no authority"},
		{"signed by itself", []*signer{issue(t, nil, p256(), asWeb)}, "untrusted", "not signed by an authority"},
		{"SHA-1", []*signer{issue(t, rsaRoot, p256(), asWeb, func(c *x509.Certificate) { c.SignatureAlgorithm = x509.SHA1WithRSA })}, "untrusted", "authority"},
		{"RSA 1024", []*signer{issue(t, root, rsa1024, asWeb)}, "untrusted", "RSA key of 1024 bits, at least 2048"},
		{"below RSA 1024", []*signer{web(weakRoot)}, "untrusted", "RSA key of 1024 bits, at least 2048"},
		{"below an intermediate of RSA 1024", below(issue(t, root, rsa1024, asCA)), "untrusted", "RSA key of 1024 bits"},
		{"P-224", []*signer{issue(t, root, curve(elliptic.P224()), asWeb)}, "untrusted", "on the curve P-224"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var chain []*x509.Certificate
			for _, s := range test.chain {
				chain = append(chain, s.cert)
			}
			for range 2 { // the second time from what was remembered
				_, err := trust.Verify(chain, time.Now())
				var pe *PeerError
				switch {
				case test.result == "" && err != nil:
					t.Error(err)
				case test.result != "" && (!errors.As(err, &pe) || pe.Result != test.result || !strings.Contains(err.Error(), test.why)):
					t.Errorf("got %v\nwant %s: %s", err, test.result, test.why)
				}
			}
		})
	}
}

// TestTrustGenerations: what was verified under authorities is known to those
// alone, also when they come back, and every change is another generation.
func TestTrustGenerations(t *testing.T) {
	first, second := testca.New(t, "example.org"), testca.New(t, "example.org")
	chain, now := []*x509.Certificate{first.SVID("/web").Leaf}, time.Now()
	s := newStore("test", nil)
	cert := first.SVID("/orders")
	var last uint64
	for i, step := range []struct {
		authorities []*testca.Authority
		good        bool
	}{{[]*testca.Authority{first}, true}, {[]*testca.Authority{second}, false}, {[]*testca.Authority{first}, true}, {[]*testca.Authority{first, second}, true}, {nil, false}} {
		learn(t, s, cert, step.authorities...)
		trust := s.trusted()
		if trust.generation <= last {
			t.Errorf("step %d: generation %d after %d", i, trust.generation, last)
		}
		last = trust.generation
		if d := trust.domains[first.TrustDomain]; d != nil && len(d.verified) > 0 {
			t.Errorf("step %d: %d chains are known under authorities that nobody was verified under", i, len(d.verified))
		}
		if _, err := trust.Verify(chain, now); (err == nil) != step.good {
			t.Errorf("step %d: %v", i, err)
		}
		learn(t, s, cert, step.authorities...)
		if again := s.trusted(); again != trust {
			t.Errorf("step %d: another generation without a change", i)
		}
		s.revoke(&revocations{})
		if again := s.trusted(); again.generation != last+1 || again.domains[first.TrustDomain] != trust.domains[first.TrustDomain] {
			t.Errorf("step %d: CRLs made generation %d after %d", i, again.generation, last)
		}
		last++
	}
}

// TestExpiredAuthorityLeavesTheBundle: that the authority of an expired SVID
// is pruned is no reason to end a connection that was to be kept.
func TestExpiredAuthorityLeavesTheBundle(t *testing.T) {
	ca, next := testca.New(t, "example.org"), testca.New(t, "example.org")
	trust := newTrust(testca.Bundles(ca))
	web := ca.SVID("/web")
	chain := []*x509.Certificate{web.Leaf}
	d := trust.domains[ca.TrustDomain]
	if d.prunedAfterExpiry(chain, web.Leaf.NotAfter, time.Now()) {
		t.Error("an authority that is still valid counts as pruned after expiry")
	}
	if !d.prunedAfterExpiry(chain, web.Leaf.NotAfter, ca.Cert.NotAfter.Add(time.Second)) {
		t.Error("an authority that has expired does not count as pruned after expiry")
	}
	if trust.next(testca.Bundles(next)).domains[ca.TrustDomain].prunedAfterExpiry(chain, web.Leaf.NotAfter, ca.Cert.NotAfter.Add(time.Second)) {
		t.Error("a bundle that never verified the chain counts")
	}
}

// BenchmarkVerify is a peer's chain that verified before.
func BenchmarkVerify(b *testing.B) {
	root := testca.New(b, "example.org")
	middle := root.Intermediate()
	chain, now := []*x509.Certificate{middle.SVID("/web").Leaf, middle.Cert}, time.Now()
	trust := newTrust(testca.Bundles(root))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := trust.Verify(chain, now); err != nil {
			b.Fatal(err)
		}
	}
}
