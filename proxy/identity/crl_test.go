package identity

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func extension(t testing.TB, id asn1.ObjectIdentifier, critical bool, value any) pkix.Extension {
	t.Helper()
	der, err := asn1.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: id, Critical: critical, Value: der}
}

// TestCRLsThatAreRefused: by what they say of themselves.
func TestCRLsThatAreRefused(t *testing.T) {
	ca := testca.New(t, "example.org")
	web := ca.SVID("/web").Leaf
	with := func(e pkix.Extension) []byte {
		return ca.CRL(1, func(r *x509.RevocationList) { r.ExtraExtensions = []pkix.Extension{e} }, web)
	}
	entry := func(reason int, e ...pkix.Extension) []byte {
		return ca.CRL(1, func(r *x509.RevocationList) {
			r.RevokedCertificateEntries[0].ReasonCode, r.RevokedCertificateEntries[0].ExtraExtensions = reason, e
		}, web)
	}
	good := ca.CRL(1, nil, web)
	unknown := asn1.ObjectIdentifier{1, 2, 3, 4}
	for _, test := range []struct {
		name string
		data []byte
		want string // of the error; empty: it is good
	}{
		{"DER", good, ""},
		{"PEM", testca.CRLPEM(good), ""},
		{"several in one PEM", testca.CRLPEM(good, ca.CRL(2, nil)), ""},
		{"on hold", entry(6), ""},
		{"an unknown extension that is not critical", with(extension(t, unknown, false, 1)), ""},
		{"one distribution point's", with(extension(t, oidDistributionPoint, true, distributionPoint{OnlyUsers: true})), ""},
		{"nothing", nil, "is empty"},
		{"DER cut short", good[:len(good)-1], "no whole CRL"},
		{"PEM cut short", testca.CRLPEM(good)[:120], "0 of 1 PEM blocks are whole"},
		{"second of two cut short", testca.CRLPEM(good, good)[:len(testca.CRLPEM(good))+100], "1 of 2 PEM blocks are whole"},
		{"two DER", append(bytes.Clone(good), good...), "bytes follow the CRL"},
		{"a certificate beside", append(testca.CRLPEM(good), testca.CertPEM(ca.Cert.Raw)...), `holds "CERTIFICATE"`},
		{"a certificate as CRL", testca.CRLPEM(ca.Cert.Raw), "CRL 1: no whole CRL"},
		{"delta", with(extension(t, oidDeltaCRL, true, 1)), "delta CRL (RFC 5280 §5.2.4)"},
		{"indirect", with(extension(t, oidDistributionPoint, true, distributionPoint{Indirect: true})), "indirect CRL (RFC 5280 §5.2.5)"},
		{"attributes", with(extension(t, oidDistributionPoint, true, distributionPoint{OnlyAttributes: true})), "attribute certificates"},
		{"malformed distribution point", with(extension(t, oidDistributionPoint, true, 1)), "malformed"},
		{"unknown critical extension", with(extension(t, unknown, true, 1)), "critical extension 1.2.3.4 is not known"},
		{"number twice", with(extension(t, oidCRLNumber, false, 7)), "is there twice"},
		{"unknown critical entry extension", entry(1, extension(t, unknown, true, 1)), "an entry's critical extension 1.2.3.4"},
		{"another issuer's entry", entry(1, extension(t, oidCertificateIssuer, true, 1)), "indirect CRL (RFC 5280 §5.3.3)"},
		{"removeFromCRL", entry(8), "removeFromCRL, which only delta CRLs may say"},
		{"serial too long", ca.CRL(1, func(r *x509.RevocationList) {
			r.RevokedCertificateEntries[0].SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160)
		}, web), "a serial number has at most 20 bytes"},
		{"no nextUpdate", withoutNextUpdate(t, good), "has no nextUpdate"},
	} {
		t.Run(test.name, func(t *testing.T) {
			lists, err := parseCRLs("f", test.data)
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "":
				if _, there := lists[0].has(web); !there {
					t.Error("what it revokes is not found")
				}
				if _, there := lists[0].has(ca.Cert); there {
					t.Error("what it does not revoke is found")
				}
			case err == nil || !strings.Contains(err.Error(), test.want):
				t.Errorf("got %v\nwant %s", err, test.want)
			}
		})
	}
}

