package proxy

import (
	"crypto/tls"
	"testing"
)

// source returns identities that a test changes by hand.
func source(t testing.TB, cert tls.Certificate, as ...*authority) *Held {
	t.Helper()
	s := NewHeld("test")
	give(t, s, cert, as...)
	return s
}

func give(t testing.TB, s *Held, cert tls.Certificate, as ...*authority) {
	t.Helper()
	if err := s.Set([]SVID{{Certificate: cert}}, bundles(as...)); err != nil {
		t.Fatal(err)
	}
}
