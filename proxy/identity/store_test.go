package identity

import (
	"crypto/tls"
	"testing"

	"github.com/narthex-id/narthex/internal/testca"
)

// storeOf returns a store that holds an SVID and the bundles of authorities.
func storeOf(t testing.TB, cert tls.Certificate, as ...*testca.Authority) *store {
	t.Helper()
	s := newStore("test", nil)
	learn(t, s, cert, as...)
	return s
}

func learn(t testing.TB, s *store, cert tls.Certificate, as ...*testca.Authority) {
	t.Helper()
	if err := s.set([]SVID{{Certificate: cert}}, testca.Bundles(as...)); err != nil {
		t.Fatal(err)
	}
}
