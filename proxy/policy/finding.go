package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Error is one thing that is wrong with a policy, at one place of a file.
type Error struct {
	File         string
	Line, Column int    // from 1; 0 where the whole file is meant
	Path         string // the key, like rules[3].from[0]; empty where none is meant
	Msg          string // what is wrong and what to do
	Test         bool   // the policy is sound, and this test of its own fails; then all are of that kind

	err error // what made the file unreadable
}

// Error returns "file:line:column: path: message", in one line, and without
// what a terminal obeys: keys and texts of a file may hold escapes of it.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
	}
	if b.Len() > 0 {
		b.WriteString(": ")
	}
	if e.Path != "" {
		b.WriteString(e.Path)
		b.WriteString(": ")
	}
	b.WriteString(e.Msg)
	return shown(b.String())
}

// shown puts a space in the place of ends of lines and tabs, and U+FFFD in
// that of all else that does not print.
func shown(s string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c == '\n' || c == '\r' || c == '\t':
			return ' '
		case !unicode.IsPrint(c):
			return unicode.ReplacementChar
		}
		return c
	}, s)
}

// Unwrap returns what made the file unreadable, such as fs.ErrNotExist; nil
// where the file could be read and its text is wrong.
func (e *Error) Unwrap() error { return e.err }

// Errors is all that is wrong with a policy, by file, line and column. Load
// and Parse return it; errors.As finds it and each Error in it.
type Errors []*Error

// Error returns one line for each.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns each error.
func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i := range e {
		errs[i] = e[i]
	}
	return errs
}

// maxFindings bounds what a hopeless policy can fill a screen with.
const maxFindings = 100

// findings gathers what is wrong.
type findings struct {
	list    []*Error
	dropped int
}

func (f *findings) add(at place, path, format string, args ...any) {
	f.take(&Error{File: at.file, Line: at.line, Column: at.column, Path: path, Msg: fmt.Sprintf(format, args...)})
}

// full reports whether what is added is counted only.
func (f *findings) full() bool { return len(f.list) >= maxFindings }

func (f *findings) take(e *Error) {
	if f.full() {
		f.dropped++
		return
	}
	f.list = append(f.list, e)
}

func (f *findings) err() error {
	if len(f.list) == 0 {
		return nil
	}
	slices.SortStableFunc(f.list, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if f.dropped > 0 {
		f.list = append(f.list, &Error{Msg: fmt.Sprintf("and %d more", f.dropped)})
		f.dropped = 0
	}
	return Errors(f.list)
}

// place is where something stands, lines and columns from 1.
type place struct {
	file         string
	line, column int
}

func (p place) String() string { return fmt.Sprintf("%s:%d:%d", p.file, p.line, p.column) }

// nearest returns the word that needs the fewest edits to become s, if they
// are few enough to be a slip of the hand; "" if none is.
func nearest(s string, words []string) string {
	if len(s) > 64 {
		return ""
	}
	best, fewest := "", 1+max(len(s)/3, 1)
	for _, w := range words {
		if len(w) > 64 {
			continue
		}
		if n := edits(strings.ToLower(s), strings.ToLower(w)); n < fewest {
			best, fewest = w, n
		}
	}
	return best
}

// edits is the optimal string alignment distance: insertions, deletions,
// substitutions and swaps of two neighbours.
func edits(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := last[j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			row[j] = min(last[j]+1, row[j-1]+1, change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}

// clip shortens what a file can make as long as it likes.
func clip(s string) string {
	const most = 80
	runes := []rune(s[:min(len(s), 4*most)])
	if len(runes) <= most && len(s) <= 4*most {
		return s
	}
	return string(runes[:min(len(runes), most)]) + "…"
}