// withoutNextUpdate takes the second of the two times out of a CRL.
func withoutNextUpdate(t *testing.T, der []byte) []byte {
	t.Helper()
	var list struct {
		TBS       asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &list); err != nil {
		t.Fatal(err)
	}
	var fields []asn1.RawValue
	for rest := list.TBS.Bytes; len(rest) > 0; {
		var field asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &field); err != nil {
			t.Fatal(err)
		}
		fields = append(fields, field)
	}
	var body []byte
	for i, field := range fields {
		if i != 4 { // version, algorithm, issuer, thisUpdate, nextUpdate
			body = append(body, field.FullBytes...)
		}
	}
	list.TBS = asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: body}
	out, err := asn1.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestCRLSigners: who may sign one for a chain.
func TestCRLSigners(t *testing.T) {
	root, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
	mute := *root
	may := *root.Cert
	may.KeyUsage, mute.Cert = x509.KeyUsageCertSign, &may
	forged := root.CRL(2, nil)
	forged[len(forged)-1] ^= 1
	parse := func(der []byte) *crl {
		c, err := newCRL("f", der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for name, test := range map[string]struct {
		c    *crl
		by   *testca.Authority
		want string
	}{
		"its issuer":           {parse(root.CRL(1, nil)), root, ""},
		"forged":               {parse(forged), root, "ECDSA verification failure"},
		"not allowed":          {parse(root.CRL(1, nil)), &mute, "not allowed to sign CRLs"},
		"another trust domain": {parse(partner.CRL(1, nil)), root, "ECDSA verification failure"},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 {
				if err := test.c.signedBy(test.by.Cert); (err == nil) != (test.want == "") || (err != nil && !strings.Contains(err.Error(), test.want)) {
					t.Errorf("%v, want %q", err, test.want)
				}
			}
		})
	}
	c := parse(root.CRL(1, nil))
	if err := c.signedBy(root.Cert); err != nil {
		t.Fatal(err)
	}
	renewed := *root.Cert
	renewed.Raw = nil
	if err := c.signedBy(&renewed); err != nil {
		t.Errorf("the same key in another certificate: %v", err)
	}
	if err := c.signedBy(partner.Cert); !errors.Is(err, errOtherKey) {
		t.Errorf("another key: %v", err)
	}
}

// TestRevocationOfPaths: the leaf and the intermediates, never the root, and
// the CRL of one issuer says nothing of another's certificates.
func TestRevocationOfPaths(t *testing.T) {
	root := testca.New(t, "example.org")
	middle := root.Intermediate()
	web := middle.SVID("/web").Leaf
	paths := []path{{web, middle.Cert, root.Cert}}
	now := time.Now()
	stale := func(r *x509.RevocationList) {
		r.ThisUpdate, r.NextUpdate = now.Add(-2*time.Hour), now.Add(-time.Hour)
	}
	forged := middle.CRL(1, nil)
	forged[len(forged)-1] ^= 1
	for name, test := range map[string]struct {
		crls []byte
		want string // refused
		live string // closed
	}{
		"nothing":                     {testca.CRLPEM(root.CRL(1, nil), middle.CRL(1, nil)), "", ""},
		"the leaf":                    {testca.CRLPEM(middle.CRL(5, nil, web)), "(keyCompromise), says CRL 5 of CN=", "revoked at"},
		"the intermediate":            {testca.CRLPEM(root.CRL(1, nil, middle.Cert)), "its intermediate CN=", "its intermediate"},
		"the root":                    {testca.CRLPEM(root.CRL(1, nil, root.Cert)), "", ""},
		"the leaf, by another issuer": {testca.CRLPEM(root.CRL(1, nil, web)), "", ""},
		"stale":                       {testca.CRLPEM(middle.CRL(1, stale)), "is out of date since", ""},
		"stale, of the intermediate":  {testca.CRLPEM(root.CRL(1, stale)), "is out of date since", ""},
		"stale, and revoked":          {testca.CRLPEM(middle.CRL(1, stale, web)), "revoked at", "revoked at"},
		"forged":                      {testca.CRLPEM(forged), "does not carry its signature", ""},
		"on hold": {testca.CRLPEM(middle.CRL(1, func(r *x509.RevocationList) {
			r.RevokedCertificateEntries[0].ReasonCode = 6
		}, web)), "(certificateHold)", "(certificateHold)"},
	} {
		t.Run(name, func(t *testing.T) {
			lists, err := parseCRLs("f", test.crls)
			if err != nil {
				t.Fatal(err)
			}
			set := &crlSet{lists: map[string][]*crl{}}
			for _, c := range lists {
				set.lists[string(c.issuer)] = append(set.lists[string(c.issuer)], c)
			}
			r := &revocations{domains: map[spiffeid.TrustDomain]*crlSet{root.TrustDomain: set}}
			same := func(what string, err error, want string) {
				t.Helper()
				if (err == nil) != (want == "") || (err != nil && !strings.Contains(err.Error(), want)) {
					t.Errorf("%s: %v, want %q", what, err, want)
				}
			}
			same("a new connection", r.admit(root.TrustDomain, paths, now), test.want)
			same("a live one", r.revoked(root.TrustDomain, paths), test.live)
			same("another domain", r.admit(testca.New(t, "partner.example").TrustDomain, paths, now), "")
			// Another way to an authority that nothing was revoked on will do.
			other := *middle.Cert
			other.SerialNumber, other.RawIssuer = big.NewInt(99), []byte("other root")
			if name == "the intermediate" {
				same("by another path", r.admit(root.TrustDomain, append(paths, path{web, &other, root.Cert}), now), "")
			}
		})
	}
}

