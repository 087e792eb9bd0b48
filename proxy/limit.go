package proxy

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"math"
	"strconv"
	"sync"
	"time"

	"github.com/narthex-id/narthex/proxy/policy"
)

// This file keeps what was spent of the limits that a policy sets. The policy
// says which of them are for a connection, limiter whether they have room.

const (
	maxBuckets  = 65_536                 // of one limit: how many are counted apart
	shardsEach  = 16                     // of a limit, so that those it is for do not wait for each other
	sweepPause  = 100 * time.Millisecond // between two looks for idle buckets in a shard that has no room
	tokenNearly = 1e-9                   // of a token, which floating point may lose
)

// limiter counts, for each limit and whoever has a share of it, the live
// connections and how much of the rate is spent. What it knows is kept under
// the limit's id, so that a new policy finds it; the figures of the limit are
// those of the policy that asks.
type limiter struct {
	began   time.Time
	now     func() time.Time // monotonic
	most    int              // buckets a shard
	seed    [16]byte         // nobody can choose names that fall into one shard
	tallies sync.Map         // of *tally, by the limit's id
}

func newLimiter(now func() time.Time) *limiter {
	m := &limiter{began: now(), now: now, most: maxBuckets / shardsEach}
	_, _ = rand.Read(m.seed[:]) // never fails (crypto/rand)
	return m
}

// holder is who has a bucket: a hash, because an ID may have 2 KiB. The zero
// holder is all whom a limit is for.
type holder [16]byte

// tally is what one limit counts.
type tally struct {
	id     string
	shards [shardsEach]shard
}

// shard is the part of a tally that one lock guards.
type shard struct {
	mu      sync.Mutex // guards the following
	gone    bool       // the limiter has forgotten the tally
	rate    float64    // tokens a second, as the limit last had it
	swept   time.Duration
	buckets map[holder]bucket
	rest    bucket // of those that have none of their own
}

// bucket is one share of a limit. The zero bucket is one that nobody has used
// for a while.
type bucket struct {
	spent float64       // tokens that have not come back yet
	at    time.Duration // when that was so, since the limiter began
	live  int
}

func (b *bucket) refill(rate float64, now time.Duration) {
	if rate <= 0 {
		b.spent = 0
	}
	if past := now - b.at; past > 0 {
		b.spent = max(0, b.spent-past.Seconds()*rate)
	}
	b.at = now
}

func (b *bucket) idle() bool { return b.live == 0 && b.spent == 0 }

// stake is the bucket in which a connection is counted.
type stake struct {
	tally *tally
	who   holder
	rest  bool
}

func (p stake) shard() *shard { return &p.tally.shards[p.who[0]%shardsEach] }

func (p stake) load() bucket {
	if p.rest {
		return p.shard().rest
	}
	return p.shard().buckets[p.who]
}

// store keeps b, and forgets it where it says nothing.
func (p stake) store(b bucket) {
	s := p.shard()
	switch {
	case p.rest:
		s.rest = b
	case b.idle():
		delete(s.buckets, p.who)
	default:
		if s.buckets == nil {
			s.buckets = make(map[holder]bucket)
		}
		s.buckets[p.who] = b
	}
}

// excess is a limit that has no room, and whether it was that of those who
// have no bucket of their own.
type excess struct {
	limit *policy.Limit
	rest  bool
	live  bool // of live connections; else of new ones a second

	requests bool // of requests a second
}

// counts is what take counts: a connection under a limit's rate and as a live
// one, or, with HTTP, a client as a live connection and each of its requests
// under the rate.
type counts struct{ rate, live bool }

var (
	aConnection = counts{rate: true, live: true}
	aClient     = counts{live: true}
	aRequest    = counts{rate: true}
)

// take counts a new connection of w under all the limits, which are in the
// order of their ids, or under none where one of them has no room. It returns
// the stakes in which it stays counted while it lives.
func (m *limiter) take(limits []*policy.Limit, w who, count counts) ([]stake, *excess) {
	if len(limits) == 0 {
		return nil, nil
	}
	now := m.now().Sub(m.began)
	stakes := m.lock(limits, w, now)
	defer unlock(stakes)
	buckets := make([]bucket, len(stakes))
	for i, limit := range limits {
		b := stakes[i].load()
		b.refill(limit.RPS, now)
		switch {
		case count.live && limit.Connections > 0 && b.live >= limit.Connections:
			return nil, &excess{limit: limit, rest: stakes[i].rest, live: true}
		case count.rate && limit.RPS > 0 && b.spent+1 > float64(max(1, limit.Burst))+tokenNearly:
			return nil, &excess{limit: limit, rest: stakes[i].rest, requests: !count.live}
		}
		buckets[i] = b
	}
	var held []stake
	for i, limit := range limits {
		if count.rate && limit.RPS > 0 {
			buckets[i].spent++
		}
		if count.live && limit.Connections > 0 {
			buckets[i].live++
			held = append(held, stakes[i])
		}
		stakes[i].store(buckets[i])
	}
	return held, nil
}

// move counts a connection that is counted in held under other limits from now
// on, whether they have room or not: it lives already, and spends no token.
func (m *limiter) move(held []stake, limits []*policy.Limit, w who) []stake {
	if len(held) == 0 && len(limits) == 0 {
		return nil
	}
	var next []stake
	for i, limit := range limits {
		if limit.Connections <= 0 {
			continue
		}
		if at, ok := find(held, limit.ID, m.holderOf(limit, w)); ok {
			next = append(next, at)
			continue
		}
		now := m.now().Sub(m.began)
		stakes := m.lock(limits[i:i+1], w, now)
		b := stakes[0].load()
		b.refill(limit.RPS, now)
		b.live++
		stakes[0].store(b)
		unlock(stakes)
		next = append(next, stakes[0])
	}
	for _, at := range held {
		if _, ok := find(next, at.tally.id, at.who); !ok {
			leave(at)
		}
	}
	return next
}

