package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// NotReady is what probes are told: nil once callers can be answered, which
// takes more than Unready: at least one attestor has been able to attest since
// the start. Where each needs something that it lacks, nobody could be. Later
// failures are for Status and for the callers that they meet; what workloads
// have is served on.
func (a *Agent) NotReady() error {
	if err := a.Unready(); err != nil {
		return err
	}
	return a.cannotAttest()
}

// cannotAttest returns why none of the attestors has been able to attest yet.
func (a *Agent) cannotAttest() error {
	if a.attests.Load() {
		return nil
	}
	var problems []error
	for _, w := range a.cfg.WorkloadAttestors {
		d, ok := w.(attestor.Dependent)
		if !ok {
			problems = nil // it needs the kernel only
			break
		}
		err := d.Problem()
		if err == nil {
			problems = nil
			break
		}
		problems = append(problems, attestorError(w, err))
	}
	if len(problems) > 0 {
		return errors.Join(problems...)
	}
	a.attests.Store(true)
	return nil
}

// checkAttestors returns what any of the attestors lacks: an agent is not
// replaced by one that can do less. It is not called while Run runs.
func (a *Agent) checkAttestors(ctx context.Context) error {
	for _, w := range a.cfg.WorkloadAttestors {
		d, ok := w.(attestor.Dependent)
		if !ok {
			continue
		}
		if err := d.Check(ctx); err != nil {
			return attestorError(w, err)
		}
	}
	return nil
}

func attestorError(w attestor.Workload, err error) error {
	return fmt.Errorf("workload attestor %s: %w", w.Type(), err)
}

// attestorsStatus tells of each attestor whether it can do its work.
func (a *Agent) attestorsStatus() []telemetry.AttestorStatus {
	out := make([]telemetry.AttestorStatus, len(a.cfg.WorkloadAttestors))
	for i, w := range a.cfg.WorkloadAttestors {
		out[i].Type = w.Type()
		d, ok := w.(attestor.Dependent)
		if !ok {
			continue
		}
		if err := d.Problem(); err != nil {
			out[i].Problem = err.Error()
		}
	}
	return out
}
