package policy

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// holdQuick fails when quickNode reads a text in another way than the library,
// or one that the library refuses. It reports whether quickNode read it.
func holdQuick(t *testing.T, data string) bool {
	t.Helper()
	if checkText("q", []byte(data)) != nil {
		return false
	}
	text := []byte(data)
	got, ok := quickNode("q", 7, text)
	if !ok {
		return false
	}
	clear(text) // the node keeps nothing of it
	want, problem := readNode("q", 7, []byte(data))
	if problem != nil {
		t.Errorf("%q: is read, but the library says %v", data, problem)
	} else if !reflect.DeepEqual(got, want) {
		t.Errorf("%q:\ngot  %s\nwant %s", data, show(got), show(want))
	}
	return true
}

// show writes a node with all its places.
func show(n node) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %q@%d:%d", n.kind, n.text, n.at.line, n.at.column)
	for _, item := range n.items {
		fmt.Fprintf(&b, " [%s]", show(item))
	}
	for _, p := range n.pairs {
		fmt.Fprintf(&b, " {%q@%d:%d %s}", p.key, p.at.line, p.at.column, show(p.value))
	}
	return b.String()
}

// quickly are texts that are worth no library.
var quickly = []string{
	"a: b",
	"a: b\nc: d\n",
	"a:\nb: c",
	"a:\n  b:\n  c:\n",
	"a: # why\n  b: c # because\n# done",
	"# first\n\n  \na: b\n\n  # in between\n\nc:\n  # below\n  d: e\n# left\n  f: g\n",
	"- a\n- b",
	"  - a: b\n    c: d\n  - e: f\n",
	"a:\n- b\n- c\nd: e\n",
	"a:\n  - b\n  - c\nd: e\n",
	"- a:\n  - b\n  c: d\n- e:\n    - f\n- g:\n- h\n",
	"-   a: b\n    c: d\n",
	"a: [b, c]\n", "a: []", "a: {}", "a: [ ]", "a: { }", "a: [b,c,]", "a: {b: c,}", "a: [\nb]",
	"a: [b, [c, {d: e}], 'f', \"g\"] # h\n",
	"a: [\n  b, # c\n\n  # d\n  e\n]\nf: g",
	"a: {b: c,\n    d: [e,\n  f]\n    }\ng: h",
	"- [a, b]\n- {c: d, e: f}\n",
	"a: [group:web, spiffe://a/b:c/*, a:b:c]\n",
	"a: {b: [group:web], c: group:x, d: x:y:1}\n",
	"a: 'it''s' \nb: \"say \\\"no\\\"\\\\ \\/ \\n\\t\"\nc: ''\nd: \"\"\n",
	"\"a\": b\n'c': d\ne: {\"f\": g, 'h': i}\n",
	"a: null\nb: ~\nc: true\nd: False\ne: 1\nf: 0x1f\ng: 0o17\nh: 017\ni: -1\nj: +2\nk: 1.5\nl: .inf\nm: -.INF\nn: .nan\no: 1_000\n",
	"a: [null, ~, yes, no, on, 1e3, 1.e3, 0b11, 08, 1:2, 10.0.0.0/8, 9000-9100, 2000-01-01, '1', \"true\", -x]\n",
	"a: {b: null, c: ~}\n",
	"1: a\ntrue: b\nnull: c\n~: d\n1.5: e\n",
	"a: b\na: c\n",
	"a: b c  d\nb: x#y\nc: it's \"so\"\nd: a{b}[c],d&e*f!g|h>i%j@k`l?m\n",
	"a: http://x/y?z=1#2\n",
	"a b: c\nd-e.f/g: h\n",
	"ä: ö ü # ß\nü: ['ö', \"ä\", é, b]\n日本: {語: x, y: z}\n",
	"a: b\r\nc:\r\n  - d # e\r\n\r\n# f\r\n  - {g: h,\r\n    i: j}\r\nk: 'l'\r\n",
	"# tab\there\na: b",
	"a:  \n  b: c",
	"a: b # c  ",
}

