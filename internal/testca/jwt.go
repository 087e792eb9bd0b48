package testca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// JWTAuthority signs JWT-SVIDs of one trust domain.
type JWTAuthority struct {
	T           testing.TB
	TrustDomain spiffeid.TrustDomain
	KeyID       string
	Key         *ecdsa.PrivateKey
}

// NewJWT returns a JWT authority of a trust domain.
func NewJWT(t testing.TB, td, keyID string) *JWTAuthority {
	t.Helper()
	return &JWTAuthority{T: t, TrustDomain: spiffeid.RequireTrustDomainFromString(td), KeyID: keyID, Key: NewKey(t)}
}

// SVID returns a token for the path, from now on.
func (a *JWTAuthority) SVID(path string, now time.Time, life time.Duration, audience ...string) string {
	a.T.Helper()
	claims, err := json.Marshal(map[string]any{
		"sub": a.TrustDomain.IDString() + path, "aud": audience, "iat": now.Unix(), "exp": now.Add(life).Unix(),
	})
	if err != nil {
		a.T.Fatal(err)
	}
	return a.Sign(fmt.Sprintf(`{"alg":"ES256","kid":%q,"typ":"JWT"}`, a.KeyID), string(claims))
}

// Sign signs any header and claims by ES256, whatever they say (RFC 7515 §7.1).
func (a *JWTAuthority) Sign(header, claims string) string {
	a.T.Helper()
	text := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, a.Key, sum[:])
	if err != nil {
		a.T.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// JWK returns the authority's key as an entry of a JWK Set (RFC 7517 §4).
func (a *JWTAuthority) JWK() string {
	a.T.Helper()
	point, err := a.Key.PublicKey.Bytes() // 4, x, y
	if err != nil {
		a.T.Fatal(err)
	}
	return fmt.Sprintf(`{"kty":"EC","crv":"P-256","kid":%q,"x":%q,"y":%q}`, a.KeyID,
		base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:]))
}

// JWKS returns a JWK Set of such entries.
func JWKS(keys ...string) []byte { return []byte(`{"keys":[` + strings.Join(keys, ",") + `]}`) }
