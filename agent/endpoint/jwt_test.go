package endpoint

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/testca"
)

// withJWT adds a JWT authority's key to a bundle.
func withJWT(b *registry.Bundle, a *testca.JWTAuthority) *registry.Bundle {
	c := *b
	c.JWTKeys = map[string]crypto.PublicKey{a.KeyID: a.Key.Public()}
	c.JWKS = testca.JWKS(a.JWK())
	return &c
}

// tokenFixture is a fixture whose agent signs JWT-SVIDs.
type tokenFixture struct {
	*fixture
	jwt, partner *testca.JWTAuthority
	client       workload.SpiffeWorkloadAPIClient
}

func serveTokens(t *testing.T, options ...func(*Config)) *tokenFixture {
	f := &tokenFixture{fixture: serve(t, options...), jwt: testca.NewJWT(t, td.Name(), "k1"), partner: testca.NewJWT(t, partner.Name(), "p1")}
	f.agent.onJWT = func(_ context.Context, e *registry.Entry, audience []string) (*registry.Token, error) {
		return &registry.Token{ID: e.SPIFFEID, Audience: audience, Compact: f.jwt.SVID(e.SPIFFEID.Path(), time.Now(), time.Minute, audience...)}, nil
	}
	f.agent.Apply(registry.Update{
		Bundle:       withJWT(f.ca.bundle(), f.jwt),
		HasFederated: true, Federated: map[spiffeid.TrustDomain]*registry.Bundle{partner: withJWT(newAuthority(t, partner).bundle(), f.partner)},
	})
	f.client = workload.NewSpiffeWorkloadAPIClient(f.dial())
	return f
}

// unsigned adds entries none of which has an X.509-SVID.
func (f *tokenFixture) unsigned(entries ...registry.Entry) {
	f.entries = append(f.entries, entries...)
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
}

func (f *tokenFixture) fetchJWT(req *workload.JWTSVIDRequest) (string, error) {
	resp, err := f.client.FetchJWTSVID(withHeader(testContext(f.t)), req)
	var got []string
	for _, s := range resp.GetSvids() {
		svid, err := jwtsvid.ParseInsecure(s.Svid, nil)
		must(f.t, err)
		if svid.ID.String() != s.SpiffeId {
			f.t.Errorf("a token of %s is said to be of %s", svid.ID, s.SpiffeId)
		}
		got = append(got, svid.ID.Path()+s.Hint+fmt.Sprint(svid.Audience))
	}
	return strings.Join(got, " "), err
}

func TestFetchJWTSVID(t *testing.T) {
	f := serveTokens(t)
	b := f.entry("b", "/b")
	b.Hint = "!"
	f.unsigned(f.entry("c", "/c"), b, f.entry("a", "/a"))
	for _, test := range []struct {
		name     string
		audience []string
		id       string
		want     string
	}{
		{"all, by entry", []string{"db"}, "", "/a[db] /b![db] /c[db]"},
		{"one", []string{"db"}, "spiffe://example.org/b", "/b![db]"},
		{"an audience is a set", []string{"z", "db", "", "z"}, "spiffe://example.org/c", "/c[db z]"},
	} {
		got, err := f.fetchJWT(&workload.JWTSVIDRequest{Audience: test.audience, SpiffeId: test.id})
		if err != nil || got != test.want {
			t.Errorf("%s: got %q, %v; want %q", test.name, got, err, test.want)
		}
	}
	many := make([]string, maxAudiences+1)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	for _, test := range []struct {
		name     string
		audience []string
		id       string
		code     codes.Code
		want     string
	}{
		{"no audience", nil, "", codes.InvalidArgument, "audience"},
		{"an empty one", []string{""}, "", codes.InvalidArgument, "audience"},
		{"too many", many, "", codes.InvalidArgument, "at most 32"},
		{"too long", []string{strings.Repeat("a", maxAudience+1)}, "", codes.InvalidArgument, "at most 1024"},
		{"no SPIFFE ID", []string{"db"}, "b", codes.InvalidArgument, "SPIFFE ID"},
		{"a long one", []string{"db"}, "spiffe://example.org/" + strings.Repeat("a", maxSPIFFEID), codes.InvalidArgument, "at most 2048"},
		{"somebody else's", []string{"db"}, "spiffe://example.org/d", codes.PermissionDenied, "not entitled"},
	} {
		_, err := f.fetchJWT(&workload.JWTSVIDRequest{Audience: test.audience, SpiffeId: test.id})
		t.Run(test.name, func(t *testing.T) { wantCode(t, err, test.code, test.want) })
	}
}

