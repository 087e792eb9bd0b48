package proxy

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/proxy/policy"
)

// clock is a time that a test moves.
type clock struct{ past atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(1_000_000, c.past.Load()) }
func (c *clock) advance(d time.Duration) { c.past.Add(int64(d)) }

func workload(name string) who {
	return who{id: spiffeid.RequireFromString("spiffe://example.org/" + name)}
}

// buckets returns how many of a limit there are.
func (m *limiter) buckets(id string) (n int) {
	t := m.tally(id)
	for i := range t.shards {
		t.shards[i].mu.Lock()
		n += len(t.shards[i].buckets)
		t.shards[i].mu.Unlock()
	}
	return n
}

func (m *limiter) known() (n int) {
	m.tallies.Range(func(any, any) bool { n++; return true })
	return n
}

func TestLimiterRate(t *testing.T) {
	web, batch := workload("web"), workload("batch")
	each := func(rps float64, burst int) *policy.Limit { return &policy.Limit{ID: "l", RPS: rps, Burst: burst} }
	all := func(rps float64, burst int) *policy.Limit {
		return &policy.Limit{ID: "l", Per: policy.PerAll, RPS: rps, Burst: burst}
	}
	type step struct {
		after time.Duration
		limit *policy.Limit
		who   who
		ok    bool
	}
	for name, steps := range map[string][]step{
		"a burst, then the rate": {
			{0, each(2, 3), web, true},
			{0, each(2, 3), web, true},
			{0, each(2, 3), web, true},
			{0, each(2, 3), web, false},
			{499 * time.Millisecond, each(2, 3), web, false},
			{time.Millisecond, each(2, 3), web, true},
			{0, each(2, 3), web, false},
		},
		"never more than the burst": {
			{0, each(10, 2), web, true}, {time.Hour, each(10, 2), web, true}, {0, each(10, 2), web, true}, {0, each(10, 2), web, false},
		},
		"less than one a second": {
			{0, each(0.25, 1), web, true}, {3 * time.Second, each(0.25, 1), web, false}, {time.Second, each(0.25, 1), web, true},
		},
		"each for itself": {{0, each(1, 1), web, true}, {0, each(1, 1), batch, true}, {0, each(1, 1), web, false}},
		"all together":    {{0, all(1, 1), web, true}, {0, all(1, 1), batch, false}, {time.Second, all(1, 1), batch, true}},
		"a higher rate counts at once": {
			{0, each(0.001, 1), web, true}, {time.Second, each(0.001, 1), web, false}, {time.Second, each(1, 1), web, true},
		},
		"a higher burst counts at once": {{0, each(1, 1), web, true}, {0, each(1, 2), web, true}, {0, each(1, 2), web, false}},
		"a lower burst counts at once":  {{0, each(1, 3), web, true}, {0, each(1, 3), web, true}, {0, each(1, 2), web, false}},
		"no burst said is one":          {{0, each(1, 0), web, true}, {0, each(1, 0), web, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var c clock
			m := newLimiter(c.now)
			for i, s := range steps {
				c.advance(s.after)
				m.forget() // what it forgets is nothing
				if _, over := m.take([]*policy.Limit{s.limit}, s.who, aConnection); (over == nil) != s.ok {
					t.Errorf("step %d: refused by %v, want passed: %t", i, over, s.ok)
				}
			}
		})
	}
}

