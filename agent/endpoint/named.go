package endpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// This file is about processes and objects that somebody else names: nobody hangs
// up when they end.

// during runs f beside holds. Whichever returns first ends the other's context.
// What holds returns counts, unless it ended because f did.
func during(ctx context.Context, holds, f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		defer cancel()
		ended <- holds(ctx)
	}()
	err := f(ctx)
	cancel()
	if end := <-ended; !errors.Is(end, context.Canceled) {
		return end
	}
	return err
}

// lookAgain is how often a process that was named by PID is looked at: its end is
// known at once, that it executes another program is not.
const lookAgain = 5 * time.Second

// untilGone returns once the subject is not the process any more that it was, or
// else the error of ctx.
func (c *caller) untilGone(ctx context.Context) error {
	for {
		wait, cancel := context.WithTimeout(ctx, lookAgain)
		err := c.subject.process.AwaitExit(wait)
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && !errors.Is(err, context.DeadlineExceeded):
			return status.Error(codes.Unavailable, err.Error())
		}
		if err := c.subject.process.Alive(); err != nil {
			return c.gone(err)
		}
	}
}

// isGone tells whether an attestation failed because there is nothing to attest.
func isGone(err error) bool {
	return errors.Is(err, attestor.ErrProcessGone) || errors.Is(err, attestor.ErrNoObject)
}

func knows(by attestor.Objects, o *attestor.Object) bool { return by.Knows(o.Plural, o.Group) }

// attestObject asks the attestor that knows objects of that type. The UID that the
// object turns out to have is o's from then on: another one of its name is another
// object.
func (s *Server) attestObject(ctx context.Context, o *attestor.Object, observe func(attestor.Outcome)) ([]attestor.Selector, error) {
	for _, by := range s.objects {
		if !knows(by, o) {
			continue
		}
		began := time.Now()
		uid, selectors, err := by.AttestObject(ctx, *o)
		if errors.Is(err, attestor.ErrNoObject) {
			return nil, err
		}
		observe(attestor.Outcome{Type: by.Type(), Duration: time.Since(began), Selectors: len(selectors), Err: err})
		if err != nil {
			return nil, fmt.Errorf("attest %s: %w: %s: %w", o, attestor.ErrAttestation, by.Type(), err)
		}
		if o.UID == "" {
			o.UID = uid
		}
		return selectors, nil
	}
	return nil, fmt.Errorf("attest %s: %w: no attestor of this agent knows such objects", o, attestor.ErrAttestation)
}

// hidden tells whether others are not given the identity: of those, one who has
// it administers the server, or is one.
func hidden(e *registry.Entry) bool { return e.Admin || e.Downstream }
