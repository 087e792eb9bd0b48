package registry

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

// TestEarly follows what a caller matches while nothing of it is signed, beside
// a watch that waits for SVIDs.
func TestEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(testOptions())
		selectors := []attestor.Selector{{Type: "unix", Value: "uid:1"}}
		entry := func(id, hint string) Entry {
			return Entry{ID: id, SPIFFEID: spiffeid.RequireFromPath(testDomain, "/"+id), Selectors: selectors, Hint: hint, Revision: 1, CreatedAt: epoch}
		}
		early, late := r.Watch(selectors), r.Watch(selectors)
		early.Early()
		defer early.Close()
		defer late.Close()
		next := func(w *Watch) string {
			ctx, cancel := context.WithTimeout(t.Context(), 1)
			defer cancel()
			view, err := w.Next(ctx)
			if errors.Is(err, context.DeadlineExceeded) {
				return "nothing"
			}
			var told []string
			for _, e := range view.Entries() {
				told = append(told, e.ID+e.Hint)
			}
			return strings.Join(told, " ")
		}
		step := func(what string, u Update, wantEarly, wantLate string) {
			t.Helper()
			r.Apply(u)
			if got := next(early); got != wantEarly {
				t.Errorf("%s: told %q, want %q", what, got, wantEarly)
			}
			if got := next(late); got != wantLate {
				t.Errorf("%s: who waits was told %q, want %q", what, got, wantLate)
			}
		}
		step("nothing is synced", Update{}, "", "")
		step("an entry", Update{HasEntries: true, Entries: []Entry{entry("b", "x")}}, "bx", "nothing")
		step("another", Update{HasEntries: true, Entries: []Entry{entry("a", "x"), entry("b", "x"), entry("c", "")}}, "ax b c", "nothing")
		step("one is signed", Update{SVIDs: map[string]*SVID{"b": {ID: spiffeid.RequireFromPath(testDomain, "/b"), NotAfter: epoch.AddDate(1, 0, 0)}}}, "ax b c", "nothing")
		step("and the others are not", Update{Failed: map[string]error{"a": errors.New("no"), "c": errors.New("no")}}, "nothing", "ax b c")
		step("nothing changes", Update{HasEntries: true, Entries: r.Entries()}, "nothing", "nothing")
		step("an unsigned one goes", Update{HasEntries: true, Entries: []Entry{entry("b", "x"), entry("c", "")}}, "bx c", "bx c")
		step("everything goes", Update{HasEntries: true}, "", "")
	})
}
