package report

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The elements of JUnit files that readers agree on, with what each may hold
// and the attributes it has; "!" marks those that must be there. Jenkins'
// junit-10.xsd allows more; Ant's and Surefire's allow one failure a case.
var junitElements = map[string]struct{ within, attributes []string }{
	"testsuites": {[]string{""}, []string{"tests!", "failures!", "errors!", "time!"}},
	"testsuite":  {[]string{"testsuites"}, []string{"name!", "tests!", "failures!", "errors!", "skipped!", "time!"}},
	"testcase":   {[]string{"testsuite"}, []string{"classname!", "name!", "time!"}},
	"failure":    {[]string{"testcase"}, []string{"message!", "type!"}},
	"system-out": {[]string{"testcase"}, nil},
}

// checkJUnit holds a report against the elements, and its counts against its
// cases.
func checkJUnit(t *testing.T, text string) junitSuites {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(text))
	var open []string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		switch token := token.(type) {
		case xml.StartElement:
			if err := checkElement(token, strings.Join(open[max(len(open)-1, 0):], "")); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			open = append(open, token.Name.Local)
		case xml.EndElement:
			open = open[:len(open)-1]
		}
	}
	var all junitSuites
	if err := xml.Unmarshal([]byte(text), &all); err != nil {
		t.Fatal(err)
	}
	if strings.Count(text, "<failure ") != checkCounts(t, all) {
		t.Errorf("a case has more than one failure:\n%s", text)
	}
	return all
}

func checkElement(e xml.StartElement, within string) error {
	known, ok := junitElements[e.Name.Local]
	if !ok || !slices.Contains(known.within, within) {
		return fmt.Errorf("<%s> within <%s>", e.Name.Local, within)
	}
	for _, a := range e.Attr {
		if !slices.Contains(known.attributes, a.Name.Local+"!") {
			return fmt.Errorf("<%s> has %s", e.Name.Local, a.Name.Local)
		}
	}
	if len(e.Attr) != len(known.attributes) {
		return fmt.Errorf("<%s> lacks an attribute: %v", e.Name.Local, e.Attr)
	}
	return nil
}

func checkCounts(t *testing.T, all junitSuites) (failures int) {
	t.Helper()
	tests := 0
	for _, s := range all.Suites {
		failed := 0
		for _, c := range s.Cases {
			if c.Failure != nil {
				failed++
			}
			checkTime(t, c.Time)
		}
		if s.Tests != len(s.Cases) || s.Failures != failed || s.Errors != 0 || s.Skipped != 0 {
			t.Errorf("suite %s: its counts are wrong: %+v", s.Name, s)
		}
		checkTime(t, s.Time)
		tests += len(s.Cases)
		failures += failed
	}
	checkTime(t, all.Time)
	if all.Tests != tests || all.Failures != failures || all.Errors != 0 {
		t.Errorf("the counts of all suites are wrong: %+v", all)
	}
	return failures
}

// checkTime holds a time against the pattern that Jenkins' xUnit plug-in has.
func checkTime(t *testing.T, text string) {
	t.Helper()
	if _, decimals, ok := strings.Cut(text, "."); !ok || len(decimals) != 3 {
		t.Errorf("time %q: want three decimals", text)
	}
	if _, err := strconv.ParseFloat(text, 64); err != nil {
		t.Error(err)
	}
}

func TestFindingsJUnit(t *testing.T) {
	t.Parallel()
	want := xml.Header + `<testsuites tests="5" failures="3" errors="0" time="0.000">
  <testsuite name="narthex check" tests="5" failures="3" errors="0" skipped="0" time="0.000">
    <testcase classname="narthex check" name="narthex.yaml" time="0.000">
      <system-out><![CDATA[narthex.yaml:1:1: note: worth knowing
]]></system-out>
    </testcase>
    <testcase classname="narthex check" name="policies/shop.yaml" time="0.000">
      <failure message="rules[1].from[0]: &#34;spffe&#34;: want spiffe (and 1 more)" type="policy-syntax"><![CDATA[policies/shop.yaml:7:12: error: rules[1].from[0]: "spffe": want spiffe
policies/shop.yaml:9: warning: rule b: never matches\nbefore <a>
    policies/shop.yaml:3:5: rule a takes it
    policies/shop.yaml:3:5: rule a takes it
]]></failure>
    </testcase>
    <testcase classname="narthex check" name="policies/good.yaml" time="0.000"></testcase>
    <testcase classname="narthex check" name="/etc/narthex/a b#%.yaml" time="0.000">
      <failure message="permission denied \x1b[31m\u202e\xff" type="policy-unreadable"><![CDATA[/etc/narthex/a b#%.yaml: error: permission denied \x1b[31m\u202e\xff
]]></failure>
    </testcase>
    <testcase classname="narthex check" name="narthex check" time="0.000">
      <failure message="and 3 more [see](0)" type="policy-syntax"><![CDATA[warning: and 3 more [see](0)
]]></failure>
    </testcase>
  </testsuite>
</testsuites>
`
	got := written(t, sample().Write, "junit")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	checkJUnit(t, got)
}

// TestWorstFindingFirst: what a list of failed tests shows of a file is its
// worst finding.
func TestWorstFindingFirst(t *testing.T) {
	t.Parallel()
	f := &Findings{Files: []string{"a", "a"}, List: []Finding{
		{Level: Note, Rule: "n", File: "a", Text: "a note"},
		{Level: Warning, Rule: "w", File: "a", Text: "a warning"},
		{Level: Error, Rule: "e", File: "a", Text: "an error"},
		{Level: Error, Rule: "f", File: "a", Text: "another"},
	}}
	all := checkJUnit(t, written(t, f.Write, "junit"))
	if all.Tests != 1 || all.Suites[0].Cases[0].Failure.Message != "an error (and 2 more)" || all.Suites[0].Cases[0].Failure.Type != "e" {
		t.Errorf("%+v", all)
	}
}
