package agent_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// away is an attestor that needs what is not there until it is well.
type away struct{ well atomic.Bool }

func (*away) Type() string { return "away" }

func (w *away) Attest(context.Context, *attestor.Process) ([]attestor.Selector, error) {
	return nil, w.Problem()
}

func (w *away) Check(context.Context) error { return w.Problem() }

func (w *away) Problem() error {
	if w.well.Load() {
		return nil
	}
	return errors.New("403 Forbidden")
}

// An agent that can attest nobody is not ready, and becomes so by itself.
func TestNotReadyWithoutAttestors(t *testing.T) {
	for name, test := range map[string]struct {
		others []attestor.Workload
		ready  bool
	}{
		"the only one":       {nil, false},
		"one beside another": {[]attestor.Workload{attestor.NewUnix(attestor.UnixConfig{})}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, entry("/web", time.Hour))
			w := &away{}
			s.cfg.WorkloadAttestors = append([]attestor.Workload{w}, test.others...)
			a, _ := s.start()
			eventually(t, "the first sync", func() bool { return a.Unready() == nil })
			err := a.NotReady()
			if (err == nil) != test.ready || err != nil && err.Error() != "workload attestor away: 403 Forbidden" {
				t.Errorf("not ready: %v", err)
			}
			if got := a.Status().Attestors; len(got) != 1+len(test.others) || got[0].Type != "away" || got[0].Problem != "403 Forbidden" {
				t.Errorf("status %+v", got)
			}
			w.well.Store(true)
			if err := a.NotReady(); err != nil {
				t.Errorf("has not healed: %v", err)
			}
			w.well.Store(false) // what workloads have is served on
			if err := a.NotReady(); err != nil || a.Status().Attestors[0].Problem == "" {
				t.Errorf("later it is %v, status %+v", err, a.Status().Attestors)
			}
		})
	}
}

// One that can attest less than the agent that runs does not take its place.
func TestSuccessorWithoutAttestor(t *testing.T) {
	s := newStage(t, entry("/web", time.Hour))
	a := s.mustNew()
	s.runs(a)
	s.mustFetch()
	w := &away{}
	s.cfg.WorkloadAttestors = append(s.cfg.WorkloadAttestors, w)
	next := s.succeeds(a)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := next.CouldBegin(ctx); err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		t.Errorf("could begin: %v", err)
	}
	if err := next.Unready(); err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		t.Errorf("probes are told %v", err)
	}
	w.well.Store(true)
	if err := next.CouldBegin(t.Context()); err != nil {
		t.Errorf("could not begin: %v", err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
}
