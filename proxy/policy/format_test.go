package policy

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// TestFormat holds testdata/format/*.txtar: what is written, and what becomes
// of it.
func TestFormat(t *testing.T) {
	files, err := filepath.Glob("testdata/format/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if len(archive.Files) != 2 {
				t.Fatalf("%d files, want in and out", len(archive.Files))
			}
			in, out := archive.Files[0].Data, &archive.Files[1]
			got, err := Format("in", in)
			if err != nil {
				got = []byte(err.Error() + "\n")
			} else {
				checkFormat(t, in)
				checkFormat(t, got)
			}
			if *update {
				out.Data = got
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, out.Data) {
				t.Errorf("got\n%swant\n%s", got, out.Data)
			}
		})
	}
}

// TestFormatForeignText formats a file with the line ends of Windows, and one
// with a byte order mark.
func TestFormatForeignText(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/format/comments.txtar")
	if err != nil {
		t.Fatal(err)
	}
	in, want := archive.Files[0].Data, archive.Files[1].Data
	for name, text := range map[string][]byte{
		"windows": bytes.ReplaceAll(in, []byte("\n"), []byte("\r\n")),
		"mark":    append([]byte("\ufeff"), in...),
	} {
		if got, err := Format("f", text); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v, got\n%s", name, err, got)
		}
	}
}

