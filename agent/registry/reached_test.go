package registry

import (
	"testing"
	"time"
)

// Plans are kept by the clock and by the time that passes, whichever is sooner.
func TestReached(t *testing.T) {
	t.Parallel()
	now := time.Now() // has the monotonic clock
	if now.String() == now.Round(0).String() {
		t.Fatal("it has not")
	}
	// set returns now on a host whose clock is set by d, and no time passes.
	set := func(d time.Duration) (planned, later time.Time) {
		wall := now.Round(0)
		return now.Add(time.Hour), wall.Add(d)
	}
	planned, ahead := set(2 * time.Hour)
	for name, test := range map[string]struct {
		at, now time.Time
		want    bool
	}{
		"not yet":               {planned, now, false},
		"time has passed":       {planned, now.Add(time.Hour), true},
		"the clock was set":     {planned, ahead, true},
		"a plan by the clock":   {planned.Round(0), now.Add(time.Hour), true},
		"a plan to come by it":  {planned.Round(0), now.Add(time.Minute), false},
		"at once":               {time.Time{}, now, true},
		"by the clock, not yet": {planned, now.Round(0).Add(time.Minute), false},
	} {
		if got := Reached(test.at, test.now); got != test.want {
			t.Errorf("%s: got %t", name, got)
		}
	}
}
