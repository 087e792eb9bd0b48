package agent

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestTurn has another agent want the turn while the loop makes calls.
func TestTurn(t *testing.T) {
	for _, tt := range []struct {
		name          string
		interruptible bool
		takes         time.Duration // the call
		within        time.Duration // of who wants the turn
		want          time.Duration // until it has it; 0: it does not get it
	}{
		{"a short call ends by itself", true, patience / 2, time.Second, patience / 2},
		{"a long one is cut off", true, time.Hour, time.Second, patience},
		{"an attestation is waited for", false, 3 * time.Second, 20 * time.Second, 3 * time.Second},
		{"but not for ever", false, time.Hour, 20 * time.Second, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := turn{token: make(chan struct{}, 1)}
				if !l.begin(t.Context()) {
					t.Fatal("no turn")
				}
				ctx, done := t.Context(), func() {}
				if tt.interruptible {
					ctx, done = l.interruptible(ctx)
				}
				over := make(chan struct{})
				go func() {
					defer close(over)
					select {
					case <-ctx.Done():
					case <-time.After(tt.takes):
					}
					done()
					l.end()
				}()
				started := time.Now()
				within, cancel := context.WithTimeout(t.Context(), tt.within)
				defer cancel()
				err := l.seize(within)
				if took := time.Since(started); (err == nil) != (tt.want > 0) || err == nil && took != tt.want {
					t.Errorf("after %s: %v", took, err)
				}
				<-over
			})
		})
	}
}
