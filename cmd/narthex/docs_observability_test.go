package main

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// documented returns the rows of a table of docs/observability.md, the one
// whose head begins with a word: what its first column names, and what its
// second does.
func documented(t *testing.T, head string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "observability.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "\n| "+head+" |")
	if !found {
		t.Fatalf("docs/observability.md has no table of each %s", head)
	}
	table, _, _ = strings.Cut(table, "\n\n")
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]*)").FindAllStringSubmatch(table, -1) {
		rows[m[1]] = strings.ReplaceAll(strings.TrimSpace(m[2]), "`", "")
	}
	return rows
}

func compare(t *testing.T, documented, real map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(real)) {
		if got, ok := documented[name]; !ok {
			t.Errorf("docs/observability.md leaves out %s (%s)", name, real[name])
		} else if got != real[name] {
			t.Errorf("docs/observability.md says %q of %s, it is %q", got, name, real[name])
		}
	}
	for name := range documented {
		if _, ok := real[name]; !ok {
			t.Errorf("docs/observability.md has %s, which does not exist", name)
		}
	}
}

// TestMetricsAreDocumented compares the documented metrics and their labels
// with what the code registers.
func TestMetricsAreDocumented(t *testing.T) {
	registered := map[string]string{}
	for _, room := range []string{"agent", "cmd", "internal", "proxy"} {
		err := filepath.WalkDir(filepath.Join("..", "..", room), func(file string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
				return err
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			ast.Inspect(parsed, func(n ast.Node) bool {
				if name, labels, ok := registration(n); ok {
					registered[name] = strings.Join(labels, ", ")
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	compare(t, documented(t, "metric"), registered)
}

// registration recognises m.Counter("narthex_…", "what it is", "label", …) and
// its like.
func registration(n ast.Node) (name string, labels []string, ok bool) {
	call, ok := n.(*ast.CallExpr)
	if !ok {
		return "", nil, false
	}
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || !slices.Contains([]string{"Counter", "Gauge", "Histogram"}, method.Sel.Name) {
		return "", nil, false
	}
	var words []string
	for _, arg := range call.Args {
		if literal, ok := arg.(*ast.BasicLit); ok && literal.Kind == token.STRING {
			word, err := strconv.Unquote(literal.Value)
			if err != nil {
				return "", nil, false
			}
			words = append(words, word)
		}
	}
	if len(words) < 2 || !strings.HasPrefix(words[0], "narthex_") {
		return "", nil, false
	}
	return words[0], words[2:], true
}

// TestAccessFieldsAreDocumented compares the documented fields of the access
// log with those of a record that has them all.
func TestAccessFieldsAreDocumented(t *testing.T) {
	record := telemetry.Access{HTTP: &telemetry.AccessHTTP{}}
	fill(reflect.ValueOf(&record).Elem())
	record.Source, record.Destination = "192.0.2.1:1", "192.0.2.2:2"
	var fields map[string]any
	if err := json.Unmarshal(record.AppendJSON(nil), &fields); err != nil {
		t.Fatal(err)
	}
	got := documented(t, "field")
	for name := range got {
		got[name] = ""
	}
	real := map[string]string{}
	for name := range fields {
		real[name] = ""
	}
	compare(t, got, real)
}

// fill gives everything in v a value other than its zero.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		fill(v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fill(v.Field(i))
			}
		}
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(1)
	case reflect.Uint16, reflect.Uint64:
		v.SetUint(1)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	}
}

// TestStatusIsDocumented compares the documented objects of the status with
// those it has.
func TestStatusIsDocumented(t *testing.T) {
	objects := map[string]string{}
	var walk func(path string, of reflect.Type)
	walk = func(path string, of reflect.Type) {
		for of.Kind() == reflect.Pointer || of.Kind() == reflect.Slice {
			of = of.Elem()
		}
		if of.Kind() != reflect.Struct || of.PkgPath() != reflect.TypeFor[telemetry.Status]().PkgPath() {
			return
		}
		var names []string
		for i := range of.NumField() {
			field := of.Field(i)
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			names = append(names, name)
			below := strings.TrimPrefix(path+"."+name, "..")
			if field.Type.Kind() == reflect.Slice {
				below += "[]"
			}
			walk(below, field.Type)
		}
		objects[path] = strings.Join(names, ", ")
	}
	walk(".", reflect.TypeFor[telemetry.Status]())
	compare(t, documented(t, "object"), objects)
}
