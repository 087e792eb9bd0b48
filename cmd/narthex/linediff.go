package main

import (
	"bytes"
	"fmt"
	"slices"
)

const (
	diffContext = 3 // lines shown around a change

	// diffEdits is how many changed lines are looked for one by one; what is
	// further apart is shown as one change. The search needs memory for the
	// square of it.
	diffEdits = 1000
)

// edit is a run of lines that differ: those from fromA to toA of the old text
// gave way to those from fromB to toB of the new.
type edit struct{ fromA, toA, fromB, toB int }

// lineDiff returns the hunks of a unified diff from a to b, with line numbers,
// without the header that names the files.
func lineDiff(a, b []byte) []byte {
	old, now := linesOf(a), linesOf(b)
	var out bytes.Buffer
	edits := editsOf(old, now)
	for len(edits) > 0 {
		n := 1
		for n < len(edits) && edits[n].fromA-edits[n-1].toA <= 2*diffContext {
			n++
		}
		writeHunk(&out, old, now, edits[:n])
		edits = edits[n:]
	}
	return out.Bytes()
}

// linesOf returns the lines of a text, each with its end.
func linesOf(s []byte) [][]byte {
	lines := bytes.SplitAfter(s, []byte("\n"))
	if last := len(lines) - 1; len(lines[last]) == 0 {
		return lines[:last]
	}
	return lines
}

func writeHunk(out *bytes.Buffer, old, now [][]byte, edits []edit) {
	first, last := edits[0], edits[len(edits)-1]
	before := min(diffContext, first.fromA)
	after := min(diffContext, len(old)-last.toA)
	span := func(from, to int) string {
		from, to = from-before, to+after
		if to == from {
			return fmt.Sprintf("%d,0", from) // the line before it, as patch wants it
		}
		return fmt.Sprintf("%d,%d", from+1, to-from)
	}
	fmt.Fprintf(out, "@@ -%s +%s @@\n", span(first.fromA, last.toA), span(first.fromB, last.toB))
	lines := func(mark byte, list [][]byte) {
		for _, line := range list {
			out.WriteByte(mark)
			out.Write(line)
			if !bytes.HasSuffix(line, []byte("\n")) {
				out.WriteString("\n\\ No newline at end of file\n")
			}
		}
	}
	at := first.fromA - before
	for _, e := range edits {
		lines(' ', old[at:e.fromA])
		lines('-', old[e.fromA:e.toA])
		lines('+', now[e.fromB:e.toB])
		at = e.toA
	}
	lines(' ', old[at:at+after])
}

// editsOf returns the fewest edits that make a to b, or one for all that
// differs if they are too many (Myers, An O(ND) Difference Algorithm, 1986).
func editsOf(a, b [][]byte) []edit {
	start := 0
	for start < min(len(a), len(b)) && bytes.Equal(a[start], b[start]) {
		start++
	}
	end := 0
	for end < min(len(a), len(b))-start && bytes.Equal(a[len(a)-1-end], b[len(b)-1-end]) {
		end++
	}
	a, b = a[start:len(a)-end], b[start:len(b)-end]
	if len(a)+len(b) == 0 {
		return nil
	}
	trace := furthest(a, b)
	if trace == nil {
		return []edit{{start, start + len(a), start, start + len(b)}}
	}
	return backtrack(trace, len(a), len(b), start)
}

// furthest returns for each number of edits how far into a each diagonal gets
// with them, until one is at the end; nil if none is after diffEdits.
func furthest(a, b [][]byte) (trace [][]int) {
	for d := 0; d <= diffEdits; d++ {
		row := make([]int, 2*d+1) // of the diagonals -d to d
		for k := -d; k <= d; k += 2 {
			x := step(trace, d, k)
			for x < len(a) && x-k < len(b) && x-k >= 0 && bytes.Equal(a[x], b[x-k]) {
				x++
			}
			row[k+d] = x
			if k == len(a)-len(b) && x >= len(a) {
				return append(trace, row)
			}
		}
		trace = append(trace, row)
	}
	return nil
}

// step returns where diagonal k begins with its d-th edit.
func step(trace [][]int, d, k int) int {
	if d == 0 {
		return 0
	}
	if down(trace, d, k) {
		return trace[d-1][k+1+d-1]
	}
	return trace[d-1][k-1+d-1] + 1
}

// down reports whether the d-th edit onto diagonal k takes a line of b in,
// rather than one of a out.
func down(trace [][]int, d, k int) bool {
	return k == -d || k != d && trace[d-1][k-1+d-1] < trace[d-1][k+1+d-1]
}

// backtrack collects the edits on the way that reached the end.
func backtrack(trace [][]int, x, y, start int) []edit {
	var edits []edit // the last first
	for d := len(trace) - 1; d > 0; d-- {
		k := x - y
		var e edit
		if down(trace, d, k) {
			x = trace[d-1][k+1+d-1]
			y = x - k - 1
			e = edit{x, x, y, y + 1}
		} else {
			x = trace[d-1][k-1+d-1]
			y = x - k + 1
			e = edit{x, x + 1, y, y}
		}
		e = edit{e.fromA + start, e.toA + start, e.fromB + start, e.toB + start}
		if n := len(edits); n > 0 && edits[n-1].fromA == e.toA && edits[n-1].fromB == e.toB {
			edits[n-1].fromA, edits[n-1].fromB = e.fromA, e.fromB
			continue
		}
		edits = append(edits, e)
	}
	slices.Reverse(edits)
	return edits
}
