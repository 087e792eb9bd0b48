package spire

import (
	"context"
	"crypto"
	"crypto/sha1" //nolint:gosec // a key identifier as RFC 5280 §4.2.1.2 has it, nothing rests on it
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/narthex-id/narthex/agent/registry"
)

// maxRefreshHint keeps a hint from the server within a time.Duration.
const maxRefreshHint = int64(365 * 24 * time.Hour / time.Second)

// Bundle returns the trust domain's bundle (GetBundle), which has at least one
// X.509 authority; the error wraps ErrBadAnswer otherwise. Tainted authorities
// are in it, for SVIDs they signed are valid until replaced; Tainted and
// TaintedKeys name them.
func (c *Client) Bundle(ctx context.Context) (*registry.Bundle, error) {
	var bundle *registry.Bundle
	err := c.call(ctx, "get bundle", func(ctx context.Context, cn *conn) (err error) {
		bundle, err = getBundle(ctx, cn, c.trustDomain)
		return err
	})
	if err != nil {
		return nil, err
	}
	return bundle, nil
}

// FederatedBundle returns the bundle of a foreign trust domain as the server
// has it (GetFederatedBundle), which may be without any authority. The error
// wraps ErrNotFound where it has none.
func (c *Client) FederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (*registry.Bundle, error) {
	var bundle *registry.Bundle
	err := c.call(ctx, "get bundle of "+td.Name(), func(ctx context.Context, cn *conn) error {
		answer, err := bundlev1.NewBundleClient(cn.cc).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()})
		if err != nil {
			return err
		}
		bundle, err = parseBundle(answer, td)
		return err
	})
	if err != nil {
		return nil, err
	}
	return bundle, nil
}

func getBundle(ctx context.Context, cn *conn, td spiffeid.TrustDomain) (*registry.Bundle, error) {
	answer, err := bundlev1.NewBundleClient(cn.cc).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, err
	}
	bundle, err := parseBundle(answer, td)
	if err == nil && len(bundle.X509) == 0 {
		// With it, neither the server nor any workload could be verified.
		return nil, badAnswer("the bundle of %s has no X.509 authority", td)
	}
	return bundle, err
}

// parseBundle fails on a bundle of which any part makes no sense: half a
// bundle would cut off the peers whose authority is in the other half.
func parseBundle(b *types.Bundle, td spiffeid.TrustDomain) (*registry.Bundle, error) {
	got, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
	switch {
	case err != nil:
		return nil, badAnswer("bundle: %w", err)
	case got != td:
		return nil, badAnswer("asked for the bundle of %s and got that of %s", td, got)
	}
	bundle := &registry.Bundle{
		TrustDomain: td,
		Sequence:    b.GetSequenceNumber(),
		RefreshHint: time.Duration(min(max(b.GetRefreshHint(), 0), maxRefreshHint)) * time.Second,
	}
	for i, authority := range b.GetX509Authorities() {
		cert, err := x509.ParseCertificate(authority.GetAsn1())
		if err != nil {
			return nil, badAnswer("bundle of %s: X.509 authority %d: %w", td, i, err)
		}
		bundle.X509 = append(bundle.X509, cert)
		bundle.DER = append(bundle.DER, cert.Raw...)
		if authority.GetTainted() {
			id, err := keyID(cert)
			if err != nil {
				return nil, badAnswer("bundle of %s: X.509 authority %d: %w", td, i, err)
			}
			bundle.Tainted = append(bundle.Tainted, id)
		}
	}
	var jwt, wit keySet
	if jwt, err = parseKeys("JWT", b.GetJwtAuthorities()); err == nil {
		wit, err = parseKeys("WIT", b.GetWitAuthorities())
	}
	if err != nil {
		return nil, badAnswer("bundle of %s: %w", td, err)
	}
	bundle.JWTKeys, bundle.JWKS = jwt.keys, jwt.jwks
	bundle.WITKeys, bundle.WITJWKS = wit.keys, wit.jwks
	bundle.TaintedKeys = slices.Sorted(slices.Values(append(jwt.tainted, wit.tainted...)))
	return bundle, nil
}

// tokenKey is a JWT or WIT authority of the API.
type tokenKey interface {
	GetKeyId() string
	GetPublicKey() []byte
	GetTainted() bool
}

type keySet struct {
	keys    map[string]crypto.PublicKey // by key ID
	jwks    []byte
	tainted []string
}

// parseKeys reads the authorities of one kind. Their JWK Set is a standard one
// (RFC 7517 §5): without the use that keys have in a SPIFFE bundle, for which
// libraries outside of SPIFFE would pass them over.
func parseKeys[K tokenKey](kind string, authorities []K) (keySet, error) {
	set := keySet{keys: make(map[string]crypto.PublicKey, len(authorities))}
	for i, authority := range authorities {
		id := authority.GetKeyId()
		if id == "" {
			return keySet{}, fmt.Errorf("%s authority %d has no key id", kind, i)
		}
		key, err := x509.ParsePKIXPublicKey(authority.GetPublicKey())
		if err != nil {
			return keySet{}, fmt.Errorf("%s authority %q: %w", kind, id, err)
		}
		set.keys[id] = key
		if authority.GetTainted() {
			set.tainted = append(set.tainted, id)
		}
	}
	jwks := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(set.keys))}
	for _, id := range slices.Sorted(maps.Keys(set.keys)) {
		jwks.Keys = append(jwks.Keys, jose.JSONWebKey{Key: set.keys[id], KeyID: id})
	}
	var err error
	if set.jwks, err = json.Marshal(jwks); err != nil {
		return keySet{}, fmt.Errorf("%s authorities: %w", kind, err)
	}
	return set, nil
}

// keyID is an authority's subject key id in hex. Where the certificate has
// none it is what RFC 5280 §4.2.1.2 (1) recommends, which is what others will
// have put into the authority key id of the certificates it signed.
func keyID(cert *x509.Certificate) (string, error) {
	if len(cert.SubjectKeyId) > 0 {
		return hex.EncodeToString(cert.SubjectKeyId), nil
	}
	var info struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &info); err != nil {
		return "", fmt.Errorf("subject public key: %w", err)
	}
	sum := sha1.Sum(info.Key.Bytes) //nolint:gosec // see above
	return hex.EncodeToString(sum[:]), nil
}
