package importer

import (
	"regexp"
	"strconv"
	"strings"
)

// document is a YAML document under construction: keys in the order in which
// they were first set.
type document struct {
	key      string
	value    string      // of a leaf, as it is written
	children []*document // of a block
	isList   bool        // children are elements, their keys are indices
}

// set puts a value under a path such as agent.broker.brokers[0].id. Values are
// texts, numbers, flags, lists of texts, and nil for a block without keys.
func (doc *document) set(path string, v any) {
	at := doc
	for name := range strings.SplitSeq(path, ".") {
		name, index, isList := strings.Cut(name, "[")
		at = at.child(name)
		if isList {
			at.isList = true
			at = at.child(strings.TrimSuffix(index, "]"))
		}
	}
	at.value = written(v)
}

func (doc *document) child(key string) *document {
	for _, c := range doc.children {
		if c.key == key {
			return c
		}
	}
	doc.value = ""
	c := &document{key: key}
	doc.children = append(doc.children, c)
	return c
}

// write writes the keys of a block in block style.
func (doc *document) write(b *strings.Builder) { doc.indented(b, "", "") }

// indented writes a block whose first line begins with first and all others
// with indent.
func (doc *document) indented(b *strings.Builder, first, indent string) {
	for _, c := range doc.children {
		b.WriteString(first)
		first = indent
		b.WriteString(written(c.key))
		switch {
		case len(c.children) == 0:
			b.WriteString(": " + c.value + "\n")
		case c.isList:
			b.WriteString(":\n")
			for _, e := range c.children {
				e.indented(b, indent+"  - ", indent+"    ")
			}
		default:
			b.WriteString(":\n")
			c.indented(b, indent+"  ", indent+"  ")
		}
	}
}

// written is a value in YAML.
func written(v any) string {
	switch v := v.(type) {
	case bool:
		return strconv.FormatBool(v)
	case int64:
		return strconv.FormatInt(v, 10)
	case string:
		return quoted(v)
	case []string:
		items := make([]string, len(v))
		for i, s := range v {
			items[i] = quoted(s)
		}
		return "[" + strings.Join(items, ", ") + "]"
	}
	return "{}"
}

// plain is text that YAML takes for text in any place, of more than one
// letter; words that YAML takes for something else are all in reserved.
var (
	plain    = regexp.MustCompile(`^[A-Za-z/][A-Za-z0-9._/-]+$`)
	reserved = regexp.MustCompile(`(?i)^(true|false|null|yes|no|on|off|nan|inf)$`)
)

// quoted is text in YAML. Go's escapes are among those of a double-quoted text
// of YAML (1.2, 5.7).
func quoted(s string) string {
	if plain.MatchString(s) && !reserved.MatchString(s) {
		return s
	}
	return strconv.Quote(s)
}

// get returns the key at a path, if it was set.
func (doc *document) get(path string) (*document, bool) {
	for name := range strings.SplitSeq(path, ".") {
		var found *document
		for _, c := range doc.children {
			if c.key == name {
				found = c
			}
		}
		if doc = found; doc == nil {
			return nil, false
		}
	}
	return doc, true
}
