package policy

import (
	"errors"
	"fmt"
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

// numbered returns a text once for each number below n.
func numbered(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// TestHostileProducts reads texts in which two lists could be multiplied: what
// they take grows with the text. With the product, this test takes minutes or
// all memory.
func TestHostileProducts(t *testing.T) {
	t.Parallel()
	t.Run("unknown groups", func(t *testing.T) {
		t.Parallel()
		const n = 20_000
		_, err := Parse("p", []byte("version: 1\ngroups:\n"+numbered(n, "  known-group-%06d: [spiffe://a/b]\n")+
			"rules:\n- id: a\n  effect: deny\n  from:\n"+numbered(n, "  - group:other-words-%06d\n")))
		if err == nil || !strings.Contains(err.Error(), "and 19900 more") {
			t.Errorf("%v", err)
		}
	})
	t.Run("failing tests", func(t *testing.T) {
		t.Parallel()
		const n = 20_000
		_, err := Parse("p", []byte("version: 1\nrules:\n- {id: z, effect: deny}\n"+numbered(n, "- {id: a%d, effect: deny, from: [spiffe://a/b]}\n")+
			"tests:\n"+strings.Repeat("- {as: spiffe://a/c, expect: allow}\n", n)))
		if err == nil || !strings.Contains(err.Error(), "and 19980 more") {
			t.Errorf("%v", err)
		}
	})
	t.Run("headers", func(t *testing.T) {
		t.Parallel()
		_, err := Parse("p", []byte("version: 1\nrules:\n- id: a\n  effect: deny\n  http:\n    headers:\n"+numbered(100_000, "      h%d: present\n")))
		if err == nil || !strings.Contains(err.Error(), "at most 128 are allowed") {
			t.Errorf("%v", err)
		}
	})
	t.Run("gRPC calls", func(t *testing.T) {
		t.Parallel()
		rule := "effect: deny, grpc: {services: [" + numbered(64, "s%d, ") + "], methods: [" + numbered(64, "m%d, ") + "]}}\n"
		_, err := Parse("p", []byte("version: 1\nrules:\n"+numbered(300, "- {id: r%d, "+rule)))
		if err == nil || !strings.Contains(err.Error(), "more than 1048576 in all rules together") {
			t.Errorf("%v", err)
		}
	})
	t.Run("listeners", func(t *testing.T) {
		t.Parallel()
		const n = 2000
		ids := numbered(8, "spiffe://a/%d, ")
		p, err := Parse("p", []byte("version: 1\nrules: [{id: r, effect: allow, from: ["+ids+"], to: ["+ids+"], on: ["+numbered(n, "l%d, ")+"]}]"))
		if err != nil {
			t.Fatal(err)
		}
		if got := len(p.index.pairs.slots); got > 4*n {
			t.Errorf("room for %d pairs", got)
		}
		for _, c := range []struct {
			from, to, on string
			allow        bool
		}{
			{"spiffe://a/0", "spiffe://a/7", "l0", true},
			{"spiffe://a/7", "spiffe://a/0", "l1999", true},
			{"spiffe://a/7", "spiffe://a/0", "l2000", false},
			{"spiffe://a/8", "spiffe://a/0", "l0", false},
			{"spiffe://a/0", "spiffe://a/8", "l0", false},
		} {
			q := request(c.from, c.to)
			q.Listener = c.on
			var d Decision
			if p.Decide(&q, &d); d.Allow != c.allow {
				t.Errorf("%+v: %+v", c, d)
			}
		}
	})
	t.Run("a word in a comment", func(t *testing.T) {
		t.Parallel()
		var l loader
		l.read("p", []byte("version: 1\n# "+strings.Repeat("effect", 500_000)))
		if cap(l.rules) > 200_000 {
			t.Errorf("room for %d rules", cap(l.rules))
		}
	})
}
