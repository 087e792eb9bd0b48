package report

import (
	"encoding/json"
	"encoding/xml"
	"testing"
	"time"
)

func sampleRun() *TestRun {
	return &TestRun{Results: []TestResult{
		{Name: "web reads orders", File: "shop.yaml", Line: 12, Column: 5, Passed: true, Duration: 1500 * time.Microsecond},
		{
			Name: "web writes # SKIP", File: "shop.yaml", Line: 14, Column: 5, Duration: 2 * time.Millisecond,
			Failures: []string{`want deny, got allow by rule "a\b"`, "shadow: want [x]\x1b, got []"},
		},
		{Name: "web reads orders", File: "shop.yaml", Line: 16, Column: 5},
		{Name: "web reads orders", File: "bank.yaml", Line: 3, Column: 5, Passed: true},
	}}
}

func TestRunText(t *testing.T) {
	t.Parallel()
	failed := `shop.yaml:14:5: FAIL: web writes # SKIP
    want deny, got allow by rule "a\b"
    shadow: want [x]\x1b, got []
shop.yaml:16:5: FAIL: web reads orders
`
	summary := "2 passed, 2 failed\n"
	run := sampleRun()
	if got, want := written(t, run.Write, "text"), failed+summary; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	run.Verbose = true
	want := "shop.yaml:12:5: ok: web reads orders\n" + failed + "bank.yaml:3:5: ok: web reads orders\n" + summary
	if got := written(t, run.Write, "text"); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got := written(t, (&TestRun{}).Write, "text"); got != "0 passed, 0 failed\n" {
		t.Errorf("no test: %q", got)
	}
	if run.Passed() || !(&TestRun{}).Passed() || !(&TestRun{Results: run.Results[:1]}).Passed() {
		t.Error("Passed is wrong")
	}
}

func TestRunJSON(t *testing.T) {
	t.Parallel()
	var got struct {
		Passed, Failed int
		Tests          []struct {
			Name, File   string
			Line, Column int
			Passed       bool
			Failures     []string
			Seconds      float64
		}
	}
	if err := json.Unmarshal([]byte(written(t, sampleRun().Write, "json")), &got); err != nil {
		t.Fatal(err)
	}
	if got.Passed != 2 || got.Failed != 2 || len(got.Tests) != 4 {
		t.Fatalf("%+v", got)
	}
	if one := got.Tests[1]; one.Name != "web writes # SKIP" || one.File != "shop.yaml" || one.Line != 14 || one.Column != 5 || one.Passed || len(one.Failures) != 2 || one.Seconds != 0.002 {
		t.Errorf("%+v", one)
	}
	if got, want := written(t, (&TestRun{}).Write, "json"), "{\n  \"passed\": 0,\n  \"failed\": 0,\n  \"tests\": []\n}\n"; got != want {
		t.Errorf("no test: %s", got)
	}
}

func TestRunJUnit(t *testing.T) {
	t.Parallel()
	want := xml.Header + `<testsuites tests="4" failures="2" errors="0" time="0.004">
  <testsuite name="narthex policy test shop.yaml" tests="3" failures="2" errors="0" skipped="0" time="0.004">
    <testcase classname="shop.yaml" name="web reads orders (12:5)" time="0.002"></testcase>
    <testcase classname="shop.yaml" name="web writes # SKIP" time="0.002">
      <failure message="want deny, got allow by rule &#34;a\b&#34; (and 1 more)" type="policy-test"><![CDATA[shop.yaml:14:5: web writes # SKIP
    want deny, got allow by rule "a\b"
    shadow: want [x]\x1b, got []
]]></failure>
    </testcase>
    <testcase classname="shop.yaml" name="web reads orders (16:5)" time="0.000">
      <failure message="failed" type="policy-test"><![CDATA[shop.yaml:16:5: web reads orders
]]></failure>
    </testcase>
  </testsuite>
  <testsuite name="narthex policy test bank.yaml" tests="1" failures="0" errors="0" skipped="0" time="0.000">
    <testcase classname="bank.yaml" name="web reads orders" time="0.000"></testcase>
  </testsuite>
</testsuites>
`
	got := written(t, sampleRun().Write, "junit")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	checkJUnit(t, got)
}

// FuzzTestRun: whatever a test is called, it is written as one test that
// failed or passed, and can be read back.
func FuzzTestRun(f *testing.F) {
	f.Add("web reads orders", "shop.yaml", 1, 2, true, "")
	f.Add("# SKIP me", "a.yaml", 0, -1, false, "  ...\nok 2")
	f.Add("\\# TODO \\", "]]>\x00", 1, 1, false, "\u0085\u2028\xff")
	f.Fuzz(func(t *testing.T, name, file string, line, column int, passed bool, failure string) {
		run := &TestRun{Verbose: true, Results: []TestResult{
			{Name: name, File: file, Line: line, Column: column, Passed: passed, Failures: []string{failure, failure}, Duration: time.Duration(line)},
			{Name: "second", File: "b.yaml", Line: 1, Column: 1, Passed: true},
		}}
		points := parseTAP(t, written(t, run.Write, "tap"))
		if len(points) != 2 || points[0].ok != passed || points[0].description != printable(name) {
			t.Errorf("%q: read back as %+v", name, points)
		}
		if !passed && points[0].diagnostic["message"] != printable(failure) {
			t.Errorf("%q: read back as %v", failure, points[0].diagnostic["message"])
		}
		checkJUnit(t, written(t, run.Write, "junit"))
		if got := written(t, run.Write, "json"); !json.Valid([]byte(got)) {
			t.Errorf("json: %s", got)
		}
	})
}
