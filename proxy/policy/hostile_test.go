package policy

import (
	"strings"
	"testing"
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
