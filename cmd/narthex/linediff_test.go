package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestLineDiff(t *testing.T) {
	t.Parallel()
	letters := func(s string) string { return strings.Join(strings.Split(s, ""), "\n") + "\n" }
	for _, c := range []struct{ a, b, want string }{
		{"", "", ""},
		{"a\n", "a\n", ""},
		{"", "a\n", "@@ -0,0 +1,1 @@\n+a\n"},
		{"a\n", "", "@@ -1,1 +0,0 @@\n-a\n"},
		{"a", "a\n", "@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+a\n"},
		{letters("abcdefg"), letters("abcXefg"), "@@ -1,7 +1,7 @@\n a\n b\n c\n-d\n+X\n e\n f\n g\n"},
		{letters("0abc123456def"), letters("Xabc123456deY"), "@@ -1,4 +1,4 @@\n-0\n+X\n a\n b\n c\n@@ -10,4 +10,4 @@\n 6\n d\n e\n-f\n+Y\n"},
		{letters("0abcdef"), letters("XabcdeY"), "@@ -1,7 +1,7 @@\n-0\n+X\n a\n b\n c\n d\n e\n-f\n+Y\n"},
	} {
		if got := string(lineDiff([]byte(c.a), []byte(c.b))); got != c.want {
			t.Errorf("%q to %q: got\n%swant\n%s", c.a, c.b, got, c.want)
		}
	}
}

// TestLineDiffApplies puts random differences back together, also such as are
// too many to look for one by one.
func TestLineDiffApplies(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 1))
	random := func(n, words int) []byte {
		var b strings.Builder
		for range r.IntN(n + 1) {
			fmt.Fprintf(&b, "%d\n", r.IntN(words))
		}
		return []byte(b.String())
	}
	for i := range 300 {
		n, words := 30, 4
		if i%100 == 0 {
			n, words = 3*diffEdits, 1<<20
		}
		a, b := random(n, words), random(n, words)
		old, now := linesOf(a), linesOf(b)
		var made []string
		at := 0
		for _, e := range editsOf(old, now) {
			if e.fromA < at {
				t.Fatalf("edits overlap: %v", editsOf(old, now))
			}
			for ; at < e.fromA; at++ {
				made = append(made, string(old[at]))
			}
			for _, line := range now[e.fromB:e.toB] {
				made = append(made, string(line))
			}
			at = e.toA
		}
		for ; at < len(old); at++ {
			made = append(made, string(old[at]))
		}
		if got := strings.Join(made, ""); got != string(b) {
			t.Fatalf("%q to %q: made %q", a, b, got)
		}
	}
}