// TestLookupsAreFree: a hundred thousand entries cost what one costs, and no
// memory.
func TestLookupsAreFree(t *testing.T) {
	ca := testca.New(t, "example.org")
	web := ca.SVID("/web").Leaf
	c, err := newCRL("f", ca.CRL(1, func(r *x509.RevocationList) {
		r.RevokedCertificateEntries = manyEntries(100_000)
	}))
	if err != nil {
		t.Fatal(err)
	}
	r := &revocations{domains: map[spiffeid.TrustDomain]*crlSet{ca.TrustDomain: {lists: map[string][]*crl{string(c.issuer): {c}}}}}
	paths, now := []path{{web, ca.Cert}}, time.Now()
	if n := testing.AllocsPerRun(100, func() {
		if err := r.admit(ca.TrustDomain, paths, now); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a lookup", n)
	}
	if len(c.revoked) != 100_000 {
		t.Errorf("%d entries", len(c.revoked))
	}
}

func manyEntries(n int) []x509.RevocationListEntry {
	entries := make([]x509.RevocationListEntry, n)
	for i := range entries {
		entries[i] = x509.RevocationListEntry{SerialNumber: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 120), big.NewInt(int64(i))), RevocationTime: time.Unix(1_700_000_000, 0)}
	}
	return entries
}

func BenchmarkRevocationLookup(b *testing.B) {
	ca := testca.New(b, "example.org")
	web := ca.SVID("/web").Leaf
	c, err := newCRL("f", ca.CRL(1, func(r *x509.RevocationList) { r.RevokedCertificateEntries = manyEntries(100_000) }))
	if err != nil {
		b.Fatal(err)
	}
	r := &revocations{domains: map[spiffeid.TrustDomain]*crlSet{ca.TrustDomain: {lists: map[string][]*crl{string(c.issuer): {c}}}}}
	paths, now := []path{{web, ca.Cert}}, time.Now()
	for b.Loop() {
		if err := r.admit(ca.TrustDomain, paths, now); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzParseCRLs(f *testing.F) {
	ca := testca.New(f, "example.org")
	web := ca.SVID("/web").Leaf
	der := ca.CRL(1, nil, web)
	f.Add(der)
	f.Add(testca.CRLPEM(der, ca.CRL(2, nil)))
	f.Add(ca.CRL(3, func(r *x509.RevocationList) {
		r.ExtraExtensions = []pkix.Extension{extension(f, oidDistributionPoint, true, distributionPoint{OnlyCAs: true})}
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		lists, err := parseCRLs("f", data)
		if err != nil && lists != nil {
			t.Error("an error and CRLs")
		}
		for _, c := range lists {
			c.has(web)
			_ = c.signedBy(ca.Cert)
			if c.until.IsZero() || c.String() == "" {
				t.Errorf("%+v", c)
			}
		}
	})
}