func TestLimiterConnections(t *testing.T) {
	var c clock
	m := newLimiter(c.now)
	web, batch := workload("web"), workload("batch")
	two := []*policy.Limit{{ID: "two", Connections: 2}}
	take := func(limits []*policy.Limit, w who, ok bool) []stake {
		t.Helper()
		held, over := m.take(limits, w, aConnection)
		if (over == nil) != ok {
			t.Fatalf("refused by %+v, want passed: %t", over, ok)
		}
		return held
	}
	first, second := take(two, web, true), take(two, web, true)
	take(two, web, false)
	other := take(two, batch, true)
	leave(first...)
	third := take(two, web, true)
	take([]*policy.Limit{{ID: "two", Connections: 3}}, web, true) // as a newer policy has it
	take(two, web, false)

	// A newer policy has another limit: who lives is counted, and goes on.
	one := []*policy.Limit{{ID: "one", Per: policy.PerAll, Connections: 1, RPS: 1, Burst: 1}}
	second, third, other = m.move(second, one, web), m.move(third, one, web), m.move(other, one, batch)
	if n := m.buckets("two"); n != 1 {
		t.Errorf("%d still count under the old limit", n) // the one that was not moved
	}
	take(one, batch, false)
	leave(second...)
	leave(third...)
	take(one, batch, false)
	leave(other...)
	take(one, batch, true) // no token was spent
	take(one, batch, false)

	// Counted by limits that are not for it any more, or set no such bound.
	held := take(two, batch, true)
	if held = m.move(held, []*policy.Limit{{ID: "two", RPS: 1, Burst: 1}}, batch); held != nil {
		t.Errorf("it holds %+v", held)
	}
	if held = m.move(m.move(nil, two, batch), two, batch); len(held) != 1 {
		t.Errorf("it holds %+v", held)
	}
	if held = m.move(held, nil, batch); held != nil || m.buckets("two") != 1 {
		t.Errorf("it holds %+v", held)
	}
}

// TestLimitsAllOrNone: what one limit refuses spends nothing of the others.
func TestLimitsAllOrNone(t *testing.T) {
	var c clock
	m := newLimiter(c.now)
	web := workload("web")
	limits := []*policy.Limit{{ID: "a", RPS: 0.001, Burst: 2}, {ID: "b", Connections: 1}, {ID: "c", Per: policy.PerAll, RPS: 1, Burst: 1}}
	held, over := m.take(limits, web, aConnection)
	if over != nil || len(held) != 1 {
		t.Fatalf("holds %v, refused by %+v", held, over)
	}
	if _, over = m.take(limits, web, aConnection); over == nil || over.limit.ID != "b" || !over.live {
		t.Errorf("refused by %+v, want b", over)
	}
	leave(held...)
	if _, over = m.take(limits, web, aConnection); over == nil || over.limit.ID != "c" || over.live {
		t.Errorf("refused by %+v, want c", over)
	}
	c.advance(time.Second)
	if _, over = m.take(limits, web, aConnection); over != nil { // the second of a's two
		t.Errorf("refused by %+v", over)
	}
}

