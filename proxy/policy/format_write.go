package policy

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// writer lays elements out.
type writer struct{ buf *bytes.Buffer }

func (w *writer) line(s string) {
	w.buf.WriteString(s)
	w.buf.WriteByte('\n')
}

// gap writes the empty line between sections.
func (w *writer) gap() {
	if w.buf.Len() > 0 && !bytes.HasSuffix(w.buf.Bytes(), []byte("\n\n")) {
		w.line("")
	}
}

func (w *writer) comments(list []string, indent int) {
	for _, c := range list {
		if c == "" {
			w.line("")
			continue
		}
		w.line(spaces(indent) + c)
	}
}

func spaces(n int) string { return strings.Repeat(" ", n) }

// section writes a top-level key, whose entries always have their own lines.
func (w *writer) section(s *section) {
	if s.entries == 0 {
		w.body(&s.element, "", 0, nil, nil)
		return
	}
	w.line(quoteKey(s.key) + ":" + s.behind())
	w.buf.Write(s.body.Bytes())
	w.comments(s.foot, indentStep)
}

// element writes an entry, a pair or an item, its comments first.
func (w *writer) element(e *element, indent int, f *form) {
	w.comments(lift(e, indent, f), indent)
	w.body(e, spaces(indent), indent, f, nil)
}

// lift takes off the comments that stand above the first line of an element.
// That of an item may begin with the first of its children, whose comments
// have no other place then.
func lift(e *element, indent int, f *form) []string {
	head := e.head
	if e.item && len(e.children) > 0 {
		if _, ok := oneLine(e, indent, f); !ok {
			child := &e.children[0]
			if e.side != "" {
				head = append(head, e.side)
			}
			head = append(head, lift(child, indent+indentStep, f.of(child.key))...)
			e.side = ""
		}
	}
	e.head = nil
	return head
}

// body writes an element behind what is in its line already. in is the form of
// the block that a pair is of.
func (w *writer) body(e *element, lead string, indent int, f, in *form) {
	mark := lead + "-"
	if !e.item {
		mark = lead + quoteKey(e.key) + ":"
	}
	if lines := prose(e, indent, in); lines != nil {
		w.line(mark + " " + lines[0] + e.behind())
		for _, line := range lines[1:] {
			if line != "" {
				line = spaces(indent+indentStep) + line
			}
			w.line(line)
		}
		return
	}
	if value, ok := oneLine(e, indent, f); ok {
		if value != "" {
			value = " " + value
		}
		w.line(mark + value + e.behind())
		w.comments(e.foot, indent+indentStep)
		return
	}
	children := e.children
	if e.item {
		child := &children[0]
		w.body(child, mark+" ", indent+indentStep, f.of(child.key), f)
		children = children[1:]
	} else {
		w.line(mark + e.behind())
	}
	for i := range children {
		child := &children[i]
		w.comments(lift(child, indent+indentStep, f.of(child.key)), indent+indentStep)
		w.body(child, spaces(indent+indentStep), indent+indentStep, f.of(child.key), f)
	}
	w.comments(e.foot, indent+indentStep)
}

// behind returns the comment for the end of an element's first line. Two spaces
// before a comment are what linters ask for.
func (e *element) behind() string {
	if e.side == "" {
		return ""
	}
	return "  " + e.side
}

// oneLine returns the value of an element as it stands behind the key or dash,
// "" for nothing, if it may stand there and there is room.
func oneLine(e *element, indent int, f *form) (string, bool) {
	if e.kind != list && e.kind != block {
		if e.kind == nothing && !e.item {
			return "", true
		}
		return scalar(e), true
	}
	if len(e.children) > 0 && f.apart() {
		return "", false
	}
	room := f.most() - indent - 2
	if !e.item {
		room -= utf8.RuneCountInString(quoteKey(e.key))
	}
	value, ok := appendFlow(nil, e, room)
	return string(value), ok || len(e.children) == 0
}

// appendFlow appends a value in brackets; false if it has comments in it, or
// more characters than there is room for.
func appendFlow(b []byte, e *element, room int) ([]byte, bool) {
	if e.kind != list && e.kind != block {
		b = append(b, scalar(e)...)
		return b, utf8.RuneCount(b) <= room
	}
	brackets := "[]"
	if e.kind == block {
		brackets = "{}"
	}
	b = append(b, brackets[0])
	for i := range e.children {
		child := &e.children[i]
		if len(child.head)+len(child.foot) > 0 || child.side != "" {
			return b, false
		}
		if i > 0 {
			b = append(b, ", "...)
		}
		if e.kind == block {
			b = append(append(b, quoteKey(child.key)...), ": "...)
		}
		var ok bool
		if b, ok = appendFlow(b, child, room); !ok {
			return b, false
		}
	}
	b = append(b, brackets[1])
	return b, utf8.RuneCount(b) <= room
}

