package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// This file is one JWT-SVID: what it says, and whether to believe it.

// Tokens is a Source that knows JWT-SVIDs, too. What it says of them changes
// with the JWT bundles; the Changed of its leases tells of that as well.
type Tokens interface {
	// FollowJWT begins to follow the JWT bundles, so that they are there when
	// the first token comes. More calls do nothing more.
	FollowJWT()

	// JWTProblem returns why no token can be validated now: no bundles were
	// received yet, or they were taken back.
	JWTProblem() error

	// JWTGeneration is one more for each change of the JWT bundles.
	JWTGeneration() uint64

	// ValidateJWT decides on a JWT-SVID as of now: it must be signed by an
	// authority of its subject's own trust domain, and at least one of
	// audience must be among those it is for (SPIFFE JWT-SVID §3, §4). Errors
	// are *JWTError. A token that was validated before costs no allocation.
	// It is not kept: the caller may use its memory again.
	ValidateJWT(token string, audience []string, now time.Time) (JWT, error)

	// RecheckJWT holds what ValidateJWT returned against the bundles of now:
	// whether the authority that signed it is still one. That it has expired
	// since is no error.
	RecheckJWT(j JWT) error

	// FetchJWT returns a JWT-SVID of one of our own identities for an
	// audience. It waits for the first one, until ctx ends; from then on it
	// is renewed at half its life, as long as it is asked for.
	FetchJWT(ctx context.Context, subject spiffeid.ID, audience string) (string, error)
}

// JWT is a JWT-SVID that was validated.
type JWT struct {
	Subject  spiffeid.ID // whom it speaks for
	NotAfter time.Time   // when it expires

	by *jwtAuthority // that signed it
}

// JWTError is why a JWT-SVID was not accepted. It holds nothing of the token
// but its trust domain and, once its signature was verified, its subject.
type JWTError struct {
	// Result is a short fixed word, for the metrics: unavailable (there are no
	// bundles: see JWTProblem), malformed, untrusted, expired, early, audience.
	Result string
	Err    error
}

func (e *JWTError) Error() string { return "JWT-SVID: " + e.Err.Error() }

func (e *JWTError) Unwrap() error { return e.Err }

// Bounds on tokens.
const (
	maxJWT      = 16 << 10         // bytes of a token
	maxJWTSkew  = 30 * time.Second // how far in the future nbf and iat may be, for clocks differ
	maxJWTDate  = 253402300799     // the last second of the year 9999
	maxJWTKeyID = 256              // bytes of a key ID

	maxTrustDomain = 255 // bytes (SPIFFE-ID §2.3)
)

// jwtAlgorithms are those of SPIFFE JWT-SVID §2.1. There is neither `none` nor
// one with a shared secret among them.
var jwtAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512,
	jose.ES256, jose.ES384, jose.ES512,
	jose.PS256, jose.PS384, jose.PS512,
}

// verdict is what is known of a token whose signature was verified.
type verdict struct {
	JWT
	audience []string
}

// judge is what is asked of a verdict each time.
func (v *verdict) judge(audience []string, now time.Time) error {
	if !now.Before(v.NotAfter) {
		return &JWTError{"expired", fmt.Errorf("of %s: expired at %s", v.Subject, v.NotAfter.UTC().Format(time.RFC3339))}
	}
	for _, a := range v.audience {
		if slices.Contains(audience, a) {
			return nil
		}
	}
	return &JWTError{"audience", fmt.Errorf("of %s: it is for others: none of its audiences (aud) is one of %q", v.Subject, audience)}
}

