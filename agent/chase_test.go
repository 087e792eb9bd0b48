package agent

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

func TestExtraSyncsComeBackOneEachInterval(t *testing.T) {
	t.Parallel()
	const interval = 5 * time.Second
	var c chase
	now := time.Now()
	takes := func() (n int) {
		for user := range 100 {
			if c.take(fmt.Sprint("uid ", user), now, interval) {
				n++
			}
		}
		return n
	}
	for _, step := range []struct {
		after time.Duration
		want  int
	}{{0, extraSyncs}, {interval - time.Millisecond, 0}, {time.Millisecond, 1}, {3 * interval, 3}, {time.Hour, extraSyncs}} {
		now = now.Add(step.after)
		if got := takes(); got != step.want {
			t.Errorf("%s later: %d extra syncs, want %d", step.after, got, step.want)
		}
	}
}

// A user who takes whatever there is leaves others theirs.
func TestExtraSyncsOfOneUser(t *testing.T) {
	t.Parallel()
	const interval = 5 * time.Second
	var c chase
	now := time.Now()
	takes := func(user string) (n int) {
		for c.take(user, now, interval) {
			n++
		}
		return n
	}
	for _, step := range []struct {
		after         time.Duration
		greedy, other int
	}{
		{0, sharedSyncs, extraSyncs - sharedSyncs},
		{2*interval - time.Millisecond, 0, 1},
		{time.Millisecond, 1, 0},
	} {
		now = now.Add(step.after)
		if n := takes("greedy"); n != step.greedy {
			t.Errorf("%s later: %d for one who takes all, want %d", step.after, n, step.greedy)
		}
		if n := takes("other"); n != step.other {
			t.Errorf("%s later: %d for another, want %d", step.after, n, step.other)
		}
	}
	for range 100 {
		now = now.Add(2 * interval)
		if n := takes("greedy"); n != 1 {
			t.Fatalf("%d every other interval for one who takes all, want 1", n)
		}
	}
	if n := takes("other"); n != sharedSyncs {
		t.Errorf("%d for another who has not asked for long, want %d", n, sharedSyncs)
	}
	for user := range 1000 {
		now = now.Add(interval)
		c.take(fmt.Sprint("uid ", user), now, interval)
	}
	if len(c.shares) > 2*extraSyncs {
		t.Errorf("%d users are remembered", len(c.shares))
	}
}

// The server is asked each chasePause for whom there is a share left.
func TestGoOn(t *testing.T) {
	t.Parallel()
	const interval = time.Hour
	var c chase
	now := time.Now()
	for c.take("greedy", now, interval) {
	}
	c.deny("greedy", 1, now, interval)
	if !c.on(now) || c.goOn(now, now, interval) || c.on(now) {
		t.Error("the server is asked, or waited for, for one who has nothing left")
	}
	c.deny("greedy", 1, now, interval)
	c.deny("other", 2, now, interval)
	for range 3 {
		if !c.goOn(now, now, interval) {
			t.Fatal("the server is not asked for another")
		}
	}
	if later := now.Add(chaseFor); c.on(later) || c.goOn(later, now, interval) {
		t.Error("the server is asked for longer than is wanted")
	}
}

func TestDeniedSelectorsAreRemembered(t *testing.T) {
	t.Parallel()
	var c chase
	now := time.Now()
	if c.known(1, now) || c.on(now) {
		t.Error("who never called is known")
	}
	c.deny("uid 1", 1, now, time.Second)
	if !c.on(now) || c.on(now.Add(chaseFor)) {
		t.Errorf("the server is asked: %+v", c.shares["uid 1"])
	}
	for range 3 { // each call counts
		now = now.Add(rememberDenial - time.Second)
		if !c.known(1, now) {
			t.Error("a caller that calls again and again is new")
		}
	}
	if now = now.Add(rememberDenial); c.known(1, now) {
		t.Error("a caller that was not seen for long is not new")
	}

	// A user that makes up selectors has nobody asked for long.
	for key := range uint64(2 * maxDenied) {
		if !c.known(key+10, now) {
			c.deny("uid 1", key+10, now, time.Second)
		}
	}
	if len(c.denied) > maxDenied || !c.known(1<<40, now) {
		t.Errorf("%d are remembered, want %d and no more", len(c.denied), maxDenied)
	}
	if now = now.Add(2 * rememberDenial); c.known(1<<40, now) || len(c.denied) != 0 {
		t.Errorf("%d are remembered long after", len(c.denied))
	}
}

