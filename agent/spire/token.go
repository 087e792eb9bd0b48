package spire

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/narthex-id/narthex/agent/registry"
)

const (
	stepSignJWT = "sign a JWT-SVID"
	stepSignWIT = "sign WIT-SVIDs"

	// maxToken bounds a token in bytes. Services take header fields of 8 KiB
	// to 32 KiB, so a longer one would be of no use.
	maxToken = 16 << 10
)

// tokenAlgorithms are those of SPIFFE JWT-SVID §2.1. There is neither `none`
// nor any with a shared key among them.
var tokenAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
}

// JWTRequest asks for one JWT-SVID.
type JWTRequest struct {
	EntryID string
	// SPIFFEID is the entry's. An answer for any other is not accepted.
	SPIFFEID spiffeid.ID
	// Audience is sorted and without duplicates. The answer is for exactly
	// these.
	Audience []string
}

// NewJWTSVID has the server sign a JWT-SVID (NewJWTSVID). Of the answer, all
// but the signature is checked: what vouches for it is the connection, and the
// bundle may be older than the authority that signed it. The error wraps
// ErrNotFound where the server no longer has the entry, or not for this agent,
// and ErrTokensOff where it signs no JWT-SVIDs. No part of a token is in it.
func (c *Client) NewJWTSVID(ctx context.Context, req JWTRequest) (*registry.Token, error) {
	var token *registry.Token
	err := c.call(ctx, stepSignJWT+": entry "+req.EntryID, func(ctx context.Context, cn *conn) error {
		answer, err := svidv1.NewSVIDClient(cn.cc).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: req.EntryID, Audience: req.Audience})
		if err != nil {
			return err
		}
		parsed, err := parseToken(answer.GetSvid().GetToken(), req.SPIFFEID, time.Now())
		switch {
		case err != nil:
			return badAnswer("the JWT-SVID: %w", err)
		case !slices.Equal(parsed.Audience, req.Audience):
			return badAnswer("the JWT-SVID: its audience is not the one that was asked for")
		}
		token = parsed
		return nil
	})
	return token, tokensOff(err)
}

// tokensOff makes the errors of servers that sign no tokens of a kind wrap
// ErrTokensOff.
func tokensOff(err error) error {
	var failed *CallError
	if errors.As(err, &failed) && failed.err == nil && (failed.Code == codes.Unimplemented || failed.Code == codes.FailedPrecondition) {
		failed.err = ErrTokensOff
	}
	return err
}

// WITRequest asks for one WIT-SVID.
type WITRequest struct {
	EntryID string
	// SPIFFEID is the entry's. An answer for any other is not accepted.
	SPIFFEID spiffeid.ID
	// Key is what the WIT-SVID will be bound to, and Algorithm what it signs
	// with: "ES256" for a key on P-256 (RFC 7518 §3.1).
	Key       crypto.PublicKey
	Algorithm string
}

// SignedWIT is the answer to one WITRequest. Its token has no private key yet.
type SignedWIT struct {
	Token *registry.Token
	Err   error // why there is none, as of NewJWTSVID
}

// NewWITSVIDs has the server sign WIT-SVIDs (BatchNewWITSVID), at most 500,
// which is what the server admits in one call. The answer has one SignedWIT for
// each request, in their order; otherwise it is as of NewJWTSVID. The error is
// that of the call.
func (c *Client) NewWITSVIDs(ctx context.Context, reqs []WITRequest) ([]SignedWIT, error) {
	if len(reqs) == 0 || len(reqs) > maxBatch {
		return nil, fmt.Errorf("%s: %d requests, want 1 to %d", stepSignWIT, len(reqs), maxBatch)
	}
	params := make([]*svidv1.NewWITSVIDParams, len(reqs))
	for i, req := range reqs {
		der, err := x509.MarshalPKIXPublicKey(req.Key)
		if err != nil {
			return nil, fmt.Errorf("%s: entry %s: %w", stepSignWIT, req.EntryID, err)
		}
		params[i] = &svidv1.NewWITSVIDParams{EntryId: req.EntryID, PublicKey: der, SigningAlgorithm: req.Algorithm}
	}
	var signed []SignedWIT
	err := c.call(ctx, stepSignWIT, func(ctx context.Context, cn *conn) error {
		answer, err := svidv1.NewSVIDClient(cn.cc).BatchNewWITSVID(ctx, &svidv1.BatchNewWITSVIDRequest{Params: params})
		if err != nil {
			return err
		}
		if got := len(answer.GetResults()); got != len(reqs) {
			return badAnswer("%d results for %d requests", got, len(reqs))
		}
		signed = make([]SignedWIT, len(reqs))
		for i, req := range reqs {
			signed[i] = c.signedWIT(answer.GetResults()[i], req)
		}
		return nil
	})
	return signed, tokensOff(err)
}

