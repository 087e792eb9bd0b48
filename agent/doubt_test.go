package agent

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/agent/registry"
)

// TestDoubt plays answers of servers. "3 B a1 b2" is server B answering at 3 s
// with entry a in revision 1 and b in revision 2; what the agent then holds
// follows the colon.
func TestDoubt(t *testing.T) {
	t.Parallel()
	const interval = 5 * time.Second
	for name, script := range map[string]string{
		"one server is believed at once": `
			0 A a1 b1: a1 b1
			5 A a1: a1
			10 A:`,
		"one that has an older version, too": `
			0 A a2: a2
			5 A a1: a1`,
		"what another does not list goes with its next answer but one": `
			0 A a1 b1: a1 b1
			5 B a1: a1 b1
			10 B a1: a1`,
		"or with that of the first": `
			0 A a1 b1: a1 b1
			5 B a1: a1 b1
			10 A a1: a1`,
		"answers in quick succession confirm nothing": `
			0 A a1: a1
			1 B: a1
			2 C: a1
			3 B: a1
			6 C:`,
		"a server that is behind takes no new entry back": `
			0 A a1: a1
			1 B a1: a1
			5 A a1 b1: a1 b1
			6 B a1: a1 b1
			7 A a1 b1: a1 b1
			8 B a1: a1 b1
			11 B a1 b1: a1 b1
			12 A a1 b1: a1 b1
			17 B a1: a1 b1
			22 B a1: a1`,
		"one that lists what was removed does not hold it for more than two intervals": `
			0 A a1: a1
			5 B: a1
			7 A a1: a1
			10 B:`,
		"nor an older version a newer": `
			0 A a1: a1
			5 B a2: a2
			6 A a1: a2
			8 B a2: a2
			11 A a2: a2
			16 B a3: a3`,
		"an older version that stays is the one": `
			0 A a2: a2
			5 B a1: a2
			10 A a1: a1`,
		"a newer one counts at once": `
			0 A a1: a1
			5 B a2 b1: a2 b1`,
		"made anew under its ID": `
			0 A a7: a7
			5 B a1*: a1*
			6 A a7: a1*`,
		"a server not heard of for long does not count": `
			0 A a1: a1
			5 B a1: a1
			300 B:`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			var d doubt
			var known []registry.Entry
			for line := range strings.Lines(strings.TrimSpace(script)) {
				said, want, _ := strings.Cut(strings.TrimSpace(line), ":")
				words := strings.Fields(said)
				var seconds int
				if _, err := fmt.Sscan(words[0], &seconds); err != nil {
					t.Fatal(err)
				}
				known = d.settle(known, versions(t, words[2:]), words[1], interval, start.Add(time.Duration(seconds)*time.Second))
				if got := written(known); got != strings.TrimSpace(want) {
					t.Fatalf("%s: the agent holds %q", line, got)
				}
			}
		})
	}
}

// versions reads entries as written writes them: ID, revision, and a star for
// one that was made anew.
func versions(t *testing.T, words []string) (entries []registry.Entry) {
	t.Helper()
	for _, w := range words {
		e := registry.Entry{ID: w[:1], CreatedAt: time.Unix(1, 0)}
		if strings.HasSuffix(w, "*") {
			e.CreatedAt = time.Unix(2, 0)
		}
		if _, err := fmt.Sscan(strings.TrimSuffix(w[1:], "*"), &e.Revision); err != nil {
			t.Fatal(err)
		}
		entries = append(entries, e)
	}
	return entries
}

func written(entries []registry.Entry) string {
	var words []string
	for _, e := range entries {
		word := fmt.Sprint(e.ID, e.Revision)
		if e.CreatedAt.Unix() == 2 {
			word += "*"
		}
		words = append(words, word)
	}
	slices.Sort(words)
	return strings.Join(words, " ")
}

func TestServersAreBounded(t *testing.T) {
	t.Parallel()
	var d doubt
	now := time.Now()
	for i := range 10 * maxServers {
		d.several(fmt.Sprint(i), now)
	}
	if len(d.servers) > maxServers {
		t.Errorf("%d servers are told apart, want %d at most", len(d.servers), maxServers)
	}
}
