package agent

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/bootstrap"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// newLooper returns a loop that has a directory, an empty registry and a server
// that is not there.
func newLooper(t *testing.T, cfg Config) *looper {
	t.Helper()
	dir, err := openDataDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("example.test")
	if cfg.Node == nil {
		cfg.Node = attestor.JoinToken{}
	}
	client, err := spire.New(spire.Config{Address: "127.0.0.1:1", TrustDomain: cfg.TrustDomain})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return &looper{Agent: &Agent{
		cfg: cfg, dir: dir, log: hclog.NewNullLogger(), client: client,
		registry: registry.New(registry.Options{TrustDomain: cfg.TrustDomain}), metrics: newMetrics(telemetry.NewMetrics()),
		tokens: newTokens(1, hclog.NewNullLogger(), newMetrics(nil).tokens, nil),
	}}
}

var errStrange = fmt.Errorf("sync entries: %w", spire.ErrUnknownAuthority)

func TestStrangeServer(t *testing.T) {
	t.Parallel()
	missing, err := bootstrap.New(bootstrap.Config{File: filepath.Join(t.TempDir(), "missing")})
	if err != nil {
		t.Fatal(err)
	}
	minutes := func(n int) time.Time { return time.Now().Add(time.Duration(n) * time.Minute).UTC() }
	saved := [][]byte{selfSigned(t).Raw}
	for name, test := range map[string]struct {
		mode   string
		state  state
		err    error
		say    string // in the error
		starts bool   // strange after it
	}{
		"never":                        {"never", state{Bundle: saved}, errStrange, "signed by an authority", false},
		"no bundle to be strange to":   {"auto", state{}, errStrange, "signed by an authority", false},
		"a bad answer":                 {"auto", state{Bundle: saved}, fmt.Errorf("%w: %w", spire.ErrBadAnswer, errStrange), "unexpected answer", false},
		"the first time":               {"auto", state{Bundle: saved}, errStrange, "the agent bootstraps again at", true},
		"always, too":                  {"always", state{Bundle: saved}, errStrange, "the agent bootstraps again at", true},
		"before the delay":             {"auto", state{Bundle: saved, Strange: minutes(-9)}, errStrange, "the agent bootstraps again at", true},
		"a clock that was set back":    {"auto", state{Bundle: saved, Strange: minutes(60)}, errStrange, "the agent bootstraps again at", true},
		"after the delay":              {"auto", state{Bundle: saved, Strange: minutes(-11)}, errStrange, "read the bootstrap bundle", true},
		"the server is away meanwhile": {"auto", state{Bundle: saved, Strange: minutes(-11)}, spire.ErrUnreachable, "unreachable", true},
		"the server is back":           {"auto", state{Bundle: saved, Strange: minutes(-11)}, nil, "", false},
		"it is back and refuses":       {"auto", state{Bundle: saved, Strange: minutes(-11)}, &spire.DeniedError{}, "denied", false},
		"a node that attests once":     {"auto", state{Bundle: saved, SVID: saved}, errStrange, "signed by an authority", false},
		"a node that attests again":    {"auto", state{Bundle: saved, SVID: saved, Reattestable: true}, errStrange, "bootstraps again", true},
	} {
		l := newLooper(t, Config{Rebootstrap: Rebootstrap{Mode: test.mode, Delay: 10 * time.Minute}, Bootstrap: missing})
		l.self.state = test.state
		l.self.state.TrustDomain = l.cfg.TrustDomain.Name()
		if err := l.dir.store(l.self.state); err != nil {
			t.Fatal(err)
		}
		err := l.recognised(t.Context(), test.err)
		if (err == nil) != (test.say == "") || err != nil && !strings.Contains(err.Error(), test.say) {
			t.Errorf("%s: %v, want %q", name, err, test.say)
		}
		// A restart must not begin the delay anew.
		if kept, err := l.dir.load("example.test"); err != nil || !kept.Strange.Equal(l.self.state.Strange) || kept.Strange.IsZero() == test.starts {
			t.Errorf("%s: strange since %v, on disk %v (%v)", name, l.self.state.Strange, kept.Strange, err)
		}
		if until := l.notBefore(minutes(600)); !l.self.state.Strange.IsZero() && l.strangeUntil().After(time.Now()) && !until.Equal(l.strangeUntil()) {
			t.Errorf("%s: tries again at %s, and may bootstrap at %s", name, until, l.strangeUntil())
		}
	}
}

func TestNodeThatAttestsOnce(t *testing.T) {
	t.Parallel()
	saved := [][]byte{selfSigned(t).Raw}
	for mode, want := range map[string]error{"never": nil, "auto": nil, "always": errAttestsOnce} {
		l := newLooper(t, Config{Rebootstrap: Rebootstrap{Mode: mode}})
		var said strings.Builder
		l.log = hclog.New(&hclog.LoggerOptions{Output: &said})
		l.self.state = state{SVID: saved}
		for range 2 {
			if err := l.checkReattestable(); !errors.Is(err, want) || want == nil && err != nil {
				t.Errorf("%s: %v, want %v", mode, err, want)
			}
		}
		if n := strings.Count(said.String(), "rebootstrap is off"); (n == 1) != (mode == "auto") || n > 1 {
			t.Errorf("%s: it says\n%s", mode, &said)
		}
		l.self.state.Reattestable = true
		if err := l.checkReattestable(); err != nil {
			t.Errorf("%s, and it can attest again: %v", mode, err)
		}
	}
}

// What the server before has signed is as good as tainted: workloads get it
// signed anew first of all.
func TestAbandonedAuthorities(t *testing.T) {
	t.Parallel()
	both, gone := authorityOf(t, 1), authorityOf(t, 2)
	l := newLooper(t, Config{})
	l.self.state.Bundle = [][]byte{both.Raw}
	own := &registry.Bundle{Tainted: []string{"aa"}}
	if l.withAbandoned(own) != own {
		t.Error("a bundle is changed where nothing was abandoned")
	}
	l.abandon([][]byte{both.Raw, gone.Raw})
	if got := l.withAbandoned(own).Tainted; len(got) != 2 || got[0] != "aa" || got[1] != "02" || len(own.Tainted) != 1 {
		t.Errorf("tainted: %v", got)
	}
}
