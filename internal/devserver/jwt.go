package devserver

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// jwtTTL is the lifetime of a JWT-SVID, as the real server's default.
const jwtTTL = 5 * time.Minute

// claims of a JWT-SVID (SPIFFE JWT-SVID section 3). Times are in seconds of
// the Unix epoch.
type claims struct {
	Audience []string `json:"aud"`
	Expires  int64    `json:"exp"`
	IssuedAt int64    `json:"iat"`
	Subject  string   `json:"sub"`
}

// newClaims caps the lifetime at that of the signing key.
func newClaims(id spiffeid.ID, audience []string, now, keyExpires time.Time) (claims, error) {
	audience = slices.DeleteFunc(slices.Clone(audience), func(a string) bool { return a == "" })
	if len(audience) == 0 {
		return claims{}, errors.New("invalid JWT-SVID audience: cannot be empty")
	}
	expires := now.Add(jwtTTL)
	if expires.After(keyExpires) {
		expires = keyExpires
	}
	return claims{Audience: audience, Expires: expires.Unix(), IssuedAt: now.Unix(), Subject: id.String()}, nil
}

// signJWT makes an ES256 token: JWS compact serialization (RFC 7515 section
// 3.1) with the signature as r‖s (RFC 7518 section 3.4).
func signJWT(key *ecdsa.PrivateKey, kid string, c claims) (string, error) {
	header, err := json.Marshal(map[string]string{"alg": "ES256", "kid": kid, "typ": "JWT"})
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	b64 := base64.RawURLEncoding
	signed := b64.EncodeToString(header) + "." + b64.EncodeToString(payload)
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return "", err
	}
	var sig [64]byte
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return signed + "." + b64.EncodeToString(sig[:]), nil
}
