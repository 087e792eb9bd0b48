package endpoint

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
)

// This file is about processes that somebody else names: nobody hangs up when
// they end.

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

// hidden tells whether others are not given the identity: of those, one who has
// it administers the server, or is one.
func hidden(e *registry.Entry) bool { return e.Admin || e.Downstream }