func TestExcessSaysWhy(t *testing.T) {
	web := workload("web")
	limit := &policy.Limit{ID: "l", RPS: 0.5, Burst: 2, Connections: 7}
	all := *limit
	all.Per = policy.PerAll
	for want, e := range map[string]excess{
		"limit l: spiffe://example.org/web may open 0.5 connections a second, 2 at once":                      {limit: limit},
		"limit l: spiffe://example.org/web may have 7 live connections":                                       {limit: limit, live: true},
		"limit l: all that it is for together may have 7 live connections":                                    {limit: &all, live: true, rest: true},
		"limit l: those beyond the 65536 that are counted apart may open 0.5 connections a second, 2 at once": {limit: limit, rest: true},
	} {
		if got := e.why(web); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestLimiterUnderFlood: however many identities come, memory is bounded, those
// who are counted keep their count, and the rest share what one may have.
func TestLimiterUnderFlood(t *testing.T) {
	var c clock
	m := newLimiter(c.now)
	limit := []*policy.Limit{{ID: "l", RPS: 0.1, Burst: 1, Connections: 5}}
	good := workload("good")
	held, over := m.take(limit, good, aConnection)
	if over != nil {
		t.Fatalf("refused by %+v", over)
	}
	before := heapSize()
	passed := 0
	flood := func(round int) {
		for i := range 2 * maxBuckets {
			stakes, over := m.take(limit, workload(fmt.Sprint("flood/", round, "/", i)), aConnection)
			if leave(stakes...); over == nil {
				passed++
			}
		}
	}
	flood(0)
	if n := m.buckets("l"); n > maxBuckets || n < maxBuckets*9/10 {
		t.Errorf("%d buckets, want about %d and no more", n, maxBuckets)
	}
	if passed > maxBuckets+shardsEach {
		t.Errorf("%d passed, with %d buckets of one token", passed, maxBuckets)
	}
	if grown := int64(heapSize()) - int64(before); grown > 16<<20 {
		t.Errorf("%d MiB for one limit", grown>>20)
	}
	_, over = m.take(limit, workload("late"), aConnection)
	if over == nil || !over.rest || over.live {
		t.Errorf("one that comes late is refused by %+v", over)
	}
	_, over = m.take(limit, good, aConnection)
	if over == nil || over.rest {
		t.Errorf("one that is counted is refused by %+v", over)
	}
	// Once the tokens are back, the buckets are for others.
	c.advance(10 * time.Second)
	flood(1)
	if n := m.buckets("l"); n > maxBuckets {
		t.Errorf("%d buckets", n)
	}
	leave(held...)
	c.advance(10 * time.Second)
	m.forget()
	if n := m.known(); n != 0 {
		t.Errorf("%d limits are not forgotten", n)
	}
	runtime.KeepAlive(m)
}

func heapSize() uint64 {
	var s runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

// TestLimiterKeepsTheLive: a bucket in which a connection is counted never
// makes room for another.
func TestLimiterKeepsTheLive(t *testing.T) {
	var c clock
	m := newLimiter(c.now)
	m.most = 1
	limit := []*policy.Limit{{ID: "l", Connections: 2}}
	var held []stake
	for i := range 200 {
		c.advance(sweepPause)
		stakes, _ := m.take(limit, workload(fmt.Sprint(i)), aConnection)
		held = append(held, stakes...)
	}
	if n := m.buckets("l"); n != shardsEach {
		t.Errorf("%d buckets, want %d", n, shardsEach)
	}
	if len(held) != 3*shardsEach { // one each, and two of those who share what is left
		t.Errorf("%d passed", len(held))
	}
	leave(held...)
	if n := m.buckets("l"); n != 0 {
		t.Errorf("%d buckets are left", n)
	}
	m.forget()
	if n := m.known(); n != 0 {
		t.Errorf("%d limits are left", n)
	}
}

// TestLimiterIsExact: however many come at once, and whatever is forgotten and
// moved meanwhile, no more get in than may.
func TestLimiterIsExact(t *testing.T) {
	t.Parallel()
	m := newLimiter(time.Now)
	limits := []*policy.Limit{{ID: "a", Connections: 3}, {ID: "b", Per: policy.PerAll, Connections: 4}, {ID: "c", Connections: 100, RPS: 1e6, Burst: 1e6}}
	var in atomic.Int64
	var all sync.WaitGroup
	for n := range 8 {
		w := workload(fmt.Sprint("w", n%2))
		all.Go(func() {
			for range 3000 {
				held, over := m.take(limits, w, aConnection)
				if over != nil {
					continue
				}
				if n := in.Add(1); n > 4 {
					t.Errorf("%d at once", n)
				}
				held = m.move(held, limits, w)
				in.Add(-1)
				leave(held...)
			}
		})
	}
	all.Go(func() {
		for range 500 {
			m.forget()
		}
	})
	all.Wait()
	m.tallies.Range(func(_, value any) bool {
		t1 := value.(*tally)
		for i := range t1.shards {
			for _, b := range t1.shards[i].buckets {
				if b.live != 0 {
					t.Errorf("limit %s still counts %d", t1.id, b.live)
				}
			}
		}
		return true
	})
}
