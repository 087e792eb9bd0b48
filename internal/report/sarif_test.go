package report

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
)

// shape is what an object of SARIF 2.1.0 may have here, by key: the shape of
// its value, "string", "line" for a number from 1, or "id" for one from 0. A
// key with "!" must be there, and one with "*" is an array of such values.
type shape map[string]string

// sarifShapes are those parts of the official schema that a report uses. The
// schema itself is under the terms of OASIS and is not copied here.
var sarifShapes = map[string]shape{
	"log":      {"$schema": "uri", "version!": "string", "runs*!": "run"},
	"run":      {"tool!": "tool", "results*!": "result", "columnKind": "string"},
	"tool":     {"driver!": "driver"},
	"driver":   {"name!": "string", "version": "string", "informationUri": "uri", "rules*": "rule"},
	"rule":     {"id!": "string", "shortDescription": "message"},
	"message":  {"text!": "string"},
	"result":   {"ruleId!": "string", "ruleIndex!": "id", "level!": "level", "message!": "message", "locations*!": "location", "relatedLocations*": "location"},
	"location": {"id": "id", "physicalLocation": "physical", "logicalLocations*": "logical", "message": "message"},
	"physical": {"artifactLocation!": "artifact", "region!": "region"},
	"artifact": {"uri!": "uri", "uriBaseId": "string"},
	"region":   {"startLine!": "line", "startColumn": "line"},
	"logical":  {"fullyQualifiedName!": "string"},
}

func checkShape(at, kind string, v any) error {
	switch kind {
	case "string", "uri", "level":
		s, ok := v.(string)
		if !ok {
			return fmt.Errorf("%s: %v is no string", at, v)
		}
		if kind == "level" && s != "none" && s != "note" && s != "warning" && s != "error" {
			return fmt.Errorf("%s: no level %q", at, s)
		}
		if _, err := url.Parse(s); kind == "uri" && err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		return nil
	case "line", "id":
		n, ok := v.(float64)
		if !ok || n < 0 || n != float64(int(n)) || kind == "line" && n < 1 {
			return fmt.Errorf("%s: %v is no %s", at, v, kind)
		}
		return nil
	}
	object, ok := v.(map[string]any)
	if !ok {
		return fmt.Errorf("%s: %v is no object", at, v)
	}
	known := 0
	for key, kind := range sarifShapes[kind] {
		name, must := strings.CutSuffix(key, "!")
		name, array := strings.CutSuffix(name, "*")
		value, there := object[name]
		if !there {
			if must {
				return fmt.Errorf("%s: no %s", at, name)
			}
			continue
		}
		known++
		values := []any{value}
		if array {
			if values, ok = value.([]any); !ok {
				return fmt.Errorf("%s.%s: no array", at, name)
			}
		}
		for i, one := range values {
			if err := checkShape(fmt.Sprintf("%s.%s[%d]", at, name, i), kind, one); err != nil {
				return err
			}
		}
	}
	if known != len(object) {
		return fmt.Errorf("%s: has keys that are not in the shape: %v", at, object)
	}
	return nil
}

// checkSARIF holds a report against the shapes and what the standard says
// beside its schema: rules are those of the results, and sets have no two alike.
func checkSARIF(t *testing.T, text string) sarifRun {
	t.Helper()
	var tree any
	var log sarifLog
	if err := json.Unmarshal([]byte(text), &tree); err != nil {
		t.Fatal(err)
	}
	if err := checkShape("log", "log", tree); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if err := json.Unmarshal([]byte(text), &log); err != nil {
		t.Fatal(err)
	}
	if log.Version != "2.1.0" || len(log.Runs) != 1 || log.Runs[0].Tool.Driver.Name != "narthex" {
		t.Fatalf("%s", text)
	}
	run := log.Runs[0]
	ids := map[string]bool{}
	for _, r := range run.Tool.Driver.Rules {
		if ids[r.ID] {
			t.Errorf("rule %s is there twice", r.ID)
		}
		ids[r.ID] = true
	}
	for _, r := range run.Results {
		if r.RuleIndex >= len(run.Tool.Driver.Rules) || run.Tool.Driver.Rules[r.RuleIndex].ID != r.RuleID {
			t.Errorf("result of %s: its index says otherwise", r.RuleID)
		}
		set := map[string]bool{}
		for _, l := range r.RelatedLocations {
			one, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			if set[string(one)] {
				t.Errorf("two related locations alike: %s", one)
			}
			set[string(one)] = true
		}
	}
	return run
}

