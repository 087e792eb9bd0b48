package main

import (
	"maps"
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

// TestPipelinesCheck holds the calls of narthex in the pipelines against its
// commands, their flags and how many files they take.
func TestPipelinesCheck(t *testing.T) {
	pipelines := readPage(t, "deploy/ci/github-actions.yaml") + readPage(t, "deploy/ci/gitlab-ci.yaml") + readPage(t, "deploy/ci/Jenkinsfile")
	count := map[string]int{}
	for _, call := range regexp.MustCompile(`narthex (check|policy) [^>|#\n]*`).FindAllString(pipelines, -1) {
		cmd, args, err := newRoot().Find(shellWords(call)[1:])
		if err == nil {
			err = cmd.ParseFlags(args)
		}
		files := map[string]int{"fmt": 1, "diff": 2}[cmd.Name()]
		if err != nil || len(cmd.Flags().Args()) != files {
			t.Errorf("%s: %v", call, err)
		}
		count[cmd.CommandPath()]++
	}
	want := map[string]int{"narthex check": 6, "narthex policy test": 5, "narthex policy fmt": 3, "narthex policy diff": 3}
	if !maps.Equal(count, want) {
		t.Errorf("the pipelines call %v, want %v", count, want)
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
