package spire

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/testca"
)

// claims of a token, which a test changes.
func claims(t *testing.T, change map[string]any) string {
	t.Helper()
	now := time.Now()
	all := map[string]any{"sub": idOf("web"), "aud": []string{"db", "queue"}, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
	for name, value := range change {
		if all[name] = value; value == nil {
			delete(all, name)
		}
	}
	text, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const goodHeader = `{"alg":"ES256","kid":"k1","typ":"JWT"}`

func TestNewJWTSVID(t *testing.T) {
	authority := testca.NewJWT(t, "example.org", "k1")
	var token string
	var asked *svidv1.NewJWTSVIDRequest
	s := newServer(t)
	s.jwt = func(req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
		asked = req
		return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: token}}, nil
	}
	s.start(t)
	c := s.client(t)
	request := JWTRequest{EntryID: "e1", SPIFFEID: spiffeid.RequireFromString(idOf("web")), Audience: []string{"db", "queue"}}

	token = authority.Sign(goodHeader, claims(t, map[string]any{"aud": []string{"queue", "db"}}))
	got, err := c.NewJWTSVID(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(got.ExpiresAt); got.ID != request.SPIFFEID || got.Compact != token || got.KeyID != "k1" || left < 59*time.Minute || left > time.Hour {
		t.Errorf("got %v, good for %s", got, left)
	}
	if asked.GetEntryId() != "e1" || fmt.Sprint(asked.GetAudience()) != "[db queue]" {
		t.Errorf("asked for %v", asked)
	}
	if text := fmt.Sprintf("%v %+v %#v %s", got, *got, got, got); strings.Contains(text, got.Compact[:40]) {
		t.Errorf("printing a token shows it: %s", text)
	}

	for name, bad := range map[string]struct{ token, want string }{
		"none":              {"", "0 bytes"},
		"too long":          {strings.Repeat("a", maxToken+1), "bytes"},
		"garbage":           {"garbage", "no signed JWT"},
		"no signature":      {authority.Sign(`{"alg":"none","kid":"k1"}`, claims(t, nil)), "no signed JWT"},
		"shared secret":     {authority.Sign(`{"alg":"HS256","kid":"k1"}`, claims(t, nil)), "no signed JWT"},
		"no claims":         {authority.Sign(goodHeader, `[]`), "claims"},
		"somebody else's":   {authority.Sign(goodHeader, claims(t, map[string]any{"sub": idOf("root")})), "it is not for " + idOf("web")},
		"for others":        {authority.Sign(goodHeader, claims(t, map[string]any{"aud": "bank"})), "audience"},
		"for one more":      {authority.Sign(goodHeader, claims(t, map[string]any{"aud": []string{"bank", "db", "queue"}})), "audience"},
		"for one less":      {authority.Sign(goodHeader, claims(t, map[string]any{"aud": []string{"db"}})), "audience"},
		"for ever":          {authority.Sign(goodHeader, claims(t, map[string]any{"exp": nil})), "no exp"},
		"over":              {authority.Sign(goodHeader, claims(t, map[string]any{"exp": time.Now().Unix() - 1})), "clock"},
		"of another domain": {authority.Sign(goodHeader, claims(t, map[string]any{"sub": "spiffe://other.org/web"})), "it is not for"},
	} {
		token = bad.token
		got, err := c.NewJWTSVID(t.Context(), request)
		if got != nil || !errors.Is(err, ErrBadAnswer) || !strings.Contains(err.Error(), bad.want) || !strings.Contains(err.Error(), "entry e1") {
			t.Errorf("%s: got %v, %v; want %q", name, got, err, bad.want)
		}
		if _, rest, signed := strings.Cut(token, "."); signed && strings.Contains(err.Error(), rest[:20]) {
			t.Errorf("%s: the error shows the token: %v", name, err)
		}
	}
}

func TestNewJWTSVIDRefused(t *testing.T) {
	var answer error
	s := newServer(t)
	s.jwt = func(*svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) { return nil, answer }
	s.start(t)
	c := s.client(t)
	for code, want := range map[codes.Code]error{
		codes.NotFound: ErrNotFound, codes.Unimplemented: ErrTokensOff, codes.FailedPrecondition: ErrTokensOff, codes.Internal: nil,
	} {
		answer = status.Error(code, "so it is")
		var call *CallError
		_, err := c.NewJWTSVID(t.Context(), JWTRequest{EntryID: "e1", Audience: []string{"db"}})
		if !errors.As(err, &call) || call.Code != code || want != nil && !errors.Is(err, want) || want == nil && errors.Is(err, ErrTokensOff) {
			t.Errorf("%s: got %v, want %v", code, err, want)
		}
	}
}

func TestNewWITSVIDs(t *testing.T) {
	authority := testca.NewJWT(t, "example.org", "w1")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const header = `{"alg":"ES256","kid":"w1","typ":"wit+jwt"}`
	bound := func(key crypto.PublicKey, algorithm string) map[string]any {
		return map[string]any{"jwk": jose.JSONWebKey{Key: key, Algorithm: algorithm}}
	}
	type result = svidv1.BatchNewWITSVIDResponse_Result
	signed := func(header string, change map[string]any) *result {
		all := map[string]any{"aud": nil, "cnf": bound(key.Public(), "ES256")}
		maps.Copy(all, change)
		return &result{Svid: &types.WITSVID{Token: authority.Sign(header, claims(t, all))}}
	}
	results := map[string]*result{
		"good":      signed(header, nil),
		"gone":      {Status: &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}},
		"off":       {Status: &types.Status{Code: int32(codes.Unimplemented), Message: "WIT functionality is disabled"}},
		"unlucky":   {Status: &types.Status{Code: int32(codes.Internal), Message: "no key"}},
		"other":     signed(header, map[string]any{"sub": idOf("other")}),
		"bearer":    signed(header, map[string]any{"aud": "db"}),
		"no answer": {},
		"no key ID": signed(`{"alg":"ES256","typ":"wit+jwt"}`, nil),
		"no type":   signed(`{"alg":"ES256","kid":"w1"}`, nil),
		"JWT":       signed(`{"alg":"ES256","kid":"w1","typ":"JWT"}`, nil),
		"HS256":     signed(`{"alg":"HS256","kid":"w1","typ":"wit+jwt"}`, nil),
		"unbound":   signed(header, map[string]any{"cnf": nil}),
		"stolen":    signed(header, map[string]any{"cnf": bound(authority.Key.Public(), "ES256")}),
		"unusable":  signed(header, map[string]any{"cnf": bound(key.Public(), "")}),
		"ended":     signed(header, map[string]any{"exp": 1}),
	}
	var answer error
	s := newServer(t)
	s.wit = func(req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
		resp := &svidv1.BatchNewWITSVIDResponse{}
		for _, p := range req.GetParams() {
			if p.GetSigningAlgorithm() != "ES256" || len(p.GetPublicKey()) == 0 {
				t.Errorf("asked for %v", p)
			}
			resp.Results = append(resp.Results, results[p.GetEntryId()])
		}
		return resp, answer
	}
	s.start(t)
	c := s.client(t)
	request := func(entry string) WITRequest {
		return WITRequest{EntryID: entry, SPIFFEID: spiffeid.RequireFromString(idOf("web")), Key: key.Public(), Algorithm: string(jose.ES256)}
	}
	wants := []struct {
		entry string
		err   error
		text  string
	}{
		{"good", nil, ""},
		{"gone", ErrNotFound, "entry gone"},
		{"off", ErrTokensOff, "WIT functionality is disabled"},
		{"unlucky", nil, "Internal: no key"},
		{"other", ErrBadAnswer, "it is not for"},
		{"bearer", ErrBadAnswer, "bearer"},
		{"no answer", ErrBadAnswer, "0 bytes"},
		{"no key ID", ErrBadAnswer, "names no key (kid)"},
		{"no type", ErrBadAnswer, "not wit+jwt"},
		{"JWT", ErrBadAnswer, "not wit+jwt"},
		{"HS256", ErrBadAnswer, "algorithm"},
		{"unbound", ErrBadAnswer, "(cnf)"},
		{"stolen", ErrBadAnswer, "not bound to the key"},
		{"unusable", ErrBadAnswer, "not bound to the key"},
		{"ended", ErrBadAnswer, "had ended"},
	}
	var requests []WITRequest
	for _, w := range wants {
		requests = append(requests, request(w.entry))
	}
	got, err := c.NewWITSVIDs(t.Context(), requests)
	if err != nil || len(got) != len(wants) {
		t.Fatalf("got %d answers, %v", len(got), err)
	}
	for i, w := range wants {
		if w.text == "" {
			if got[i].Err != nil || got[i].Token.KeyID != "w1" {
				t.Errorf("%s: got %v, %v", w.entry, got[i].Token, got[i].Err)
			}
			continue
		}
		if err := got[i].Err; got[i].Token != nil || err == nil || w.err != nil && !errors.Is(err, w.err) || !strings.Contains(err.Error(), w.text) {
			t.Errorf("%s: got %v, want %v with %q", w.entry, err, w.err, w.text)
		}
	}

	answer = status.Error(codes.Unimplemented, "WIT functionality is disabled")
	if _, err := c.NewWITSVIDs(t.Context(), requests[:1]); !errors.Is(err, ErrTokensOff) {
		t.Errorf("got %v, want %v", err, ErrTokensOff)
	}
	for _, n := range []int{0, maxBatch + 1} {
		if _, err := c.NewWITSVIDs(t.Context(), make([]WITRequest, n)); err == nil {
			t.Errorf("%d requests in one call: no error", n)
		}
	}
}