func TestSARIF(t *testing.T) {
	t.Parallel()
	run := checkSARIF(t, written(t, sample().Write, "sarif"))
	if run.Tool.Driver.Version != "1.2.3" || run.ColumnKind != "unicodeCodePoints" {
		t.Errorf("%+v", run.Tool.Driver)
	}
	var rules []string
	for _, r := range run.Tool.Driver.Rules {
		rules = append(rules, r.ID+": "+r.ShortDescription.Text)
	}
	if got, want := strings.Join(rules, "\n"), `policy-syntax: A rule file is wrong.
never-found: Nothing has this.
unreachable-rule: unreachable-rule
policy-unreadable: policy-unreadable
policy-note: policy-note`; got != want {
		t.Errorf("rules:\n%s", got)
	}
	var results []string
	for _, r := range run.Results {
		line := r.Level + " " + r.RuleID + " " + r.Message.Text
		for _, l := range append(r.Locations, r.RelatedLocations...) {
			if p := l.PhysicalLocation; p != nil {
				line += fmt.Sprintf("\n  %s %s %d:%d", p.ArtifactLocation.URIBaseID, p.ArtifactLocation.URI, p.Region.StartLine, p.Region.StartColumn)
			}
			for _, logical := range l.LogicalLocations {
				line += " " + logical.FullyQualifiedName
			}
			if l.Message != nil {
				line += " " + l.Message.Text
			}
		}
		results = append(results, line)
	}
	if got, want := strings.Join(results, "\n"), `error policy-syntax rules[1].from[0]: "spffe": want spiffe
  %SRCROOT% policies/shop.yaml 7:12 rules[1].from[0]
warning unreachable-rule rule b: never matches\nbefore <a>
  %SRCROOT% policies/shop.yaml 9:0
  %SRCROOT% policies/shop.yaml 3:5 rule a takes it
  %SRCROOT% policies/shop.yaml 3:5 rule a takes it
error policy-unreadable permission denied \x1b[31m\u202e\xff
   file:///etc/narthex/a%20b%23%25.yaml 1:0
warning policy-syntax and 3 more [see] (0)
note policy-note worth knowing
  %SRCROOT% narthex.yaml 1:1`; got != want {
		t.Errorf("results:\n%s", got)
	}
}

func TestArtifact(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ dir, file, base, want string }{
		{"/src", "a.yaml", sourceRoot, "a.yaml"},
		{"/src", "./b/../a.yaml", sourceRoot, "a.yaml"},
		{"/src", "/src/b/a.yaml", sourceRoot, "b/a.yaml"},
		{"/src", "../a.yaml", "", "file:///a.yaml"},
		{"/src", "/srcs/a.yaml", "", "file:///srcs/a.yaml"},
		{"/", "/etc/a.yaml", sourceRoot, "etc/a.yaml"},
		{"", "a.yaml", sourceRoot, "a.yaml"},
		{"", "/etc/a.yaml", "", "file:///etc/a.yaml"},
		{"/src", "a b/100%?#ü.yaml", sourceRoot, "a%20b/100%25%3F%23%C3%BC.yaml"},
		{"/src", "http:x/a.yaml", sourceRoot, "http%3Ax/a.yaml"},
		{"/src", "a\n\xff.yaml", sourceRoot, "a%0A%FF.yaml"},
	} {
		f := Findings{Dir: c.dir}
		got := f.artifact(c.file)
		if got.URI != c.want || got.URIBaseID != c.base {
			t.Errorf("%q in %q: got %s %s", c.file, c.dir, got.URIBaseID, got.URI)
		}
		u, err := url.Parse(got.URI)
		if err != nil || (u.Scheme == "") != (c.base != "") {
			t.Errorf("%q: %v, %v", c.file, u, err)
		}
	}
}