// TestQuote holds texts against how they are written, and reads them back.
func TestQuote(t *testing.T) {
	for s, want := range map[string]string{
		"web": "web", "web-2_b.c/D": "web-2_b.c/D", "GET /v1/orders/7": "GET /v1/orders/7", "group:web": "group:web",
		"": `""`, "a ": `"a "`, " a": `" a"`, "a  b": `"a  b"`, "a: b": `"a: b"`, "a #b": `"a #b"`, "-": `"-"`, "group:": `"group:"`,
		"yes": `"yes"`, "Off": `"Off"`, "NULL": `"NULL"`, "y": `"y"`, "group:on": `"group:on"`,
		"1": `"1"`, "1e3": `"1e3"`, "3fa1": `"3fa1"`, "10.0.0.0/8": `"10.0.0.0/8"`, "2026-01-02T09:00:00Z": `"2026-01-02T09:00:00Z"`, ".inf": `".inf"`, "~": `"~"`,
		"spiffe://a/*": `"spiffe://a/*"`, "/v1/{id}": `"/v1/{id}"`, "a,b": `"a,b"`, "*.a": `"*.a"`, "<<": `"<<"`, "é": `"é"`, "a's": `"a's"`,
		`a "b"`: `'a "b"'`, `a\b`: `'a\b'`, `'"`: `"'\""`, `'\`: `"'\\"`,
		"a\nb": `"a\nb"`, "a\tb": `"a\tb"`, "a\rb": `"a\x0db"`, "\x00\x7f\u0085\u00a0": `"\x00\x7f\x85\xa0"`, "\u2028\ufeff": `"\u2028\ufeff"`, "\U000e0001": `"\U000e0001"`, "\ufffd": "\"\ufffd\"",
	} {
		got := quote(s)
		if got != want {
			t.Errorf("%q is written %s, want %s", s, got, want)
		}
		for _, source := range []string{"a: " + got + "\n", "- " + got, "[" + got + ", x]", "{a: " + got + "}"} {
			n, problem := readNode("f", 0, []byte(source))
			if problem != nil {
				t.Errorf("%s: %v", source, problem)
				continue
			}
			for len(n.items)+len(n.pairs) > 0 {
				if n.kind == block {
					n = n.pairs[0].value
				} else {
					n = n.items[0]
				}
			}
			if n.kind != text || n.text != s {
				t.Errorf("%q is read from %s as %s", s, source, n.describe())
			}
		}
	}
}

// TestFormatRandom formats random policies with comments strewn in.
func TestFormatRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	for range 60 {
		for _, text := range worldPolicy(r).yaml(r, 1) {
			if _, err := Parse("p", []byte(text)); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			checkFormat(t, []byte(text))
			checkFormat(t, []byte(strew(r, text)))
		}
	}
}

// strew puts comments and empty lines between and behind the lines of a text,
// and into its brackets.
func strew(r *rand.Rand, text string) string {
	var b strings.Builder
	n := 0
	comment := func() string {
		n++
		return fmt.Sprintf("# c%d", n)
	}
	for line := range strings.Lines(text) {
		for r.IntN(4) == 0 {
			b.WriteString(spaces(r.IntN(9)) + comment() + "\n" + strings.Repeat("\n", r.IntN(3)))
		}
		line = strings.TrimSuffix(line, "\n")
		if r.IntN(6) == 0 {
			for _, mark := range []string{"[", ", ", "]"} {
				if r.IntN(2) == 0 {
					line = strings.Replace(line, mark, mark+" "+comment()+"\n"+spaces(8), 1)
				}
			}
		}
		if r.IntN(4) == 0 && strings.TrimSpace(line) != "" {
			line += " " + comment()
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

// checkFormat formats a text and holds the result against what Format says.
func checkFormat(t *testing.T, data []byte) {
	t.Helper()
	out, err := Format("f", data)
	before, parseErr := Parse("f", data)
	if err != nil {
		var all Errors
		if !errors.As(err, &all) || len(all) != 1 || all[0].Line < 1 || all[0].Column < 1 {
			t.Fatalf("error %#v", err)
		}
		if parseErr == nil || strings.Contains(err.Error(), "canonical") {
			t.Fatalf("%v; parsed: %v\n%q", err, parseErr, data)
		}
		return
	}
	if again, err := Format("f", out); err != nil || !bytes.Equal(again, out) {
		t.Fatalf("%v; from\n%s\nfirst\n%s\nthen\n%s", err, data, out, again)
	}
	if a, b := commentsOf(data), commentsOf(out); !slices.Equal(a, b) {
		t.Fatalf("comments %q became %q", a, b)
	}
	a, problem := readNode("f", 0, bytes.TrimPrefix(data, []byte("\ufeff")))
	b, problemOut := readNode("f", 0, out)
	if problem != nil || problemOut != nil {
		t.Fatal(problem, problemOut)
	}
	if a, b := sorted(a), sorted(b); !reflect.DeepEqual(a, b) {
		t.Fatalf("%v became %v; from\n%s\nto\n%s", a, b, data, out)
	}
	after, err := Parse("f", out)
	if (err == nil) != (parseErr == nil) || !before.Equal(after) {
		t.Fatalf("%v became %v\n%s", parseErr, err, out)
	}
}

func commentsOf(data []byte) []string {
	var out []string
	for _, t := range lexer.Tokenize(lineFeeds(data)) {
		if t.Type == token.CommentType {
			out = append(out, strings.TrimRight(t.Value, " \t"))
		}
	}
	slices.Sort(out)
	return out
}

// sorted takes the places out of a tree, and puts the keys of blocks in order.
func sorted(n node) node {
	n.at, n.down, n.right = place{}, 0, 0
	n.items, n.pairs = slices.Clone(n.items), slices.Clone(n.pairs)
	for i := range n.items {
		n.items[i] = sorted(n.items[i])
	}
	for i := range n.pairs {
		n.pairs[i] = pair{key: n.pairs[i].key, value: sorted(n.pairs[i].value)}
	}
	slices.SortStableFunc(n.pairs, func(a, b pair) int { return strings.Compare(a.key, b.key) })
	if len(n.items) == 0 {
		n.items = nil
	}
	if len(n.pairs) == 0 {
		n.pairs = nil
	}
	return n
}

// TestFormatPieces formats large files, in pieces, as it would in one.
func TestFormatPieces(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 6))
	mix := string(mixText(t, rulemix.Generate(rulemix.HTTP, 2600, 7)))
	rules := mix[strings.Index(mix, "rules:"):]
	left := strings.NewReplacer("\n  - ", "\n- ", "\n    ", "\n  ", "group:g", "spiffe://example.org/g").Replace(rules)
	for name, text := range map[string]string{
		"windows":  strings.ReplaceAll(strew(r, mix), "\n", "\r\n"),
		"comments": "# first\n---\n\n# second\n" + strew(r, mix) + "\n# last\n",
		"left":     "# of the file\n\n" + strew(r, left) + "\nversion: 1",
		"foot":     mix + "    # of the last\n  # of the rules\n# of the file\n",
		"above":    mix + "# of the list\nrevoked: # side\n  # of the entry\n\n  - spiffe://a/b # side\n# of the file",
	} {
		t.Run(name, func(t *testing.T) {
			pieces, problem := split("f", []byte(text))
			if problem != nil || len(pieces) < 3 {
				t.Fatalf("%d pieces, %v", len(pieces), problem)
			}
			got, err := Format("f", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			var whole formatter
			if problem := whole.document("f", 0, []byte(text), false); problem != nil {
				t.Fatal(problem)
			}
			if want := whole.write(); !bytes.Equal(got, want) {
				a, b := strings.Split(string(got), "\n"), strings.Split(string(want), "\n")
				for i := range min(len(a), len(b)) {
					if a[i] != b[i] {
						t.Fatalf("line %d is %q, want %q; of %d and %d", i+1, a[i], b[i], len(a), len(b))
					}
				}
				t.Fatalf("%d lines, want %d", len(a), len(b))
			}
			if name == "comments" {
				checkFormat(t, []byte(text))
			}
		})
	}
}

func TestFormatErrors(t *testing.T) {
	for text, want := range map[string]string{
		"- a\n":                 "f:1:1: a policy file is a block of keys (version, trust_domains, groups, ",
		"a: [b\n":               "f:1:4: not valid YAML: a list that [ begins is not ended by ]",
		"a: 1\nb: *c\n":         "f:2:4: anchors, aliases",
		"a: b\n---\nc: d\n":     "f:2:1: a second YAML document",
		"a: \"\xff\"\n":         "f:1:5: not UTF-8 text",
		"# only\nversion: \x01": "f:2:10: control character",
	} {
		out, err := Format("f", []byte(text))
		if out != nil || err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %q, %v, want %s", text, out, err, want)
		}
	}
	if _, err := Format("large", make([]byte, MaxSize+1)); err == nil || !strings.Contains(err.Error(), "64 MiB") {
		t.Errorf("%v, want the size refused", err)
	}
}

func TestHasSections(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"version: 1\nrules: []\n":              true,
		"tests: []\nfoo: bar\n":                true,
		"foo: {rules: []}\n":                   false,
		"version: 1\n":                         false,
		"trust_domain: example.org\nproxy: {}": false,
		"- rules\n":                            false,
		"rules: [":                             false,
		"":                                     false,
	} {
		if got := HasSections([]byte(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func FuzzFormat(f *testing.F) {
	for _, pattern := range []string{"good/*.yaml", "bad/*.yaml", "format/*.txtar"} {
		files, _ := filepath.Glob("testdata/" + pattern)
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			if archive := txtar.Parse(data); len(archive.Files) > 0 {
				data = archive.Files[0].Data
			}
			f.Add(data)
		}
	}
	r := rand.New(rand.NewPCG(3, 3))
	for range 20 {
		f.Add([]byte(strew(r, worldPolicy(r).yaml(r, 1)[0])))
	}
	f.Fuzz(func(t *testing.T, data []byte) { checkFormat(t, data) })
}
