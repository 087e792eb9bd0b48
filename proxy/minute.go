package proxy

import (
	"context"
	"time"
)

// This file is about rules that depend on the time: they change without
// anybody changing them.

// eachMinute calls do at the beginning of each minute of the wall clock until
// ctx ends. It looks at the clock anew each time, which may have been set
// meanwhile.
func eachMinute(ctx context.Context, do func()) {
	timer := time.NewTimer(untilMinute(time.Now()))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		do()
		timer.Reset(untilMinute(time.Now()))
	}
}

// untilMinute returns how long it is until the next minute begins.
func untilMinute(now time.Time) time.Duration {
	now = now.Round(0) // by the wall clock
	return now.Truncate(time.Minute).Add(time.Minute).Sub(now)
}

// askForTime asks every live connection again where the policy in force
// answers by the time.
func (p *Proxy) askForTime() {
	rules := p.world.Load().policy
	if rules == nil || !rules.TimeDependent() {
		return
	}
	n := p.ask(p.table.of(nil))
	if n.closed > 0 {
		p.log.Info("time rules: connections are not allowed any more", "connections_asked", n.all, "connections_refused", n.refused, "connections_closed", n.closed)
	}
}
