package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// turn says who may speak to the server: the loop while it does what is due, or
// nobody while the agent lets go of its place.
type turn struct {
	token chan struct{} // of one: whoever put it there has the turn

	mu  sync.Mutex         // guards the following
	cut context.CancelFunc // ends the calls of the loop's turn that may be cut off; nil: there are none
}

// patience is how long calls that may be cut off have to end by themselves: who
// waits for them is answered by this agent still.
const patience = 500 * time.Millisecond

// errInterrupted is of a turn that was cut short.
var errInterrupted = errors.New("the agent lets go of its place")

// begin takes the turn. It returns false, without it, where ctx ends before.
func (t *turn) begin(ctx context.Context) bool {
	if ctx.Err() != nil {
		return false
	}
	select {
	case t.token <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (t *turn) end() { <-t.token }

// interruptible returns a context for calls that may be cut off in favour of
// who wants the turn. The caller ends it with done.
func (t *turn) interruptible(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancel(ctx)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cut = cancel
	return ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.cut = nil
		cancel()
	}
}

// seize takes the turn: at once from a loop that sleeps, else when the calls of
// its turn have ended, or have been cut off where they may be.
func (t *turn) seize(ctx context.Context) error {
	late := time.NewTicker(patience)
	defer late.Stop()
	for {
		select {
		case t.token <- struct{}{}:
			return nil
		case <-late.C:
			t.mu.Lock()
			if t.cut != nil {
				t.cut()
			}
			t.mu.Unlock()
		case <-ctx.Done():
			return fmt.Errorf("the agent is attesting, which must not be cut off: try again later: %w", ctx.Err())
		}
	}
}
