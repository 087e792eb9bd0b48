package config

import (
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write what the errors are now to testdata/bad.txtar")

// TestBadInput holds the exact words of each refusal: they are what a person
// has to go by. testdata/bad.txtar has pairs of a file and its errors.
func TestBadInput(t *testing.T) {
	const path = "testdata/bad.txtar"
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out txtar.Archive
	out.Comment = archive.Comment
	wants := map[string]string{}
	for _, f := range archive.Files {
		if name, ok := strings.CutSuffix(f.Name, ".want"); ok {
			wants[name] = string(f.Data)
		}
	}
	for _, f := range archive.Files {
		if !strings.HasSuffix(f.Name, ".yaml") {
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			_, err := Parse(f.Name, f.Data)
			if err == nil {
				t.Fatal("was accepted")
			}
			got := err.Error() + "\n"
			name := strings.TrimSuffix(f.Name, ".yaml")
			if want := wants[name]; got != want && !*update {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
			out.Files = append(out.Files, f, txtar.File{Name: name + ".want", Data: []byte(got)})
		})
	}
	if *update {
		if err := os.WriteFile(path, txtar.Format(&out), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBombs feeds what is small on disk and large or deep in memory.
func TestBombs(t *testing.T) {
	lol := "proxy:\n  policies: &a [x, x, x, x, x, x, x, x, x, x]\n  listeners: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n"
	unfolding := "proxy:\n  policies:\n" +
		"    - &a [x, x, x, x, x, x, x, x, x, x]\n" +
		"    - &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n" +
		"    - &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
	identities := "proxy:\n  listeners:\n    - &l {name: a, expect: &e [" + strings.Repeat("spiffe://a/b,", 2000) + "spiffe://a/b]}\n" +
		strings.Repeat("    - *l\n", 2000)
	const big = 300_000 // bytes: past every other bound, and quick to read under -race
	for name, data := range map[string]string{
		"aliases":       lol,
		"alias lists":   unfolding,
		"alias blocks":  identities,
		"brackets":      strings.Repeat("[", big),
		"braces":        strings.Repeat("{a: ", big/4),
		"dashes":        strings.Repeat("- ", big/2),
		"question":      strings.Repeat("? ", big/2),
		"anchors":       strings.Repeat("&a ", big/3),
		"tags":          strings.Repeat("!!str ", big/6),
		"colons":        strings.Repeat("a: ", big/3),
		"comments":      strings.Repeat("#\n", big/2),
		"documents":     strings.Repeat("---\n", big/4),
		"one line":      "proxy: " + strings.Repeat("x", big-8),
		"literal":       "proxy: |\n" + strings.Repeat(" x\n", big/3-4),
		"keys":          strings.Repeat("a: b\n", big/5),
		"self":          "proxy: &a {policies: *a}",
		"oversize":      strings.Repeat("#", MaxSize+1),
		"list of lists": "proxy: {listeners: [" + strings.Repeat("[],", 10_000) + "]}",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("n.yaml", []byte(data))
			checkError(t, err)
			if err != nil && len(err.Error()) > 64<<10 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// checkError fails unless err has a position for everything it says.
func checkError(t *testing.T, err error) {
	t.Helper()
	var all *Error
	if !errors.As(err, &all) || len(all.Findings) == 0 {
		t.Fatalf("want findings, got %v", err)
	}
	line, column := 0, 0
	for _, f := range all.Findings {
		if f.File == "" || f.Line < 1 || f.Column < 1 || f.Problem == "" {
			t.Fatalf("finding without a place: %+v", f)
		}
		if f.Line < line || f.Line == line && f.Column < column {
			t.Fatalf("findings are out of order: %v", err)
		}
		line, column = f.Line, f.Column
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(bothHalves))
	f.Add([]byte(smallAgent + smallProxy))
	archive, err := txtar.ParseFile("testdata/bad.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		f.Add(file.Data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("n.yaml", data)
		if err != nil {
			checkError(t, err)
			return
		}
		if !c.HasAgent() && !c.HasProxy() {
			t.Fatal("a file without halves was accepted")
		}
		if c.HasAgent() != (c.ForAgent() == nil) || c.HasProxy() != (c.ForProxy() == nil) {
			t.Fatalf("halves disagree: %v, %v", c.ForAgent(), c.ForProxy())
		}
	})
}
