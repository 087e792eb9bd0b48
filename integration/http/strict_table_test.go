//go:build integration

package http_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/mesh"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestStrictness sends requests that can be read in two ways, or that lie
// about who sent them, to nginx, haproxy and Narthex, each in front of a
// service that keeps what comes. Narthex is never laxer than the stricter of
// the two, passes on nothing that they read differently, and says itself who
// the caller is. The verdicts are the table of docs/http.md.
func TestStrictness(t *testing.T) {
	t.Parallel()
	var all []odd
	for _, part := range strictTable {
		all = append(all, part.of...)
	}
	verdicts := make([][]verdict, len(strictProxies))
	var g sync.WaitGroup
	for i, p := range strictProxies {
		g.Go(func() { verdicts[i] = judge(t, all, p.start) })
	}
	g.Wait()
	if t.Failed() {
		return
	}
	for n, o := range all {
		checkStrict(t, o, &verdicts[0][n], &verdicts[1][n], &verdicts[2][n])
		// What the inbound one behind it refuses is an answer like any other.
		if ours, out := verdicts[2][n].String(), strings.TrimSuffix(verdicts[3][n].String(), ", goes on"); strings.TrimSuffix(ours, ", goes on") != out {
			t.Errorf("%s: an inbound listener says %q, an outbound one %q", o.name, ours, out)
		}
	}
	checkTable(t, verdicts)
}

// checkStrict holds our verdict on one request against theirs.
func checkStrict(t *testing.T, o odd, nginx, haproxy, ours *verdict) {
	t.Helper()
	theirs := func() string {
		return fmt.Sprintf("\n nginx: %s: %s\n haproxy: %s: %s\n ours: %s: %s", nginx, nginx.meaning(), haproxy, haproxy.meaning(), ours, ours.meaning())
	}
	if ours.broken != "" {
		t.Errorf("%s: net/http does not read what we passed on: %s", o.name, ours.broken)
	}
	if ours.refused() {
		if o.laxer != "" {
			t.Errorf("%s: we refuse it; take the exception out", o.name)
		}
		if len(ours.statuses) == 0 || ours.statuses[0] < 400 {
			t.Errorf("%s: want an answer that says why%s", o.name, theirs())
		}
		if after := len(ours.statuses) > 1 || ours.last; after != o.ends {
			t.Errorf("%s: what follows is served: %t, want %t%s", o.name, after, o.ends, theirs())
		}
		return
	}
	if lax := nginx.refused() || haproxy.refused(); lax != (o.laxer != "") {
		t.Errorf("%s: they refuse it: %t, the exception: %q%s", o.name, lax, o.laxer, theirs())
	}
	if !nginx.refused() && !haproxy.refused() && nginx.meaning() != haproxy.meaning() {
		t.Errorf("%s: they read it differently, and we pass it on%s", o.name, theirs())
	}
	for _, r := range ours.seen {
		said := r.claims()
		if len(said) != 2 || said[0] != "x-spiffe-id: "+mesh.ID(caller) || !strings.HasSuffix(said[1], ";URI="+mesh.ID(caller)) {
			t.Errorf("%s: the service is told %q", o.name, said)
		}
	}
}

// The table stands between these lines of the page.
const (
	page       = "../../docs/http.md"
	tableBegin = "<!-- Written by integration/http: go test -tags integration -run TestStrictness ./integration/http -update -->\n"
	tableEnd   = "<!-- The end of what it wrote. -->\n"
)

// checkTable compares the page's table with what happened, or writes it.
// Verdicts of nginx and haproxy are those of the versions that the page names:
// where others run, ours alone are compared.
func checkTable(t *testing.T, verdicts [][]verdict) {
	t.Helper()
	nginx, haproxy := versionOf(t, "nginx", "-v"), versionOf(t, "haproxy", "-v")
	text := stage.ReadFile(t, page)
	before, rest, ok := strings.Cut(text, tableBegin)
	old, after, whole := strings.Cut(rest, tableEnd)
	if !ok || !whole {
		t.Fatalf("%s has no place for the table: want the lines\n%s%s", page, tableBegin, tableEnd)
	}
	now := table(nginx, haproxy, verdicts)
	if *update {
		if err := os.WriteFile(filepath.Clean(page), []byte(before+tableBegin+now+tableEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !strings.Contains(old, heading(nginx, haproxy)) {
		t.Logf("the page is of other versions than %s and %s: their columns are not compared", nginx, haproxy)
		old, now = oursAlone(old), oursAlone(now)
	}
	if old != now {
		t.Errorf("the table of %s is another one; -update writes this:\n%s", page, now)
	}
}

func heading(nginx, haproxy string) string {
	return fmt.Sprintf("| | %s | %s | Narthex |\n|---|---|---|---|\n", nginx, haproxy)
}

// table is that of the page.
func table(nginx, haproxy string, verdicts [][]verdict) string {
	var b strings.Builder
	n := 0
	b.WriteString("\n" + heading(nginx, haproxy))
	for _, part := range strictTable {
		fmt.Fprintf(&b, "| **%s** | | | |\n", part.title)
		for _, o := range part.of {
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", o.name, &verdicts[0][n], &verdicts[1][n], &verdicts[2][n])
			n++
		}
	}
	b.WriteString("\n")
	b.WriteString(exceptions())
	return b.String()
}

// exceptions says why we pass on what one of the others refuses.
func exceptions() string {
	b := strings.Builder{}
	b.WriteString("What Narthex passes on though one of the two refuses it:\n\n")
	for _, part := range strictTable {
		for _, o := range part.of {
			if o.laxer != "" {
				fmt.Fprintf(&b, "- %s: %s.\n", o.name, o.laxer)
			}
		}
	}
	return b.String()
}

// oursAlone is a table without the verdicts of others.
func oursAlone(table string) string {
	var b strings.Builder
	for line := range strings.Lines(table) {
		if cells := strings.Split(line, " | "); len(cells) == 4 {
			line = cells[0] + " | " + cells[3]
		}
		b.WriteString(line)
	}
	return b.String()
}

// versionOf returns a program's name and the version it says, without what a
// distribution has put behind it.
func versionOf(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.FieldsFunc(string(out), func(r rune) bool { return r != '.' && (r < '0' || r > '9') }) {
		if strings.Count(word, ".") == 2 {
			return program + " " + word
		}
	}
	t.Fatalf("%s says no version: %s", program, out)
	return ""
}
