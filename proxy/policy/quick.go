package policy

import (
	"bytes"
	"slices"
)

// The YAML library takes most of the time and memory of loading a large
// policy. Nearly every rule file is written in a small part of YAML; quickNode
// reads that part, in one pass, and leaves the rest to the library: see
// docs/design/0011-reading-rules.md.
//
// It reads blocks and lists by indentation, flow lists and blocks, and plain
// and quoted text of one line, with comments. Whatever may mean something else
// to the library, or is wrong, it does not read, so that the library alone says
// what is wrong. FuzzQuick holds the one against the other.

// quickNode reads one document as readNode does, which need not be asked then,
// or reports false. The text has passed checkText. Nothing of the node
// refers to the text.
func quickNode(file string, base int, data []byte) (node, bool) {
	q := quick{file: file, data: data, line: base}
	if !q.content() || q.column == 0 {
		return node{}, false
	}
	n, ok := q.block(1)
	if !ok || q.column != 0 {
		return node{}, false
	}
	return n, true
}

// quick is the state of one pass. Its methods report false when the text is
// none of theirs; the pass ends there.
type quick struct {
	file string
	data []byte

	i     int // the next byte
	line  int // of it
	start int // where the line begins, and one more for each byte up to i that continues a character

	column int // in which the line under way begins; 0: there are no more
	margin int // of flow lists and blocks: no line of theirs begins further left

	items []node // of the lists under way, the innermost last
	pairs []pair // of the blocks under way
	words [256]string
}

// next returns the next byte, 0 at the end.
func (q *quick) next() byte { return q.ahead(0) }

func (q *quick) ahead(n int) byte {
	if q.i+n < len(q.data) {
		return q.data[q.i+n]
	}
	return 0
}

func (q *quick) here() place { return place{q.file, q.line, q.i - q.start + 1} }

func (q *quick) spaces() {
	for q.next() == ' ' {
		q.i++
	}
}

// ends reports whether a plain text or key ends before this byte.
func ends(c byte) bool { return c == ' ' || c == '\n' || c == '\r' || c == 0 }

// content moves from the begin of a line to the content of the first that has
// any.
func (q *quick) content() bool {
	for {
		q.line, q.start = q.line+1, q.i
		q.spaces()
		switch q.next() {
		case 0:
			q.column = 0
			return q.i == len(q.data)
		case '\n', '\r', '#':
			if !q.endLine() {
				return false
			}
		default:
			q.column = q.i - q.start + 1
			return true
		}
	}
}

// endLine takes the rest of a line, which may be a comment, and its end.
func (q *quick) endLine() bool {
	q.spaces()
	if q.next() == '#' {
		if q.i > q.start && q.data[q.i-1] != ' ' {
			return false
		}
		if n := bytes.IndexAny(q.data[q.i:], "\r\n"); n >= 0 {
			q.i += n
		} else {
			q.i = len(q.data)
		}
	}
	switch {
	case q.next() == '\n':
		q.i++
	case q.next() == '\r' && q.ahead(1) == '\n':
		q.i += 2
	default:
		return q.i == len(q.data)
	}
	return true
}

// nextLine ends a line and moves to the content of the next.
func (q *quick) nextLine() bool { return q.endLine() && q.content() }

// dash reports whether an entry of a list begins here.
func (q *quick) dash() bool { return q.next() == '-' && q.ahead(1) == ' ' }

// block reads the list or block that the line under way begins.
func (q *quick) block(depth int) (node, bool) {
	if q.dash() {
		return q.list(depth)
	}
	key, isKey, ok := q.inline(depth)
	if !ok || !isKey {
		return node{}, false
	}
	return q.keys(key, depth)
}

func (q *quick) list(depth int) (node, bool) {
	if depth > maxDepth {
		return node{}, false
	}
	out, column, mark := node{kind: list, at: q.here()}, q.column, len(q.items)
	for q.column == column && q.dash() {
		q.i++
		q.spaces()
		q.margin = column
		item, isKey, ok := q.inline(depth + 1)
		switch {
		case !ok:
			return node{}, false
		case isKey:
			item, ok = q.keys(item, depth+1)
		default:
			ok = q.nextLine()
		}
		if !ok {
			return node{}, false
		}
		q.items = append(q.items, item)
	}
	out.items = q.takeItems(mark)
	return out, q.column <= column
}

// keys reads a block, whose first key is read.
func (q *quick) keys(key node, depth int) (node, bool) {
	if depth > maxDepth {
		return node{}, false
	}
	out, column, mark := node{kind: block, at: key.at}, key.at.column, len(q.pairs)
	for {
		value, ok := q.value(key.at, depth+1)
		if !ok {
			return node{}, false
		}
		q.pairs = append(q.pairs, pair{key.text, key.at, value})
		if q.column < column {
			out.pairs = q.takePairs(mark)
			return out, true
		}
		if q.column > column {
			return node{}, false
		}
		var isKey bool
		if key, isKey, ok = q.inline(depth); !ok || !isKey {
			return node{}, false
		}
	}
}

