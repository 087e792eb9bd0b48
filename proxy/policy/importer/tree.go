package importer

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

type kind uint8

const (
	nothing kind = iota // null
	text
	number // or truth: what is no text
	list
	block // of keys
)

// node is a value of a document, be it YAML, JSON or HCL.
type node struct {
	kind  kind
	text  string // of a scalar
	at    place
	items []node // of a list
	pairs []pair // of a block
}

// pair is a key of a block and its value.
type pair struct {
	key   string
	at    place
	value node
}

// maxDepth is how deep lists and blocks may stand in each other: the readers
// recurse once for each.
const maxDepth = 64

// describe says what a node is, for a person.
func (n *node) describe() string {
	switch n.kind {
	case nothing:
		return "nothing"
	case text:
		return fmt.Sprintf("%q", clip(n.text))
	case number:
		return clip(n.text)
	case list:
		return "a list"
	}
	return "a block of keys"
}

// child returns the value of a key; a node of kind nothing where it is not
// there.
func (n *node) child(key string) *node {
	for i := range n.pairs {
		if n.pairs[i].key == key {
			return &n.pairs[i].value
		}
	}
	return &node{at: n.at}
}

// keys returns the values of a block by key, and refuses keys that are not
// known, and keys that are there twice. Values of kind nothing are left out,
// as the products do.
func (p *piece) keys(n *node, path string, known ...string) map[string]*node {
	values := map[string]*node{}
	if n.kind == nothing {
		return values
	}
	if n.kind != block {
		p.refuse(n.at, path, "must be a block of keys, not %s", n.describe())
		return values
	}
	for i := range n.pairs {
		entry := &n.pairs[i]
		switch {
		case !slices.Contains(known, entry.key):
			p.refuse(entry.at, join(path, clip(entry.key)), "unknown key: what it means is not known, so nothing can be said of the rest; known: %s", strings.Join(known, ", "))
		case values[entry.key] != nil:
			p.refuse(entry.at, join(path, entry.key), "is here twice")
		case entry.value.kind != nothing:
			values[entry.key] = &entry.value
		}
	}
	return values
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// items returns the values of a list, none where it is not there.
func (p *piece) items(n *node, path string) []node {
	switch {
	case n == nil:
		return nil
	case n.kind != list:
		p.refuse(n.at, path, "must be a list, not %s", n.describe())
		return nil
	case len(n.items) > maxValues:
		p.refuse(n.at, path, "more than %d values in one list", maxValues)
		return nil
	}
	return n.items
}

// word is a text with its place.
type word struct {
	text string
	at   place
}

// words returns the texts of a list. An empty list is refused: it looks like
// nobody, and means anybody.
func (p *piece) words(n *node, path string) []word {
	if n == nil {
		return nil
	}
	items := p.items(n, path)
	if n.kind == list && len(n.items) == 0 {
		p.refuse(n.at, path, "an empty list asks for nothing: take the key out, if that is meant")
	}
	var words []word
	for i := range items {
		switch item := &items[i]; {
		case item.kind != text:
			p.refuse(item.at, fmt.Sprintf("%s[%d]", path, i), "must be text, not %s", item.describe())
		case item.text == "":
			p.refuse(item.at, fmt.Sprintf("%s[%d]", path, i), "is empty")
		default:
			words = append(words, word{item.text, item.at})
		}
	}
	return words
}

// word returns a text; "" where it is not there.
func (p *piece) word(n *node, path string) string {
	switch {
	case n == nil:
		return ""
	case n.kind != text:
		p.refuse(n.at, path, "must be text, not %s", n.describe())
		return ""
	}
	return n.text
}

// read turns a file into its documents. The formats are told by name, and
// where it says nothing by the text.
func (d *draft) read(in *Input, hcl bool) []node {
	fail := func(at place, message string) []node {
		d.refuse(Refusal{File: in.Name, Line: at.line, Column: at.column, Msg: message, Widens: true})
		return nil
	}
	if at, problem := checkText(in); problem != "" {
		return fail(at, problem)
	}
	reader := readYAML
	switch format(in, hcl) {
	case "json":
		reader = readJSON
	case "hcl":
		reader = readHCL
	}
	documents, at, problem := guarded(reader, in)
	if problem != "" {
		return fail(at, problem)
	}
	return documents
}

// guarded turns a panic of a reader into an error: a slice index that a foreign
// parser gets wrong must cost the import alone.
func guarded(reader func(*Input) ([]node, place, string), in *Input) (documents []node, at place, problem string) {
	defer func() {
		if recover() != nil {
			documents, at, problem = nil, place{in.Name, 1, 1}, "cannot be read: the parser gave up on it"
		}
	}()
	return reader(in)
}

func format(in *Input, hcl bool) string {
	name := strings.ToLower(in.Name)
	for _, suffix := range []string{".json", ".yaml", ".yml", ".hcl"} {
		if strings.HasSuffix(name, suffix) && (hcl || suffix != ".hcl") {
			return strings.Replace(suffix[1:], "yml", "yaml", 1)
		}
	}
	content := strings.TrimSpace(string(in.Data))
	switch {
	case strings.HasPrefix(content, "{") || strings.HasPrefix(content, "["):
		return "json"
	case hcl && !strings.HasPrefix(content, "apiVersion:") && !strings.Contains(content, "\napiVersion:") && !strings.Contains(content, "- apiVersion:"):
		return "hcl"
	}
	return "yaml"
}

// checkText refuses bytes that no text file holds, so that messages can show
// what a file says.
func checkText(in *Input) (place, string) {
	line, column := 1, 1
	for i := 0; i < len(in.Data); {
		c, size := utf8.DecodeRune(in.Data[i:])
		switch {
		case c == utf8.RuneError && size == 1:
			return place{in.Name, line, column}, "not UTF-8 text"
		case c < ' ' && c != '\n' && c != '\r' && c != '\t', c >= 0x7f && c < 0xa0, c == 0xfeff:
			return place{in.Name, line, column}, fmt.Sprintf("control character %U", c)
		case c == '\n':
			line, column = line+1, 0
		}
		i += size
		column++
	}
	return place{}, ""
}
