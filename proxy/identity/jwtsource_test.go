package identity

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/testca"
)

// jwtStage is a source on a fake Workload API, which has given it an SVID.
type jwtStage struct {
	*WorkloadAPI
	t     *testing.T
	api   *fakeAPI
	stop  func()
	log   *lines
	lease Lease
	ca    *testca.Authority
}

func newJWTStage(t *testing.T) *jwtStage {
	t.Helper()
	socket := t.TempDir() + "/api.sock"
	s := &jwtStage{t: t, log: &lines{}, ca: testca.New(t, "example.org")}
	s.api, s.stop = startAPI(t, socket)
	w, err := NewWorkloadAPI(WorkloadAPIConfig{Socket: socket, Log: hclog.New(&hclog.LoggerOptions{Output: s.log, Level: hclog.Debug})})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	s.WorkloadAPI = w
	if s.lease, err = w.Own(context.Background(), Pick{}); err != nil {
		t.Fatal(err)
	}
	svid := s.ca.SVID("/orders")
	s.api.answer(t, update(t, nil, s.ca, svid))
	until(t, s.lease, "an SVID", presents(svid))
	return s
}

// bundles has the API send these JWT bundles.
func (s *jwtStage) bundles(bundles map[string][]byte) {
	s.t.Helper()
	give(s.t, s.api.bundles, &workload.JWTBundlesResponse{Bundles: bundles})
}

// judged waits, as those do who hold a lease, until a token is judged so.
func (s *jwtStage) judged(what, token, result string) {
	s.t.Helper()
	late := time.After(patience)
	for {
		changed := s.lease.Changed()
		_, err := s.ValidateJWT(token, []string{"orders"}, time.Now())
		if resultOf(err) == result {
			return
		}
		select {
		case <-changed:
		case <-late:
			s.t.Fatalf("%s: still %v; want %q", what, err, result)
		}
	}
}

func TestFollowJWTBundles(t *testing.T) {
	t.Parallel()
	s := newJWTStage(t)
	a, next, b := testca.NewJWT(t, "example.org", "a1"), testca.NewJWT(t, "example.org", "a2"), testca.NewJWT(t, "partner.example", "b1")
	if n := s.api.follows.Load(); n != 0 || s.Report().Problem != "" {
		t.Errorf("bundles that nobody needs: asked for %d times, report %+v", n, s.Report())
	}
	old, partner := a.SVID("/web", time.Now(), time.Hour, "orders"), b.SVID("/web", time.Now(), time.Hour, "orders")
	s.judged("before there are bundles", old, "unavailable") // which begins to follow them
	if !strings.Contains(s.Report().Problem, "no JWT bundles received yet") {
		t.Errorf("report %+v", s.Report())
	}
	s.FollowJWT()
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(a.JWK()), "spiffe://partner.example": testca.JWKS(b.JWK())})
	s.judged("the first bundles", old, "")
	s.judged("a partner's", partner, "")
	j, err := s.ValidateJWT(old, []string{"orders"}, time.Now())
	if err != nil || s.Report().Problem != "" || s.JWTProblem() != nil {
		t.Fatalf("%v, report %+v", err, s.Report())
	}

	// The same again wakes nobody.
	generation := s.JWTGeneration()
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(a.JWK()), "spiffe://partner.example": testca.JWKS(b.JWK())})
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(next.JWK())}) // taken after the repeat was
	s.judged("an authority that is gone", old, "untrusted")
	s.judged("a partner that is gone", partner, "untrusted")
	if n := s.JWTGeneration(); n != generation+1 {
		t.Errorf("generation %d after %d", n, generation)
	}
	if err := s.RecheckJWT(j); resultOf(err) != "untrusted" {
		t.Errorf("asked again: %v", err)
	}

	fresh := next.SVID("/web", time.Now(), time.Hour, "orders")
	s.judged("the new authority", fresh, "")
	give(t, s.api.bundles, status.Error(codes.PermissionDenied, "no identity issued"))
	s.judged("refused", fresh, "unavailable")
	if !strings.Contains(s.Report().Problem, "is there an entry") || s.log.count("no news of JWT bundles") != 1 {
		t.Errorf("report %+v", s.Report())
	}
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(next.JWK())})
	s.judged("given again", fresh, "")
	s.bundles(nil)
	s.judged("an empty update", fresh, "untrusted")
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(next.JWK())})
	s.judged("given again", fresh, "")

	// An API that is away takes nothing back, also one that answers what the
	// library gives up on.
	give(t, s.api.bundles, status.Error(codes.InvalidArgument, "shutting down"))
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(a.JWK(), next.JWK())})
	s.judged("after an error", old, "")
	s.stop()
	s.judged("API away", fresh, "")
}

