package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// tap writes TAP version 14 (testanything.org), with a YAML block of what
// failed below each test that did.
func (r *TestRun) tap(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "TAP version 14\n1..%d", len(r.Results))
	if len(r.Results) == 0 {
		b.WriteString(" # no tests") // a plan of none is a run that was skipped, and why
	}
	b.WriteByte('\n')
	for i := range r.Results {
		t := &r.Results[i]
		if t.Passed {
			fmt.Fprintf(&b, "ok %d - %s\n", i+1, tapText(t.Name))
			continue
		}
		fmt.Fprintf(&b, "not ok %d - %s\n", i+1, tapText(t.Name))
		t.diagnostic(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// diagnostic writes the YAML block of a test that failed. Its strings are
// those of JSON, which YAML reads (YAML 1.2 §1.3). Several failures are the
// lines of one text: the reader of Perl's harness takes a string with a colon
// for a mapping when it stands in a list.
func (t *TestResult) diagnostic(b *strings.Builder) {
	fmt.Fprintf(b, "  ---\n  message: %s\n  severity: fail\n", quote(t.firstFailure()))
	if len(t.Failures) > 1 {
		b.WriteString("  failures: |\n")
		for _, failure := range t.Failures {
			fmt.Fprintf(b, "    %s\n", strings.TrimSpace(printable(failure)))
		}
	}
	fmt.Fprintf(b, "  at:\n    file: %s\n", quote(printable(t.File)))
	if t.Line > 0 {
		fmt.Fprintf(b, "    line: %d\n    column: %d\n", t.Line, t.Column)
	}
	fmt.Fprintf(b, "  duration_ms: %.3f\n  ...\n", float64(t.Duration.Microseconds())/1000)
}

// quote returns a printable text as a string of JSON.
func quote(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		panic(err) // a string that cannot be written: a mistake in the program
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// tapText escapes what would begin a directive: a test named "# SKIP" must not
// pass for one that was skipped (TAP 14, Escaping).
func tapText(s string) string {
	return strings.NewReplacer(`\`, `\\`, "#", `\#`).Replace(printable(s))
}
