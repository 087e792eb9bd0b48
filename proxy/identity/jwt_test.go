package identity

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/narthex-id/narthex/internal/testca"
)

// jwtTime is when the tokens of tests are looked at.
var jwtTime = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// newTokens returns a source of JWT-SVIDs that nothing follows: its bundles are
// those of the test, and its own tokens are what fetch returns.
func newTokens(t testing.TB, fetch func(context.Context, jwtsvid.Params) (*jwtsvid.SVID, error)) (s *jwtSource, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s = &jwtSource{log: testLog(t), ctx: ctx, fetch: fetch, news: func() {}, following: true}
	s.trust.Store(&jwtTrust{problem: errors.New("no JWT bundles received yet")})
	s.grants.Store(&map[grantKey]*grant{})
	return s, func() { cancel(); s.end() }
}

// trusts puts exactly these authorities in force, as an update would.
func trusts(t testing.TB, s *jwtSource, as ...*testca.JWTAuthority) {
	t.Helper()
	keys := map[spiffeid.TrustDomain][]string{}
	for _, a := range as {
		keys[a.TrustDomain] = append(keys[a.TrustDomain], a.JWK())
	}
	update := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
	for td, k := range keys {
		update.Bundles[td.IDString()] = testca.JWKS(k...)
	}
	takes(t, s, update)
}

func takes(t testing.TB, s *jwtSource, update *workload.JWTBundlesResponse) {
	t.Helper()
	if err := siftBundles(update); err != nil {
		t.Fatal(err)
	}
	var bundles []*jwtbundle.Bundle
	for name, doc := range update.Bundles {
		b, err := jwtbundle.Parse(spiffeid.RequireTrustDomainFromString(name), doc)
		if err != nil {
			t.Fatal(err)
		}
		bundles = append(bundles, b)
	}
	s.OnJWTBundlesUpdate(jwtbundle.NewSet(bundles...))
}