// signedWIT reads one result. One that is good has no status.
func (c *Client) signedWIT(result *svidv1.BatchNewWITSVIDResponse_Result, req WITRequest) SignedWIT {
	e := &CallError{Step: stepSignWIT + ": entry " + req.EntryID, Address: c.address}
	if code := codes.Code(result.GetStatus().GetCode()); code != codes.OK {
		e.Code, e.Message = code, result.GetStatus().GetMessage()
		if code == codes.NotFound {
			e.err = ErrNotFound
		} else {
			e.Message = code.String() + ": " + e.Message
		}
		return SignedWIT{Err: tokensOff(e)}
	}
	token, err := parseToken(result.GetSvid().GetToken(), req.SPIFFEID, time.Now())
	switch {
	case err != nil:
	case len(token.Audience) > 0:
		err = errors.New("it has an audience, as a bearer token does")
	default:
		if err = checkWIT(token.Compact, req); err == nil {
			return SignedWIT{Token: token}
		}
	}
	e.err = badAnswer("the WIT-SVID: %w", err)
	return SignedWIT{Err: e}
}

// checkWIT checks what a WIT-SVID has that a JWT-SVID has not (WIT-SVID §2.1,
// §2.2, §3.2): without them no verifier would take it, and bound to another key it
// would be of use to others only.
func checkWIT(compact string, req WITRequest) error {
	signed, err := jwt.ParseSigned(compact, tokenAlgorithms)
	if err != nil {
		return errors.New("it is no signed JWT")
	}
	var claims struct {
		Confirmation struct {
			Key jose.JSONWebKey `json:"jwk"`
		} `json:"cnf"`
	}
	header := signed.Headers[0]
	switch {
	case header.KeyID == "":
		return errors.New("its header names no key (kid)")
	case header.ExtraHeaders[jose.HeaderType] != "wit+jwt":
		return errors.New("its type (typ) is not wit+jwt")
	case signed.UnsafeClaimsWithoutVerification(&claims) != nil:
		return errors.New("it is bound to no key that can be read (cnf)")
	case claims.Confirmation.Key.Algorithm != req.Algorithm || !sameKey(req.Key, claims.Confirmation.Key.Key):
		return errors.New("it is not bound to the key it was asked for (cnf)")
	}
	return nil
}

func sameKey(a, b crypto.PublicKey) bool {
	// Every public key type of the standard library has this method.
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// parseToken reads what the server has signed for a SPIFFE ID. The errors hold
// no part of it.
func parseToken(compact string, id spiffeid.ID, now time.Time) (*registry.Token, error) {
	if compact == "" || len(compact) > maxToken {
		return nil, fmt.Errorf("it has %d bytes, want 1 to %d", len(compact), maxToken)
	}
	signed, err := jwt.ParseSigned(compact, tokenAlgorithms)
	if err != nil {
		return nil, errors.New("it is no signed JWT (RFC 7519) with an algorithm of the standard")
	}
	var claims jwt.Claims
	if err := signed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return nil, errors.New("its claims cannot be read")
	}
	switch {
	case claims.Subject != id.String():
		return nil, fmt.Errorf("it is not for %s", id)
	case claims.Expiry == nil:
		return nil, errors.New("it has no exp")
	case !claims.Expiry.Time().After(now):
		return nil, errors.New("it had ended when it came: compare this host's clock with the server's")
	}
	audience := slices.Clone([]string(claims.Audience))
	slices.Sort(audience)
	token := &registry.Token{
		ID: id, Audience: slices.Compact(audience), Compact: compact,
		KeyID: signed.Headers[0].KeyID, ExpiresAt: claims.Expiry.Time(),
	}
	if claims.IssuedAt != nil {
		token.IssuedAt = claims.IssuedAt.Time()
	}
	return token, nil
}
