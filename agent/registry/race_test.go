package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestManyWatches has callers come and go, follow and lag behind while entries
// and SVIDs change; in the end each must have been told the final state.
func TestManyWatches(t *testing.T) {
	const callers, entries, rounds = 64, 40, 200
	r := New(testOptions())
	final := make(chan struct{})
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() { follow(t, r, i, final) })
	}
	wg.Go(func() { // an operator who looks on
		for open := true; open; {
			select {
			case <-final:
				open = false
			default:
			}
			r.Status()
			r.NextDue(epoch)
			for _, e := range r.Entries() {
				_ = e.Selectors[0].Value
			}
		}
	})
	random := rand.New(rand.NewPCG(1, 2))
	for round := range rounds {
		u := Update{HasEntries: true}
		for i := range entries {
			if round == rounds-1 || random.IntN(4) > 0 {
				u.Entries = append(u.Entries, raceEntry(i, random.IntN(2)))
			}
		}
		r.Apply(u)
		signDue(r, round)
	}
	u := Update{HasEntries: true}
	for i := range entries {
		u.Entries = append(u.Entries, raceEntry(i, 7))
	}
	r.Apply(u)
	signDue(r, rounds)
	r.Apply(Update{Bundle: &Bundle{TrustDomain: testDomain, DER: []byte("final")}})
	close(final)
	wg.Wait()
	checkIndex(t, r)
	if len(r.audiences) > 0 {
		t.Errorf("%d audiences are left", len(r.audiences))
	}
}

func raceEntry(i, revision int) Entry {
	return Entry{
		ID: "e" + strconv.Itoa(i), SPIFFEID: spiffeid.RequireFromPath(testDomain, "/w"+strconv.Itoa(i)),
		Selectors: selectors("all", "group"+strconv.Itoa(i%8)), Revision: int64(revision),
	}
}

func signDue(r *Registry, round int) {
	u := Update{SVIDs: map[string]*SVID{}}
	for _, e := range r.Due(epoch) {
		u.SVIDs[e.ID] = &SVID{ID: e.SPIFFEID, Serial: fmt.Sprint(round), NotBefore: epoch, NotAfter: epoch.Add(time.Hour)}
	}
	r.Apply(u)
}

// follow watches, now and then anew, until it has the final bundle, and then
// must have all five identities of its group at their last revision.
func follow(t *testing.T, r *Registry, i int, final <-chan struct{}) {
	random := rand.New(rand.NewPCG(uint64(i), 3))
	w := r.Watch(selectors("all", "group"+strconv.Itoa(i%8), "uid"+strconv.Itoa(i/2)))
	defer func() { w.Close() }()
	for {
		ctx, cancel := context.WithCancel(t.Context())
		if random.IntN(8) == 0 {
			cancel()
		}
		v, err := w.Next(ctx)
		cancel()
		switch {
		case errors.Is(err, context.Canceled):
			continue
		case err != nil:
			t.Error(err)
			return
		}
		if v.Bundle != nil {
			if len(v.Identities) != 5 || v.Pending != 0 || v.Identities[0].Entry.Revision != 7 {
				t.Errorf("caller %d: %s", i, printView(v))
			}
			return
		}
		select {
		case <-final:
		default:
			if random.IntN(4) == 0 {
				w.Close()
				w = r.Watch(selectors("all", "group"+strconv.Itoa(i%8), "uid"+strconv.Itoa(i/2)))
			}
		}
	}
}

// TestNextWaits shows what ends the waiting.
func TestNextWaits(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(*Registry, *Watch, context.CancelFunc)
		want string
	}{
		{"a change", func(r *Registry, _ *Watch, _ context.CancelFunc) { r.Apply(Update{HasEntries: true}) }, "synced: nothing"},
		{"its context", func(_ *Registry, _ *Watch, cancel context.CancelFunc) { cancel() }, "context canceled"},
		{"Interrupt", func(_ *Registry, w *Watch, _ context.CancelFunc) { w.Interrupt() }, "watch was interrupted"},
		{"Close", func(_ *Registry, w *Watch, _ context.CancelFunc) { w.Close() }, "watch is closed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := New(testOptions())
				w, other := r.Watch(selectors("a")), r.Watch(selectors("a"))
				defer w.Close()
				defer other.Close()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if v, err := w.Next(ctx); err != nil || v.Synced {
					t.Fatal(v, err)
				}
				got := ""
				go func() {
					v, err := w.Next(ctx)
					if err != nil {
						got = err.Error()
					} else {
						got = printView(v)
					}
				}()
				synctest.Wait()
				if got != "" {
					t.Fatalf("Next did not wait: %s", got)
				}
				// What makes no difference does not end it.
				r.Apply(Update{})
				synctest.Wait()
				if got != "" {
					t.Fatalf("Next did not wait: %s", got)
				}
				tt.end(r, w, cancel)
				synctest.Wait()
				if got != tt.want {
					t.Errorf("got %q, want %q", got, tt.want)
				}
			})
		})
	}
}
