package proxy

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/identity"
)

// spoken is a source to which the path of a SPIFFE ID is a good token for it.
type spoken struct{ *identity.Held }

func (spoken) FollowJWT()                    {}
func (spoken) JWTProblem() error             { return nil }
func (spoken) JWTGeneration() uint64         { return 1 }
func (spoken) RecheckJWT(identity.JWT) error { return nil }

func (spoken) ValidateJWT(token string, _ []string, now time.Time) (identity.JWT, error) {
	return identity.JWT{Subject: spiffeid.RequireFromString("spiffe://example.org" + token), NotAfter: now.Add(time.Hour)}, nil
}

func (spoken) FetchJWT(context.Context, spiffeid.ID, string) (string, error) {
	return "", errors.New("none")
}

const webSpeaks = `version: 1
rules:
  - {id: own, effect: allow, from: ["spiffe://example.org/web"], http: {paths: ["/own"]}}
  - {id: speaks, effect: allow, from: ["spiffe://example.org/web"], http: {paths: ["/for"], subjects: ["spiffe://example.org/users/**"]}}
  - {id: not-eve, effect: deny, http: {subjects: ["spiffe://example.org/users/eve"]}}
revoked: ["spiffe://example.org/users/bert"]
`

// TestSubjects: whom a token speaks for is decided on, request by request, and
// one that is out does not take the connection with it.
func TestSubjects(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), func(c *Config) {
		held, _ := c.Identities.(*identity.Held)
		c.Identities = spoken{held}
		c.Listeners[0].HTTP.JWT = &JWT{Audience: []string{"orders"}}
		c.Policy = rulesOf(t, webSpeaks)
	})
	b := p.browser(ca)
	for _, test := range []struct {
		path, token string
		status      int
	}{
		{"/own", "", http.StatusOK},
		{"/own", "/web", http.StatusOK},
		{"/own", "/users/anna", http.StatusForbidden},
		{"/for", "", http.StatusUnauthorized},
		{"/for", "/web", http.StatusForbidden},
		{"/for", "/users/anna", http.StatusOK},
		{"/for", "/users/eve", http.StatusForbidden},
		{"/for", "/users/bert", http.StatusForbidden},
		{"/none", "", http.StatusForbidden},
		{"/for", "/users/anna", http.StatusOK},
	} {
		authorization := ""
		if test.token != "" {
			authorization = "Authorization: Bearer " + test.token + "\r\n"
		}
		b.send("GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n", test.path, authorization)
		resp, _ := b.response("GET")
		if challenge := resp.Header.Get("WWW-Authenticate"); resp.StatusCode != test.status || (challenge == "Bearer") != (test.status == http.StatusUnauthorized) {
			t.Errorf("%s for %q: %d %q, want %d", test.path, test.token, resp.StatusCode, challenge, test.status)
		}
	}
}

// TestNoTokens: where none are looked for, a deny of somebody is one of all.
func TestNoTokens(t *testing.T) {
	t.Parallel()
	p, ca := web(t, origin(t, echoes), func(c *Config) { c.Policy = rulesOf(t, webSpeaks) })
	b := p.browser(ca)
	for _, path := range []string{"/own", "/for"} {
		if status, _ := b.get(path); status != http.StatusForbidden {
			t.Errorf("%s: %d", path, status)
		}
	}
}
