package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// Format returns a rule file in its canonical form: sections and keys in the
// order of the language, one layout, one way to quote. What the file says
// stays the same for Parse, and so does the order of rules, tests and the
// items of lists; comments stay with what they stood at. Formatting the result
// changes nothing more.
//
// A file that does not load is formatted too, unknown keys behind the known,
// as long as it is a YAML document with a block of keys. The error is an
// Errors, as that of Parse; name stands for the file in it. Like those of a
// policy, the text may have MaxSize bytes.
func Format(name string, data []byte) ([]byte, error) {
	if len(data) > MaxSize {
		return nil, Errors{tooLarge(name)}
	}
	var f formatter
	if problem := f.read(name, data); problem != nil {
		return nil, Errors{problem}
	}
	out := f.write()
	if len(out) > MaxSize {
		return nil, Errors{tooLarge(name)}
	}
	// Who formats trusts that nothing is lost, so it is looked at once more.
	var check formatter
	check.discard = true
	if problem := check.read(name, out); problem != nil || check.says() != f.says() {
		return nil, Errors{{File: name, Line: 1, Column: 1, Msg: "has no canonical form that says the same; leave it as it is, and report it with the file"}}
	}
	return out, nil
}

// Sections are the top-level keys by which a file is known to hold rules: files
// of other kinds have a version too.
func Sections() []string {
	return slices.DeleteFunc(keysOf(topKeys), func(key string) bool { return key == "version" })
}

// HasSections reports whether a file that Format takes has any of Sections:
// one that has none is likely of another kind, and none of ours to rewrite.
func HasSections(data []byte) bool {
	f, known := formatter{discard: true}, Sections()
	return len(data) <= MaxSize && f.read("", data) == nil &&
		slices.ContainsFunc(f.sections, func(s section) bool { return slices.Contains(known, s.key) })
}

// formatter takes a file in, piece by piece, and keeps what is to be written.
type formatter struct {
	discard bool // only the fingerprint is wanted

	head, foot []string // comments of the file
	sections   []section
	comments   uint64
}

// section is a top-level key. Its entries are written as they are read: what
// the library needs for a piece can go then.
type section struct {
	element // of the key, without its children
	body    bytes.Buffer
	entries int
	sum     uint64
}

// read takes a file in.
func (f *formatter) read(name string, data []byte) *Error {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if problem := checkText(name, data); problem != nil {
		return problem
	}
	pieces, problem := split(name, data)
	if problem != nil {
		return problem
	}
	spaced := false
	for i := range pieces {
		if problem := f.piece(name, &pieces[i], spaced); problem != nil {
			return problem
		}
		spaced = endsEmpty(pieces[i].text)
	}
	return nil
}

// endsEmpty reports whether the last line of a text is empty.
func endsEmpty(text []byte) bool {
	text = bytes.TrimSuffix(text, []byte("\n"))
	return len(bytes.TrimSpace(text[bytes.LastIndexByte(text, '\n')+1:])) == 0
}

func (f *formatter) piece(name string, p *piece, spaced bool) *Error {
	if p.key == "" {
		return f.document(name, p.base, p.text, spaced)
	}
	if p.intro != nil {
		if problem := f.document(name, p.introBase, p.intro, spaced); problem != nil {
			return problem
		}
		spaced = false
	}
	s, problem := f.source(name, p.base, p.text, spaced)
	if problem != nil {
		return problem
	}
	to := &f.sections[len(f.sections)-1]
	root := &s.root
	if to.kind == nothing {
		to.kind, to.text = root.kind, root.text
	} else if root.kind != nothing && (root.kind != to.kind || root.kind != list && root.kind != block) {
		return &Error{File: name, Line: root.at.line, Column: root.at.column, Path: clip(p.key), Msg: "this does not belong to what is around it; are indentation, brackets and quotes right?"}
	}
	f.entries(to, root.children)
	to.foot = append(to.foot, root.foot...)
	return nil
}

func (f *formatter) source(name string, base int, text []byte, spaced bool) (*source, *Error) {
	s, problem := readSource(name, base, text, spaced)
	if problem != nil {
		return nil, problem
	}
	for i := range s.comments {
		f.comments += mix(s.comments[i].text, 0, 0)
	}
	s.attach()
	return s, nil
}

