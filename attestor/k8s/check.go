package k8s

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/narthex-id/narthex/attestor"
)

// errNotAsked is the problem until the first request.
var errNotAsked = errors.New("the kubelet has not been asked yet")

// Check implements attestor.Dependent: it looks whether the processes of other
// pods can be seen, and makes one request to the kubelet, whose answer Attest
// uses for as long as it is not too old.
func (a *Attestor) Check(ctx context.Context) error {
	if err := a.seesNode(); err != nil {
		return err
	}
	a.source.request(ctx)
	return a.Problem()
}

// Problem implements attestor.Dependent. While Run runs and there is one, the
// kubelet is asked again, at least twice a minute, also when nobody calls.
func (a *Attestor) Problem() error {
	if err := a.seesNode(); err != nil {
		return err
	}
	return a.source.problem()
}

// seesNode fails where process 1 is of a pod: then the PID namespace is a pod's
// own, and no caller of another one could be told. What cannot be read says
// nothing here; if that is in the way of attesting, callers are told.
func (a *Attestor) seesNode() error {
	const advice = "give the agent's pod hostPID: true"
	if os.Getpid() == 1 {
		return fmt.Errorf("%w: the agent is process 1 of its own, and cannot see who calls from other pods; %s", attestor.ErrPIDNamespace, advice)
	}
	a.mu.Lock()
	first, err := a.readFirst()
	a.mu.Unlock()
	if errors.Is(err, attestor.ErrPIDNamespace) {
		return err
	}
	own, ownErr := a.ownPlace()
	if err != nil || ownErr != nil {
		return nil //nolint:nilerr // see above
	}
	if at, err := placeOf(first, own); err == nil && at != (place{}) {
		return fmt.Errorf("%w: process 1 is in a container of a pod, so the agent cannot see who calls from other pods; %s", attestor.ErrPIDNamespace, advice)
	}
	return nil
}

// problem is what the last request failed with.
func (s *source) problem() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newest == nil && s.err == nil {
		return errNotAsked
	}
	return s.err
}