// value reads what a key stands for, in its line or below.
func (q *quick) value(key place, depth int) (node, bool) {
	q.i++ // the colon
	q.spaces()
	if c := q.next(); c == '#' || ends(c) {
		if !q.nextLine() {
			return node{}, false
		}
		if q.column > key.column || q.column == key.column && q.dash() {
			return q.block(depth)
		}
		return node{at: key}, true
	}
	q.margin = key.column
	n, isKey, ok := q.inline(depth)
	if !ok || isKey || !q.nextLine() {
		return node{}, false
	}
	if n.kind == nothing {
		n.at = key
	}
	return n, true
}

// inline reads what one line can hold, or a flow list or block, and reports
// whether it is a key: then the colon is next.
func (q *quick) inline(depth int) (n node, isKey, ok bool) {
	switch q.next() {
	case '[':
		n, ok = q.flowList(depth)
		return n, false, ok
	case '{':
		n, ok = q.flowBlock(depth)
		return n, false, ok
	case '"', '\'':
		n, ok = q.quoted()
	default:
		n, ok = q.plain()
	}
	return n, ok && q.next() == ':' && ends(q.ahead(1)), ok
}

func (q *quick) flowList(depth int) (node, bool) {
	if depth > maxDepth {
		return node{}, false
	}
	out, mark := node{kind: list, at: q.here()}, len(q.items)
	for first := true; ; first = false {
		more, ok := q.comma(first, ']')
		if !ok {
			return node{}, false
		}
		if !more {
			out.items = q.takeItems(mark)
			return out, true
		}
		item, ok := q.flowValue(depth + 1)
		if !ok {
			return node{}, false
		}
		q.items = append(q.items, item)
	}
}

func (q *quick) flowBlock(depth int) (node, bool) {
	if depth > maxDepth {
		return node{}, false
	}
	out, mark := node{kind: block, at: q.here()}, len(q.pairs)
	for first := true; ; first = false {
		more, ok := q.comma(first, '}')
		if !ok {
			return node{}, false
		}
		if !more {
			if out.pairs = q.takePairs(mark); len(out.pairs) > 0 {
				out.at = out.pairs[0].at
			}
			return out, true
		}
		p, ok := q.flowPair(depth + 1)
		if !ok {
			return node{}, false
		}
		q.pairs = append(q.pairs, p)
	}
}

// comma takes the opening bracket or the comma before an entry of a flow list
// or block, or the closing bracket, and reports whether an entry follows.
func (q *quick) comma(first bool, closing byte) (more, ok bool) {
	if !first {
		if !q.gap() {
			return false, false
		}
		if q.next() == closing {
			q.i++
			return false, true
		}
		if q.next() != ',' {
			return false, false
		}
	}
	q.i++
	if !q.gap() {
		return false, false
	}
	if q.next() == closing {
		q.i++
		return false, true
	}
	return true, true
}

// gap takes spaces, ends of lines and comments between the parts of a flow
// list or block.
func (q *quick) gap() bool {
	q.spaces()
	switch q.next() {
	case '\n', '\r', '#':
		return q.nextLine() && q.column >= q.margin
	}
	return true
}

func (q *quick) flowPair(depth int) (pair, bool) {
	var key node
	var ok bool
	if c := q.next(); c == '"' || c == '\'' {
		key, ok = q.quoted()
	} else {
		key, ok = q.flowPlain(true)
	}
	// A colon without a space behind it is the end of the key to some, and part
	// of it to others.
	if !ok || q.next() != ':' || q.ahead(1) != ' ' {
		return pair{}, false
	}
	q.i++
	q.spaces()
	value, ok := q.flowValue(depth)
	if value.kind == nothing {
		value.at = key.at
	}
	return pair{key.text, key.at, value}, ok
}

func (q *quick) flowValue(depth int) (node, bool) {
	switch q.next() {
	case '[':
		return q.flowList(depth)
	case '{':
		return q.flowBlock(depth)
	case '"', '\'':
		return q.quoted()
	}
	return q.flowPlain(false)
}

// What a byte may be in plain text.
const (
	inner   = 1 << iota // ordinary within it
	opening             // may begin it
	word                // letter, digit, or what no rule of YAML is about
)

var plainBytes = func() (table [256]uint8) {
	for c := byte('!'); c <= '~'; c++ {
		table[c] = inner | opening
	}
	for c := 0x80; c <= 0xff; c++ {
		table[c] = opening
	}
	for _, c := range []byte("?,[]{}&*!|>'\"%@`") {
		table[c] = inner
	}
	table['<'], table['#'], table[':'] = 0, 0, 0 // <<: is a merge key
	for _, c := range []byte("/_.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") {
		table[c] |= word
	}
	return table
}()