// find returns the stake under a limit.
func find(stakes []stake, id string, w holder) (stake, bool) {
	for _, at := range stakes {
		if at.tally.id == id && at.who == w {
			return at, true
		}
	}
	return stake{}, false
}

// leave takes a connection out of the stakes in which it was counted.
func leave(held ...stake) {
	for _, at := range held {
		s := at.shard()
		s.mu.Lock()
		b := at.load()
		b.live--
		at.store(b)
		s.mu.Unlock()
	}
}

// lock finds the bucket of w under each limit and locks what guards it. Limits
// are locked in the order of their ids, so that no two wait for each other.
func (m *limiter) lock(limits []*policy.Limit, w who, now time.Duration) []stake {
	stakes := make([]stake, 0, len(limits))
	for len(stakes) < len(limits) {
		limit := limits[len(stakes)]
		at := stake{tally: m.tally(limit.ID), who: m.holderOf(limit, w)}
		s := at.shard()
		s.mu.Lock()
		if s.gone { // forgotten since it was found
			s.mu.Unlock()
			continue
		}
		s.rate = limit.RPS
		at.rest = !s.room(at.who, m.most, now)
		stakes = append(stakes, at)
	}
	return stakes
}

func unlock(stakes []stake) {
	for _, at := range stakes {
		at.shard().mu.Unlock()
	}
}

func (m *limiter) tally(id string) *tally {
	if t, ok := m.tallies.Load(id); ok {
		return t.(*tally)
	}
	t, _ := m.tallies.LoadOrStore(id, &tally{id: id})
	return t.(*tally)
}

func (m *limiter) holderOf(limit *policy.Limit, w who) (h holder) {
	if limit.Per == policy.PerAll {
		return h
	}
	sum := sha256.Sum256(append(m.seed[:len(m.seed):len(m.seed)], w.String()...))
	copy(h[:], sum[:])
	return h
}

// room reports whether w has a bucket or may have one, with s.mu held. Where
// there are as many as may be, the idle ones go: a bucket made anew is as they
// are.
func (s *shard) room(w holder, most int, now time.Duration) bool {
	if _, ok := s.buckets[w]; ok || len(s.buckets) < most {
		return true
	}
	if now-s.swept < sweepPause {
		return false
	}
	s.sweep(now)
	return len(s.buckets) < most
}

// sweep forgets idle buckets, with s.mu held.
func (s *shard) sweep(now time.Duration) {
	s.swept = now
	for w, b := range s.buckets {
		if b.refill(s.rate, now); b.idle() {
			delete(s.buckets, w)
		}
	}
}

// forget gives up the tallies in which nothing is counted: those of limits that
// are no more, and of others, which lose nothing by it.
func (m *limiter) forget() {
	now := m.now().Sub(m.began)
	m.tallies.Range(func(id, value any) bool {
		t := value.(*tally)
		idle := true
		for i := range t.shards {
			s := &t.shards[i]
			s.mu.Lock()
			s.sweep(now)
			s.rest.refill(s.rate, now)
			idle = idle && len(s.buckets) == 0 && s.rest.idle()
		}
		if idle {
			m.tallies.CompareAndDelete(id, t)
		}
		for i := range t.shards {
			t.shards[i].gone = idle
			t.shards[i].mu.Unlock()
		}
		return true
	})
}

// retryAfter is after how many seconds one more fits in (RFC 9110, section
// 10.2.3).
func (e *excess) retryAfter() string {
	if e.limit.RPS <= 0 {
		return "1"
	}
	return strconv.Itoa(int(min(3600, max(1, math.Ceil(1/e.limit.RPS)))))
}

// why says for a person what the limit allows, and to whom.
func (e *excess) why(w who) string {
	subject := w.String()
	switch {
	case e.limit.Per == policy.PerAll:
		subject = "all that it is for together"
	case e.rest:
		subject = fmt.Sprintf("those beyond the %d that are counted apart", maxBuckets)
	}
	if e.live {
		return fmt.Sprintf("limit %s: %s may have %d live connections", e.limit.ID, subject, e.limit.Connections)
	}
	what := "open %g connections"
	if e.requests {
		what = "send %g requests"
	}
	return fmt.Sprintf("limit %s: %s may "+what+" a second, %d at once", e.limit.ID, subject, e.limit.RPS, max(1, e.limit.Burst))
}

// takeLimits counts a connection that the policy allows under the limits that
// are for it, or refuses it, with c.mu held.
func (c *conn) takeLimits(w *world) error {
	if c.request.Direction != policy.Inbound {
		return nil
	}
	var room [8]*policy.Limit
	limits := w.policy.Limits(&c.request, room[:0])
	count := aConnection
	if c.latest.HTTP != nil {
		count = aClient
	}
	held, excess := c.l.proxy.limits.take(limits, c.whoIs(), count)
	if excess != nil {
		c.record.Limit = excess.limit.ID
		c.l.proxy.instruments.limited(c.l.name, excess.limit.ID)
		return refuse("limited", "%s", excess.why(c.whoIs()))
	}
	c.metered, c.stakes = true, held
	return nil
}

// moveLimits has a live connection counted under the limits of another policy,
// with c.mu held. It ends none.
func (c *conn) moveLimits(w *world) {
	if !c.metered {
		return
	}
	var room [8]*policy.Limit
	c.stakes = c.l.proxy.limits.move(c.stakes, w.policy.Limits(&c.request, room[:0]), c.whoIs())
}

// giveLimits counts it no longer, with c.mu held.
func (c *conn) giveLimits() {
	leave(c.stakes...)
	c.metered, c.stakes = false, nil
}
