package endpoint

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/narthex-id/narthex/agent/registry"
)

const (
	maxJWT     = 16 << 10         // bytes of a token
	maxJWTSkew = 30 * time.Second // how far in the future nbf and iat may be, for clocks differ
)

// jwtAlgorithms are those of SPIFFE JWT-SVID §2.1. There is neither `none` nor
// one with a shared secret among them.
var jwtAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
}

// ValidateJWTSVID verifies a token with the bundles the caller may verify
// with: SPIFFE Workload API §6.2.3. One that is not good is InvalidArgument, with
// the reason and without any part of it.
func (a *workloadAPI) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch n := len(req.GetAudience()); {
	case n == 0:
		return nil, status.Error(codes.InvalidArgument, "the request names no audience: name the one that tokens for the caller have")
	case n > maxAudience:
		return nil, status.Errorf(codes.InvalidArgument, "the audience has %d bytes; at most %d are accepted", n, maxAudience)
	case req.GetSvid() == "":
		return nil, status.Error(codes.InvalidArgument, "there is no token in the request")
	}
	view, err := a.server.ask(ctx, a.jwtBundles)
	if err != nil {
		return nil, err
	}
	id, claims, err := verifyJWT(req.GetSvid(), req.GetAudience(), view, time.Now())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the JWT-SVID is not accepted: %v", err)
	}
	if id.TrustDomain() != view.Bundle.TrustDomain {
		for name := range claims {
			if !slices.Contains([]string{"sub", "exp", "aud"}, name) && !slices.Contains(a.foreignClaims, name) {
				delete(claims, name)
			}
		}
	}
	told, err := structpb.NewStruct(claims)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "the JWT-SVID is not accepted: one of its claims cannot be told as JSON")
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: told}, nil
}

// verifyJWT verifies a token as SPIFFE JWT-SVID §4 asks for, and returns whose
// it is and its claims, of which aud is always a list. Errors hold no part of
// the token, but for the trust domain where there is no bundle of it.
func verifyJWT(token, audience string, view *registry.View, now time.Time) (spiffeid.ID, map[string]any, error) {
	fail := func(format string, args ...any) (spiffeid.ID, map[string]any, error) {
		return spiffeid.ID{}, nil, fmt.Errorf(format, args...)
	}
	signed, claims, id, err := readJWT(token)
	if err != nil {
		return fail("%w", err)
	}
	key, err := jwtKey(view, id.TrustDomain(), signed.Headers[0].KeyID)
	if err != nil {
		return fail("%w", err)
	}
	all := map[string]any{}
	if err := signed.Claims(key, &all); err != nil {
		return fail("the signature is not that of the authority of its trust domain that it names (kid)")
	}
	if expires := claims.Expiry.Time(); !now.Before(expires) {
		return fail("it expired at %s (exp)", expires.UTC().Format(time.RFC3339))
	}
	for _, from := range []*jwt.NumericDate{claims.NotBefore, claims.IssuedAt} {
		if from != nil && from.Time().After(now.Add(maxJWTSkew)) {
			return fail("it begins in the future (nbf, iat): compare the clocks of this machine and of who signed it")
		}
	}
	if !claims.Audience.Contains(audience) {
		return fail("it is for others: %q is none of its audiences (aud)", audience)
	}
	list := make([]any, len(claims.Audience))
	for i, a := range claims.Audience {
		list[i] = a
	}
	all["aud"] = list
	return id, all, nil
}

// readJWT reads a token of which nothing is known.
func readJWT(token string) (*jwt.JSONWebToken, *jwt.Claims, spiffeid.ID, error) {
	fail := func(format string, args ...any) (*jwt.JSONWebToken, *jwt.Claims, spiffeid.ID, error) {
		return nil, nil, spiffeid.ID{}, fmt.Errorf(format, args...)
	}
	if n := len(token); n > maxJWT {
		return fail("it has %d bytes, at most %d are accepted", n, maxJWT)
	}
	if strings.ContainsAny(token, "\r\n\t ") { // the library takes them
		return fail("there is white space in it")
	}
	signed, err := jwt.ParseSigned(token, jwtAlgorithms)
	if err != nil {
		return fail("it is no JWS in compact form that is signed by an algorithm of SPIFFE JWT-SVID §2.1")
	}
	header := signed.Headers[0]
	if !plainHeader(token) {
		return fail("its header has more than alg, kid and typ (SPIFFE JWT-SVID §2)")
	}
	if typ, given := header.ExtraHeaders[jose.HeaderType]; given && typ != "JWT" && typ != "JOSE" {
		return fail("its type (typ) is neither JWT nor JOSE (SPIFFE JWT-SVID §2.3)")
	}
	if header.KeyID == "" {
		return fail("its header names no key (kid)")
	}
	var claims jwt.Claims
	if err := signed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return fail("its claims are no JSON object of the types of RFC 7519 §4.1, each name once")
	}
	id, err := spiffeid.FromString(claims.Subject)
	switch {
	case err != nil || len(claims.Subject) > maxSPIFFEID:
		return fail("its subject (sub) is no SPIFFE ID")
	case claims.Expiry == nil:
		return fail("it does not say when it expires (exp)")
	}
	return signed, &claims, id, nil
}

// plainHeader tells whether a JWS has no header but those of SPIFFE JWT-SVID §2:
// others may say how it is to be verified, or with which key.
func plainHeader(token string) bool {
	head, _, _ := strings.Cut(token, ".")
	var header map[string]json.RawMessage
	text, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil || json.Unmarshal(text, &header) != nil {
		return false
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return false
		}
	}
	return true
}

// jwtKey returns the key of that ID of a trust domain. It is not looked for in
// any other domain's bundle.
func jwtKey(view *registry.View, td spiffeid.TrustDomain, keyID string) (crypto.PublicKey, error) {
	bundle := view.Federated[td]
	if td == view.Bundle.TrustDomain {
		bundle = view.Bundle
	}
	if bundle == nil {
		return nil, fmt.Errorf("the caller has no bundle of trust domain %.255s: it is neither its own nor one its entries federate with", td)
	}
	key, ok := bundle.JWTKeys[keyID]
	if !ok {
		return nil, errors.New("the key it names (kid) is none in the bundle of its trust domain")
	}
	return key, nil
}
