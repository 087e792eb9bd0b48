//go:build integration

package spire_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/identity"
)

// tokenKey returns the ID of the key that signed a token.
func tokenKey(t *testing.T, token string) string {
	t.Helper()
	encoded, _, _ := strings.Cut(token, ".")
	text, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	var header struct {
		KeyID string `json:"kid"`
	}
	if err := json.Unmarshal(text, &header); err != nil {
		t.Fatal(err)
	}
	return header.KeyID
}

// agents are the agents beside which the proxy has to do: SPIRE's own, and ours.
var agents = map[string]func(*testing.T, *server, ...entry) (socket string){
	"stock": startStockAgent,
	"own": func(t *testing.T, s *server, entries ...entry) string {
		return startAgent(t, s, entries...).api
	},
}

// startAgent runs our agent alone, and returns once it has the entries. The
// server gets them, with the agent for their parent, before.
func startAgent(t *testing.T, s *server, entries ...entry) *node {
	t.Helper()
	n := newNode(t, "own", proxyUser)
	id := n.joins(s)
	for i := range entries {
		entries[i].parent = id
	}
	s.add(entries...)
	n.start("agent")
	n.Becomes(stage.Soon, "has synced the entries", func(s telemetry.Status) bool { return s.Agent.Entries == len(entries) })
	return n
}

// TestTokens fetches and validates JWT-SVIDs while the server's JWT authority is
// replaced before its time, as after a theft of its key: tokens of the old one
// are refused, however long they have to live, and our own is one of the new.
func TestTokens(t *testing.T) {
	t.Parallel()
	for name, start := range agents {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testTokens(t, start)
		})
	}
}

func testTokens(t *testing.T, start func(*testing.T, *server, ...entry) string) {
	server := newServer(t, serverOptions{cacheReload: time.Second})
	socket := start(t, server, entry{path: "/web", selector: fmt.Sprintf("unix:uid:%d", os.Getuid())})
	source, err := identity.NewWorkloadAPI(identity.WorkloadAPIConfig{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	source.FollowJWT()
	web, audience := spiffeid.RequireFromString(server.id("/web")), []string{server.id("/orders")}
	fetch := func() (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), callTime)
		defer cancel()
		return source.FetchJWT(ctx, web, audience[0])
	}

	var old string
	var stands identity.JWT
	stage.Eventually(t, stage.Soon, "a token of the agent is good", func() (err error) {
		if old, err = fetch(); err == nil {
			stands, err = source.ValidateJWT(old, audience, time.Now())
		}
		return err
	})
	if left := time.Until(stands.NotAfter); stands.Subject != web || left < time.Minute || left > time.Hour {
		t.Errorf("the token is of %s and good for %v", stands.Subject, left)
	}
	if again, err := fetch(); err != nil || again != old {
		t.Errorf("asked again, the token is another one: %v", err)
	}
	if _, err := source.ValidateJWT(old, []string{server.id("/billing")}, time.Now()); !refusedAs(err, "audience") {
		t.Errorf("for others: %v", err)
	}

	authority := server.localAuthorities("jwt").Active.ID
	if id := tokenKey(t, old); id != authority {
		t.Errorf("the token names the key %s, the server's is %s", id, authority)
	}
	server.cli("localauthority", "jwt", "prepare")
	next := server.localAuthorities("jwt").Prepared.ID
	server.cli("localauthority", "jwt", "activate", "-authorityID", next)
	server.cli("localauthority", "jwt", "taint", "-authorityID", authority)
	// Where a taint and a revocation fall between two of its syncs, the agent
	// goes on to give what it holds.
	stage.Eventually(t, stage.Soon, "the agent has heard of the taint", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), callTime)
		defer cancel()
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Subject: web, Audience: audience[0]}, workloadapi.WithAddr("unix://"+socket))
		if err == nil && tokenKey(t, svid.Marshal()) != next {
			err = errors.New("it gives the old token")
		}
		return err
	})
	if err := source.RecheckJWT(stands); err != nil {
		t.Errorf("before the authority was revoked: %v", err)
	}
	generation := source.JWTGeneration()
	server.cli("localauthority", "jwt", "revoke", "-authorityID", authority)
	stage.Eventually(t, stage.Soon, "the old token is refused", func() error {
		if _, err := source.ValidateJWT(old, audience, time.Now()); !refusedAs(err, "untrusted") {
			return fmt.Errorf("still %w", err)
		}
		return nil
	})
	if err := source.RecheckJWT(stands); !refusedAs(err, "untrusted") || source.JWTGeneration() == generation {
		t.Errorf("who came by it, asked again: %v", err)
	}
	stage.Eventually(t, stage.Soon, "our own token is of the new authority", func() error {
		token, err := fetch()
		if err == nil && tokenKey(t, token) != next {
			err = errors.New("it is of the old one")
		}
		if err == nil {
			_, err = source.ValidateJWT(token, audience, time.Now())
		}
		return err
	})
}

func refusedAs(err error, result string) bool {
	var e *identity.JWTError
	return errors.As(err, &e) && e.Result == result
}
