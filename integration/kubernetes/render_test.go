//go:build integration

package kubernetes_test

import (
	"embed"
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"text/template"
)

//go:embed testdata/*.yaml
var testdata embed.FS

// render fills in a manifest of testdata. Every one may use .Images.
func render(t *testing.T, name string, values map[string]any) string {
	t.Helper()
	all := map[string]any{"Images": k8s.images}
	maps.Copy(all, values)
	parsed, err := template.New(name).Option("missingkey=error").Funcs(template.FuncMap{"quote": quote}).ParseFS(testdata, "testdata/"+name)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := parsed.Execute(&out, all); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// quote writes a string as JSON does, which is YAML too.
func quote(s string) (string, error) {
	text, err := json.Marshal(s)
	return string(text), err
}
