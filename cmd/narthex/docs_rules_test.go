package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/policy"
)

// rulePages are the pages about rules. An example that begins with its name is
// a file of that name, and those of one directory are one policy. broken.yaml
// is to fail its tests.
var rulePages = []string{"docs/rules.md", "docs/rules-recipes.md"}

// ruleExample is an example.
type ruleExample struct{ page, name, text string }

func ruleExamples(t *testing.T) (all []ruleExample) {
	t.Helper()
	for _, page := range rulePages {
		for _, block := range yamlBlocks(t, page) {
			name := regexp.MustCompile(`^# (\S+\.yaml)\n`).FindStringSubmatch(block)
			if name == nil || !strings.Contains(block, "\nversion: 1\n") {
				t.Errorf("%s: an example without name or version:\n%s", page, block)
				continue
			}
			all = append(all, ruleExample{page, name[1], block})
		}
	}
	return all
}

// writeRules writes the examples.
func writeRules(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, e := range ruleExamples(t) {
		file := filepath.Join(dir, filepath.FromSlash(e.name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s: there are two %s", e.page, e.name)
		}
		if err := os.WriteFile(file, []byte(e.text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestRuleExamples reads every rule file of the pages and runs its tests.
func TestRuleExamples(t *testing.T) {
	dir := writeRules(t)
	policies := map[string][]string{}
	for _, e := range ruleExamples(t) {
		file := filepath.Join(dir, filepath.FromSlash(e.name))
		key := filepath.Dir(file)
		if key == dir {
			key = file
		}
		policies[key] = append(policies[key], file)
	}
	for name, files := range policies {
		_, err := policy.Load(files...)
		if broken := filepath.Base(name) == "broken.yaml"; broken != (err != nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRuleExamplesAreCanonical: every rule file that a reader may copy, the
// README's too, is as `narthex policy fmt` writes it.
func TestRuleExamplesAreCanonical(t *testing.T) {
	formatted := 0
	for _, page := range append([]string{"README.md"}, rulePages...) {
		for _, block := range yamlBlocks(t, page) {
			if !strings.Contains(block, "\nversion: 1\n") {
				continue // the README shows a narthex.yaml too
			}
			formatted++
			want, err := policy.Format(page, []byte(block))
			if err != nil {
				t.Errorf("%v in\n%s", err, block)
			} else if block != string(want) {
				t.Errorf("%s: an example is not in its form:\n%s", page, lineDiff([]byte(block), want))
			}
		}
	}
	if formatted < 20 {
		t.Errorf("%d examples are rule files", formatted)
	}
}

// TestDocumentedSemantics asks what the tables of docs/rules.md answer.
func TestDocumentedSemantics(t *testing.T) {
	for _, file := range []string{"testdata/semantics.yaml", "testdata/semantics-when.yaml"} {
		if _, err := policy.Load(file); err != nil {
			t.Error(err)
		}
	}
}

// TestRecipesShowBoth: every recipe has a test of what it allows and one of
// what it refuses.
func TestRecipesShowBoth(t *testing.T) {
	for _, e := range ruleExamples(t) {
		if e.page != "docs/rules-recipes.md" || e.name == "broken.yaml" {
			continue
		}
		if !strings.Contains(e.text, "expect: allow") || !strings.Contains(e.text, "expect: deny") {
			t.Errorf("%s does not test what it allows and what it refuses", e.name)
		}
	}
}

// TestRuleCommands runs every command that the pages show, among their files,
// and compares what it prints.
func TestRuleCommands(t *testing.T) {
	shown := map[string]string{}
	for _, page := range rulePages {
		shown[page] = readPage(t, page)
	}
	t.Chdir(writeRules(t))
	ran := 0
	for _, page := range rulePages {
		for _, m := range regexp.MustCompile("(?ms)^```console\n(.*?)^```").FindAllStringSubmatch(shown[page], -1) {
			for _, step := range strings.Split("\n"+m[1], "\n$ ")[1:] {
				line, want, _ := strings.Cut(step, "\n")
				if got, ok := runShown(t, line); ok {
					ran++
					if strings.TrimSuffix(got, "\n") != strings.TrimSuffix(want, "\n") {
						t.Errorf("%s: %s\ngot\n%s\nwant\n%s", page, line, got, want)
					}
				}
			}
		}
	}
	if ran < 5 {
		t.Errorf("%d commands were run", ran)
	}
}

// runShown runs a command; not ok where this build lacks what it needs.
func runShown(t *testing.T, line string) (out string, ok bool) {
	t.Helper()
	args := shellWords(line)
	if len(args) < 2 || args[0] != "narthex" {
		t.Fatalf("%q is no command of narthex", line)
	}
	root := newRoot()
	if found, _, err := root.Find(args[1:]); err != nil || found.HasSubCommands() {
		t.Errorf("%s: there is no such command", line)
		return "", false
	}
	var both bytes.Buffer
	root.SetOut(&both)
	root.SetErr(&both)
	root.SetArgs(args[1:])
	if err := root.Execute(); err != nil {
		if exit := (exitError{}); !errors.As(err, &exit) || exit.code != exitFailure {
			t.Errorf("%s: %v", line, err)
		}
	}
	return both.String(), true
}

// shellWords parts a line as a shell does that knows quotes alone.
func shellWords(line string) (words []string) {
	for _, m := range regexp.MustCompile(`'([^']*)'|"([^"]*)"|(\S+)`).FindAllStringSubmatch(line, -1) {
		words = append(words, m[1]+m[2]+m[3])
	}
	return words
}

// TestDocumentedPaths asks for every path in the table of paths.
func TestDocumentedPaths(t *testing.T) {
	table := regexp.MustCompile("(?ms)^\\| path \\| covers \\|.*?\n\n").FindString(readPage(t, "docs/rules.md"))
	words := regexp.MustCompile("`([^`]+)`")
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || !strings.Contains(cells[1], "`") {
			continue
		}
		rows++
		pattern := words.FindStringSubmatch(cells[1])[1]
		rules := fmt.Sprintf("version: 1\nrules: [{id: a, effect: allow, from: [\"spiffe://example.org/a\"], http: {paths: [%q]}}]\n", pattern)
		p, err := policy.Parse(pattern, []byte(rules))
		if err != nil {
			t.Fatal(err)
		}
		for cell, want := range map[string]bool{cells[2]: true, cells[3]: false} {
			for _, m := range words.FindAllStringSubmatch(cell, -1) {
				method := "GET"
				if m[1] == "*" {
					method = "OPTIONS"
				}
				q := policy.Question{As: "spiffe://example.org/a", Do: method + " " + m[1]}
				request, err := q.Request()
				if err != nil {
					t.Fatal(err)
				}
				var d policy.Decision
				if p.Decide(request, &d); d.Allow != want {
					t.Errorf("%s covers %s: %t, the page says %t", pattern, m[1], d.Allow, want)
				}
			}
		}
	}
	if rows < 5 {
		t.Errorf("the table of paths has %d rows", rows)
	}
}

// TestDocumentedConditions compiles every name and expression in the tables
// about when.
func TestDocumentedConditions(t *testing.T) {
	_, section, _ := strings.Cut(readPage(t, "docs/rules.md"), "\n### When\n")
	section, _, _ = strings.Cut(section, "\n| bound |")
	tried := 0
	for _, row := range regexp.MustCompile(`(?m)^\| (.*) \|$`).FindAllStringSubmatch(section, -1) {
		cells := strings.Split(strings.ReplaceAll(row[1], `\|`, ""), " | ")
		if cells[0] == "operators" {
			continue
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[0]+functionsOf(cells), -1) {
			text := conditionWith(m[1])
			if text == "" {
				continue
			}
			tried++
			if _, err := policy.Parse("when.yaml", fmt.Appendf(nil, "version: 1\nrules: [{id: a, effect: deny, when: %q}]", text)); err != nil {
				t.Errorf("%s: %v", m[1], err)
			}
		}
	}
	if tried < 35 {
		t.Errorf("%d names and expressions", tried)
	}
}

// functionsOf is the second cell of a row of functions.
func functionsOf(cells []string) string {
	if len(cells) == 2 {
		return cells[1]
	}
	return ""
}

// conditionWith is a condition with the name or expression in it; "" for what
// is neither.
func conditionWith(word string) string {
	const of = "from.id."
	switch {
	case word == "to.…":
		return "to.id == to.id && to.trust_domain == to.path && to.serial == to.id && to.authenticated"
	case word == "request.headers":
		return "size(request.headers) == 0"
	case word == "size":
		return of + "size() == 0"
	case slices.Contains([]string{"startsWith", "endsWith", "contains"}, word):
		return of + word + `("a")`
	case slices.Contains([]string{"all", "exists", "exists_one"}, word):
		return `["a"].` + word + `(x, x == "a")`
	case strings.HasPrefix(word, "get"):
		if !strings.HasSuffix(word, ")") {
			word += `("+01:00")`
		}
		return "time." + word + " == 0"
	case word == "+", strings.Contains(word, "\""), word == "map", word == "filter":
		if !strings.Contains(word, "(") && !strings.Contains(word, " in ") {
			return "" // a value
		}
	}
	return "(" + word + ") == (" + word + ")"
}

// TestRuleKeysAreDocumented: the page lists every key as the schema has it.
func TestRuleKeysAreDocumented(t *testing.T) {
	text, err := policy.Schema()
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	page := readPage(t, "docs/rules.md")
	rows := 0
	eachProperty("", schema, func(path, about string) {
		rows++
		if row := "\n| `" + path + "` | " + about + " |\n"; !strings.Contains(page, row) {
			t.Errorf("docs/rules.md lacks the row%s", row)
		}
	})
	if _, table, ok := strings.Cut(page, "## Every key\n"); !ok || strings.Count(table, "\n| `") != rows {
		t.Errorf("the last table of docs/rules.md has other rows than the %d keys", rows)
	}
}

// eachProperty calls f for every key below a schema. What stands in a list is
// named key[], what stands below names of the user's key.NAME.
func eachProperty(path string, schema map[string]any, f func(path, about string)) {
	block := func(v any) map[string]any { m, _ := v.(map[string]any); return m }
	for name, v := range block(schema["properties"]) {
		value, key := block(v), strings.TrimPrefix(path+"."+name, ".")
		about, _ := value["description"].(string)
		f(key, about)
		below := value
		switch {
		case value["items"] != nil:
			below, key = block(value["items"]), key+"[]"
		case block(value["additionalProperties"]) != nil:
			below, key = block(value["additionalProperties"]), key+".NAME"
		}
		eachProperty(key, below, f)
		if shapes, ok := below["anyOf"].([]any); ok {
			for _, one := range shapes {
				eachProperty(key, block(one), f)
			}
		}
	}
}
