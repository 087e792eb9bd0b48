package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/identity"
	"github.com/narthex-id/narthex/proxy/policy"
)

// This file is about JWT-SVIDs in requests (SPIFFE JWT-SVID, section 6.1):
// those of clients, which are a second proof of who calls or for whom, and our
// own, which services far away ask for.

// JWT is what a listener does with JWT-SVIDs. Inbound, a token that clients send
// must be for one of Audience, and with Required there must be one; outbound,
// one for the only Audience is attached to requests that have no authorization
// of their own.
type JWT struct {
	Audience []string
	Required bool // inbound
}

func (j *JWT) check(inbound bool) error {
	switch {
	case len(j.Audience) == 0 || slices.Contains(j.Audience, ""):
		return errors.New("jwt: needs an audience")
	case !inbound && len(j.Audience) > 1:
		return errors.New("jwt: outbound, a token is for one audience")
	case !inbound && j.Required:
		return errors.New("jwt: required is for inbound listeners")
	}
	return nil
}

// noToken is what a client is told whose request needs a token (RFC 6750,
// section 3).
var (
	noToken  = []http1.Field{{Name: "www-authenticate", Value: "Bearer"}}
	badToken = []http1.Field{{Name: "www-authenticate", Value: `Bearer error="invalid_token"`}}
)

// bearer returns the token of a request, or "" where it has none. The name of
// the scheme is in any case (RFC 9110, section 11.1).
func bearer(fields []http1.Field) (token string, lines int) {
	const scheme = "bearer"
	for i := range fields {
		f := &fields[i]
		if f.Hop || f.Name != "authorization" {
			continue
		}
		lines++
		if len(f.Value) > len(scheme) && strings.EqualFold(f.Value[:len(scheme)], scheme) && (f.Value[len(scheme)] == ' ' || f.Value[len(scheme)] == '\t') {
			token = strings.TrimLeft(f.Value[len(scheme):], " \t")
		}
	}
	return token, lines
}

// prove validates the second proof of who calls, where the listener wants one.
// A bearer token that is no JWT-SVID is the service's own business, and proves
// nothing here.
func (x *call) prove() *refused {
	want := x.s.HTTP.JWT
	if want == nil || x.s.Direction == policy.Outbound {
		return nil
	}
	token, lines := bearer(x.req.Fields)
	if lines > 1 {
		return refuseRequest(http.StatusBadRequest, "authorization is there more than once")
	}
	var err error
	if token != "" {
		if x.proof, err = x.s.tokens.ValidateJWT(token, want.Audience, x.began); err == nil {
			x.asked.Subject = x.proof.Subject
			return nil
		}
	}
	var bad *identity.JWTError
	switch {
	case token == "" && !want.Required:
		return nil
	case token == "":
		return &refused{status: http.StatusUnauthorized, why: "no JWT-SVID: the listener requires one in authorization: Bearer", fields: noToken}
	case errors.As(err, &bad) && bad.Result == "unavailable":
		return refuseRequest(http.StatusServiceUnavailable, "%v", err)
	case errors.As(err, &bad) && bad.Result == "malformed" && !want.Required:
		return nil
	}
	return &refused{status: http.StatusUnauthorized, why: err.Error(), fields: badToken}
}

// vouch adds our own JWT-SVID to a request that goes out.
func (x *call) vouch(own *identity.Identity) *refused {
	want := x.s.HTTP.JWT
	if want == nil {
		return nil
	}
	if _, lines := bearer(x.req.Fields); lines > 0 {
		return nil
	}
	token, err := x.s.tokens.FetchJWT(x.q.dialContext(), own.ID, want.Audience[0])
	if err != nil {
		return refuseRequest(http.StatusServiceUnavailable, "no JWT-SVID of %s for %s to attach: %v", own.ID, want.Audience[0], err)
	}
	start := len(x.notes)
	x.notes = append(append(x.notes, "Bearer "...), token...)
	x.told.Set = append(x.told.Set[:0], http1.Field{Name: "authorization", Value: viewOf(x.notes[start:])})
	return nil
}

// recheckProof holds the token of the request against the JWT bundles of now,
// with c.mu held. One that was sent with an upgrade ends with its stream.
func (q *question) recheckProof(s *settings, now time.Time) verdict {
	if q.proof == (identity.JWT{}) {
		return verdict{ok: true}
	}
	if s.tokens == nil {
		return verdict{always: true, closing: closing{"revoked", "JWT-SVID: nobody can tell any more whether it is good"}}
	}
	if err := s.tokens.RecheckJWT(q.proof); err != nil {
		return verdict{always: true, closing: closing{"revoked", err.Error()}}
	}
	return q.recheckExpiry(now)
}

// recheckExpiry is for tokens whose time is over, with c.mu held.
func (q *question) recheckExpiry(now time.Time) verdict {
	if q.proof != (identity.JWT{}) && !now.Before(q.proof.NotAfter) {
		return verdict{always: true, closing: closing{"expiry", fmt.Sprintf("the JWT-SVID of %s expired at %s", q.proof.Subject, q.proof.NotAfter.UTC().Format(time.RFC3339))}}
	}
	return verdict{ok: true}
}
