package proxy

import (
	"crypto/tls"
	"testing"
)

// storeOf returns a store that holds an SVID and the bundles of authorities.
func storeOf(t testing.TB, cert tls.Certificate, as ...*authority) *store {
	t.Helper()
	s := newStore("test", nil)
	learn(t, s, cert, as...)
	return s
}

func learn(t testing.TB, s *store, cert tls.Certificate, as ...*authority) {
	t.Helper()
	if err := s.set([]SVID{{Certificate: cert}}, bundles(as...)); err != nil {
		t.Fatal(err)
	}
}