func scalar(e *element) string {
	switch e.kind {
	case nothing:
		return "null"
	case text:
		return quote(e.text)
	}
	return e.text
}

// notText are plain text to YAML 1.2 and something else to YAML 1.1.
var notText = []string{"y", "n", "yes", "no", "on", "off", "true", "false", "null"}

// quoteKey returns a key as it is written. "on" is one of the language's own.
func quoteKey(s string) string {
	if s == "on" {
		return s
	}
	if strings.HasPrefix(s, groupPrefix) {
		return doubleQuote(s)
	}
	return quote(s)
}

// quote returns text that every YAML reader takes for that text: words as they
// are, all else in quotes.
func quote(s string) string {
	switch {
	case isPlain(strings.TrimPrefix(s, groupPrefix)):
		return s
	case strings.ContainsAny(s, `"\`) && !strings.Contains(s, "'") && isPrintable(s):
		return "'" + s + "'"
	}
	return doubleQuote(s)
}

func doubleQuote(s string) string {
	out := []byte{'"'}
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			out = append(out, '\\', byte(c))
		case c == '\n':
			out = append(out, `\n`...)
		case c == '\t':
			out = append(out, `\t`...)
		case unicode.IsPrint(c):
			out = utf8.AppendRune(out, c)
		default:
			out = appendEscape(out, c)
		}
	}
	return string(append(out, '"'))
}

// appendEscape appends a character as the escapes of YAML 1.1 and 1.2 have it.
func appendEscape(b []byte, c rune) []byte {
	letter, digits := byte('U'), 8
	if c <= 0xff {
		letter, digits = 'x', 2
	} else if c <= 0xffff {
		letter, digits = 'u', 4
	}
	code := strconv.FormatInt(int64(c), 16)
	b = append(b, '\\', letter)
	b = append(b, strings.Repeat("0", digits-len(code))...)
	return append(b, code...)
}

// isPlain reports whether text needs no quotes, in brackets and out of them:
// it begins with a letter, and has only letters, digits, some marks and single
// spaces.
func isPlain(s string) bool {
	if s == "" || slices.Contains(notText, strings.ToLower(s)) {
		return false
	}
	for i := range len(s) {
		c := s[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		switch {
		case letter || i > 0 && (c >= '0' && c <= '9' || strings.IndexByte("_-./", c) >= 0):
		case c == ' ' && i > 0 && i < len(s)-1 && s[i-1] != ' ':
		default:
			return false
		}
	}
	return true
}

func isPrintable(s string) bool {
	return strings.IndexFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) < 0
}

// prose returns the lines of a text that is better read as lines than as one,
// the first with the mark of how they are joined; nil where there is no need,
// or no way.
func prose(e *element, indent int, in *form) []string {
	if e.kind != text || !in.isProse(e.key) || len(e.foot) > 0 {
		return nil
	}
	body, mark := e.text, "|-"
	if end, ok := strings.CutSuffix(body, "\n"); ok {
		body, mark = end, "|"
	}
	lines := strings.Split(body, "\n")
	for i, line := range lines {
		if !isPrintable(line) || strings.HasSuffix(line, " ") || (i == 0 || i == len(lines)-1) && line == "" {
			return nil
		}
	}
	if strings.HasPrefix(body, " ") {
		return nil
	}
	room := lineWidth - indent - indentStep
	switch {
	case len(lines) > 1 || mark == "|":
	case utf8.RuneCountInString(quoteKey(e.key)+quote(body)) > room:
		lines, mark = fold(body, room), ">-"
	case strings.Contains(body, `"`) && strings.Contains(body, "'"):
	default:
		return nil
	}
	return append([]string{mark}, lines...)
}

// fold breaks a line at single spaces, which the reader puts back.
func fold(s string, room int) []string {
	var lines []string
	for start := 0; ; {
		end, width := -1, 0
		for i, c := range s[start:] {
			i += start
			if c == ' ' && i > start && s[i-1] != ' ' && s[i+1] != ' ' {
				if end >= 0 && width > room {
					break
				}
				end = i
			}
			width++
		}
		if end < 0 || len(s)-start <= utf8.UTFMax*room && utf8.RuneCountInString(s[start:]) <= room {
			return append(lines, s[start:])
		}
		lines = append(lines, s[start:end])
		start = end + 1
	}
}
