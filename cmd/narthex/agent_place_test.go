package main

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// runningAgent is asked for its place, and notes what it hears.
type runningAgent struct {
	offers []handover.Socket
	begun  chan bool
}

func (r *runningAgent) Offer() ([]handover.Socket, error)            { return r.offers, nil }
func (*runningAgent) Keep()                                          {}
func (*runningAgent) LetGo(context.Context, []handover.Socket) error { return nil }
func (*runningAgent) Give([]handover.Socket)                         {}
func (r *runningAgent) Begun(ok bool) (goesOn bool)                  { r.begun <- ok; return !ok }
func (*runningAgent) Live() map[string]int                           { return nil }

// TestBegunOnlyWhenItServes: an agent whose server went away after it took over
// leaves the place to the one before it, if that one could serve.
func TestBegunOnlyWhenItServes(t *testing.T) {
	for name, served := range map[string]bool{"the one before it served": true, "nor could the one before it": false} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			api, err := net.Listen("unix", filepath.Join(dir, "old.sock"))
			if err != nil {
				t.Fatal(err)
			}
			defer api.Close()
			before := &runningAgent{begun: make(chan bool, 1), offers: []handover.Socket{{
				Kind: handover.Listener, Bind: "old.sock", Serving: served, Listener: api,
			}}}
			path := filepath.Join(dir, handoverSocketName)
			control, err := handover.Listen(path)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				_, err := handover.Serve(ctx, handover.Config{Listener: control, Path: path, Giver: before})
				done <- err
			}()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}()
			a, err := agent.New(agent.Config{ // that has synced with nobody
				TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"), DataDir: filepath.Join(dir, "data"), Server: "127.0.0.1:1",
				Node: attestor.JoinToken{Token: "t"}, WorkloadAttestors: []attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})},
				Socket: filepath.Join(dir, "new.sock"), Metrics: telemetry.NewMetrics(), Log: hclog.NewNullLogger(),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			p := &agentPlace{log: hclog.NewNullLogger(), settled: time.Now().Add(50 * time.Millisecond)}
			if p.from, err = handover.Ask(t.Context(), path, "new"); err != nil {
				t.Fatal(err)
			}
			if err := p.from.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			err = p.begun(t.Context(), a)
			if (err != nil) != served || err != nil && !strings.Contains(err.Error(), "the agent before this one goes on: the agent is starting") {
				t.Errorf("begun: %v", err)
			}
			p.end()
			if said := <-before.begun; said == served {
				t.Errorf("the one before it heard that this one has begun: %t", said)
			}
		})
	}
}