func TestFetchJWTSVIDFails(t *testing.T) {
	f := serveTokens(t)
	request := &workload.JWTSVIDRequest{Audience: []string{"db"}}
	_, err := f.fetchJWT(request)
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	f.unsigned(f.entry("a", "/a"))
	for code, fails := range map[codes.Code]error{
		codes.Unavailable:   errors.New("server spire:8081: unreachable"),
		codes.Unimplemented: fmt.Errorf("%w: it is disabled", ErrNoTokens),
	} {
		f.agent.set(func(a *fakeAgent) {
			a.onJWT = func(context.Context, *registry.Entry, []string) (*registry.Token, error) { return nil, fails }
		})
		_, err := f.fetchJWT(request)
		wantCode(t, err, code, "spiffe://example.org/a", fails.Error())
	}
	f.agent.set(func(a *fakeAgent) {
		a.onJWT = func(ctx context.Context, _ *registry.Entry, _ []string) (*registry.Token, error) {
			<-ctx.Done() // which is before the caller's own deadline
			return nil, errors.New("no answer in time")
		}
	})
	ctx, cancel := context.WithTimeout(withHeader(t.Context()), 2*time.Second)
	defer cancel()
	_, err = f.client.FetchJWTSVID(ctx, request)
	wantCode(t, err, codes.Unavailable, "no answer in time")
}

// What goes while tokens are made is not given any more.
func TestFetchJWTSVIDOfEntriesThatGo(t *testing.T) {
	t.Parallel()
	const a, b = "/a[db]", "/b[db]"
	for _, test := range []struct {
		name   string
		id     string
		change func(*tokenFixture)
		want   string
		code   codes.Code
		says   string
	}{
		{"nothing", "", func(*tokenFixture) {}, a + " " + b, codes.OK, ""},
		{"one of two goes", "", func(f *tokenFixture) { f.left(f.entry("b", "/b")) }, b, codes.OK, ""},
		{"another one comes", "", func(f *tokenFixture) { f.unsigned(f.entry("c", "/c")) }, a + " " + b, codes.OK, ""},
		{"one becomes another", "", func(f *tokenFixture) { f.left(f.entry("a", "/other"), f.entry("b", "/b")) }, b, codes.OK, ""},
		{"a hint changes", "", func(f *tokenFixture) {
			hinted := f.entry("a", "/a")
			hinted.Hint = "!"
			f.left(hinted, f.entry("b", "/b"))
		}, a + " " + b, codes.OK, ""},
		{"both become others", "", func(f *tokenFixture) { f.left(f.entry("a", "/other"), f.entry("b", "/another")) }, "", codes.Unavailable, "call again"},
		{"both go", "", func(f *tokenFixture) { f.left() }, "", codes.PermissionDenied, "no identity issued"},
		{"the one asked for goes", "spiffe://example.org/a", func(f *tokenFixture) { f.left(f.entry("b", "/b")) }, "", codes.PermissionDenied, "not entitled"},
		{"the agent is banned", "", func(f *tokenFixture) { f.agent.Apply(registry.Update{Wipe: true}) }, "", codes.PermissionDenied, "taken back"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := serveTokens(t)
			f.unsigned(f.entry("a", "/a"), f.entry("b", "/b"))
			sign, begun, changed := f.agent.onJWT, make(chan struct{}, 2), make(chan struct{})
			f.agent.set(func(agent *fakeAgent) {
				agent.onJWT = func(ctx context.Context, e *registry.Entry, audience []string) (*registry.Token, error) {
					begun <- struct{}{}
					<-changed
					return sign(ctx, e, audience)
				}
			})
			go func() {
				defer close(changed)
				<-begun
				test.change(f)
			}()
			got, err := f.fetchJWT(&workload.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: test.id})
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if err != nil || test.code != codes.OK {
				wantCode(t, err, test.code, test.says)
			}
		})
	}
}

