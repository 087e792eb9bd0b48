// Package report writes what a check of files found, and how tests went, for
// people and for machines that gate a change on it.
//
//	findings := report.Findings{Version: version, Dir: wd, Files: files, List: list}
//	if err := findings.Write(os.Stdout, "sarif"); err != nil {
//		return err
//	}
//
// The same findings are always written as the same bytes, in the order they
// were given. What finds, in which files, and what exit status follows from it
// is for those who use it.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Level says how bad a finding is.
type Level string

// The levels, by the names that SARIF has for them (SARIF 2.1.0 §3.27.10).
const (
	Error   Level = "error"   // what was checked will not work
	Warning Level = "warning" // it works, and likely not as it was meant
	Note    Level = "note"    // it works; worth knowing
)

// AtLeast reports whether l is as bad as least, or worse. A level that is not
// one of the three counts as an error: it must not slip through a gate.
func (l Level) AtLeast(least Level) bool { return l.rank() >= least.rank() }

func (l Level) rank() int {
	switch l {
	case Note:
		return 0
	case Warning:
		return 1
	}
	return 2
}

// Place is a place in a file that a finding refers to.
type Place struct {
	File   string `json:"file"`
	Line   int    `json:"line,omitempty"`   // from 1; 0 where the whole file is meant
	Column int    `json:"column,omitempty"` // in characters, from 1; 0 where the whole line is meant
	Text   string `json:"text"`             // what is there
}

// Finding is one thing that is wrong, or worth a look.
type Finding struct {
	Level   Level   `json:"level"`
	Rule    string  `json:"rule"`             // the kind of finding, in lower case with hyphens; stable, since people silence findings by it
	File    string  `json:"file"`             // empty where no file is meant
	Line    int     `json:"line,omitempty"`   // from 1; 0 where the whole file is meant
	Column  int     `json:"column,omitempty"` // in characters, from 1; 0 where the whole line is meant
	Path    string  `json:"path,omitempty"`   // the key, like rules[3].from[0]; empty where none is meant
	Text    string  `json:"text"`             // what is wrong and what to do
	Related []Place `json:"related,omitempty"`
}

// String returns "file:line:column: level: path: text", in one line.
func (f Finding) String() string {
	return where(f.File, f.Line, f.Column) + string(f.Level) + ": " + printable(f.message())
}

// message returns the text with the key it is about.
func (f *Finding) message() string {
	if f.Path == "" {
		return f.Text
	}
	return f.Path + ": " + f.Text
}

// Rule describes a kind of finding.
type Rule struct {
	ID   string // see Finding.Rule
	Text string // one sentence: what such a finding is about
}

// Findings is what a check found.
type Findings struct {
	Version string    // of the program that checked
	Dir     string    // the working directory, which relative names of files start from; absolute
	Files   []string  // all files that were read, also those without a finding
	Rules   []Rule    // the kinds of finding there are, also those that were not found
	Summary string    // what was found good; text says it when there is no finding
	List    []Finding // in the order they are written
}

// FindingFormats are the formats that Findings.Write knows.
var FindingFormats = []string{"text", "json", "sarif", "junit"}

// Keep drops the findings that are less than the level.
func (f *Findings) Keep(least Level) {
	f.List = slices.DeleteFunc(f.List, func(one Finding) bool { return !one.Level.AtLeast(least) })
}

// Write writes the findings in one of FindingFormats; another is an error.
func (f *Findings) Write(w io.Writer, format string) error {
	switch format {
	case "text":
		return f.text(w)
	case "json":
		return f.json(w)
	case "sarif":
		return f.sarif(w)
	case "junit":
		return f.junit(w)
	}
	return unknownFormat(format, FindingFormats)
}

func unknownFormat(format string, known []string) error {
	last := len(known) - 1
	return fmt.Errorf("format %q: want %s or %s", format, strings.Join(known[:last], ", "), known[last])
}

func (f *Findings) text(w io.Writer) error {
	var b strings.Builder
	for i := range f.List {
		fmt.Fprintln(&b, f.List[i])
		for _, p := range f.List[i].Related {
			fmt.Fprintf(&b, "    %s\n", p)
		}
	}
	if len(f.List) == 0 {
		fmt.Fprintf(&b, "good: %s\n", printable(f.Summary))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// String returns "file:line:column: text", in one line.
func (p Place) String() string { return where(p.File, p.Line, p.Column) + printable(p.Text) }

// json writes an array of findings. Their text begins with the key.
func (f *Findings) json(w io.Writer) error {
	list := slices.Clone(f.List)
	for i := range list {
		list[i].Text = list[i].message()
	}
	if list == nil {
		list = []Finding{} // an array all the same
	}
	return writeJSON(w, list)
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// where returns what a line about a place begins with: as much of
// "file:line:column: " as is known.
func where(file string, line, column int) string {
	switch file = printable(file); {
	case file == "":
		return ""
	case line <= 0:
		return file + ": "
	case column <= 0:
		return fmt.Sprintf("%s:%d: ", file, line)
	}
	return fmt.Sprintf("%s:%d:%d: ", file, line, column)
}

// printable writes what does not print as escapes of Go, so that a text stays
// one line, and nothing that stands in a file can move a terminal's cursor,
// turn the direction of writing, or break XML, which has no way to write most
// control characters (XML 1.0 §2.2).
func printable(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			quoted := fmt.Sprintf("%+q", r) // '\n', '\x1b', '\u202e'
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		i += size
	}
	return b.String()
}
