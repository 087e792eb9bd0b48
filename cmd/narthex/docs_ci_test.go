package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/narthex-id/narthex/internal/report"
)

// TestPipelines: docs/ci.md shows the files of deploy/ci as they are, each at
// its link, and those in YAML can be read.
func TestPipelines(t *testing.T) {
	page := readPage(t, "docs/ci.md")
	files, err := filepath.Glob(filepath.Join("..", "..", "deploy", "ci", "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name, fence := filepath.Base(file), "groovy"
		if filepath.Ext(file) == ".yaml" {
			fence = "yaml"
			var pipeline map[string]any
			if err := yaml.UnmarshalWithOptions(text, &pipeline, yaml.Strict()); err != nil || len(pipeline) == 0 {
				t.Errorf("%s: %v", name, err)
			}
		}
		shown := "[deploy/ci/" + name + "](../deploy/ci/" + name + "):\n\n```" + fence + "\n" + string(text) + "```\n"
		if !strings.Contains(page, shown) {
			t.Errorf("docs/ci.md does not show %s as it is", name)
		}
	}
	if blocks := strings.Count(page, "\n```") / 2; blocks != len(files) {
		t.Errorf("docs/ci.md shows %d files, deploy/ci has %d", blocks, len(files))
	}
}

// TestPipelinesCheck holds the calls of `narthex check` in the pipelines
// against its flags.
func TestPipelinesCheck(t *testing.T) {
	calls := regexp.MustCompile(`narthex check [^>\n]*`).FindAllString(readPage(t, "deploy/ci/github-actions.yaml")+readPage(t, "deploy/ci/gitlab-ci.yaml")+readPage(t, "deploy/ci/Jenkinsfile"), -1)
	if len(calls) != 6 {
		t.Errorf("%d calls: %q", len(calls), calls)
	}
	for _, call := range calls {
		cmd, args, err := newRoot().Find(strings.Fields(call)[1:])
		if err == nil {
			err = cmd.ParseFlags(args)
		}
		if err != nil || cmd.Name() != "check" || len(cmd.Flags().Args()) > 0 {
			t.Errorf("%s: %v", call, err)
		}
	}
}

// TestKindsOfFindingsAreDocumented: a name in a report can be looked up, and is
// one that can be written in a comment or a flag.
func TestKindsOfFindingsAreDocumented(t *testing.T) {
	page := readPage(t, "docs/ci.md")
	known := map[string]bool{}
	for _, r := range checkRules {
		if known[r.ID] || !regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`).MatchString(r.ID) {
			t.Errorf("%s: is there twice, or is no lower-case name with hyphens", r.ID)
		}
		known[r.ID] = true
		if !strings.Contains(page, "\n| `"+r.ID+"` | "+r.Text+" |\n") {
			t.Errorf("docs/ci.md does not describe %s as the code does", r.ID)
		}
	}
	declared := regexp.MustCompile(`(?m)^\trule\w+ += "(.*)"$`).FindAllStringSubmatch(readPage(t, "cmd/narthex/check_rules.go"), -1)
	if len(declared) != len(checkRules) {
		t.Errorf("%d kinds have a name, %d a description", len(declared), len(checkRules))
	}
	for _, m := range declared {
		if !known[m[1]] {
			t.Errorf("%s has no description", m[1])
		}
	}
	for _, format := range append(report.FindingFormats, report.TestFormats...) {
		if !strings.Contains(page, "`"+format+"`") {
			t.Errorf("docs/ci.md does not name the format %s", format)
		}
	}
}
