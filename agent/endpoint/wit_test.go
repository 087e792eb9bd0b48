package endpoint

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"github.com/narthex-id/narthex/agent/registry"
)

// withWIT adds a key for WIT-SVIDs to a bundle.
func withWIT(b *registry.Bundle, jwks string) *registry.Bundle {
	c := *b
	c.WITKeys, c.WITJWKS = map[string]crypto.PublicKey{"w1": nil}, []byte(jwks)
	return &c
}

func TestFetchWITSVID(t *testing.T) {
	f := serveTokens(t)
	round, refresh := 0, make(chan time.Time, 10)
	f.agent.onWIT = func(_ context.Context, e *registry.Entry) (*registry.Token, time.Time, error) {
		round++
		return &registry.Token{ID: e.SPIFFEID, Compact: fmt.Sprintf("%s-%d", e.ID, round), PrivateKey: "key of " + e.ID}, <-refresh, nil
	}
	f.agent.Apply(registry.Update{Bundle: withWIT(f.ca.bundle(), "{}")})
	f.unsigned(f.entry("a", "/a"))
	ctx, cancel := context.WithCancel(withHeader(testContext(t)))
	defer cancel()
	stream, err := f.client.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: "spiffe://example.org/a"})
	must(t, err)
	next := func() string {
		t.Helper()
		resp, err := stream.Recv()
		must(t, err)
		var got []string
		for _, s := range resp.Svids {
			got = append(got, s.SpiffeId+" "+s.WitSvid+" "+s.WitSvidKey+" "+s.Hint)
		}
		return strings.Join(got, "\n")
	}
	refresh <- time.Now().Add(20 * time.Millisecond)
	if got := next(); got != "spiffe://example.org/a a-1 key of a " {
		t.Errorf("got %q", got)
	}
	refresh <- time.Now().Add(time.Hour)
	if got := next(); got != "spiffe://example.org/a a-2 key of a " {
		t.Errorf("at its time: %q", got)
	}
	refresh <- time.Now().Add(time.Hour)
	f.entries[0].Hint, f.entries[0].Revision = "!", 2
	f.unsigned()
	if got := next(); got != "spiffe://example.org/a a-3 key of a !" {
		t.Errorf("with another hint: %q", got)
	}
	f.agent.Apply(registry.Update{Bundle: f.ca.bundle()}) // the server signs none any more
	_, err = stream.Recv()
	wantCode(t, err, codes.Unimplemented, `feature_flags = ["wit-svid"]`)
}

func TestFetchWITSVIDFails(t *testing.T) {
	f := serveTokens(t)
	fetch := func(id string) error {
		stream, err := f.client.FetchWITSVID(withHeader(testContext(t)), &workload.WITSVIDRequest{SpiffeId: id})
		must(t, err)
		_, err = stream.Recv()
		return err
	}
	wantCode(t, fetch(""), codes.Unimplemented, "wit-svid")
	f.unsigned(f.entry("a", "/a"))
	wantCode(t, fetch(""), codes.Unimplemented, "wit-svid")
	wantCode(t, fetch("a"), codes.InvalidArgument, "SPIFFE ID")
	f.agent.Apply(registry.Update{Bundle: withWIT(f.ca.bundle(), "{}")})
	wantCode(t, fetch("spiffe://example.org/b"), codes.PermissionDenied, "not entitled")
	wantCode(t, fetch(""), codes.Unimplemented, ErrNoTokens.Error())
	f.agent.set(func(a *fakeAgent) {
		a.onWIT = func(context.Context, *registry.Entry) (*registry.Token, time.Time, error) {
			return nil, time.Time{}, errors.New("unreachable")
		}
	})
	wantCode(t, fetch(""), codes.Unavailable, "spiffe://example.org/a", "unreachable")
}

func TestWITBundles(t *testing.T) {
	f := serveTokens(t)
	fetch := func() (*workload.WITBundlesResponse, error) {
		stream, err := f.client.FetchWITBundles(withHeader(testContext(t)), &workload.WITBundlesRequest{})
		must(t, err)
		return stream.Recv()
	}
	_, err := fetch()
	wantCode(t, err, codes.Unimplemented, "wit-svid")
	f.agent.Apply(registry.Update{Bundle: withWIT(f.ca.bundle(), `{"keys":[]}`)})
	_, err = fetch()
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	f.unsigned(f.entry("a", "/a"))
	got, err := fetch()
	must(t, err)
	if len(got.Bundles) != 1 || got.Bundles["spiffe://example.org"] != `{"keys":[]}` {
		t.Errorf("got %v", got.Bundles)
	}
}
