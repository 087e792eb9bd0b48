package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Finding is one thing that is wrong, or worth a look, at one place of a
// file.
type Finding struct { //nolint:errname // a warning is one too, and no error
	File    string `json:"file"`
	Line    int    `json:"line"`          // from 1
	Column  int    `json:"column"`        // from 1
	Key     string `json:"key,omitempty"` // like proxy.listeners[0].bind; empty where no key is meant
	Problem string `json:"problem"`       // what is wrong and what to do
}

// Error returns "file:line:column: key: problem".
func (f *Finding) Error() string {
	if f.Key == "" {
		return fmt.Sprintf("%s:%d:%d: %s", f.File, f.Line, f.Column, f.Problem)
	}
	return fmt.Sprintf("%s:%d:%d: %s: %s", f.File, f.Line, f.Column, f.Key, f.Problem)
}

// String returns the same, so that a Finding prints well by value too.
func (f Finding) String() string { return f.Error() }

// Error is all that is wrong with a file, in the order of its lines. Parse,
// Load and the For methods return it; errors.As finds it and each Finding.
type Error struct{ Findings []Finding }

// Error returns one line for each finding.
func (e *Error) Error() string {
	lines := make([]string, len(e.Findings))
	for i := range e.Findings {
		lines[i] = e.Findings[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the findings as errors.
func (e *Error) Unwrap() []error {
	errs := make([]error, len(e.Findings))
	for i := range e.Findings {
		errs[i] = &e.Findings[i]
	}
	return errs
}

func sortFindings(fs []Finding) {
	slices.SortStableFunc(fs, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// position is a place in a file, from 1.
type position struct{ line, column int }

// positions knows where each key of a file stands, by its path.
type positions map[string]position

// of returns the place of the key, or of the nearest block around it that is
// in the file.
func (p positions) of(key string) position {
	for {
		if at, ok := p[key]; ok {
			return at
		}
		cut := strings.LastIndexAny(key, ".[")
		if cut < 0 {
			return position{1, 1}
		}
		key = key[:cut]
	}
}

// findings gathers what is wrong with one file.
type findings struct {
	file string
	pos  positions
	list []Finding
	bad  map[string]bool // keys that have a finding: what follows from it is not reported again
}

// maxFindings bounds what a hopeless file can fill a screen with.
const maxFindings = 100

func (f *findings) add(at position, key, problem string) {
	f.bad[key] = true
	if len(f.list) < maxFindings {
		f.list = append(f.list, Finding{f.file, at.line, at.column, key, problem})
	}
}

// addf reports a problem of a key, unless the key, or a block around it, is
// reported already.
func (f *findings) addf(key, format string, args ...any) {
	if !f.isBad(key) {
		f.add(f.pos.of(key), key, fmt.Sprintf(format, args...))
	}
}

func (f *findings) isBad(key string) bool {
	for {
		if f.bad[key] {
			return true
		}
		cut := strings.LastIndexAny(key, ".[")
		if cut < 0 {
			return false
		}
		key = key[:cut]
	}
}

func (f *findings) err() error {
	if len(f.list) == 0 {
		return nil
	}
	sortFindings(f.list)
	return &Error{f.list}
}
