package policy

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

var update = flag.Bool("update", false, "write the texts of testdata/bad again")

// TestBadPolicies holds every message against testdata/bad/*.txt.
func TestBadPolicies(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			p, err := Parse(filepath.Base(file), data)
			if err == nil || p != nil {
				t.Fatalf("%v, %v: want an error alone", p, err)
			}
			var all Errors
			if first := (*Error)(nil); !errors.As(err, &all) || !errors.As(err, &first) || first != all[0] {
				t.Errorf("%T is not found as Errors and Error", err)
			}
			for _, e := range all {
				if e.Line < 1 || e.Column < 1 {
					t.Errorf("%v has no place", e)
				}
			}
			golden, got := strings.TrimSuffix(file, "yaml")+"txt", err.Error()+"\n"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	p, err := Load("testdata/good/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if p.Rules() != 5 || !slices.Equal(p.Files(), []string{"testdata/good/shop.yaml"}) {
		t.Errorf("%d rules of %v", p.Rules(), p.Files())
	}
	var named []string
	for _, m := range p.Listeners() {
		named = append(named, fmt.Sprintf("%s:%s:%d:%d", m.Listener, m.Rule, m.Line, m.Column))
	}
	if want := []string{"delivery:partner-delivers:22:10", "health:probes-in-plaintext:26:10", "orders:web-speaks-to-orders:12:10", "to-orders:web-speaks-to-orders:12:18"}; !slices.Equal(named, want) {
		t.Errorf("listeners %v, want %v", named, want)
	}
}

// TestSeveralFiles reads groups, rules and revocations from different files,
// and names both places of what is in two.
func TestSeveralFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	rules := write("a.yaml", "version: 1\nrules:\n  - {id: a, effect: allow, from: [group:g]}\n")
	groups := write("b.yaml", "version: 1\ngroups:\n  g: [\""+web+"\"]\ntrust_domains: {x.org: {ids: [/a]}}\n")
	same := write("c.yaml", "version: 1\ngroups:\n  g: [\""+web+"\"]\nrules:\n  - {id: a, effect: deny}\ntrust_domains: {x.org: {ids: [/a]}}\n")
	for _, files := range [][]string{{rules, groups}, {groups, rules}, {groups, rules, groups}} {
		p, err := Load(files...)
		if err != nil {
			t.Fatal(err)
		}
		q := request(web, orders)
		if p.Admit(&q) != Always || len(p.Files()) != 2 {
			t.Errorf("%v: admits %v, from %v", files, p.Admit(&q), p.Files())
		}
	}
	_, err := Load(same, groups, rules)
	want := strings.ReplaceAll(`DIR/c.yaml:3:3: groups["g"]: group "g" is defined twice; first at DIR/b.yaml:3:3
DIR/c.yaml:5:10: rules[0].id: duplicate id "a"; first at DIR/a.yaml:3:10
DIR/c.yaml:6:17: trust_domains["x.org"]: the trust domain is here twice; first at DIR/b.yaml:4:17`, "DIR", dir)
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%v", err, want)
	}
	if _, err := Load(rules); err == nil || !strings.Contains(err.Error(), `unknown group "g"; no group is defined`) {
		t.Errorf("%v, want the missing group named", err)
	}
}

