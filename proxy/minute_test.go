package proxy

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestUntilMinute(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 0, 0, time.FixedZone("+05:30", 19800))
	for past, want := range map[time.Duration]time.Duration{
		0: time.Minute, time.Nanosecond: time.Minute - time.Nanosecond, 59 * time.Second: time.Second, time.Minute: time.Minute,
	} {
		if got := untilMinute(at.Add(past)); got != want {
			t.Errorf("%s into the minute it is %s to the next, want %s", past, got, want)
		}
	}
}

// TestEachMinute: aligned to the wall clock, also where the work takes long.
func TestEachMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(17 * time.Second) // of the bubble's clock, which begins on the minute
		ctx, cancel := context.WithCancel(t.Context())
		var at []string
		done := make(chan struct{})
		go func() {
			defer close(done)
			eachMinute(ctx, func() {
				at = append(at, time.Now().UTC().Format(time.TimeOnly))
				if len(at) == 2 {
					time.Sleep(90 * time.Second)
				}
			})
		}()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		cancel()
		<-done
		if want := []string{"00:01:00", "00:02:00", "00:04:00", "00:05:00"}; !slices.Equal(at, want) {
			t.Errorf("called at %v, want %v", at, want)
		}
	})
}
