package registry

import (
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

// A watch is due when one of its own entries is, and Due says so too.
func TestWatchDue(t *testing.T) {
	r := New(testOptions())
	selectors := func(uid string) []attestor.Selector { return []attestor.Selector{{Type: "unix", Value: uid}} }
	entry := func(id, uid string) Entry {
		return Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(testDomain, "/"+id), Selectors: selectors(uid), Revision: 1, CreatedAt: epoch}
	}
	r.Apply(Update{HasEntries: true, Entries: []Entry{entry("a", "uid:1"), entry("b", "uid:2")}})
	a, b, nobody := r.Watch(selectors("uid:1")), r.Watch(selectors("uid:2")), r.Watch(selectors("uid:3"))
	defer a.Close()
	defer b.Close()
	defer nobody.Close()
	check := func(what string, now time.Time, wantA, wantB bool) {
		t.Helper()
		if a.Due(now) != wantA || b.Due(now) != wantB || nobody.Due(now) {
			t.Errorf("%s: due are %v, %v and, of nobody, %v; want %v, %v", what, a.Due(now), b.Due(now), nobody.Due(now), wantA, wantB)
		}
		due := map[string]bool{}
		for _, e := range r.Due(now) {
			due[e.ID] = true
		}
		if due["a"] != wantA || due["b"] != wantB {
			t.Errorf("%s: Due returns %v, want a %v, b %v", what, due, wantA, wantB)
		}
	}
	check("synced", epoch, true, true)
	r.Apply(Update{SVIDs: map[string]*SVID{"a": {ID: entry("a", "").SPIFFEID, NotBefore: epoch, NotAfter: epoch.Add(time.Hour)}}})
	check("signed", epoch, false, true)
	r.Apply(Update{Failed: map[string]error{"b": errors.New("refused")}, Retry: func(int) time.Time { return epoch.Add(time.Minute) }})
	check("failed", epoch, false, false)
	check("to be tried again", epoch.Add(time.Minute), false, true)
	check("to be replaced", epoch.Add(45*time.Minute), true, true)
	check("ended", epoch.Add(2*time.Hour), true, true)
	changed := entry("a", "uid:1")
	changed.Revision++
	r.Apply(Update{SVIDs: map[string]*SVID{"a": {ID: changed.SPIFFEID, NotBefore: epoch, NotAfter: epoch.Add(24 * time.Hour)}}})
	check("signed again", epoch.Add(2*time.Hour), false, true)
	r.Apply(Update{HasEntries: true, Entries: []Entry{changed, entry("b", "uid:2")}})
	check("changed", epoch.Add(2*time.Hour), true, true)
}