// hostileJWTs are tokens that are not accepted, and why. a signs for
// example.org, which trusts no other key; b for partner.example.
func hostileJWTs(a, b *testca.JWTAuthority) map[string]struct{ token, result, says string } {
	const header = `{"alg":"ES256","kid":"a1","typ":"JWT"}`
	at := jwtTime.Unix()
	claims := fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":["orders"],"exp":%d}`, at+300)
	with := func(more string) string { return strings.TrimSuffix(claims, "}") + "," + more + "}" }
	good := a.Sign(header, claims)
	first, rest, _ := strings.Cut(good, ".")
	payload, signature, _ := strings.Cut(rest, ".")
	return map[string]struct{ token, result, says string }{
		"empty":             {"", "malformed", "0 dots"},
		"too long":          {strings.Repeat("a", maxJWT+1), "malformed", "at most 16384"},
		"two parts":         {first + "." + payload, "malformed", "1 dots"},
		"four parts":        {good + ".", "malformed", "3 dots"},
		"dots":              {"..", "malformed", "header"},
		"white space":       {good + "\n", "malformed", "base64url"},
		"padding":           {good + "=", "malformed", "base64url"},
		"JSON form":         {`{"payload":"` + payload + `"}`, "malformed", "base64url"},
		"bits to spare":     {respell(good), "malformed", "not base64url"},
		"no signature":      {first + "." + payload + ".", "untrusted", "signature"},
		"other's signature": {good[:len(good)-86] + b.Sign(header, claims)[len(good)-86:], "untrusted", "signature"},
		"other claims":      {first + "." + part(a.Sign(header, with(`"x":1`)), 1) + "." + signature, "untrusted", "signature"},

		"none":              {unsigned(`{"alg":"none","kid":"a1"}`, claims), "malformed", "algorithm"},
		"HS256":             {a.Sign(`{"alg":"HS256","kid":"a1"}`, claims), "malformed", "algorithm"},
		"EdDSA":             {a.Sign(`{"alg":"EdDSA","kid":"a1"}`, claims), "malformed", "algorithm"},
		"no algorithm":      {a.Sign(`{"kid":"a1"}`, claims), "malformed", "algorithm"},
		"of another curve":  {a.Sign(`{"alg":"ES384","kid":"a1"}`, claims), "untrusted", "signature"},
		"of another kind":   {a.Sign(`{"alg":"RS256","kid":"a1"}`, claims), "untrusted", "signature"},
		"no key ID":         {a.Sign(`{"alg":"ES256"}`, claims), "malformed", "kid"},
		"empty key ID":      {a.Sign(`{"alg":"ES256","kid":""}`, claims), "malformed", "kid"},
		"key ID a number":   {a.Sign(`{"alg":"ES256","kid":1}`, claims), "malformed", "kid"},
		"long key ID":       {a.Sign(`{"alg":"ES256","kid":"`+strings.Repeat("k", 257)+`"}`, claims), "malformed", "kid"},
		"unknown key ID":    {a.Sign(`{"alg":"ES256","kid":"a2"}`, claims), "untrusted", "none of the 1"},
		"type":              {a.Sign(`{"alg":"ES256","kid":"a1","typ":"at+jwt"}`, claims), "malformed", "typ"},
		"type null":         {a.Sign(`{"alg":"ES256","kid":"a1","typ":null}`, claims), "malformed", "typ"},
		"own key in header": {a.Sign(`{"alg":"ES256","kid":"a1","jwk":`+b.JWK()+`}`, claims), "malformed", "more than"},
		"critical":          {a.Sign(`{"alg":"ES256","kid":"a1","crit":["b64"],"b64":false}`, claims), "malformed", "more than"},
		"header twice":      {a.Sign(`{"alg":"none","alg":"ES256","kid":"a1"}`, claims), "malformed", "once"},
		"header in capital": {a.Sign(`{"ALG":"ES256","kid":"a1"}`, claims), "malformed", "more than"},
		"header a list":     {a.Sign(`["ES256"]`, claims), "malformed", "header"},

		"no subject":           {a.Sign(header, fmt.Sprintf(`{"aud":["orders"],"exp":%d}`, at+300)), "malformed", "not a SPIFFE ID"},
		"subject no ID":        {a.Sign(header, fmt.Sprintf(`{"sub":"web","aud":["orders"],"exp":%d}`, at+300)), "malformed", "not a SPIFFE ID"},
		"subject without path": {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org","aud":["orders"],"exp":%d}`, at+300)), "malformed", "a path"},
		"subject too long":     {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/%s","aud":["orders"],"exp":%d}`, strings.Repeat("a", 2048), at+300)), "malformed", "at most 2048"},
		"domain too long":      {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://%s/web","aud":["orders"],"exp":%d}`, strings.Repeat("a", 256), at+300)), "malformed", "255"},
		"subject twice":        {a.Sign(header, with(`"sub":"spiffe://example.org/admin"`)), "malformed", "once"},
		"another domain":       {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://partner.example/web","aud":["orders"],"exp":%d}`, at+300)), "untrusted", "JWT bundle of partner.example"},
		"another's key":        {b.Sign(`{"alg":"ES256","kid":"b1"}`, claims), "untrusted", "JWT bundle of example.org"},
		"unknown domain":       {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://elsewhere.example/web","aud":["orders"],"exp":%d}`, at+300)), "untrusted", "neither ours nor federated"},
		"no audience":          {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/web","exp":%d}`, at+300)), "malformed", "aud"},
		"empty audience":       {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":[],"exp":%d}`, at+300)), "malformed", "aud"},
		"audience a number":    {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":1,"exp":%d}`, at+300)), "malformed", "types"},
		"for others":           {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":["billing","order"],"exp":%d}`, at+300)), "audience", `one of ["orders" "reports"]`},
		"no expiry":            {a.Sign(header, `{"sub":"spiffe://example.org/web","aud":["orders"]}`), "malformed", "exp"},
		"expiry null":          {a.Sign(header, `{"sub":"spiffe://example.org/web","aud":["orders"],"exp":null}`), "malformed", "exp"},
		"expiry a string":      {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":["orders"],"exp":"%d"}`, at+300)), "malformed", "types"},
		"expiry endless":       {a.Sign(header, `{"sub":"spiffe://example.org/web","aud":["orders"],"exp":1e17}`), "malformed", "9999"},
		"expired":              {a.Sign(header, fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":["orders"],"exp":%d}`, at)), "expired", "2026-05-04T12:00:00Z"},
		"not yet":              {a.Sign(header, with(fmt.Sprintf(`"nbf":%d`, at+31))), "early", "clocks"},
		"issued in future":     {a.Sign(header, with(fmt.Sprintf(`"iat":%d`, at+31))), "early", "clocks"},
		"claims a list":        {a.Sign(header, `[]`), "malformed", "claims"},
		"claims and more":      {a.Sign(header, claims+`{}`), "malformed", "claims"},
	}
}

// part returns one of the three parts of a token.
func part(token string, n int) string { return strings.Split(token, ".")[n] }

func unsigned(header, claims string) string {
	return base64URL.EncodeToString([]byte(header)) + "." + base64URL.EncodeToString([]byte(claims)) + "."
}

// respell changes the bits of a signature of 64 bytes that say nothing.
func respell(token string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(token) - 1
	return token[:last] + string(alphabet[strings.IndexByte(alphabet, token[last])|1])
}

// showsPart returns a part of the token that text shows.
func showsPart(text, token string) string {
	for p := range strings.SplitSeq(token, ".") {
		if len(p) >= 24 && strings.Contains(text, p[:24]) {
			return p
		}
	}
	return ""
}

func TestHostileJWTs(t *testing.T) {
	t.Parallel()
	a, b := testca.NewJWT(t, "example.org", "a1"), testca.NewJWT(t, "partner.example", "b1")
	s, end := newTokens(t, nil)
	defer end()
	audience := []string{"orders", "reports"}
	token := a.SVID("/web", jwtTime, time.Minute, "orders")
	if _, err := s.ValidateJWT(token, audience, jwtTime); resultOf(err) != "unavailable" || s.JWTProblem() == nil {
		t.Errorf("without bundles: %v", err)
	}
	trusts(t, s, a, b)
	for name, c := range hostileJWTs(a, b) {
		for range 2 { // whatever the first time leaves behind
			j, err := s.ValidateJWT(c.token, audience, jwtTime)
			if resultOf(err) != c.result || !strings.Contains(fmt.Sprint(err), c.says) || j != (JWT{}) {
				t.Errorf("%s: %v, %v; want %s: …%s…", name, j, err, c.result, c.says)
			}
			if p := showsPart(fmt.Sprint(err), c.token); p != "" {
				t.Errorf("%s: the error %q shows %q", name, err, p)
			}
		}
	}
	if n := remembered(&s.verdicts); n != 0 {
		t.Errorf("%d tokens that were refused are remembered", n)
	}
}

func resultOf(err error) string {
	var e *JWTError
	if errors.As(err, &e) {
		return e.Result
	}
	return ""
}

func remembered(v *verdicts) (n int) {
	for i := range v.shards {
		v.shards[i].mu.RLock()
		n += len(v.shards[i].known)
		v.shards[i].mu.RUnlock()
	}
	return n
}

// TestGoodJWTs: every algorithm of the specification, and what is at the edge
// of being refused.
func TestGoodJWTs(t *testing.T) {
	t.Parallel()
	a := testca.NewJWT(t, "example.org", "a1")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := (&jose.JSONWebKey{Key: key.Public(), KeyID: "r1", Use: "jwt-svid"}).MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	s, end := newTokens(t, nil)
	defer end()
	takes(t, s, &workload.JWTBundlesResponse{Bundles: map[string][]byte{"example.org": testca.JWKS(a.JWK(), string(jwk))}})

	at := jwtTime.Unix()
	claims := fmt.Sprintf(`{"sub":"spiffe://example.org/web","aud":"orders","exp":%d,"nbf":%d,"iat":%d,"jti":"x","custom":{"a":[1]}}`, at+1, at+30, at+30)
	tokens := map[string]string{
		"ES256":        a.Sign(`{"alg":"ES256","kid":"a1"}`, claims),
		"typ JOSE":     a.Sign(`{"typ":"JOSE","alg":"ES256","kid":"a1"}`, claims),
		"as SPIRE has": a.SVID("/web", jwtTime, time.Second, "orders", "billing"),
	}
	for _, alg := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512} {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: "r1"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		token, err := jwt.Signed(signer).Claims(jwt.Claims{
			Subject: "spiffe://example.org/web", Audience: []string{"orders"}, Expiry: jwt.NewNumericDate(jwtTime.Add(time.Second)),
		}).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		tokens[string(alg)] = token
	}
	for name, token := range tokens {
		for range 2 {
			j, err := s.ValidateJWT(token, []string{"reports", "orders"}, jwtTime)
			if err != nil || j.Subject.String() != "spiffe://example.org/web" || !j.NotAfter.Equal(jwtTime.Add(time.Second)) {
				t.Errorf("%s: %+v, %v", name, j, err)
			}
		}
		// What is remembered says nothing of the audience or the hour.
		if _, err := s.ValidateJWT(token, []string{"reports"}, jwtTime); resultOf(err) != "audience" {
			t.Errorf("%s, for others: %v", name, err)
		}
		if _, err := s.ValidateJWT(token, nil, jwtTime); resultOf(err) != "audience" {
			t.Errorf("%s, for nobody: %v", name, err)
		}
		if _, err := s.ValidateJWT(token, []string{"orders"}, jwtTime.Add(time.Second)); resultOf(err) != "expired" {
			t.Errorf("%s, later: %v", name, err)
		}
	}
	if n := remembered(&s.verdicts); n != len(tokens) {
		t.Errorf("%d tokens are remembered, not %d", n, len(tokens))
	}
}

// TestJWTAuthorityWithdrawn: neither a token that was just accepted nor one
// that is in use stands any longer, while those of other keys do.
func TestJWTAuthorityWithdrawn(t *testing.T) {
	t.Parallel()
	a, next, b := testca.NewJWT(t, "example.org", "a1"), testca.NewJWT(t, "example.org", "a2"), testca.NewJWT(t, "partner.example", "b1")
	s, end := newTokens(t, nil)
	defer end()
	audience := []string{"orders"}
	ask := func(a *testca.JWTAuthority) (string, JWT) {
		t.Helper()
		token := a.SVID("/web", jwtTime, time.Minute, "orders")
		j, err := s.ValidateJWT(token, audience, jwtTime)
		if err != nil {
			t.Fatal(err)
		}
		return token, j
	}
	trusts(t, s, a, b)
	old, oldStands := ask(a)
	partner, partnerStands := ask(b)
	generation := s.JWTGeneration()
	trusts(t, s, b, a)
	if s.JWTGeneration() != generation {
		t.Error("the same bundles are another generation")
	}
	trusts(t, s, a, next, b)
	if s.JWTGeneration() != generation+1 {
		t.Errorf("generation %d after %d", s.JWTGeneration(), generation)
	}
	fresh, freshStands := ask(next)
	for token, j := range map[string]JWT{old: oldStands, fresh: freshStands, partner: partnerStands} {
		if _, err := s.ValidateJWT(token, audience, jwtTime); err != nil || s.RecheckJWT(j) != nil {
			t.Errorf("while both are authorities: %v, %v", err, s.RecheckJWT(j))
		}
	}

	trusts(t, s, next)
	for token, j := range map[string]JWT{old: oldStands, partner: partnerStands} {
		_, err := s.ValidateJWT(token, audience, jwtTime)
		if again := s.RecheckJWT(j); resultOf(err) != "untrusted" || resultOf(again) != "untrusted" {
			t.Errorf("of an authority that is gone: %v, %v", err, again)
		}
	}
	if _, err := s.ValidateJWT(fresh, audience, jwtTime); err != nil || s.RecheckJWT(freshStands) != nil {
		t.Errorf("of the one that stays: %v", err)
	}

	// Another key by the same name is another authority.
	trusts(t, s, testca.NewJWT(t, "example.org", "a2"))
	_, err := s.ValidateJWT(fresh, audience, jwtTime)
	if again := s.RecheckJWT(freshStands); resultOf(err) != "untrusted" || !strings.Contains(fmt.Sprint(again), "another key") {
		t.Errorf("of a key whose name went to another: %v, %v", err, again)
	}
	trusts(t, s, a)
	if _, err := s.ValidateJWT(old, audience, jwtTime); err != nil {
		t.Errorf("of an authority that came back: %v", err)
	}
	if err := s.RecheckJWT(JWT{}); resultOf(err) != "untrusted" {
		t.Errorf("what was never validated: %v", err)
	}
}

// TestVerdictsAreBounded: more tokens than are remembered make room by age.
func TestVerdictsAreBounded(t *testing.T) {
	t.Parallel()
	var v verdicts
	by := &jwtAuthority{}
	sum := func(i int) (s [32]byte) {
		s[0], s[1], s[2], s[3] = byte(i), byte(i>>8), byte(i>>16), 1
		return s
	}
	for i := range 2 * maxVerdicts {
		v.remember(sum(i), verdict{JWT: JWT{by: by}})
		v.remember(sum(i), verdict{JWT: JWT{by: by}})
	}
	if n := remembered(&v); n != maxVerdicts {
		t.Errorf("%d are remembered, not %d", n, maxVerdicts)
	}
	if _, ok := v.find(sum(2*maxVerdicts - 1)); !ok {
		t.Error("the newest is not among them")
	}
	if _, ok := v.find(sum(0)); ok {
		t.Error("the oldest is among them")
	}
	v.remember(sum(-1), verdict{audience: []string{strings.Repeat("a", maxVerdictWords+1)}})
	if _, ok := v.find(sum(-1)); ok {
		t.Error("one with long audiences is among them")
	}
}

// TestWarmJWTs: what each request does costs no allocation. It is not
// parallel, for others would be counted.
func TestWarmJWTs(t *testing.T) {
	a := testca.NewJWT(t, "example.org", "a1")
	s, end := newTokens(t, (&issuer{by: a}).fetch)
	defer end()
	trusts(t, s, a)
	audience := []string{"orders"}
	token := a.SVID("/web", jwtTime, time.Minute, audience...)
	for what, ask := range map[string]func() error{
		"validate": func() error { _, err := s.ValidateJWT(token, audience, jwtTime); return err },
		"fetch":    func() error { _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); return err },
	} {
		var err error
		if n := testing.AllocsPerRun(100, func() { err = errors.Join(err, ask()) }); n != 0 || err != nil {
			t.Errorf("%s: %v allocations, %v", what, n, err)
		}
	}
}

// FuzzValidateJWT: nobody can make a token that is accepted of one that is
// not, and no error shows what was sent.
func FuzzValidateJWT(f *testing.F) {
	a, b := testca.NewJWT(f, "example.org", "a1"), testca.NewJWT(f, "partner.example", "b1")
	good := map[string]bool{}
	for _, audience := range [][]string{{"orders"}, {"reports", "orders"}} {
		token := a.SVID("/web", jwtTime, time.Minute, audience...)
		good[part(token, 1)] = true
		f.Add(token)
	}
	for _, c := range hostileJWTs(a, b) {
		f.Add(c.token)
	}
	s, end := newTokens(f, nil)
	f.Cleanup(end)
	s.log = hclog.NewNullLogger()
	trusts(f, s, a, b)
	f.Fuzz(func(t *testing.T, token string) {
		j, err := s.ValidateJWT(token, []string{"orders"}, jwtTime)
		again, err2 := s.ValidateJWT(token, []string{"orders"}, jwtTime)
		switch {
		case j != again || fmt.Sprint(err) != fmt.Sprint(err2):
			t.Errorf("first %v, %v, then %v, %v", j, err, again, err2)
		case err == nil && (!good[part(token, 1)] || s.RecheckJWT(j) != nil):
			t.Errorf("%q is accepted", token)
		case err != nil && resultOf(err) == "":
			t.Errorf("%T: %v", err, err)
		case err != nil && showsPart(err.Error(), token) != "":
			t.Errorf("the error shows the token: %v", err)
		}
	})
}

func BenchmarkValidateJWT(b *testing.B) {
	a := testca.NewJWT(b, "example.org", "a1")
	s, end := newTokens(b, nil)
	defer end()
	trusts(b, s, a)
	audience := []string{"spiffe://example.org/orders"}
	token := a.SVID("/ns/shop/sa/web", jwtTime, time.Minute, audience...)
	for name, forget := range map[string]bool{"warm": false, "cold": true} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if forget {
					s.verdicts = verdicts{}
				}
				if _, err := s.ValidateJWT(token, audience, jwtTime); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