// strange are texts that the quick reader has to leave to the library, which
// refuses most of them, and reads the others in its own way.
var strange = []string{
	"", "\n", "# a\n", "a", "- ", "-", "[a]", "{a: b}", "---\na: b", "--- a", "...\n", "a: b\n---\nc: d", "a: b\n...\n",
	"a: b: c", "a: 'b': c", "[a:b]", "{a:b}", "a: {b:c}", "a: [b: c]", "a: {b: c: d}", "a: {b}", "a: {b, c}", "a: {b:}", "a: {b: }", "a: {b: , c: d}",
	"- - x", "- - x\n  - y", "-\n  a: b", "- #c", "- # c\n  a: b", "-a", "- -", "a: - b", "a: -",
	"key : v", "key :", "\"a\" : 1", "\"a\":1", "a: {\"b\":1}", "a: {b : c}", "? x", "? x\n: y", ": x", "a: : b", "a: {b: :c}",
	"a:#b", "a: [#b\n]", "a: [b,#c\n]", "a: 'b'#c", "a: [b]#c", "a: {b: c}#d",
	"a:\n    b: c\n  d: e", "  a: b\nc: d", "a: b\n  c: d", "a:\n  - b\n - c", "a:\n  b: c\n - d", "- a\n  - b", "- a: b\n c: d", "- a: b\n   c: d", "a:\n  - b\n  c: d", "a: b\n- c",
	"a:\n- b\n -c", "- a\nb: c",
	"a: b\n  c", "a:\n  b", "a: 'b\n  c'", "a: \"b\n  c\"", "a: [b\n c]", "a: {b\n: c}", "a: {b:\n c}", "a: [b\n",
	"a: |\n  b", "a: >-\n  b", "a: &b c", "a: *b", "a: !!str b", "<<: a", "a: <<: b", "a<<: b", "%a b", "a: @b", "a: `b", "a: %b", "a: ?b", "a: ,b", "a: ]b", "a: }b", "a: ]", "a: [b}]", "a: {b: c]}", "a: [b", "a: {b: c",
	"a: [,]", "a: [b,,c]", "a: {,}", "a: [b c: d]", "a: [b :c]", "a: [b:: c]", "a: [b:*c]", "a: [b:'c']", "a: [a:]", "a: {b: [c:#d]}", "a: {b: [c:-d]}", "a: {b: [c: d]}", "a: {b:c: d}",
	"  a: [\n b]", "a: [b,\n--- c]", "a: [- b]", "a: [- b, c]", "a: [b]c", "a: [b] c", "a: 'b' c", "a: 'b' 'c'", "'a' b: c", "a: ''b'", "a: \"b", "a: 'b", "a: \"\\x41\"", "a: \"\\u0041\"", "a: \"\\q\"", "a: \"\\",
	"\ta: b", "a:\tb", "a: b\tc", "a: b\t# c", "a: '\tb'", "a:\n\tb: c", "a: [\tb]", " \t\na: b",
	"a: b \nc: d", "a: [b \n]", "a: b\rc: d", "a: b # c\rd: e", "a: b\r",
	".a: b", "-a: b", "a: [b, c]: d", "[a]: b", "{a: b}: c", "a: [b]\n  c: d", "a: {b: c}\n  d: e",
}

func TestQuick(t *testing.T) {
	t.Parallel()
	for _, text := range quickly {
		for _, text := range []string{text, strings.TrimRight(text, "\n") + "\n", "\n# x\n" + text, strings.ReplaceAll(text, "\n", "\n\n"), strings.ReplaceAll(text, "\n", "\n  ")} {
			holdQuick(t, text)
		}
		if !holdQuick(t, text) {
			t.Errorf("%q is left to the library", text)
		}
	}
	for _, text := range strange {
		for _, text := range []string{text, text + "\n", "x: y\n" + text, "x:\n  y: z\n" + strings.ReplaceAll("\n"+text, "\n", "\n  "), "- " + text} {
			holdQuick(t, text)
		}
		if holdQuick(t, text) {
			t.Errorf("%q is read", text)
		}
	}
}

// TestQuickResolves holds every short text of what numbers and words are made
// of against the library.
func TestQuickResolves(t *testing.T) {
	t.Parallel()
	words := []string{"0", "1", "9", "8", "x", "o", "b", "e", "_", "+", "-", ".", "~", "inf", "Inf", "nan", "NaN", "null", "NULL", "n", "true", "True", "FALSE", "f", ":"}
	for i := range len(words) * len(words) * len(words) {
		var text string
		for n := i; n > 0; n /= len(words) {
			text += words[n%len(words)]
		}
		holdQuick(t, "a: "+text+"\n")
	}
	for _, text := range []string{"18446744073709551615", "18446744073709551616", "-9223372036854775809", "1e999", "1.0e999", "0x10000000000000000", "1.2.3", "0.1_0", "1.", "-.5", "infinity", ".infinity", "0x1p-2", "0x1.8"} {
		if !holdQuick(t, "a: ["+text+"]\n") {
			t.Errorf("%q is left to the library", text)
		}
	}
}

// TestQuickBytes puts every byte that may mean something, and some pairs, into
// every place of a text.
func TestQuickBytes(t *testing.T) {
	t.Parallel()
	bytes := []string{"a", "0", "\n", "\r\n", "\n  ", "\n- ", "\n  - ", ": ", " #", "#", " :", "é", "\u2028", "[", "]", "{", "}", "- ", "''", "\\\""}
	for c := byte(' '); c <= '~'; c++ {
		if c < '0' || c > '9' && c < 'A' || c > 'Z' && c < 'a' || c > 'z' {
			bytes = append(bytes, string(c))
		}
	}
	for _, text := range []string{
		"a: b\nc:\n  - d e\n  - f: g\n    h: 'i'\n",
		"- a: [b, group:c, \"d\",\n    e]\n  f: {g: h, i: [j]}\n",
		"a: {b: c:d,\n e: {\"f\": g}, h: [i:j] }\n",
	} {
		for i := range len(text) + 1 {
			for _, c := range bytes {
				holdQuick(t, text[:i]+c+text[i:])
				if i < len(text) {
					holdQuick(t, text[:i]+c+text[i+1:])
				}
			}
		}
	}
}

