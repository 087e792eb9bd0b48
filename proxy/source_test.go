package proxy

import (
	"crypto/tls"
	"testing"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/identity"
)

// source returns identities that a test changes by hand.
func source(t testing.TB, cert tls.Certificate, as ...*testca.Authority) *identity.Held {
	t.Helper()
	s := identity.NewHeld("test")
	give(t, s, cert, as...)
	return s
}

func give(t testing.TB, s *identity.Held, cert tls.Certificate, as ...*testca.Authority) {
	t.Helper()
	if err := s.Set([]identity.SVID{{Certificate: cert}}, testca.Bundles(as...)); err != nil {
		t.Fatal(err)
	}
}
