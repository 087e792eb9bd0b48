package devserver

import (
	"testing"
	"testing/synctest"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

func getBundle(t *testing.T, c client) *types.Bundle {
	t.Helper()
	b, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGetBundleMasks(t *testing.T) {
	srv, _ := serve(t, Config{})
	c := dial(t, srv, nil)
	full := getBundle(t, c)
	if full.TrustDomain != "dev.test" || full.SequenceNumber == 0 || len(full.X509Authorities) != 1 || len(full.JwtAuthorities) != 1 {
		t.Fatalf("bundle %v", full)
	}
	if full.JwtAuthorities[0].ExpiresAt != srv.ca.signer().cert.NotAfter.Unix() {
		t.Errorf("JWT key expires at %d", full.JwtAuthorities[0].ExpiresAt)
	}
	for _, tt := range []struct {
		mask *types.BundleMask
		want *types.Bundle
	}{
		{&types.BundleMask{}, &types.Bundle{TrustDomain: "dev.test"}},
		{&types.BundleMask{X509Authorities: true}, &types.Bundle{TrustDomain: "dev.test", X509Authorities: full.X509Authorities}},
		{&types.BundleMask{JwtAuthorities: true}, &types.Bundle{TrustDomain: "dev.test", JwtAuthorities: full.JwtAuthorities}},
		{&types.BundleMask{SequenceNumber: true, RefreshHint: true}, &types.Bundle{TrustDomain: "dev.test", SequenceNumber: full.SequenceNumber}},
	} {
		got, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: tt.mask})
		if err != nil || !proto.Equal(got, tt.want) {
			t.Errorf("mask %v: %v %v", tt.mask, got, err)
		}
	}
}

func TestGetFederatedBundle(t *testing.T) {
	srv, _ := serve(t, Config{})
	c, _ := agent(t, srv)
	for td, want := range map[string]codes.Code{"other.test": codes.NotFound, "dev.test": codes.InvalidArgument, "not a domain": codes.InvalidArgument} {
		_, err := c.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: td})
		wantCode(t, err, want, "")
	}
}

func TestRotateAndTaint(t *testing.T) {
	clk := newClock()
	e := workload("a")
	srv, _ := serve(t, Config{Now: clk.Now, Entries: []Entry{e}})
	c, cert := agent(t, srv)
	first := getBundle(t, c)
	oldToken, err := c.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: idOf(e), Audience: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	old := srv.ca.signer()
	clk.advance(time.Hour / 4) // so that the two do not expire together
	if err := srv.RotateCA(); err != nil {
		t.Fatal(err)
	}
	second := getBundle(t, c)
	if len(second.X509Authorities) != 2 || len(second.JwtAuthorities) != 2 || second.SequenceNumber <= first.SequenceNumber {
		t.Fatalf("bundle after rotation %v", second)
	}
	if !proto.Equal(second.X509Authorities[0], first.X509Authorities[0]) {
		t.Error("the old authority is not in the bundle as it was")
	}
	verifyJWT(t, c, oldToken.Svid.Token)
	key := newKey(t)
	leaf := certificate(t, sign(t, c, idOf(e), newCSR(t, key)), key).Leaf
	if err := leaf.CheckSignatureFrom(srv.ca.signer().cert); err != nil || srv.ca.signer() == old {
		t.Errorf("not signed by the new authority: %v", err)
	}
	if err := ping(t, dial(t, srv, cert)); err != nil {
		t.Errorf("an agent with an SVID of the old authority: %v", err)
	}

	if err := srv.TaintCA(); err != nil {
		t.Fatal(err)
	}
	third := getBundle(t, c)
	if !third.X509Authorities[0].Tainted || third.X509Authorities[1].Tainted || third.SequenceNumber <= second.SequenceNumber {
		t.Errorf("bundle after tainting %v", third)
	}

	clk.advance(old.cert.NotAfter.Sub(clk.Now()))
	if err := srv.ca.turn(); err != nil { // prepares a third
		t.Fatal(err)
	}
	for _, a := range srv.ca.bundle().authorities {
		if a == old {
			t.Error("an expired authority is in the bundle")
		}
	}
}

// TestTurn follows two lifetimes of an authority.
func TestTurn(t *testing.T) {
	clk := &clock{now: time.Now().Truncate(time.Second)}
	srv, err := New(Config{TrustDomain: testTD, CATTL: time.Hour, SVIDTTL: time.Minute, Now: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	first := srv.ca.signer()
	steps := []struct {
		advance time.Duration
		bundle  int
		rotated bool // since the last step
	}{
		{29 * time.Minute, 1, false},
		{1 * time.Minute, 2, false}, // half of its life: prepared
		{19 * time.Minute, 2, false},
		{1 * time.Minute, 2, true}, // five sixths: active, itself 20 minutes old
		{10 * time.Minute, 2, false},
		{1 * time.Minute, 2, false}, // the first one has expired, a third is prepared
		{19 * time.Minute, 2, true},
		{24 * time.Hour, 1, true}, // slept through everything
	}
	last := first
	for i, step := range steps {
		clk.advance(step.advance)
		for range 2 { // what is due is done once
			if err := srv.ca.turn(); err != nil {
				t.Fatal(err)
			}
		}
		now := srv.ca.signer()
		if got := len(srv.ca.bundle().authorities); got != step.bundle || (now != last) != step.rotated {
			t.Errorf("step %d: %d authorities, rotated %t; want %d, %t", i, got, now != last, step.bundle, step.rotated)
		}
		if srv.ca.expired(now) {
			t.Errorf("step %d: an expired authority signs", i)
		}
		last = now
	}
}

func TestKeepCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Only the loop: sockets have no place in a bubble.
		cfg := Config{TrustDomain: testTD, CATTL: time.Hour}
		if err := cfg.complete(); err != nil {
			t.Fatal(err)
		}
		c, err := newCA(cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{ca: c, log: cfg.Log}
		go s.keepCA(t.Context())
		first := c.signer()
		time.Sleep(49 * time.Minute)
		if c.signer() != first || len(c.bundle().authorities) != 2 {
			t.Errorf("after 49 minutes: %d authorities", len(c.bundle().authorities))
		}
		time.Sleep(3 * time.Minute)
		if c.signer() == first {
			t.Error("after 52 minutes the first authority still signs")
		}
	})
}

func TestDefaultCATTLCoversEntries(t *testing.T) {
	e := workload("a")
	e.TTL = 30 * 24 * time.Hour
	cfg := Config{TrustDomain: testTD, Entries: []Entry{e}}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	if cfg.CATTL != 6*e.TTL || cfg.AgentTTL != time.Hour {
		t.Errorf("CA %s, agent %s", cfg.CATTL, cfg.AgentTTL)
	}
}
