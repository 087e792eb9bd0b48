package identity

import (
	"crypto/x509"
	"errors"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/internal/testca"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// heldCRLs are CRLs whose files are read when the test says so.
type heldCRLs struct {
	*CRLs
	t   *testing.T
	log *lines
	ids *store
}

func holdCRLs(t *testing.T, ids *store, files map[spiffeid.TrustDomain][]string) *heldCRLs {
	t.Helper()
	h := &heldCRLs{t: t, log: &lines{}, ids: ids}
	h.CRLs = &CRLs{
		into: ids, files: files, log: hclog.New(&hclog.LoggerOptions{Output: h.log}),
		figures: newCRLFigures(telemetry.NewMetrics()), domains: map[spiffeid.TrustDomain]*crlFiles{},
	}
	h.load()
	return h
}

// put writes a file by rename, and has everything read.
func (h *heldCRLs) put(path string, data []byte) {
	h.t.Helper()
	write(h.t, path+".new", data)
	if err := os.Rename(path+".new", path); err != nil {
		h.t.Fatal(err)
	}
	h.load()
}

// refuses asks as a new connection would.
func (h *heldCRLs) refuses(what string, want string, chain ...*x509.Certificate) {
	h.t.Helper()
	_, err := h.ids.trusted().Verify(chain, time.Now())
	if (err == nil) != (want == "") || (err != nil && !strings.Contains(err.Error(), want)) {
		h.t.Errorf("%s: %v, want %q", what, err, want)
	}
}

// TestCRLFiles: what is good takes the place of what was, and nothing else
// does.
func TestCRLFiles(t *testing.T) {
	ca, partner := testca.New(t, "example.org"), testca.New(t, "partner.example")
	middle := ca.Intermediate()
	web, batch, low := ca.SVID("/web").Leaf, ca.SVID("/batch").Leaf, middle.SVID("/low").Leaf
	foreign := partner.SVID("/web").Leaf
	file := t.TempDir() + "/ca.crl"
	h := holdCRLs(t, storeOf(t, ca.SVID("/orders"), ca, partner), map[spiffeid.TrustDomain][]string{ca.TrustDomain: {filepath.Dir(file) + "/*.crl"}})
	asks := func(what, ofWeb, ofBatch string) {
		t.Helper()
		h.refuses(what+": web", ofWeb, web)
		h.refuses(what+": batch", ofBatch, batch)
		h.refuses(what+": another domain", "", foreign)
	}
	asks("no file", "could not be read yet", "could not be read yet")
	h.put(file, testca.CRLPEM(ca.CRL(5, nil, web)))
	asks("PEM", "revoked at", "")
	h.refuses("an issuer without CRL", "", low, middle.Cert)
	h.put(file, ca.CRL(6, nil, web, batch))
	asks("DER", "revoked at", "revoked at")
	good := testca.CRLPEM(ca.CRL(7, nil, batch))
	h.put(file, good)
	asks("taken from the list", "", "revoked at")

	forged := ca.CRL(8, nil)
	forged[len(forged)-1] ^= 1
	stranger := &testca.Authority{T: t, TrustDomain: ca.TrustDomain, Key: testca.NewKey(t), Cert: ca.Cert} // has the name and not the key
	same := *ca.Cert
	same.PublicKey = stranger.Key.Public()
	stranger.Cert = &same
	for _, bad := range []struct {
		name string
		data []byte
		want string
	}{
		{"cut short", good[:200], "0 of 1 PEM blocks are whole"},
		{"empty", nil, "is empty"},
		{"forged", forged, "its signature is not good, though the bundle of example.org has its authority"},
		{"by a stranger", stranger.CRL(8, nil), "its signature is not good"},
		{"of another domain", partner.CRL(8, nil), "it is of trust domain partner.example; a CRL counts for its own domain alone"},
		{"one good, one forged", testca.CRLPEM(ca.CRL(9, nil), forged), "its signature is not good"},
		{"to come", ca.CRL(8, func(r *x509.RevocationList) { r.ThisUpdate = time.Now().Add(time.Hour) }), "are the clocks right?"},
		{"older", testca.CRLPEM(ca.CRL(6, nil)), "a rollback is not followed"},
	} {
		h.put(file, bad.data)
		h.load()
		asks(bad.name, "", "revoked at")
		if got := h.ids.Report().CRLs; len(got) < 2 || !strings.Contains(got[0].Problem, bad.want) || got[1].Number != "7" || got[1].Entries != 1 || !got[1].Verified {
			t.Errorf("%s: status %+v\nwant %s", bad.name, got, bad.want)
		}
		if n := h.log.count(bad.want); n < 1 {
			t.Errorf("%s: %d log lines with %q", bad.name, n, bad.want)
		}
	}
	lines := strings.Count(h.log.text.String(), "\n")
	h.load()
	if after := strings.Count(h.log.text.String(), "\n"); after != lines {
		t.Errorf("what was said is said again:\n%s", h.log.text.String())
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	h.load()
	asks("file gone", "", "revoked at")
	h.put(filepath.Dir(file)+"/middle.crl", middle.CRL(1, nil, low))
	asks("another file", "", "revoked at")
	h.refuses("an intermediate's CRL", "revoked at", low, middle.Cert)
	if h.log.count("stays in force though no file holds it any more") != 1 {
		t.Errorf("log:\n%s", h.log.text.String())
	}
	h.put(filepath.Dir(file)+"/middle.crl", middle.CRL(2, nil))
	h.refuses("and its next", "", low, middle.Cert)
	h.Configure(nil)
	asks("not configured any more", "", "")
}

// TestCRLOrder: by number, then by time.
func TestCRLOrder(t *testing.T) {
	at := func(number, hour int64) *crl {
		c := &crl{from: time.Unix(hour*3600, 0)}
		if number > 0 {
			c.number = big.NewInt(number)
		}
		return c
	}
	for _, test := range []struct {
		next, was *crl
		older     bool
	}{
		{at(2, 1), at(1, 1), false},
		{at(1, 2), at(2, 1), true},
		{at(2, 1), at(2, 2), true},
		{at(2, 2), at(2, 2), false},
		{at(0, 9), at(1, 1), true}, // has lost its number
		{at(1, 9), at(0, 1), false},
		{at(0, 1), at(0, 2), true},
		{at(0, 3), at(0, 2), false},
	} {
		if got := test.next.olderThan(test.was); got != test.older {
			t.Errorf("%v of %s after %v of %s: older %t", test.next.number, test.next.from, test.was.number, test.was.from, got)
		}
	}
}

// TestForgedCRLOfAnIntermediate: what no bundle can tell is told by the chain,
// and what was verified once is not displaced.
func TestForgedCRLOfAnIntermediate(t *testing.T) {
	ca := testca.New(t, "example.org")
	middle := ca.Intermediate()
	web := middle.SVID("/web").Leaf
	file := t.TempDir() + "/crl"
	forge := func(number int64) []byte {
		der := middle.CRL(number, nil)
		der[len(der)-1] ^= 1
		return der
	}
	write(t, file, forge(5))
	h := holdCRLs(t, storeOf(t, ca.SVID("/orders"), ca), map[spiffeid.TrustDomain][]string{ca.TrustDomain: {file}})
	h.refuses("forged", "does not carry its signature", web, middle.Cert)
	if s := h.ids.Report().CRLs; len(s) != 1 || s[0].Verified {
		t.Errorf("status %+v", s)
	}
	h.put(file, middle.CRL(6, nil, web))
	h.refuses("good", "revoked at", web, middle.Cert)
	h.put(file, forge(7))
	h.refuses("forged later", "revoked at", web, middle.Cert)
	if s := h.ids.Report().CRLs; len(s) != 2 || !strings.Contains(s[0].Problem, "not signed by the authority that signed the CRL in force") {
		t.Errorf("status %+v", s)
	}
}

// TestCRLsBeforeBundles: CRLs that were read while the source had no bundle
// yet are told apart when there is one.
func TestCRLsBeforeBundles(t *testing.T) {
	ca := testca.New(t, "example.org")
	web := ca.SVID("/web").Leaf
	file := t.TempDir() + "/crl"
	forged := ca.CRL(9, nil)
	forged[len(forged)-1] ^= 1
	write(t, file, forged)
	ids := newStore("test", errors.New("not yet"))
	h := holdCRLs(t, ids, map[spiffeid.TrustDomain][]string{ca.TrustDomain: {file}})
	learn(t, ids, ca.SVID("/orders"), ca)
	h.refuses("forged", "does not carry its signature", web)
	h.put(file, ca.CRL(1, nil)) // a good one counts, whatever number the forged one had
	h.refuses("good", "", web)
	g := ids.trusted().generation
	learn(t, ids, ca.SVID("/orders"), ca, testca.New(t, "partner.example"))
	if trust := ids.trusted(); trust.generation != g+1 || trust.crls == nil {
		t.Errorf("generation %d after %d, CRLs %v", trust.generation, g, trust.crls)
	}
}

// TestCRLsGrowOld: said once when late, once when over; over, nobody comes in
// and nobody is thrown out.
func TestCRLsGrowOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := testca.New(t, "example.org")
		web := ca.SVID("/web", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(23 * time.Hour) }).Leaf
		file := t.TempDir() + "/crl"
		write(t, file, ca.CRL(1, func(r *x509.RevocationList) { r.NextUpdate = time.Now().Add(10 * time.Hour) }))
		h := holdCRLs(t, storeOf(t, ca.SVID("/orders"), ca), map[spiffeid.TrustDomain][]string{ca.TrustDomain: {file}})
		said := func(late, over int) {
			t.Helper()
			h.load()
			h.load()
			if a, b := h.log.count("about to be out of date"), h.log.count("is out of date: new connections"); a != late || b != over {
				t.Errorf("warned %d and %d times, want %d and %d", a, b, late, over)
			}
		}
		time.Sleep(7 * time.Hour)
		said(0, 0)
		time.Sleep(2 * time.Hour)
		said(1, 0)
		h.refuses("late", "", web)
		time.Sleep(2 * time.Hour)
		said(1, 1)
		h.refuses("over", "is out of date since", web)
		trust := h.ids.trusted()
		if err := trust.crls.revoked(ca.TrustDomain, []path{{web, ca.Cert}}); err != nil {
			t.Errorf("a live connection: %v", err)
		}
		h.put(file, ca.CRL(2, nil))
		h.refuses("renewed", "", web)
		said(1, 1)
	})
}

