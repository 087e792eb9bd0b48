package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"unicode"
)

// sample has one finding of each kind of place, and what a file could put in
// the way of whoever reads the report.
func sample() *Findings {
	return &Findings{
		Version: "1.2.3",
		Dir:     "/src/app",
		Files:   []string{"narthex.yaml", "policies/shop.yaml", "policies/good.yaml"},
		Rules:   []Rule{{"policy-syntax", "A rule file is wrong."}, {"never-found", "Nothing has this."}},
		Summary: "agent, 1 listener",
		List: []Finding{
			{Level: Error, Rule: "policy-syntax", File: "policies/shop.yaml", Line: 7, Column: 12, Path: "rules[1].from[0]", Text: "\"spffe\": want spiffe"},
			{
				Level: Warning, Rule: "unreachable-rule", File: "policies/shop.yaml", Line: 9, Text: "rule b: never matches\nbefore <a>",
				Related: []Place{
					{File: "policies/shop.yaml", Line: 3, Column: 5, Text: "rule a takes it"},
					{File: "policies/shop.yaml", Line: 3, Column: 5, Text: "rule a takes it"},
				},
			},
			{Level: Error, Rule: "policy-unreadable", File: "/etc/narthex/a b#%.yaml", Text: "permission denied \x1b[31m\u202e\xff"},
			{Level: Warning, Rule: "policy-syntax", Text: "and 3 more [see](0)"},
			{Level: Note, Rule: "policy-note", File: "narthex.yaml", Line: 1, Column: 1, Text: "worth knowing"},
		},
	}
}

func written(t *testing.T, write func(w io.Writer, format string) error, format string) string {
	t.Helper()
	var first, second bytes.Buffer
	if err := errors.Join(write(&first, format), write(&second, format)); err != nil {
		t.Fatalf("%s: %v", format, err)
	}
	if first.String() != second.String() {
		t.Errorf("%s: written twice, it differs:\n%s\n%s", format, &first, &second)
	}
	return first.String()
}

func TestFindingsText(t *testing.T) {
	t.Parallel()
	want := `policies/shop.yaml:7:12: error: rules[1].from[0]: "spffe": want spiffe
policies/shop.yaml:9: warning: rule b: never matches\nbefore <a>
    policies/shop.yaml:3:5: rule a takes it
    policies/shop.yaml:3:5: rule a takes it
/etc/narthex/a b#%.yaml: error: permission denied \x1b[31m\u202e\xff
warning: and 3 more [see](0)
narthex.yaml:1:1: note: worth knowing
`
	if got := written(t, sample().Write, "text"); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	good := &Findings{Summary: "agent"}
	if got := written(t, good.Write, "text"); got != "good: agent\n" {
		t.Errorf("no finding: %q", got)
	}
}

// TestFindingsJSON: the keys that programs read stay what they are, and the
// text begins with the key it is about.
func TestFindingsJSON(t *testing.T) {
	t.Parallel()
	var got []map[string]any
	if err := json.Unmarshal([]byte(written(t, sample().Write, "json")), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 5 {
		t.Fatalf("%d findings", len(got))
	}
	for key, want := range map[string]any{
		"level": "error", "rule": "policy-syntax", "file": "policies/shop.yaml", "line": 7.0, "column": 12.0,
		"path": "rules[1].from[0]", "text": `rules[1].from[0]: "spffe": want spiffe`,
	} {
		if got[0][key] != want {
			t.Errorf("%s: got %v, want %v", key, got[0][key], want)
		}
	}
	if related, ok := got[1]["related"].([]any); !ok || len(related) != 2 || related[0].(map[string]any)["line"] != 3.0 {
		t.Errorf("related: %v", got[1]["related"])
	}
	if got := written(t, (&Findings{}).Write, "json"); got != "[]\n" {
		t.Errorf("no finding: %q", got)
	}
}

func TestKeep(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		least Level
		want  int
	}{{Note, 5}, {Warning, 4}, {Error, 2}} {
		f := sample()
		f.Keep(c.least)
		if len(f.List) != c.want {
			t.Errorf("%s: %d findings, want %d", c.least, len(f.List), c.want)
		}
	}
	if !Level("fatal").AtLeast(Error) {
		t.Error("a level that nobody knows is less than an error")
	}
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"plain text, ünïcode… 世界", "plain text, ünïcode… 世界"},
		{"a\nb\tc\r", `a\nb\tc\r`},
		{"\x00\x1b\x7f", `\x00\x1b\x7f`},
		{"\u202etxt.\u2028", `\u202etxt.\u2028`},
		{"\xffa\xc3", `\xffa\xc3`},
		{"\ufffd", "\ufffd"}, // the replacement character itself prints
		{`"quoted" 'and' \`, `"quoted" 'and' \`},
	} {
		if got := printable(c.in); got != c.want {
			t.Errorf("%q: got %s, want %s", c.in, got, c.want)
		}
	}
}

func TestUnknownFormat(t *testing.T) {
	t.Parallel()
	err := sample().Write(io.Discard, "html")
	if err == nil || err.Error() != `format "html": want text, json, sarif or junit` {
		t.Error(err)
	}
	err = (&TestRun{}).Write(io.Discard, "sarif")
	if err == nil || err.Error() != `format "sarif": want text, json, junit or tap` {
		t.Error(err)
	}
}

// TestWriteFails: a report that could not be written must not look like one
// that was.
func TestWriteFails(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	r.Close()
	for _, format := range FindingFormats {
		if err := sample().Write(w, format); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("findings, %s: %v", format, err)
		}
	}
	for _, format := range TestFormats {
		if err := sampleRun().Write(w, format); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("tests, %s: %v", format, err)
		}
	}
}

// FuzzFindings: whatever stands in a file, every format stays well formed and
// text stays one line a finding.
func FuzzFindings(f *testing.F) {
	f.Add("policies/shop.yaml", 7, 12, "rules[0]", "text", "why")
	f.Add("a:b%/../c\x00.yaml", -1, 0, "", "]](0)\n\x1b[2J", "\xff")
	f.Add("//host/share", 1, 1, "\u202e", "{0} &lt;![CDATA[ ]]>", "-->")
	f.Fuzz(func(t *testing.T, file string, line, column int, path, text, related string) {
		found := &Findings{Dir: "/src", Files: []string{file}, Summary: text, List: []Finding{{
			Level: []Level{Error, Warning, Note}[len(text)%3], Rule: text, File: file, Line: line, Column: column, Path: path, Text: text,
			Related: []Place{{File: related, Line: column, Column: line, Text: related}},
		}}}
		lines := written(t, found.Write, "text")
		if strings.Count(lines, "\n") != 2 || strings.IndexFunc(lines, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) >= 0 {
			t.Errorf("text: %q", lines)
		}
		if got := written(t, found.Write, "json"); !json.Valid([]byte(got)) {
			t.Errorf("json: %s", got)
		}
		checkSARIF(t, written(t, found.Write, "sarif"))
		checkJUnit(t, written(t, found.Write, "junit"))
	})
}
