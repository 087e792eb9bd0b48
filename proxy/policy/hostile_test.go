package policy

import (
	"errors"
	"strings"
	"testing"
	"unicode"
)

// TestHostileText reads texts that are cheap to write and dear to parse: each
// is refused with few words, whatever the depth, length or number.
func TestHostileText(t *testing.T) {
	const n = 1 << 17
	rep := strings.Repeat
	for name, text := range map[string]string{
		"brackets":     rep("[", n),
		"braces":       rep("{a: ", n),
		"dashes":       rep("- ", n),
		"questions":    rep("? ", n),
		"colons":       "groups: {a: [" + rep(":", n) + "]}",
		"more colons":  "groups: {a: [" + rep("a:", n) + "]}",
		"open quote":   "a: \"" + rep("x\n ", n),
		"laughs":       "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
		"anchors":      rep("&a ", n),
		"tags":         rep("!a ", n),
		"documents":    rep("---\n", n),
		"one key":      rep("a", n) + ": 1",
		"same key":     "{" + rep("a: 1,", n/16) + "}",
		"empty lines":  rep("\n", n),
		"large entry":  "rules:\n  - |\n" + rep("    x\n", pieceMax/6),
		"large scalar": "rules: " + rep("x", pieceMax),
		"long ID":      "version: 1\nrules: [{id: a, effect: deny, from: ['spiffe://a/" + rep("x", n) + "']}]",
		"long id":      "version: 1\nrules: [{id: " + rep("x", n) + ", effect: deny}]",
		"long key":     "version: 1\nrules: [{" + rep("x", n) + ": 1}]",
		"long group":   "version: 1\nrules: [{id: a, effect: deny, from: ['group:" + rep("x", n) + "']}]",
	} {
		p, err := Parse("p", []byte(text))
		if p != nil || err == nil {
			t.Errorf("%s is accepted", name)
			continue
		}
		for line := range strings.Lines(err.Error()) {
			if len(line) > 512 {
				t.Errorf("%s: a message of %d bytes", name, len(line))
			}
		}
	}
}

// TestHostileEscapes: what the escapes of YAML make of a key or a text forges
// no line and moves no cursor where it is shown.
func TestHostileEscapes(t *testing.T) {
	t.Parallel()
	const hostile = `\e[31mred\nlevel=info msg=forged\u009b1m\u202e`
	for _, text := range []string{
		"version: 1\n\"" + hostile + "\": 1\n",
		"version: 1\nrules: [{id: a, effect: deny, \"" + hostile + "\": 1}]\n",
		"version: 1\ntrust_domains: {a: {\"" + hostile + "\": 1, \"" + hostile + "\": 1}}\n",
		"version: 1\nrules: [{id: a, effect: deny, http: {headers: {\"" + hostile + "\": present}}}]\n",
		"version: 1\nrules: [{id: a, effect: deny, when: \"foo" + hostile + "\"}]\n",
		"version: 1\nrules: [{id: a, effect: deny, from: [\"group:" + hostile + "\"]}]\n",
		"version: 1\nrules: [{id: a, effect: deny}]\ntests: [{as: spiffe://a/b, expect: allow, name: \"" + hostile + "\"}]\n",
		"version: 1\nrules: [{id: a, effect: deny}, {id: b, effect: deny, when: \"\\nsource.port == 1\\n|| from.id == '\\e[31m'\"}]\ntests: [{as: spiffe://a/b, expect: deny, rule: b}]\n",
		`{version: 1, rules: [{id: "a\u009bb", effect: deny}]}`,
		`{version: 1, rules: [{id: "a\u202eb", effect: deny}]}`,
		`{version: 1, rules: [{id: "a\u2028b", effect: deny}]}`,
		`{version: 1, rules: [{id: a, effect: deny, on: ["a\u00a0b"]}]}`,
	} {
		_, err := Parse("p", []byte(text))
		var all Errors
		if !errors.As(err, &all) {
			t.Errorf("%s: %v", text, err)
			continue
		}
		for _, e := range all {
			if strings.ContainsFunc(e.Error(), func(c rune) bool { return !unicode.IsPrint(c) }) {
				t.Errorf("%s: %q", text, e.Error())
			}
		}
	}
}