// TestCRLFileBounds: what is no plain file, or too large, does not hold the
// proxy up.
func TestCRLFileBounds(t *testing.T) {
	ca := testca.New(t, "example.org")
	dir := t.TempDir()
	big, err := os.Create(dir + "/big")
	if err != nil {
		t.Fatal(err)
	}
	if err := big.Truncate(maxCRLBytes + 1); err != nil {
		t.Fatal(err)
	}
	if err := big.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{dir: "not a plain file", dir + "/big": "larger than", dir + "/none": "file does not exist", dir + "/[": "syntax error"} {
		d := &crlFiles{}
		if !d.load(ca.TrustDomain, []string{name}, newTrust(testca.Bundles(ca)), time.Now()) || !strings.Contains(d.problem, want) {
			t.Errorf("%s: %q, want %q", name, d.problem, want)
		}
		if err := CheckCRLs([]string{name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: a look at it alone: %v, want %q", name, err, want)
		}
	}
	if _, err := NewCRLs(CRLsConfig{Identities: nil}); err == nil {
		t.Error("CRLs without bundles were taken")
	}
	if got := slices.Collect(maps.Keys(holdCRLs(t, storeOf(t, ca.SVID("/o"), ca), nil).domains)); len(got) != 0 {
		t.Errorf("%v", got)
	}
}
