package report

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// TestResult is how one test of a policy went.
type TestResult struct {
	Name         string        // of the test; need not be unique
	File         string        // which the test stands in
	Line, Column int           // from 1; 0 where the whole file is meant
	Passed       bool          // counts, whatever Failures says
	Failures     []string      // what was expected and what came instead, one each
	Duration     time.Duration // that it took
}

// TestRun is how the tests of a policy went.
type TestRun struct {
	Results []TestResult // in the order they are written
	Verbose bool         // text lists tests that passed too
}

// TestFormats are the formats that TestRun.Write knows.
var TestFormats = []string{"text", "json", "junit", "tap"}

// Passed reports whether every test passed; it does where there is none.
func (r *TestRun) Passed() bool { return r.failed() == 0 }

func (r *TestRun) failed() (n int) {
	for i := range r.Results {
		if !r.Results[i].Passed {
			n++
		}
	}
	return n
}

// Write writes the results in one of TestFormats; another is an error.
func (r *TestRun) Write(w io.Writer, format string) error {
	switch format {
	case "text":
		return r.text(w)
	case "json":
		return r.json(w)
	case "junit":
		return r.junit(w)
	case "tap":
		return r.tap(w)
	}
	return unknownFormat(format, TestFormats)
}

func (r *TestRun) text(w io.Writer) error {
	var b strings.Builder
	for i := range r.Results {
		t := &r.Results[i]
		at, name := where(t.File, t.Line, t.Column), printable(t.Name)
		switch {
		case !t.Passed:
			fmt.Fprintf(&b, "%sFAIL: %s\n", at, name)
			for _, failure := range t.Failures {
				fmt.Fprintf(&b, "    %s\n", printable(failure))
			}
		case r.Verbose:
			fmt.Fprintf(&b, "%sok: %s\n", at, name)
		}
	}
	failed := r.failed()
	fmt.Fprintf(&b, "%d passed, %d failed\n", len(r.Results)-failed, failed)
	_, err := io.WriteString(w, b.String())
	return err
}

// json writes an object with the counts and all results.
func (r *TestRun) json(w io.Writer) error {
	type result struct {
		Name     string   `json:"name"`
		File     string   `json:"file"`
		Line     int      `json:"line,omitempty"`
		Column   int      `json:"column,omitempty"`
		Passed   bool     `json:"passed"`
		Failures []string `json:"failures,omitempty"`
		Seconds  float64  `json:"seconds"`
	}
	failed := r.failed()
	run := struct {
		Passed int      `json:"passed"`
		Failed int      `json:"failed"`
		Tests  []result `json:"tests"`
	}{Passed: len(r.Results) - failed, Failed: failed, Tests: make([]result, len(r.Results))}
	for i, t := range r.Results {
		run.Tests[i] = result{t.Name, t.File, t.Line, t.Column, t.Passed, t.Failures, t.Duration.Seconds()}
	}
	return writeJSON(w, run)
}

// testSuite names the test suites of policies' tests.
const testSuite = "narthex policy test"

// junit writes a test suite for each file. Readers take two tests of one name
// for one, so those have their place in their names.
func (r *TestRun) junit(w io.Writer) error {
	type key struct{ file, name string }
	count := map[key]int{}
	for i := range r.Results {
		count[key{r.Results[i].File, r.Results[i].Name}]++
	}
	var suites []junitSuite
	at := map[string]int{} // the suite of each file
	for i := range r.Results {
		t := &r.Results[i]
		n, ok := at[t.File]
		if !ok {
			n = len(suites)
			at[t.File] = n
			suites = append(suites, junitSuite{Name: testSuite + " " + printable(t.File)})
		}
		c := junitCase{Class: printable(t.File), Name: printable(t.Name), Failure: t.junitFailure()}
		if count[key{t.File, t.Name}] > 1 {
			c.Name += fmt.Sprintf(" (%d:%d)", t.Line, t.Column)
		}
		suites[n].add(c, t.Duration)
	}
	return writeJUnit(w, suites...)
}

// junitFailure returns what failed, nil where nothing did.
func (t *TestResult) junitFailure() *junitFailure {
	if t.Passed {
		return nil
	}
	f := &junitFailure{Message: t.firstFailure(), Type: "policy-test"}
	if more := len(t.Failures) - 1; more > 0 {
		f.Message += fmt.Sprintf(" (and %d more)", more)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s%s\n", where(t.File, t.Line, t.Column), printable(t.Name))
	for _, failure := range t.Failures {
		fmt.Fprintf(&b, "    %s\n", printable(failure))
	}
	f.Text = b.String()
	return f
}

func (t *TestResult) firstFailure() string {
	if len(t.Failures) == 0 {
		return "failed"
	}
	return printable(t.Failures[0])
}