// left leaves these entries, none of which has an X.509-SVID, and no other.
func (f *tokenFixture) left(entries ...registry.Entry) {
	f.entries = nil
	f.unsigned(entries...)
}

func (a *fakeAgent) set(change func(*fakeAgent)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change(a)
}

func TestJWTBundles(t *testing.T) {
	f := serveTokens(t)
	f.unsigned(f.entry("a", "/a"))
	ctx, cancel := context.WithCancel(withHeader(testContext(t)))
	defer cancel()
	stream, err := f.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	must(t, err)
	next := func() string {
		t.Helper()
		resp, err := stream.Recv()
		must(t, err)
		var got []string
		for name, jwks := range resp.Bundles {
			got = append(got, name+" "+string(jwks))
		}
		slices.Sort(got)
		return strings.Join(got, "\n")
	}
	own, foreign := "spiffe://example.org "+string(testca.JWKS(f.jwt.JWK())), "spiffe://partner.example "+string(testca.JWKS(f.partner.JWK()))
	if got := next(); got != own {
		t.Errorf("got %s", got)
	}
	f.entries[0].FederatesWith, f.entries[0].Revision = []spiffeid.TrustDomain{partner}, 2
	f.unsigned()
	if got := next(); got != own+"\n"+foreign {
		t.Errorf("with a federated domain: %s", got)
	}
	f.agent.Apply(registry.Update{HasFederated: true})
	if got := next(); got != own {
		t.Errorf("without it again: %s", got)
	}
	empty := f.ca.bundle()
	empty.JWKS = testca.JWKS()
	f.agent.Apply(registry.Update{Bundle: empty})
	if got := next(); got != `spiffe://example.org {"keys":[]}` {
		t.Errorf("of a server that signs no JWT-SVIDs: %s", got)
	}
	f.entries = nil
	f.unsigned()
	_, err = stream.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

// TestJWTSource has go-spiffe's source live on our socket.
func TestJWTSource(t *testing.T) {
	f := serveTokens(t)
	f.unsigned(f.entry("a", "/a"))
	source, err := workloadapi.NewJWTSource(testContext(t), workloadapi.WithClientOptions(workloadapi.WithAddr(f.addr())))
	must(t, err)
	defer source.Close()
	svid, err := source.FetchJWTSVID(testContext(t), jwtsvid.Params{Audience: "db", ExtraAudiences: []string{"queue"}})
	must(t, err)
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"queue"}); err != nil {
		t.Error(err)
	}
	got, err := workloadapi.ValidateJWTSVID(testContext(t), svid.Marshal(), "db", workloadapi.WithAddr(f.addr()))
	must(t, err)
	if got.ID.Path() != "/a" {
		t.Errorf("got %s", got.ID)
	}
}