func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(); err == nil {
		t.Error("no files are a policy")
	}
	_, err := Load(filepath.Join(dir, "none.yaml"), filepath.Join(dir, "nor.yaml"))
	var all Errors
	if !errors.Is(err, fs.ErrNotExist) || !errors.As(err, &all) || len(all) != 2 {
		t.Errorf("%v, want both missing files", err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "a directory; name its files, or "+dir+"/*.yaml") {
		t.Errorf("%v, want the directory refused", err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(pipe); err == nil || !strings.Contains(err.Error(), "not a plain file") {
		t.Errorf("%v, want the pipe refused", err)
	}
	// 100 MB take no time to refuse: the file is not read.
	large := filepath.Join(dir, "large.yaml")
	if err := os.WriteFile(large, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 100<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(large); err == nil || !strings.Contains(err.Error(), "64 MiB") {
		t.Errorf("%v, want the size refused", err)
	}
	if _, err := Parse("large", make([]byte, MaxSize+1)); err == nil || !strings.Contains(err.Error(), "64 MiB") {
		t.Errorf("%v, want the size refused", err)
	}
}

func TestExpand(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b.yaml", "a.yaml", "c.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, b := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
	if got, err := Expand(filepath.Join(dir, "*.yaml"), b, filepath.Join(dir, ".", "a.y*")); err != nil || !slices.Equal(got, []string{a, b}) {
		t.Errorf("%v, %v, want %s and %s", got, err, a, b)
	}
	if got, err := Expand(filepath.Join(dir, "none")); err != nil || len(got) != 1 {
		t.Errorf("%v, %v, want the name as it is", got, err)
	}
	if _, err := Expand(filepath.Join(dir, "*.json")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want no match to be an error", err)
	}
	if _, err := Expand(filepath.Join(dir, "[")); err == nil {
		t.Error("a broken pattern is accepted")
	}
}

// TestErrorsAreBounded reads a policy that is wrong in every line.
func TestErrorsAreBounded(t *testing.T) {
	_, err := Parse("p", []byte("version: 1\nrules:\n"+strings.Repeat("  - x\n", 5000)))
	var all Errors
	if !errors.As(err, &all) || len(all) != maxFindings+1 || all[maxFindings].Error() != "and 4900 more" {
		t.Errorf("%d errors, the last %v", len(all), all[len(all)-1])
	}
}

// TestPieces reads large files in pieces, with the same result, and the same
// places, as in one.
func TestPieces(t *testing.T) {
	mix := string(mixText(t, rulemix.Generate(rulemix.HTTP, 4000, 5)))
	// The entries of a list may stand at the left edge.
	rules := mix[strings.Index(mix, "rules:"):]
	left := strings.NewReplacer("\n  - ", "\n- ", "\n    ", "\n  ", "group:g", "spiffe://example.org/g").Replace(rules)
	texts := map[string]string{
		"mix":      mix,
		"windows":  strings.ReplaceAll(mix, "\n", "\r\n"),
		"comments": "# first\n---\n" + strings.ReplaceAll(mix, "\n  - id", "\n# a comment\n\n  # another\n  - id"),
		"left":     "version: 1\n" + left,
	}
	for name, text := range texts {
		t.Run(name, func(t *testing.T) {
			pieces, problem := split("p", []byte(text))
			if problem != nil || len(pieces) < 3 {
				t.Fatalf("%d pieces, %v", len(pieces), problem)
			}
			whole, problem := readNode("p", 0, []byte(text))
			if problem != nil {
				t.Fatal(problem)
			}
			got := map[string]*node{}
			if problem := readPieces("p", pieces, func(n node) {
				for _, pair := range n.pairs {
					if have := got[pair.key]; have != nil {
						have.items = append(have.items, pair.value.items...)
						have.pairs = append(have.pairs, pair.value.pairs...)
					} else {
						got[pair.key] = &pair.value
					}
				}
			}); problem != nil {
				t.Fatal(problem)
			}
			if len(got) != len(whole.pairs) {
				t.Fatalf("%d keys, want %d", len(got), len(whole.pairs))
			}
			for _, pair := range whole.pairs {
				if !reflect.DeepEqual(*got[pair.key], pair.value) {
					t.Errorf("%s differs", pair.key)
				}
			}
		})
	}
	t.Run("errors", func(t *testing.T) {
		bad := mix + "  - {id: r000007, effect: deny}\n  - id: z\n    effect: none\n"
		_, err := Parse("p", []byte(bad))
		lines := strings.Count(mix, "\n")
		want := fmt.Sprintf("p:%d:10: rules[4000].id: duplicate id \"r000007\"; first at p:", lines+1)
		last := fmt.Sprintf("p:%d:13: rules[4001].effect: must be allow or deny, not \"none\"", lines+3)
		if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.HasSuffix(err.Error(), last) {
			t.Errorf("got\n%v\nwant\n%s…\n%s", err, want, last)
		}
		_, err = Parse("p", []byte(mix+"rules: []\n"))
		if err == nil || !strings.Contains(err.Error(), "rules: is here twice; first at line") {
			t.Errorf("%v, want the second rules refused", err)
		}
		_, err = Parse("p", []byte(mix+"  - {id: z, from: ["+strings.Repeat("x, ", pieceMax/3)+"]}\n"))
		if err == nil || !strings.Contains(err.Error(), "an entry of more than 4 MiB") {
			t.Errorf("%v, want the large entry refused", err)
		}
	})
}

// TestForeignText reads a small file with the line ends of Windows, and
// one with a byte order mark.
func TestForeignText(t *testing.T) {
	data, err := os.ReadFile("testdata/good/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse("p", data)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"windows": bytes.ReplaceAll(data, []byte("\n"), []byte("\r\n")),
		"mark":    append([]byte("\ufeff"), data...),
	} {
		o, err := Parse("p", text)
		if err != nil || !p.Equal(o) {
			t.Errorf("%s: %v, equal %v", name, err, err == nil && p.Equal(o))
		}
	}
	n, problem := readNode("p", 0, []byte("# c\r\na: |\r\n  x\r\n\r\n  y # d\r\nb: c # d\r\ne: f\r\n"))
	if problem != nil || len(n.pairs) != 3 || n.pairs[0].value.text != "x\n\ny # d\n" || n.pairs[2].at.line != 7 {
		t.Errorf("%+v, %v: want e in line 7", n, problem)
	}
}

func TestHash(t *testing.T) {
	base := "version: 1\ngroups: {g: ['" + web + "'], h: ['" + orders + "']}\nrules:\n- {id: a, effect: allow, on: [x, y], from: [group:g, '" + orders + "'], to: ['" + web + "']}\n- {id: b, effect: deny, from: [unauthenticated]}\nrevoked: ['spiffe://a/b', {issuer: aa, serial: 1}]\ntrust_domains: {p.org: {ids: [/a, /b]}}\n"
	p, err := Parse("p", []byte(base))
	if err != nil {
		t.Fatal(err)
	}
	same := map[string]string{
		"comment":    "# c\n" + base,
		"order":      strings.NewReplacer("x, y", "y, x, x", "[/a, /b]", "[/b, /a]", "serial: 1", "serial: '0:01'").Replace(base),
		"group name": strings.NewReplacer("g: [", "k: [", "group:g", "group:k").Replace(base),
		"group h":    strings.Replace(base, ", h: ['"+orders+"']", "", 1),
	}
	for name, text := range same {
		if o, err := Parse("q", []byte(text)); err != nil || !p.Equal(o) {
			t.Errorf("%s: %v, equal %v, want equal", name, err, err == nil && p.Equal(o))
		}
	}
	for old, text := range map[string]string{
		"id: a": "id: c", "effect: deny": "effect: allow", "x, y": "x", "on: [x, y], ": "", ", to: ['" + web + "']": "",
		"group:g, ": "", "group:g": "group:h", "[unauthenticated]": "['spiffe://a/u']", "'spiffe://a/b', ": "", "aa": "ab", "/b]": "/c]",
		"deny, from: [unauthenticated]": "deny", "id: b": "at: inbound, id: b", "p.org": "q.org",
	} {
		if o, err := Parse("q", []byte(strings.Replace(base, old, text, 1))); err != nil || p.Equal(o) {
			t.Errorf("%q for %q: %v, equal %v, want different", text, old, err, err == nil && p.Equal(o))
		}
	}
	if p.Equal(nil) || !(*Policy)(nil).Equal(nil) {
		t.Error("nil policies compare wrong")
	}
}

func FuzzParse(f *testing.F) {
	for _, dir := range []string{"good", "bad"} {
		files, _ := filepath.Glob("testdata/" + dir + "/*.yaml")
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse("f", data)
		if (p == nil) == (err == nil) {
			t.Fatalf("%v, %v", p, err)
		}
		if err != nil {
			var all Errors
			if err.Error() == "" || !errors.As(err, &all) || len(all) > maxFindings+1 {
				t.Fatalf("error %q", err)
			}
			return
		}
		r := rand.New(rand.NewPCG(1, 1))
		var d Decision
		for range 20 {
			q := worldRequest(r)
			p.Decide(&q, &d)
			if e := p.Explain(&q); e.Detail == "" || e.Decision.Rule != d.Rule {
				t.Fatalf("%+v explained as %+v", d, e)
			}
		}
		again, err := Parse("g", data)
		if err != nil || !p.Equal(again) {
			t.Fatalf("read twice: %v", err)
		}
	})
}