// verify reads a token and verifies its signature and when it begins. What is
// left is for judge.
func (t *jwtTrust) verify(token string, now time.Time) (verdict, error) {
	if t.problem != nil {
		return verdict{}, &JWTError{"unavailable", t.problem}
	}
	keyID, err := checkJWTForm(token)
	if err != nil {
		return verdict{}, &JWTError{"malformed", err}
	}
	signed, err := jose.ParseSignedCompact(token, jwtAlgorithms)
	if err != nil {
		// The library's error holds parts of the token.
		return verdict{}, &JWTError{"malformed", errors.New("it is no JWS that is signed by an algorithm of SPIFFE JWT-SVID §2.1")}
	}
	var c jwt.Claims
	if err := json.Unmarshal(signed.UnsafePayloadWithoutVerification(), &c); err != nil {
		return verdict{}, &JWTError{"malformed", errors.New("its claims are no JSON object of the types of RFC 7519 §4.1, each name once")}
	}
	id, err := checkClaims(&c)
	if err != nil {
		return verdict{}, &JWTError{"malformed", err}
	}
	by, err := t.authority(id.TrustDomain(), keyID)
	if err != nil {
		return verdict{}, &JWTError{"untrusted", err}
	}
	if _, err := signed.Verify(by.key); err != nil {
		return verdict{}, &JWTError{"untrusted", fmt.Errorf("the signature is not that of the authority of %s that it names (kid)", id.TrustDomain())}
	}
	for _, from := range []*jwt.NumericDate{c.NotBefore, c.IssuedAt} {
		if from != nil && from.Time().After(now.Add(maxJWTSkew)) {
			return verdict{}, &JWTError{"early", fmt.Errorf("of %s: it begins in the future (nbf, iat), at %s; are the clocks right?", id, from.Time().UTC().Format(time.RFC3339))}
		}
	}
	return verdict{JWT{Subject: id, NotAfter: c.Expiry.Time(), by: by}, c.Audience}, nil
}

// checkJWTForm refuses what is no compact serialisation (RFC 7515 §7.1), and
// what has another header than alg, kid and typ (SPIFFE JWT-SVID §2). It
// returns the key ID, which the specification does not ask for: without it the
// key would have to be guessed.
func checkJWTForm(token string) (keyID string, err error) {
	if err := checkJWTBytes(token); err != nil {
		return "", err
	}
	var header []byte
	for part := range strings.SplitSeq(token, ".") {
		text, err := base64URL.DecodeString(part)
		if err != nil { // the library takes several spellings
			return "", errors.New("one of its parts is not base64url (RFC 7515 §2)")
		}
		if header == nil {
			header = text
		}
	}
	return checkJWTHeader(header)
}

// checkJWTBytes bounds a token to what can stand in a field of a request.
func checkJWTBytes(token string) error {
	if len(token) > maxJWT {
		return fmt.Errorf("it has %d bytes, at most %d are accepted", len(token), maxJWT)
	}
	dots := 0
	for i := range len(token) {
		switch c := token[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		case c == '.':
			dots++
		default:
			return fmt.Errorf("byte %d is none of base64url", i+1)
		}
	}
	if dots != 2 {
		return fmt.Errorf("it has %d dots; a JWS in compact form has two", dots)
	}
	return nil
}

func checkJWTHeader(text []byte) (keyID string, err error) {
	var header map[string]any
	if err := json.Unmarshal(text, &header); err != nil {
		return "", errors.New("its header is no JSON object with each name once")
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return "", errors.New("its header has more than alg, kid and typ (SPIFFE JWT-SVID §2)")
		}
	}
	if typ, given := header["typ"]; given && typ != "JWT" && typ != "JOSE" {
		return "", errors.New("its type (typ) is neither JWT nor JOSE (SPIFFE JWT-SVID §2.3)")
	}
	keyID, _ = header["kid"].(string)
	if keyID == "" || len(keyID) > maxJWTKeyID {
		return "", fmt.Errorf("its header names no key (kid) of 1 to %d bytes", maxJWTKeyID)
	}
	return keyID, nil
}

// checkClaims asks for what SPIFFE JWT-SVID §3 asks for.
func checkClaims(c *jwt.Claims) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(c.Subject)
	switch {
	case len(c.Subject) > maxSPIFFEID:
		err = fmt.Errorf("its subject (sub) has %d bytes, a SPIFFE ID has at most %d", len(c.Subject), maxSPIFFEID)
	case err != nil:
		err = errors.New("its subject (sub) is not a SPIFFE ID")
	case len(id.TrustDomain().Name()) > maxTrustDomain:
		err = fmt.Errorf("the trust domain of its subject (sub) has more than %d bytes", maxTrustDomain)
	case id.Path() == "":
		err = errors.New("its subject (sub) is a trust domain; that of a workload has a path")
	case len(c.Audience) == 0:
		err = errors.New("it is for nobody: there is no audience (aud)")
	case c.Expiry == nil:
		err = errors.New("it does not say when it expires (exp)")
	}
	for _, d := range []*jwt.NumericDate{c.Expiry, c.NotBefore, c.IssuedAt} {
		if err == nil && d != nil && (*d < 0 || *d > maxJWTDate) {
			err = errors.New("one of exp, nbf and iat is not between the years 1970 and 9999")
		}
	}
	return id, err
}