// TestBadJWTAuthorities: they keep neither others from being used nor what was
// withdrawn in force, and are said once.
func TestBadJWTAuthorities(t *testing.T) {
	t.Parallel()
	s := newJWTStage(t)
	a, next, b, c := testca.NewJWT(t, "example.org", "a1"), testca.NewJWT(t, "example.org", "a2"), testca.NewJWT(t, "partner.example", "b1"), testca.NewJWT(t, "other.example", "c1")
	token := func(a *testca.JWTAuthority) string { return a.SVID("/web", time.Now(), time.Hour, "orders") }
	s.FollowJWT()
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(a.JWK()), "spiffe://partner.example": testca.JWKS(b.JWK()), "spiffe://other.example": testca.JWKS(c.JWK())})
	s.judged("good ones", token(c), "")
	bad := map[string][]byte{
		"spiffe://example.org": testca.JWKS(`{"kty":"oct","kid":"a3","k":"AAAA"}`, `{"kty":"new","kid":"a4"}`, `"key"`,
			next.JWK(), strings.Replace(a.JWK(), "a1", "a2", 1), strings.Replace(a.JWK(), "{", `{"use":"x509-svid",`, 1),
			`{"kty":"OKP","crv":"Ed25519","kid":"a5","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`,
			`{"kty":"RSA","kid":"a6","e":"AQAB","n":"`+base64URL.EncodeToString([]byte(strings.Repeat("\xff", 128)))+`"}`,
			strings.Replace(a.JWK(), `"kid":"a1",`, "", 1)),
		"spiffe://partner.example": []byte(`<html>`),
		"spiffe://other.example":   testca.JWKS(c.JWK()),
		"other.example":            testca.JWKS(c.JWK()),
		"spiffe://no domain":       testca.JWKS(c.JWK()),
	}
	s.bundles(bad)
	s.judged("the good one among bad ones", token(next), "")
	for what, token := range map[string]string{"withdrawn": token(a), "not read": token(b), "there twice": token(c)} {
		s.judged(what, token, "untrusted")
	}
	generation := s.JWTGeneration()
	s.bundles(bad)
	s.bundles(map[string][]byte{"spiffe://example.org": testca.JWKS(a.JWK())})
	s.judged("good again", token(a), "")
	if n := s.JWTGeneration(); n != generation+1 {
		t.Errorf("generation %d after %d", n, generation)
	}
	if n := s.log.count("a JWT authority that is not good"); n != 1 {
		t.Errorf("said %d times", n)
	}
	for _, says := range []string{"RSA key of 1024 bits", "another key has its ID", "another use", "no JWK Set", "two bundles", "no public key for RSA or ECDSA"} {
		if s.log.count(says) == 0 {
			t.Errorf("the log does not say %q", says)
		}
	}
}

func (s *jwtStage) fetched(token string) {
	s.t.Helper()
	give(s.t, s.api.tokens, &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: "spiffe://example.org/orders", Svid: token}}})
}

func TestFetchJWTFromAPI(t *testing.T) {
	t.Parallel()
	s := newJWTStage(t)
	a := testca.NewJWT(t, "example.org", "a1")
	id := mustID(t, s.ca.SVID("/orders"))
	const audience = "spiffe://example.org/inventory"
	token := a.SVID("/orders", time.Now(), time.Hour, audience)
	got := make(chan string)
	for range 20 {
		go func() {
			token, err := s.FetchJWT(t.Context(), id, audience)
			got <- fmt.Sprint(token, err)
		}()
	}
	s.fetched(token) // once
	for range 20 {
		if g := <-got; g != token+"<nil>" {
			t.Errorf("got %s", g)
		}
	}

	// A call that is given up takes nothing from those that wait on.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.FetchJWT(ctx, id, "other"); err == nil || !strings.Contains(err.Error(), "context canceled") {
		t.Errorf("given up: %v", err)
	}
	other := a.SVID("/orders", time.Now(), time.Hour, "other")
	s.fetched(other)
	if token, err := s.FetchJWT(t.Context(), id, "other"); token != other || err != nil {
		t.Errorf("after one gave up: %v", err)
	}

	// What the API takes back is not used.
	billing := s.ca.SVID("/billing")
	s.api.answer(t, update(t, nil, s.ca, billing))
	until(t, s.lease, "another identity", presents(billing))
	go func() { s.api.tokens <- status.Error(codes.PermissionDenied, "not yours") }()
	if _, err := s.FetchJWT(t.Context(), id, audience); err == nil || !strings.Contains(err.Error(), "not yours") {
		t.Errorf("of an identity that was taken back: %v", err)
	}
	if n := s.log.count(token) + s.log.count(other); n != 0 {
		t.Errorf("the log holds a token:\n%s", s.log.text.String())
	}
}

// TestFetchedJWTsThatAreNone: what the API gives is looked at.
func TestFetchedJWTsThatAreNone(t *testing.T) {
	t.Parallel()
	a := testca.NewJWT(t, "example.org", "a1")
	now := time.Now()
	for name, c := range map[string]struct{ token, says string }{
		"of another subject":  {a.SVID("/web", now, time.Hour, "inventory"), "gave one of spiffe://example.org/web instead"},
		"for others":          {a.SVID("/orders", now, time.Hour, "billing"), "expected audience"},
		"expired":             {a.SVID("/orders", now.Add(-2*time.Hour), time.Hour, "inventory"), "expired"},
		"with an end of line": {a.SVID("/orders", now, time.Hour, "inventory") + "\n", "base64url"},
		"no token":            {"token", "parse"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newJWTStage(t)
			go func() {
				s.api.tokens <- &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{Svid: c.token}}}
			}()
			token, err := s.FetchJWT(t.Context(), mustID(t, s.ca.SVID("/orders")), "inventory")
			if token != "" || err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q, %v; want %q", token, err, c.says)
			}
		})
	}
}
