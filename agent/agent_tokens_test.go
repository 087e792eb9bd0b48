package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/internal/devserver"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// counter returns the value of a counter.
func (s *stage) counter(name string, labels ...string) (value float64) {
	s.cfg.Metrics.Each(func(m telemetry.Sample) {
		if m.Name == name && strings.Join(m.LabelValues, " ") == strings.Join(labels, " ") {
			value = m.Value
		}
	})
	return value
}

// TestBurstOfTokens has 200 workloads ask for the same token when the agent has
// just started, and go on while its server is away.
func TestBurstOfTokens(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	_, _ = s.start()
	s.mustFetch()
	fetch := func(audience string) (*jwtsvid.SVID, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience}, workloadapi.WithAddr("unix://"+s.cfg.Socket))
	}
	got := make(chan string, 200)
	for range cap(got) {
		go func() {
			svid, err := fetch("db")
			if err != nil {
				got <- err.Error()
				return
			}
			got <- svid.Marshal()
		}()
	}
	first := <-got
	for range cap(got) - 1 {
		if other := <-got; other != first {
			t.Fatalf("some got %.60s, others %.60s", first, other)
		}
	}
	if n := s.counter("narthex_tokens_signed_total", "jwt", "ok"); n != 1 {
		t.Errorf("%v calls to the server", n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+s.cfg.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := jwtsvid.ParseAndValidate(first, source, []string{"db"})
	if err != nil || svid.ID != spiffeid.RequireFromPath(td, "/orders") {
		t.Fatalf("a token of %v: %v", svid, err)
	}

	s.stop()
	if svid, err := fetch("db"); err != nil || svid.Marshal() != first {
		t.Errorf("while the server is away: %v", err)
	}
	if _, err := fetch("queue"); err == nil || !strings.Contains(err.Error(), "Unavailable") || !strings.Contains(err.Error(), s.cfg.Server) {
		t.Errorf("for another audience: %v", err)
	}
	if n := s.counter("narthex_tokens_signed_total", "jwt", "error"); n < 1 {
		t.Errorf("%v calls to the server failed", n)
	}
}

// TestTokenOfAnotherEntry: what is kept goes with its entry.
func TestTokenOfAnotherEntry(t *testing.T) {
	s := newStage(t, entry("/orders", time.Hour))
	_, _ = s.start()
	fetch := func() (*jwtsvid.SVID, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db"}, workloadapi.WithAddr("unix://"+s.cfg.Socket))
	}
	eventually(t, "a token", func() bool { _, err := fetch(); return err == nil })
	if err := s.server.SetEntries([]devserver.Entry{entry("/billing", time.Hour)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one of the other entry", func() bool {
		svid, err := fetch()
		return err == nil && svid.ID.Path() == "/billing"
	})
	eventually(t, "the old one is dropped", func() bool { return s.counter("narthex_tokens_cached") == 1 })
	if err := s.server.SetEntries(nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing", func() bool {
		_, err := fetch()
		return err != nil && strings.Contains(err.Error(), "PermissionDenied")
	})
	eventually(t, "nothing is kept", func() bool { return s.counter("narthex_tokens_cached") == 0 })
}
