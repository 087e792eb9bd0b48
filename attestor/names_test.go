package attestor

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// What a name was is forgotten soon, that there is none likewise, and a failure
// at once.
func TestNamesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		text, failure, asked := "alice", error(nil), 0
		n := newNames(func(id string) (string, error) {
			if id != "1000" {
				t.Errorf("asked for %q", id)
			}
			asked++
			return text, failure
		})
		start := time.Now()
		for _, step := range []struct {
			at      time.Duration
			text    string // what the system says from then on
			failure error
			want    string
			asked   int
		}{
			{at: 0, text: "alice", want: "alice", asked: 1},
			{at: nameKept / 2, text: "bob", want: "alice", asked: 1},
			{at: nameKept, text: "bob", want: "bob", asked: 2},
			{at: 2 * nameKept, text: "", want: "", asked: 3},
			{at: 2*nameKept + 1, text: "carol", want: "", asked: 3},
			{at: 3 * nameKept, failure: errors.New("no file descriptor left"), asked: 4},
			{at: 3*nameKept + 1, text: "carol", want: "carol", asked: 5},
		} {
			time.Sleep(time.Until(start.Add(step.at)))
			text, failure = step.text, step.failure
			got, err := n.of(1000)
			if got != step.want || !errors.Is(err, step.failure) || asked != step.asked {
				t.Errorf("after %s: %q, %v, asked %d times; want %q, %v, %d", step.at, got, err, asked, step.want, step.failure, step.asked)
			}
		}
	})
}

// A caller with many groups does not fill the memory.
func TestNamesAreBounded(t *testing.T) {
	n := newNames(func(id string) (string, error) { return fmt.Sprint("g", id), nil })
	for id := range uint32(3 * maxNames) {
		if got, err := n.of(id); err != nil || got != fmt.Sprint("g", id) {
			t.Fatalf("%d: %q, %v", id, got, err)
		}
		if len(n.known) > maxNames {
			t.Fatalf("%d names are kept", len(n.known))
		}
	}
}
