package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/config"
)

func TestDocsAreFresh(t *testing.T) {
	files, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(docsDir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if !bytes.Equal(got, want) {
			t.Errorf("docs/%s is stale; run: go generate ./internal/config/gen", name)
		}
	}
}

// TestExamplesParse reads the snippets out of the finished page, so that one
// cannot be lost on the way there.
func TestExamplesParse(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(docsDir, "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	snippets := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(page, -1)
	if len(snippets) != len(examples) {
		t.Fatalf("the page has %d snippets, want %d", len(snippets), len(examples))
	}
	for i, s := range snippets {
		c, err := config.Parse("narthex.yaml", s[1])
		if err != nil {
			t.Errorf("%s: %v", examples[i].title, err)
			continue
		}
		for _, w := range c.Warnings {
			t.Errorf("%s: an example should not warn: %v", examples[i].title, &w)
		}
	}
}

// TestEveryKeyIsDescribed holds page and schema against the keys.
func TestEveryKeyIsDescribed(t *testing.T) {
	root, err := readKeys()
	if err != nil {
		t.Fatal(err)
	}
	files, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	var schema any
	if err := json.Unmarshal(files["narthex.schema.json"], &schema); err != nil {
		t.Fatal(err)
	}
	var walk func(k *key, s any)
	walk = func(k *key, s any) {
		if m := s.(map[string]any); m["type"] == "array" {
			s = m["items"]
		}
		if len(k.keys) > 0 && s.(map[string]any)["additionalProperties"] != false {
			t.Errorf("the schema of %q lets unknown keys pass", k.path)
		}
		for _, sub := range k.keys {
			properties, _ := s.(map[string]any)["properties"].(map[string]any)
			next, ok := properties[sub.name].(map[string]any)
			if !ok {
				t.Errorf("%s is not in the schema", sub.path)
				continue
			}
			if next["description"] != sub.doc {
				t.Errorf("%s has no description in the schema", sub.path)
			}
			if !strings.Contains(string(files["configuration.md"]), "| `"+sub.name+"` | ") {
				t.Errorf("%s is not on the page", sub.path)
			}
			walk(sub, next)
		}
	}
	walk(root, schema)
}