func TestValidateJWTSVID(t *testing.T) {
	f := serveTokens(t, func(c *Config) { c.ForeignJWTClaims = []string{"role"} })
	federated := f.entry("a", "/a")
	federated.FederatesWith = []spiffeid.TrustDomain{partner}
	f.unsigned(federated)
	validate := func(token, audience string) (*workload.ValidateJWTSVIDResponse, error) {
		return f.client.ValidateJWTSVID(withHeader(testContext(t)), &workload.ValidateJWTSVIDRequest{Svid: token, Audience: audience})
	}
	now := time.Now()
	claims := func(domain string) string {
		return fmt.Sprintf(`{"sub":"spiffe://%s/web","aud":"db","exp":%d,"role":"clerk","secret":{"a":[1]}}`, domain, now.Add(time.Minute).Unix())
	}
	for _, test := range []struct {
		name  string
		token string
		id    string
		told  []string
	}{
		{"our own", f.jwt.Sign(`{"alg":"ES256","kid":"k1","typ":"JOSE"}`, claims("example.org")), "spiffe://example.org/web", []string{"aud", "exp", "role", "secret", "sub"}},
		{"a foreign one", f.partner.Sign(`{"alg":"ES256","kid":"p1"}`, claims("partner.example")), "spiffe://partner.example/web", []string{"aud", "exp", "role", "sub"}},
	} {
		resp, err := validate(test.token, "db")
		must(t, err)
		var told []string
		for name := range resp.Claims.Fields {
			told = append(told, name)
		}
		slices.Sort(told)
		if resp.SpiffeId != test.id || !slices.Equal(told, test.told) {
			t.Errorf("%s: got %s with %v", test.name, resp.SpiffeId, told)
		}
		if list := resp.Claims.Fields["aud"].GetListValue().GetValues(); len(list) != 1 || list[0].GetStringValue() != "db" {
			t.Errorf("%s: aud is %v, not a list", test.name, resp.Claims.Fields["aud"])
		}
	}

	good := f.jwt.SVID("/web", now, time.Minute, "db", "queue")
	for _, test := range []struct{ name, token, audience, want string }{
		{"no audience", good, "", "audience"},
		{"a long one", good, strings.Repeat("a", maxAudience+1), "at most 1024"},
		{"no token", "", "db", "no token"},
		{"for others", good, "bank", `"bank" is none of its audiences`},
		{"too long", strings.Repeat("a", maxJWT+1), "db", "at most 16384"},
		{"white space", good + "\n", "db", "white space"},
		{"no token at all", "garbage", "db", "no JWS"},
		{"unsigned", f.jwt.Sign(`{"alg":"none","kid":"k1"}`, claims("example.org")), "db", "algorithm"},
		{"by a shared secret", f.jwt.Sign(`{"alg":"HS256","kid":"k1"}`, claims("example.org")), "db", "algorithm"},
		{"of another type", f.jwt.Sign(`{"alg":"ES256","kid":"k1","typ":"wit+jwt"}`, claims("example.org")), "db", "typ"},
		{"with its own key", f.jwt.Sign(`{"alg":"ES256","kid":"k1","jwk":`+f.jwt.JWK()+`}`, claims("example.org")), "db", "more than alg, kid and typ"},
		{"with another header", f.jwt.Sign(`{"alg":"ES256","kid":"k1","cty":"JWT"}`, claims("example.org")), "db", "more than alg, kid and typ"},
		{"without an audience", f.jwt.Sign(`{"alg":"ES256","kid":"k1"}`, `{"sub":"spiffe://example.org/web","exp":9999999999}`), "db", "none of its audiences"},
		{"not in compact form", `{"payload":"e30","signature":"AA","protected":"e30"}`, "db", "no JWS in compact form"},
		{"without a key", f.jwt.Sign(`{"alg":"ES256"}`, claims("example.org")), "db", "kid"},
		{"of an unknown key", f.jwt.Sign(`{"alg":"ES256","kid":"k2"}`, claims("example.org")), "db", "none in the bundle"},
		{"of another's key", f.partner.Sign(`{"alg":"ES256","kid":"k1"}`, claims("example.org")), "db", "signature"},
		{"of a domain for another", f.partner.Sign(`{"alg":"ES256","kid":"p1"}`, claims("example.org")), "db", "none in the bundle"},
		{"of a domain without a bundle", f.partner.Sign(`{"alg":"ES256","kid":"p1"}`, claims("other.example")), "db", "no bundle of trust domain other.example"},
		{"of nobody", f.jwt.Sign(`{"alg":"ES256","kid":"k1"}`, `{"aud":"db","exp":9999999999}`), "db", "SPIFFE ID"},
		{"for ever", f.jwt.Sign(`{"alg":"ES256","kid":"k1"}`, `{"sub":"spiffe://example.org/web","aud":"db"}`), "db", "expires"},
		{"twice somebody", f.jwt.Sign(`{"alg":"ES256","kid":"k1"}`, `{"sub":"spiffe://example.org/a","sub":"spiffe://example.org/b","aud":"db","exp":9999999999}`), "db", "each name once"},
		{"expired", f.jwt.SVID("/web", now.Add(-2*time.Minute), time.Minute, "db"), "db", "expired"},
		{"of tomorrow", f.jwt.SVID("/web", now.Add(24*time.Hour), time.Minute, "db"), "db", "future"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := validate(test.token, test.audience)
			wantCode(t, err, codes.InvalidArgument, test.want)
			for part := range strings.SplitSeq(test.token, ".") {
				if len(part) > 10 && strings.Contains(err.Error(), part[:10]) {
					t.Errorf("%q shows a part of the token", err)
				}
			}
			if strings.Contains(f.log.String(), "eyJ") {
				t.Error("a token is in the log")
			}
		})
	}
}

