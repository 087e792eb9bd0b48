//go:build integration

package spire_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

func (n *node) workloadAPI() workloadapi.ClientOption { return workloadapi.WithAddr("unix://" + n.api) }

// TestBurstOfTokens: 200 workloads that start at one moment cost the server one
// signature, and the next ones none while it is away.
func TestBurstOfTokens(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second})
	n := startAgent(t, server,
		entry{path: "/web", selector: "unix:uid:0"}, entry{path: "/admin", selector: "unix:uid:0"})
	fetch := func(audience string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), callTime)
		defer cancel()
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Subject: spiffeid.RequireFromString(server.id("/web")), Audience: audience}, n.workloadAPI())
		if err != nil {
			return "", err
		}
		if svid.ID.Path() != "/web" {
			return "", fmt.Errorf("asked for /web and got %s", svid.ID)
		}
		return svid.Marshal(), nil
	}
	got, failed := make(chan string, 200), make(chan error, 200)
	for range cap(got) {
		go func() {
			token, err := fetch("db")
			got <- token
			failed <- err
		}()
	}
	first := <-got
	for range cap(got) - 1 {
		if token := <-got; token != first {
			t.Error("some got another token")
		}
	}
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	if calls := n.Metric(`narthex_tokens_signed_total{result="ok",type="jwt"}`); calls != 1 {
		t.Errorf("%g calls to the server", calls)
	}
	server.Stop()
	if token, err := fetch("db"); err != nil || token != first {
		t.Errorf("while the server is away: %v", err)
	}
	if _, err := fetch("queue"); err == nil || !strings.Contains(err.Error(), server.address) {
		t.Errorf("a token that is not there, while the server is away: %v", err)
	}
}

// TestForeignTokens validates the token of another trust domain, by the bundle
// that the server has of it and for as long as it has it.
func TestForeignTokens(t *testing.T) {
	t.Parallel()
	home := newServer(t, serverOptions{trustDomain: "home.example", cacheReload: time.Second})
	partner := newServer(t, serverOptions{trustDomain: "partner.example", cacheReload: time.Second})
	home.trust(partner.bundle())
	n := startAgent(t, home, entry{path: "/stock", selector: "unix:uid:0", federates: []string{"partner.example"}})
	token := strings.TrimSpace(partner.cli("jwt", "mint", "-spiffeID", partner.id("/buyer"), "-audience", "stock"))
	ctx, cancel := context.WithTimeout(t.Context(), 3*stage.Soon)
	defer cancel()
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(n.workloadAPI()))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if _, err := jwtsvid.ParseAndValidate(token, source, []string{"stock"}); err != nil {
		t.Errorf("by the bundles: %v", err)
	}
	conn, err := grpc.NewClient("unix://"+n.api, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	validate := func() (*workload.ValidateJWTSVIDResponse, error) {
		ctx := metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
		return workload.NewSpiffeWorkloadAPIClient(conn).ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "stock", Svid: token})
	}
	resp, err := validate()
	if err != nil {
		t.Fatal(err)
	}
	if told := slices.Sorted(maps.Keys(resp.Claims.Fields)); resp.SpiffeId != partner.id("/buyer") || !slices.Equal(told, []string{"aud", "exp", "sub"}) {
		t.Errorf("told %v of %s", told, resp.SpiffeId)
	}
	home.distrust("partner.example")
	stage.Eventually(t, stage.Soon, "the partner is not believed any more", func() error {
		_, err := validate()
		if err == nil {
			return errors.New("it is")
		}
		if !strings.Contains(err.Error(), "no bundle of trust domain partner.example") {
			return err
		}
		return nil
	})
	stage.Eventually(t, stage.Soon, "the bundle is taken back from streams", func() error {
		if _, err := source.GetJWTBundleForTrustDomain(partner.td); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
}

// TestWITSVIDs fetches and verifies a WIT-SVID, which is bound to the key that
// comes with it, and shared by all who have the entry.
func TestWITSVIDs(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second, features: []string{"wit-svid"}})
	n := startAgent(t, server,
		entry{path: "/web", selector: "unix:uid:0", hint: "internal", ttl: 20 * time.Second}, entry{path: "/admin", selector: "unix:uid:0"})
	client, err := workloadapi.New(t.Context(), n.workloadAPI())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	bundles, err := client.FetchWITBundles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	svids, err := client.FetchWITSVIDs(ctx, "")
	if err != nil || len(svids) != 2 {
		t.Fatalf("%d WIT-SVIDs, %v", len(svids), err)
	}
	for _, svid := range svids {
		checkWIT(t, svid, bundles)
	}
	again, err := client.FetchWITSVID(ctx, server.id("/web"))
	if err != nil {
		t.Fatal(err)
	}
	if again.Hint != "internal" || !slices.ContainsFunc(svids, func(s *witsvid.SVID) bool { return s.Marshal() == again.Marshal() }) {
		t.Errorf("asked again, the WIT-SVID of %s (%q) is another one", again.ID, again.Hint)
	}
	watch := &witWatcher{make(chan *witsvid.SVID, 10)}
	watching, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- client.WatchWITSVIDs(watching, watch, server.id("/web")) }()
	defer func() { stop(); <-done }()
	seen := map[string]bool{}
	for len(seen) < 3 { // of 20 s each
		select {
		case svid := <-watch.updates:
			checkWIT(t, svid, bundles)
			seen[svid.Marshal()] = true
		case <-ctx.Done():
			t.Fatalf("%d WIT-SVIDs on the stream", len(seen))
		}
	}
}

type witWatcher struct{ updates chan *witsvid.SVID }

func (w *witWatcher) OnWITSVIDsUpdate(svids []*witsvid.SVID) { w.updates <- svids[0] }
func (w *witWatcher) OnWITSVIDsWatchError(error)             {}

// checkWIT verifies a WIT-SVID and that its private key is the one it names.
func checkWIT(t *testing.T, svid *witsvid.SVID, bundles witbundle.Source) {
	t.Helper()
	verified, err := witsvid.ParseAndValidate(svid.Marshal(), bundles)
	if err != nil {
		t.Errorf("%s: %v", svid.ID, err)
		return
	}
	public, ok := verified.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	signer, signs := svid.PrivateKey.(crypto.Signer)
	if !ok || !signs || !public.Equal(signer.Public()) {
		t.Errorf("%s: the private key is not that of the WIT-SVID", svid.ID)
	}
}

// TestWITOff: a server without the feature has clients stop asking.
func TestWITOff(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second})
	n := startAgent(t, server, entry{path: "/web", selector: "unix:uid:0"})
	client, err := workloadapi.New(t.Context(), n.workloadAPI())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	_, svidErr := client.FetchWITSVID(ctx, "")
	_, bundleErr := client.FetchWITBundles(ctx)
	for _, err := range []error{svidErr, bundleErr} {
		if err == nil || !strings.Contains(err.Error(), "Unimplemented") || !strings.Contains(err.Error(), "wit-svid") {
			t.Errorf("got %v", err)
		}
	}
}
