package agent

import (
	"errors"
	"hash/maphash"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// An entry is often made about when its workload starts. So a caller to which
// none matches has the server asked at once, and after a denial each second
// for a while: the entry is of use as soon as the server shows it. The
// Workload API is open to every local user, so that all syncs beyond those of
// the interval come out of one bucket, of which no user has more than a share.
const (
	// chaseFor and chasePause are for how long, and how often, the server is
	// asked after a denial. A caller is held for a second (endpoint), so that one
	// that calls again hears of the next answer.
	chaseFor, chasePause = 10 * time.Second, 800 * time.Millisecond
	// extraSyncs is how many syncs there may be at once beside those of the
	// interval; another one comes with each interval. So in the long run
	// callers make the agent ask the server twice as often as it does anyway.
	extraSyncs = 30
	// sharedSyncs is how many of them one user may have made, a pod's, say, or a
	// uid's. One comes back to the user with every other interval: whoever takes
	// each as soon as it comes leaves every second one to others.
	sharedSyncs = 20
	// rememberDenial is for how long a caller's selectors are known to have been
	// denied, since they last were: until then they have nobody asked.
	rememberDenial = 10 * time.Minute
	// settleFor is for how long after an attestation a server may have no entries
	// for the node because it has not read them yet, or not that the node has
	// attested and which selectors it has: SPIRE Server looks into its database
	// each 5 s (cache_reload_interval), or a while later when it is busy.
	settleFor = 10 * time.Second
	// maxDenied bounds the sets of selectors that are remembered. Further ones
	// have nobody asked.
	maxDenied = 4096
)

// errUnsettled is why nobody knows yet whether there is an entry for a caller.
var errUnsettled = errors.New("it has no entry at all yet for this node, which attested a moment ago")

// unsettled returns errUnsettled while that is so.
func (a *Agent) unsettled(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.view.settled(now) {
		return nil
	}
	return errUnsettled
}

// settled reports whether a server that shows no entry has none.
func (v *view) settled(now time.Time) bool {
	return v.entries > 0 || now.Sub(v.attested) >= settleFor
}

// chase is what callers without an entry make the agent ask the server. The
// Agent's mutex guards it.
type chase struct {
	all     extra
	shares  map[string]*share    // by who asks; those with nothing spent may be missing
	denied  map[uint64]time.Time // by hash of the selectors: when last
	sweepAt time.Time
}

// share is what one user has made the agent ask.
type share struct {
	extra
	until time.Time // the server is asked each chasePause
}

// extra counts the extra syncs that did not come back yet, as of counted.
type extra struct {
	spent   float64
	counted time.Time
}

// refill has one come back in each interval.
func (e *extra) refill(now time.Time, interval time.Duration) {
	e.spent = max(0, e.spent-now.Sub(e.counted).Seconds()/interval.Seconds())
	e.counted = now
}

// on reports whether the server is asked each chasePause.
func (c *chase) on(now time.Time) bool {
	for _, s := range c.shares {
		if now.Before(s.until) {
			return true
		}
	}
	return false
}

// take takes an extra sync for a user, if there is one.
func (c *chase) take(user string, now time.Time, interval time.Duration) bool {
	c.all.refill(now, interval)
	s := c.shareOf(user, now, interval)
	if c.all.spent+1 > extraSyncs || s.spent+1 > sharedSyncs {
		return false
	}
	c.all.spent++
	s.spent++
	return true
}

// shareOf returns the share of a user, up to date. Since each that is kept has
// taken of what there is for all, there are never many.
func (c *chase) shareOf(user string, now time.Time, interval time.Duration) *share {
	s := c.shares[user]
	if s == nil {
		if c.shares == nil {
			c.shares = map[string]*share{}
		}
		for other, o := range c.shares {
			if o.refill(now, 2*interval); o.spent == 0 && !now.Before(o.until) {
				delete(c.shares, other)
			}
		}
		s = &share{}
		c.shares[user] = s
	}
	s.refill(now, 2*interval)
	return s
}

// goOn takes the next of the syncs that are made each chasePause, at a time when
// that is still wanted, for one of the users it is made for. Who has none left
// shall not wait for it.
func (c *chase) goOn(at, now time.Time, interval time.Duration) bool {
	for user, s := range c.shares {
		if !at.Before(s.until) {
			continue
		}
		if c.take(user, now, interval) {
			return true
		}
		s.until = time.Time{}
	}
	return false
}

// known reports whether a caller with these selectors was denied lately, which
// counts anew from now on, or cannot be remembered.
func (c *chase) known(key uint64, now time.Time) bool {
	if _, there := c.denied[key]; there {
		known := now.Sub(c.denied[key]) < rememberDenial
		c.denied[key] = now
		return known
	}
	if len(c.denied) >= maxDenied && now.After(c.sweepAt) {
		for key, last := range c.denied {
			if now.Sub(last) >= rememberDenial {
				delete(c.denied, key)
			}
		}
		c.sweepAt = now.Add(rememberDenial / 10)
	}
	return len(c.denied) >= maxDenied
}

// deny remembers a user's denial that a sync did not change, and begins to ask the
// server each chasePause.
func (c *chase) deny(user string, key uint64, now time.Time, interval time.Duration) {
	if c.denied == nil {
		c.denied = map[uint64]time.Time{}
	}
	if len(c.denied) < maxDenied {
		c.denied[key] = now
	}
	c.pursue(user, now, interval)
}

// pursue has the server asked each chasePause for a while.
func (c *chase) pursue(user string, now time.Time, interval time.Duration) {
	c.shareOf(user, now, interval).until = now.Add(chaseFor)
}

var selectorsSeed = maphash.MakeSeed()

// selectorsKey is one number for one set of selectors, sorted as the registry
// gives them.
func selectorsKey(selectors []attestor.Selector) uint64 {
	var h maphash.Hash
	h.SetSeed(selectorsSeed)
	for _, s := range selectors {
		_, _ = h.WriteString(s.Type)
		_ = h.WriteByte(0)
		_, _ = h.WriteString(s.Value)
		_ = h.WriteByte(0)
	}
	return h.Sum64()
}
