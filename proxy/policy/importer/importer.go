// Package importer turns the access rules of other products into a rule file
// that means exactly what they mean:
//
//	r := importer.Istio(files, importer.IstioOptions{TrustDomains: []string{"example.org"}})
//	if r.Refused(false) { … r.Refusals … }
//	os.Stdout.Write(r.Text)
//
// What the language of package policy cannot say exactly is refused with its
// place and the reason, and never approximated: an importer that is nearly
// right opens a door that nobody looks at. Whether the text loads is asked by
// the caller, with policy.Parse.
//
// All three products decide at the end that is called. So do the rules: they
// carry `at: inbound`, and one rule more says that the calling end asks nothing.
package importer

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// MaxSize bounds what is imported at once, in bytes.
const MaxSize = 16 << 20

// The bounds of what is made of it. The language has no need of more, and the
// products themselves take less in one object.
const (
	maxRules  = 50_000
	maxValues = 1024 // of one list
	maxWhen   = 4096 // bytes of a CEL text
	maxShown  = 1000 // refusals
	maxNotes  = 200
)

// Input is one file.
type Input struct {
	Name string // for messages
	Data []byte
}

// Result is what an import gave.
type Result struct {
	// Text is the rule file. It holds what can be said; what was refused is in
	// it as comments.
	Text []byte
	// Refusals are what cannot be said, by file and line.
	Refusals []Refusal
}

// Refused reports whether the text must not be used. With partial, only
// refusals count without which the text would allow more than the input.
func (r *Result) Refused(partial bool) bool {
	return slices.ContainsFunc(r.Refusals, func(f Refusal) bool { return !partial || f.Widens })
}

// Refusal is one thing that cannot be said exactly, or is no valid input.
type Refusal struct {
	File         string
	Line, Column int    // from 1; 0 where the whole file is meant
	Object       string // like AuthorizationPolicy shop/orders; empty where none is meant
	Path         string // the key in it, like spec.rules[0].from
	Msg          string // why, and what to do

	// Widens says that leaving it out could allow what the input denies.
	Widens bool
}

// String returns "file:line:column: object: path: message".
func (r *Refusal) String() string {
	where := r.File
	if r.Line > 0 {
		where = fmt.Sprintf("%s:%d:%d", r.File, r.Line, r.Column)
	}
	parts := []string{where, r.Object, r.Path, r.Msg}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), ": ")
}

// place is where something stands, lines and columns from 1.
type place struct {
	file         string
	line, column int
}

// draft gathers what becomes a Result.
type draft struct {
	notes    []string // of the header, a paragraph each
	groups   []group
	rules    []rule
	refusals []Refusal
	dropped  int
	widens   bool // of what was dropped
}

type group struct {
	name     string
	patterns []string
}

// noteHTTP is what whoever imports rules for HTTP must know of listeners.
const noteHTTP = "Some of these rules ask for HTTP. At a tcp listener, which sees no HTTP, " +
	"such an allow never matches at the inbound end, and such a deny matches whatever is asked."

func (d *draft) note(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); len(d.notes) < maxNotes && !slices.Contains(d.notes, text) {
		d.notes = append(d.notes, text)
	}
}

func (d *draft) refuse(r Refusal) {
	if len(d.refusals) == maxShown {
		d.dropped++
		d.widens = d.widens || r.Widens
		return
	}
	d.refusals = append(d.refusals, r)
}

// piece is what is taken or refused as one: a rule of the input.
type piece struct {
	draft   *draft
	object  string
	widens  bool // to leave it out
	refused bool
}

func (p *piece) refuse(at place, path, format string, args ...any) {
	p.refused = true
	p.draft.refuse(Refusal{File: at.file, Line: at.line, Column: at.column, Object: p.object, Path: path, Msg: fmt.Sprintf(format, args...), Widens: p.widens})
}

// result ends the import.
func (d *draft) result(product string) *Result {
	slices.SortStableFunc(d.refusals, func(a, b Refusal) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if d.dropped > 0 {
		d.refusals = append(d.refusals, Refusal{Msg: fmt.Sprintf("and %d more", d.dropped), Widens: d.widens})
	}
	if slices.ContainsFunc(d.rules, func(r rule) bool { return r.asksHTTP() }) {
		d.notes = append(d.notes, noteHTTP) // however many there are
	}
	return &Result{Text: d.text(product), Refusals: d.refusals}
}

// fits refuses inputs that are too large together.
func (d *draft) fits(files []Input) bool {
	size := 0
	for i := range files {
		if size += len(files[i].Data); size > MaxSize {
			d.refuse(Refusal{File: files[i].Name, Widens: true, Msg: fmt.Sprintf("too large: %d MiB can be imported at once", MaxSize>>20)})
			return false
		}
	}
	return true
}

// clip shortens what a file can make as long as it likes, and shows no control
// characters.
func clip(s string) string {
	const most = 80
	s = strings.ToValidUTF8(s[:min(len(s), 4*most)], "\ufffd")
	s = strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 || c == 0x2028 || c == 0x2029 || c == 0xfeff {
			return '\ufffd'
		}
		return c
	}, s)
	runes := []rune(s)
	if len(runes) <= most {
		return s
	}
	return string(runes[:most]) + "…"
}
