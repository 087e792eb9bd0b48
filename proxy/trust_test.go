package proxy

import (
	"crypto/x509"
	"testing"
	"time"
)

// TestVerifiedChainsAreRemembered: for the very same chain, under the same
// authorities, while all of it is valid.
func TestVerifiedChainsAreRemembered(t *testing.T) {
	root := newAuthority(t, "example.org")
	middle := root.intermediate()
	web := middle.svid("/web")
	chain, now := []*x509.Certificate{web.Leaf, middle.cert}, time.Now()
	trust := newTrust(bundles(root))
	d := trust.domains[root.td]
	verify := func(trust *Trust, chain []*x509.Certificate, at time.Time) error {
		_, err := trust.verify(chain, at)
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
		"under other authorities":  verify(trust.next(bundles(newAuthority(t, "example.org"))), chain, now),
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
	short := *middle.cert
	short.NotAfter = now.Add(-time.Second)
	d.remember(sumOf(chain), []path{{web.Leaf, &short, root.cert}})
	if v := d.verified[sumOf(chain)]; !v.to.Equal(short.NotAfter) {
		t.Errorf("remembered until %s, past the end of an intermediate", v.to)
	}
}
