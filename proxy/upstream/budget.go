package upstream

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// Budget bounds the retries of a group, so that many requests which fail do not
// become many times as many: a share of the requests of about the last ten
// seconds (Settings.RetryPercent), and three a second, which are for groups with
// few requests. Its methods may be called by many at once.
type Budget struct {
	set      *Set
	share    float64 // of a retry that each request allows
	retries  *telemetry.Counter
	requests atomic.Uint64
	account  atomic.Pointer[account]
}

const (
	// budgetTime is how long what a request allows is worth something: it
	// fades with this time constant.
	budgetTime = 10 * time.Second
	// budgetRate is how many retries a second are always allowed, so that at
	// most budgetRate × budgetTime come at once.
	budgetRate = 3
)

// account is what a budget has at a time.
type account struct {
	at       int64 // Set.clock
	requests uint64
	allows   float64 // retries
}

func (b *Budget) init(s *Set, percent int, retries *telemetry.Counter) {
	b.set, b.share, b.retries = s, float64(max(percent, 0))/100, retries
	b.account.Store(&account{at: s.clock(), allows: b.most()})
	if percent < 0 {
		b.account.Store(nil)
	}
}

// most is what is allowed at once where there were no requests.
func (b *Budget) most() float64 { return budgetRate * budgetTime.Seconds() }

// Request counts a request, which is no retry. It costs one addition: the time
// is seen to when there is something to retry.
func (b *Budget) Request() { b.requests.Add(1) }

// TakeRetry reports whether a request may be sent once more, and counts it.
func (b *Budget) TakeRetry() bool {
	for {
		was := b.account.Load()
		if was == nil {
			return false
		}
		next := was.later(max(b.set.clock(), was.at), b.requests.Load(), b.share)
		if next.allows < 1 {
			return false // was goes on: what it has earned is still counted from there
		}
		next.allows--
		if b.account.CompareAndSwap(was, &next) {
			b.retries.Inc()
			return true
		}
	}
}

// later returns the account at a later time, when there had been that many
// requests. Those between came evenly, as far as we know.
func (a *account) later(now int64, requests uint64, share float64) account {
	elapsed := float64(now-a.at) / float64(budgetTime)
	faded := 1.0 // what is left, on average, of what was earned between
	if elapsed > 0 {
		faded = -math.Expm1(-elapsed) / elapsed
	}
	var came uint64
	if requests > a.requests { // else another one has seen more of them
		came = requests - a.requests
	}
	earned := share*float64(came) + budgetRate*budgetTime.Seconds()*elapsed
	return account{at: now, requests: max(requests, a.requests), allows: a.allows*math.Exp(-elapsed) + earned*faded}
}