// TestVerifiers are callers without an entry, who want to verify others.
func TestVerifiers(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		f := serveTokens(t, func(c *Config) { c.AllowUnauthenticatedVerifiers = allowed })
		other := f.entry("a", "/a")
		other.Selectors = []attestor.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Geteuid()+1)}}
		other.FederatesWith = []spiffeid.TrustDomain{partner}
		f.unsigned(other)
		ctx := withHeader(testContext(t))
		stream, err := f.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		must(t, err)
		bundles, bundlesErr := stream.Recv()
		_, ownErr := f.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Svid: f.jwt.SVID("/b", time.Now(), time.Minute, "db"), Audience: "db"})
		_, foreignErr := f.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Svid: f.partner.SVID("/b", time.Now(), time.Minute, "db"), Audience: "db"})
		_, fetchErr := f.fetchJWT(&workload.JWTSVIDRequest{Audience: []string{"db"}})
		wantCode(t, fetchErr, codes.PermissionDenied)
		if !allowed {
			wantCode(t, bundlesErr, codes.PermissionDenied)
			wantCode(t, ownErr, codes.PermissionDenied)
			wantCode(t, foreignErr, codes.PermissionDenied)
			continue
		}
		must(t, bundlesErr)
		must(t, ownErr)
		wantCode(t, foreignErr, codes.InvalidArgument, "no bundle of trust domain partner.example")
		if len(bundles.Bundles) != 1 {
			t.Errorf("got the bundles of %d domains, want our own", len(bundles.Bundles))
		}
	}
}

// FuzzVerifyJWT: whatever a stranger sends is refused or is a token of an
// authority, and no reason shows a part of it.
func FuzzVerifyJWT(f *testing.F) {
	authority := testca.NewJWT(f, td.Name(), "k1")
	view := &registry.View{Bundle: withJWT(&registry.Bundle{TrustDomain: td}, authority)}
	now := time.Unix(1.7e9, 0)
	f.Add(authority.SVID("/web", now, time.Minute, "db"), "db")
	f.Add(authority.Sign(`{"alg":"ES256","kid":"k1"}`, `{"sub":"spiffe://example.org/a","aud":["db"],"exp":1.8e9,"x":[[[[{}]]]]}`), "db")
	f.Add(authority.Sign(`{"alg":"ES256","kid":"k1","crit":["b64"],"b64":false}`, `{}`), "")
	f.Add(authority.Sign(`{"alg":"RS256","kid":"k1"}`, `{"sub":"spiffe://example.org"}`), "db")
	f.Add("..", "db")
	f.Fuzz(func(t *testing.T, token, audience string) {
		id, claims, err := verifyJWT(token, audience, view, now)
		if err == nil {
			if id.TrustDomain() != td || claims["sub"] != id.String() || len(token) > maxJWT {
				t.Fatalf("%q is taken for a token of %s", token, id)
			}
			return
		}
		if !id.IsZero() || claims != nil {
			t.Fatalf("%q is refused, and told all the same", token)
		}
		if part, _, _ := strings.Cut(token, "."); len(part) > 20 && strings.Contains(err.Error(), part) {
			t.Fatalf("%q shows a part of %q", err, token)
		}
	})
}