// TestQuickSoup reads texts of random parts, most of which mean nothing.
func TestQuickSoup(t *testing.T) {
	t.Parallel()
	parts := strings.Split("a|b c|a:b|null|1|'d'|\"e\"|\"f\\\"|é|: |: |: |:|- |- |-|[|]|{|}|, |,| |  | # g\n|#|\n|\n|\n|\n  |\n  |\n    |\n  - |\n- |\r\n|a: |b: |- a: |[a, |{a: |]\n|}\n|*|~|.|/|<<|?|!|x: [|x: {", "|")
	r := rand.New(rand.NewPCG(9, 9))
	read := 0
	for range 20000 {
		var text strings.Builder
		for range 2 + r.IntN(12) {
			text.WriteString(parts[r.IntN(len(parts))])
		}
		if holdQuick(t, text.String()) {
			read++
		}
	}
	if read < 500 {
		t.Errorf("%d of 20000 were read: the soup is too thin", read)
	}
}

// TestQuickDepth finds the depth that is refused, at the place the library
// names.
func TestQuickDepth(t *testing.T) {
	t.Parallel()
	for depth := range 2 * maxDepth {
		for _, text := range []string{
			"a: " + strings.Repeat("[", depth) + strings.Repeat("]", depth),
			"a: " + strings.Repeat("{a: ", depth) + "b" + strings.Repeat("}", depth),
			func() (s string) {
				for i := range depth {
					s += strings.Repeat(" ", i) + "a:\n"
				}
				return s
			}(),
			func() (s string) {
				for i := range depth {
					s += strings.Repeat(" ", 2*i) + "- a:\n"
				}
				return s
			}(),
		} {
			read := holdQuick(t, text)
			if read && depth > maxDepth {
				t.Errorf("%q is read", text)
			}
			if !read && depth > 0 && depth <= maxDepth/2-1 {
				t.Errorf("%q is left to the library", text)
			}
		}
	}
}

// TestQuickPolicies reads policies of many styles, and all that the tests and
// the documentation hold, as they are and with slips of the hand.
func TestQuickPolicies(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(8, 8))
	for range 60 {
		for _, text := range worldPolicy(r).yaml(r, 1+r.IntN(3)) {
			// A block of text and colons side by side are the library's.
			if !holdQuick(t, text) && !strings.Contains(text, " |-\n") && !strings.Contains(text, "::") {
				t.Errorf("left to the library:\n%s", text)
			}
			holdQuick(t, damage(r, text))
		}
	}
	if mix := string(mixText(t, rulemix.Generate(rulemix.HTTP, 500, 8))); !holdQuick(t, mix) || !holdQuick(t, strings.ReplaceAll(mix, "\n", "\r\n")) {
		t.Error("the mix of the benchmarks is left to the library")
	}
	for _, text := range quickSamples(t) {
		holdQuick(t, text)
		for range 4 {
			holdQuick(t, damage(r, text))
		}
	}
	shop, err := os.ReadFile("testdata/good/shop.yaml")
	if err != nil || !holdQuick(t, string(shop)) {
		t.Errorf("%v; shop.yaml is left to the library", err)
	}
}

// damage changes a text as a slip of the hand does: a piece is left out, put
// in twice, moved in or out.
func damage(r *rand.Rand, text string) string {
	if text == "" {
		return ""
	}
	i := r.IntN(len(text))
	j := min(i+1+r.IntN(4), len(text))
	switch r.IntN(4) {
	case 0:
		return text[:i] + text[j:]
	case 1:
		return text[:j] + text[i:]
	case 2:
		return text[:i] + []string{" ", "\n", ":", "#", "- ", "  ", ",", "'", "["}[r.IntN(9)] + text[i:]
	}
	lines := strings.SplitAfter(text, "\n")
	k := r.IntN(len(lines))
	lines[k] = " " + lines[k]
	return strings.Join(lines, "")
}

// quickSamples returns the policies of testdata and what the documentation
// shows as YAML.
func quickSamples(t testing.TB) (texts []string) {
	for _, pattern := range []string{"testdata/*/*.yaml", "../../docs/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatal(pattern, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if filepath.Ext(file) == ".yaml" {
				texts = append(texts, string(data))
				continue
			}
			for _, part := range strings.Split(string(data), "```yaml\n")[1:] {
				text, _, _ := strings.Cut(part, "```")
				texts = append(texts, text)
			}
		}
	}
	return texts
}

func FuzzQuick(f *testing.F) {
	for _, texts := range [][]string{quickly, strange, quickSamples(f)} {
		for _, text := range texts {
			f.Add([]byte(text))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) { holdQuick(t, string(data)) })
}
