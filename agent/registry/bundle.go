package registry

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bundle is the trust bundle of one trust domain, encoded once and shared by
// all who are served it. It is never modified.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []*x509.Certificate
	DER         []byte                      // X509 as the Workload API sends it: DER certificates concatenated
	JWTKeys     map[string]crypto.PublicKey // by key ID
	JWKS        []byte                      // JWTKeys as the Workload API sends them: a JWK Set, in the order of key IDs
	WITKeys     map[string]crypto.PublicKey // by key ID; none where the server signs no WIT-SVIDs
	WITJWKS     []byte                      // WITKeys likewise
	Tainted     []string                    // subject key IDs, hexadecimal, of the X.509 authorities no longer to be relied on
	TaintedKeys []string                    // key IDs of such JWT and WIT authorities, in order
	Sequence    uint64                      // goes up with every change the server makes
	RefreshHint time.Duration               // how often to look for a new one; zero: the server has no opinion
}

// Equal tells whether both hold the same, sequence and refresh hint included.
// Two nil bundles are equal.
func (b *Bundle) Equal(o *Bundle) bool {
	if b == nil || o == nil {
		return b == o
	}
	return b.servesSame(o) && b.Sequence == o.Sequence && b.RefreshHint == o.RefreshHint &&
		slices.Equal(b.Tainted, o.Tainted) && slices.Equal(b.TaintedKeys, o.TaintedKeys)
}

// Vouches tells whether what an authority with this key ID signed, JWT-SVID or
// WIT-SVID, may still be given out: it is in the bundle and not tainted.
func (b *Bundle) Vouches(keyID string) bool {
	_, jwt := b.JWTKeys[keyID]
	_, wit := b.WITKeys[keyID]
	return (jwt || wit) && !slices.Contains(b.TaintedKeys, keyID)
}

// servesSame tells whether a workload could not tell the two apart: taint,
// sequence and refresh hint are between the server and the agent.
func (b *Bundle) servesSame(o *Bundle) bool {
	if b == o {
		return true
	}
	if b == nil || o == nil {
		return false
	}
	return b.TrustDomain == o.TrustDomain && bytes.Equal(b.DER, o.DER) &&
		maps.EqualFunc(b.JWTKeys, o.JWTKeys, samePublicKey) && maps.EqualFunc(b.WITKeys, o.WITKeys, samePublicKey)
}

func samePublicKey(a, b crypto.PublicKey) bool {
	// Every public key type of the standard library has this method.
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