func TestSelectorsKey(t *testing.T) {
	t.Parallel()
	seen := map[uint64]string{}
	for _, s := range [][]attestor.Selector{
		nil,
		{{Type: "a", Value: "b"}},
		{{Type: "ab"}},
		{{Type: "a", Value: "b"}, {Type: "c", Value: "d"}},
		{{Type: "a", Value: "b:c:d"}},
	} {
		key := selectorsKey(s)
		if other, there := seen[key]; there {
			t.Errorf("%v has the key of %s", s, other)
		}
		seen[key] = fmt.Sprint(s)
	}
}

// What a caller without an entry waits for, and what it has asked.
func TestBoard(t *testing.T) {
	t.Parallel()
	caller := func(n int) []attestor.Selector {
		return []attestor.Selector{{Type: "unix", Value: fmt.Sprint("uid:", n)}}
	}
	l := newLooper(t, Config{SyncInterval: 5 * time.Second})
	l.wake = make(chan struct{}, 1)
	now := time.Now()
	board := func(n int) (*flight, bool) {
		t.Helper()
		f, err := l.board(question{"uid 1", caller(n)}, now)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-l.wake:
			return f, true
		default:
			return f, false
		}
	}

	first, woke := board(1)
	if first == nil || !woke {
		t.Fatal("a new caller does not have the server asked")
	}
	if second, woke := board(2); second != first || !woke {
		t.Error("two callers do not share a sync")
	}
	l.aboard = l.boarded()
	l.registry.Apply(registry.Update{HasEntries: true, Entries: []registry.Entry{{ID: "2", Selectors: caller(2)}}})
	l.arrive()
	select {
	case <-first.done:
	default:
		t.Fatal("callers wait on after the sync")
	}
	if f, woke := board(1); f == nil || f == first || woke {
		t.Error("a denied caller that calls again shall wait for the next sync and ask for none")
	}
	if at := l.afterSync(now); at.After(now.Add(2 * chasePause)) {
		t.Errorf("after a denial the next sync is %s later", at.Sub(now))
	}

	now = now.Add(chaseFor + chasePause)
	if at := l.afterSync(now); at.Before(now.Add(4 * time.Second)) {
		t.Errorf("long after the denial the next sync is %s later", at.Sub(now))
	}
	l.land(nil)
	if f, woke := board(1); f != nil || woke {
		t.Error("a caller that was denied waits, or has the server asked, when none is asked soon")
	}
	l.view.problem = errors.New("server away since noon")
	if _, err := l.board(question{"uid 1", caller(1)}, now); !errors.Is(err, l.view.problem) {
		t.Errorf("while the server is away it is told %v", err)
	}
}

// A server that has nothing for a node that has just attested may not have read
// what there is: its callers are held, and told to call again.
func TestCallersOfANodeThatHasJustAttestedAreHeld(t *testing.T) {
	t.Parallel()
	caller := []attestor.Selector{{Type: "unix", Value: "uid:1"}}
	entry := registry.Entry{ID: "1", Selectors: []attestor.Selector{{Type: "unix", Value: "uid:2"}}}
	for _, c := range []struct {
		name  string
		later time.Duration      // than the attestation
		syncs [][]registry.Entry // what each brings, one after the other
		want  error              // nil: that no entry matches is known
	}{
		{"nothing yet", 0, [][]registry.Entry{nil}, errUnsettled},
		{"nothing, twice", 0, [][]registry.Entry{nil, nil}, errUnsettled},
		{"an entry of others at once", 0, [][]registry.Entry{{entry}}, nil},
		{"an entry of others later", 0, [][]registry.Entry{nil, {entry}}, nil},
		{"nothing for long", settleFor, [][]registry.Entry{nil}, nil},
		{"nobody answers", 0, nil, errUnsettled},
		{"nobody answers, for long", settleFor, nil, context.DeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newLooper(t, Config{SyncInterval: 5 * time.Second})
			synctest.Test(t, func(t *testing.T) {
				l.wake = make(chan struct{}, 1)
				l.update(func(v *view) { v.synced, v.attested = true, time.Now().Add(-c.later) })
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				told := make(chan error, 1)
				go func() { told <- l.Sync(ctx, "uid 1", caller) }()
				for _, entries := range c.syncs {
					synctest.Wait()
					l.aboard = l.boarded()
					l.registry.Apply(registry.Update{HasEntries: true, Entries: entries})
					l.update(func(v *view) { v.entries = len(entries) })
					l.arrive()
				}
				if err := <-told; !errors.Is(err, c.want) {
					t.Errorf("it is told %v, want %v", err, c.want)
				}
				if errors.Is(c.want, errUnsettled) && (l.chase.all.spent > 1 || len(l.chase.denied) > 0) {
					t.Errorf("it has cost %g syncs, and it is known as denied: %v", l.chase.all.spent, l.chase.denied)
				}
			})
		})
	}
}