// document takes in a text that holds its keys itself.
func (f *formatter) document(name string, base int, text []byte, spaced bool) *Error {
	s, problem := f.source(name, base, text, spaced)
	if problem != nil {
		return problem
	}
	root := &s.root
	if root.kind != nothing && root.kind != block {
		return &Error{File: name, Line: root.at.line, Column: root.at.column, Msg: fmt.Sprintf("a policy file is a block of keys (%s), not %s", strings.Join(keysOf(topKeys), ", "), (&node{kind: root.kind, text: root.text}).describe())}
	}
	// Comments that no key follows in this piece stand above that of the next.
	waiting := f.foot
	f.foot = nil
	for i := range root.children {
		e := root.children[i]
		if i == 0 && len(waiting) > 0 {
			if e.spaced {
				waiting = append(waiting, "")
			}
			e.head, waiting = append(waiting, e.head...), nil
		}
		if len(f.sections) == 0 {
			f.takeHead(&e)
		}
		children := e.children
		e.children = nil
		f.sections = append(f.sections, section{element: e})
		f.entries(&f.sections[len(f.sections)-1], children)
	}
	if f.foot = append(waiting, root.foot...); len(f.foot) > 0 && f.foot[0] == "" {
		f.foot = f.foot[1:]
	}
	return nil
}

// takeHead makes the comments at the top of the file, down to the last empty
// line, those of the file: they stay there when the first key does not.
func (f *formatter) takeHead(e *element) {
	for i := len(e.head) - 1; i >= 0; i-- {
		if e.head[i] == "" {
			f.head, e.head = slices.Clone(e.head[:i]), e.head[i+1:]
			return
		}
	}
}

// entries takes in entries of a section.
func (f *formatter) entries(s *section, list []element) {
	form := documentForm.of(s.key)
	w := writer{buf: &s.body}
	for i := range list {
		e := &list[i]
		sum := e.fingerprint()
		if s.kind == block {
			s.sum += sum
		} else {
			s.sum = mix("", s.sum, sum)
		}
		s.entries++
		if f.discard {
			continue
		}
		e.arrange(form.of(e.key))
		if s.entries > 1 && (e.spaced || form.of(e.key).apart()) {
			w.line("")
		}
		w.element(e, indentStep, form.of(e.key))
	}
}

// says returns the fingerprint of the file.
func (f *formatter) says() fingerprint {
	sum := fingerprint{comments: f.comments}
	for i := range f.sections {
		s := &f.sections[i]
		sum.tree += mix("", s.fingerprint(), s.sum)
	}
	return sum
}

// write returns the file.
func (f *formatter) write() []byte {
	var out bytes.Buffer
	w := writer{buf: &out}
	w.comments(f.head, 0)
	slices.SortStableFunc(f.sections, func(a, b section) int { return documentForm.rank(a.key) - documentForm.rank(b.key) })
	for i := range f.sections {
		s := &f.sections[i]
		w.gap()
		w.comments(s.head, 0)
		w.section(s)
	}
	if len(f.foot) > 0 {
		w.gap()
		w.comments(f.foot, 0)
	}
	return out.Bytes()
}

// form is how a value of the language is written. A nil form is that of a
// value that the language does not know.
type form struct {
	keys  []string         // of a block, in their order; others follow as they are
	inner map[string]*form // of the values of keys
	each  *form            // of the values of other keys, or of the items of a list
	long  bool             // never in one line, and an empty line before it
	width int              // a line may have; 0: lineWidth
	prose []string         // keys whose text may take several lines
}

const (
	indentStep = 2
	lineWidth  = 100 // in characters, without the comment at its end
	testWidth  = 120 // a test is read best as one line
)

var (
	ruleForm = &form{
		keys:  keysOf(ruleKeys),
		inner: map[string]*form{"http": {keys: httpKeyNames}, "grpc": {keys: grpcKeyNames}},
		long:  true,
		prose: []string{"description", "when"},
	}
	limitForm    = &form{keys: limitKeyNames}
	testForm     = &form{keys: testKeyNames, width: testWidth}
	documentForm = &form{
		keys: keysOf(topKeys),
		inner: map[string]*form{
			"trust_domains": {each: &form{keys: keysOf(ceilingKeys)}},
			"rules":         {each: ruleForm},
			"limits":        {each: limitForm},
			"revoked":       {each: &form{keys: keysOf(revokedKeys)}},
			"tests":         {each: testForm},
		},
	}
)

// of returns the form of the value of a key, or of an item, which has none.
func (f *form) of(key string) *form {
	if f == nil {
		return nil
	}
	if inner := f.inner[key]; inner != nil {
		return inner
	}
	return f.each
}

// rank returns where a key comes among the others.
func (f *form) rank(key string) int {
	if f == nil {
		return 0
	}
	if i := slices.Index(f.keys, key); i >= 0 {
		return i
	}
	return len(f.keys)
}

func (f *form) apart() bool { return f != nil && f.long }

func (f *form) most() int {
	if f == nil || f.width == 0 {
		return lineWidth
	}
	return f.width
}

func (f *form) isProse(key string) bool { return f != nil && slices.Contains(f.prose, key) }

// arrange puts the keys of blocks into their order.
func (e *element) arrange(f *form) {
	if e.kind == block {
		slices.SortStableFunc(e.children, func(a, b element) int { return f.rank(a.key) - f.rank(b.key) })
	}
	for i := range e.children {
		e.children[i].arrange(f.of(e.children[i].key))
	}
}
