package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// This file is whom JWT-SVIDs are believed: the JWT bundles of the Workload
// API, kept apart by trust domain as those for certificates are.

// base64URL is base64url without padding and without bits to spare, so that
// there is one spelling (RFC 7515 §2).
var base64URL = base64.RawURLEncoding.Strict()

// jwtTrust is the JWT bundles as of some moment. It is immutable.
type jwtTrust struct {
	domains    map[spiffeid.TrustDomain]map[string]*jwtAuthority // by key ID
	generation uint64                                            // one more for each change
	problem    error                                             // why there are no bundles
}

// jwtAuthority is a key that signs JWT-SVIDs. One that stays in the bundle
// keeps its pointer.
type jwtAuthority struct {
	domain spiffeid.TrustDomain
	keyID  string
	key    jwtKey
}

// jwtKey is *rsa.PublicKey or *ecdsa.PublicKey.
type jwtKey interface{ Equal(crypto.PublicKey) bool }

// authority returns the key of that name of a trust domain. It is not looked
// for in any other domain's bundle.
func (t *jwtTrust) authority(td spiffeid.TrustDomain, keyID string) (*jwtAuthority, error) {
	domain, ok := t.domains[td]
	if !ok {
		return nil, fmt.Errorf("no JWT bundle for trust domain %s: it is neither ours nor federated with us", td)
	}
	a := domain[keyID]
	if a == nil {
		return nil, fmt.Errorf("the key it names (kid) is none of the %d in the JWT bundle of %s", len(domain), td)
	}
	return a, nil
}

// holds reports whether a is still an authority.
func (t *jwtTrust) holds(a *jwtAuthority) bool { return t.domains[a.domain][a.keyID] == a }

// next returns the trust that follows t, or t where nothing changed.
func (t *jwtTrust) next(bundles []*jwtbundle.Bundle) *jwtTrust {
	n := &jwtTrust{domains: map[spiffeid.TrustDomain]map[string]*jwtAuthority{}, generation: t.generation + 1}
	for _, b := range bundles {
		td := b.TrustDomain()
		n.domains[td] = map[string]*jwtAuthority{}
		for id, key := range b.JWTAuthorities() {
			k, err := checkJWTKey(id, key)
			if err != nil {
				continue // sifted out before
			}
			if old := t.domains[td][id]; old != nil && old.key.Equal(key) {
				n.domains[td][id] = old
			} else {
				n.domains[td][id] = &jwtAuthority{td, id, k}
			}
		}
	}
	if t.problem == nil && maps.EqualFunc(t.domains, n.domains, maps.Equal[map[string]*jwtAuthority, map[string]*jwtAuthority]) {
		return t
	}
	return n
}

// checkJWTKey refuses what cannot verify by an algorithm of SPIFFE JWT-SVID
// §2.1, and keys of less than 112 bits of security.
func checkJWTKey(keyID string, key crypto.PublicKey) (jwtKey, error) {
	if keyID == "" || len(keyID) > maxJWTKeyID {
		return nil, fmt.Errorf("its key ID (kid) has %d bytes, not 1 to %d", len(keyID), maxJWTKeyID)
	}
	switch k := key.(type) {
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < minRSA {
			return nil, fmt.Errorf("it is an RSA key of %d bits, at least %d are needed", bits, minRSA)
		}
		return k, nil
	case *ecdsa.PublicKey:
		if c := k.Curve; c != elliptic.P256() && c != elliptic.P384() && c != elliptic.P521() {
			return nil, errors.New("its curve is none of P-256, P-384 and P-521")
		}
		return k, nil
	}
	return nil, errors.New("it is no public key for RSA or ECDSA")
}

// siftBundles takes out of each bundle the keys that cannot be used, and tells
// why: the library would refuse the update as a whole, and an authority that
// was withdrawn would stay. A bundle that is none is taken out as a whole, for
// what it withdrew is not known.
func siftBundles(update *workload.JWTBundlesResponse) error {
	var problems []error
	named := map[spiffeid.TrustDomain]string{}
	for _, name := range slices.Sorted(maps.Keys(update.Bundles)) {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			problems = append(problems, fmt.Errorf("%.512q: %w", name, err))
			delete(update.Bundles, name)
			continue
		}
		if other, twice := named[td]; twice {
			problems = append(problems, fmt.Errorf("%s has two bundles, none of which is used", td))
			delete(update.Bundles, name)
			delete(update.Bundles, other)
			continue
		}
		named[td] = name
		doc, err := siftKeys(update.Bundles[name])
		if err != nil {
			problems = append(problems, fmt.Errorf("bundle of %s: %w", td, err))
		}
		if update.Bundles[name] = doc; doc == nil {
			delete(update.Bundles, name)
		}
	}
	return errors.Join(problems...)
}

// siftKeys returns the JWK Set with the keys that can be used, or nil where
// doc is none.
func siftKeys(doc []byte) ([]byte, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(doc, &set); err != nil {
		return nil, fmt.Errorf("no JWK Set (RFC 7517 §5): %w", err)
	}
	good := []json.RawMessage{}
	var problems []error
	seen := map[string]bool{}
	for i, raw := range set.Keys {
		var key jose.JSONWebKey
		err := key.UnmarshalJSON(raw)
		if err == nil {
			_, err = checkJWTKey(key.KeyID, key.Key)
		}
		if err == nil && key.Use != "" && key.Use != "sig" && key.Use != "jwt-svid" {
			err = fmt.Errorf("it is for another use (%.64q)", key.Use)
		}
		if err == nil && seen[key.KeyID] {
			err = fmt.Errorf("another key has its ID %q", key.KeyID)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("key %d: %w", i+1, err))
			continue
		}
		seen[key.KeyID] = true
		good = append(good, raw)
	}
	if len(problems) == 0 {
		return doc, nil
	}
	set.Keys = good
	sifted, err := json.Marshal(set)
	return sifted, errors.Join(append(problems, err)...)
}