// opens reports whether a plain text begins here. What begins with a dash or a
// dot in the first column may be a mark between documents.
func (q *quick) opens() bool {
	c := q.next()
	if (c == '-' || c == '.') && (q.i == q.start || ends(q.ahead(1))) {
		return false
	}
	return plainBytes[c]&opening != 0
}

// plain reads text without quotes outside of flow lists and blocks.
func (q *quick) plain() (node, bool) {
	if !q.opens() {
		return node{}, false
	}
	at, begin := q.here(), q.i
	for {
		for q.i < len(q.data) && plainBytes[q.data[q.i]]&inner != 0 {
			q.i++
		}
		switch c := q.next(); {
		case c == ' ', c == ':' && !ends(q.ahead(1)), c == '#' && q.data[q.i-1] != ' ':
		case c >= 0x80:
			q.character()
			continue
		case c == ':', c == '#', c == '\n', c == '\r', c == 0:
			return q.scalar(at, begin)
		default:
			return node{}, false
		}
		q.i++
	}
}

// flowPlain reads text without quotes in a flow list or block. The library
// takes any colon there for the end of a key, and joinColons mends it: here one
// may stand only between what cannot be mistaken, and in no key.
func (q *quick) flowPlain(isKey bool) (node, bool) {
	if !q.opens() {
		return node{}, false
	}
	at, begin := q.here(), q.i
	for {
		switch c := q.next(); {
		case c >= 0x80:
			q.character()
			continue
		case c == ',', c == ']', c == '}', c == '\n', c == '\r', c == '#' && q.data[q.i-1] == ' ':
			return q.scalar(at, begin)
		case c == ':' && isKey:
			return q.scalar(at, begin)
		case c == ':' && (q.data[q.i-1] == ' ' || plainBytes[q.ahead(1)]&word == 0), c == '[', c == '{':
			return node{}, false
		case c != ' ' && c != ':' && c != '#' && plainBytes[c] == 0:
			return node{}, false
		}
		q.i++
	}
}

// character takes a byte that is not ASCII: columns count characters.
func (q *quick) character() {
	if q.data[q.i]&0xc0 == 0x80 {
		q.start++
	}
	q.i++
}

// scalar returns the plain text that ends here.
func (q *quick) scalar(at place, begin int) (node, bool) {
	raw := bytes.TrimRight(q.data[begin:q.i], " ")
	if c := q.next(); len(raw) < q.i-begin && (c == ':' || c != '#' && ends(c)) {
		// A space before a colon is for the library to judge; with one at the
		// end of a line it counts columns in a way of its own.
		return node{}, false
	}
	n := node{text: q.text(raw), at: at}
	n.kind = resolve(n.text)
	if n.kind == nothing && q.next() != ':' {
		n.text = ""
	}
	return n, true
}

// escapes are those that double-quoted text is likely to hold.
var escapes = map[byte]byte{'"': '"', '\\': '\\', '/': '/', 'n': '\n', 't': '\t'}

// quoted reads text in quotes, of one line.
func (q *quick) quoted() (node, bool) {
	out, quote := node{kind: text, at: q.here(), right: 1}, q.next()
	q.i++
	begin, long := q.i, []byte(nil) // long: the text up to begin, where it is not as in the file
	for {
		c := q.next()
		switch {
		case c >= 0x80:
			q.character()
			continue
		case c < ' ':
			return node{}, false
		case c == quote && (c == '"' || q.ahead(1) != quote):
			if raw := q.data[begin:q.i]; long == nil {
				out.text = q.text(raw)
			} else {
				out.text = string(append(long, raw...))
			}
			q.i++
			return out, true
		case c == quote: // '' is '
			long = append(append(long, q.data[begin:q.i]...), quote)
			q.i++
			begin = q.i + 1
		case c == '\\' && quote == '"':
			means, known := escapes[q.ahead(1)]
			if !known {
				return node{}, false
			}
			long = append(append(long, q.data[begin:q.i]...), means)
			q.i++
			begin = q.i + 1
		}
		q.i++
	}
}

// text returns a string of its own for what stands in the file. The words that
// come again and again share one.
func (q *quick) text(raw []byte) string {
	if len(raw) == 0 {
		return ""
	}
	kept := &q.words[raw[0]^raw[len(raw)-1]<<3^byte(len(raw))<<5]
	if *kept != string(raw) {
		*kept = string(raw)
	}
	return *kept
}

// takeItems takes the entries of a list that is read off the stack.
func (q *quick) takeItems(mark int) []node {
	if mark == len(q.items) {
		return nil
	}
	out := slices.Clone(q.items[mark:])
	q.items = q.items[:mark]
	return out
}

func (q *quick) takePairs(mark int) []pair {
	out := make([]pair, len(q.pairs)-mark)
	copy(out, q.pairs[mark:])
	q.pairs = q.pairs[:mark]
	return out
}
