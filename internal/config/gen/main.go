// Command gen writes what people and editors read about narthex.yaml: the
// reference docs/configuration.md and the JSON Schema
// docs/narthex.schema.json. Both come from the types, tags and comments of
// internal/config/types.go, so they cannot say anything else than the
// decoder. It also writes the JSON Schema of rule files, which comes from the
// keys in proxy/policy/language.go, into docs/policy.schema.json. Run it with
//
//	go generate ./internal/config/gen
//
// A test fails while the files in docs are not what it would write.
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/proxy/policy"
)

//go:generate go run .

const (
	typesFile = "../types.go"
	docsDir   = "../../../docs"
)

func main() {
	files, err := generate()
	if err == nil {
		for name, data := range files {
			if err = os.WriteFile(filepath.Join(docsDir, name), data, 0o644); err != nil { //nolint:gosec // G306: pages for everybody
				break
			}
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// generate returns the files by their names in docs.
func generate() (map[string][]byte, error) {
	root, err := readKeys()
	if err != nil {
		return nil, err
	}
	schema, err := jsonSchema(root)
	if err != nil {
		return nil, err
	}
	rules, err := policy.Schema()
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		"configuration.md":    reference(root),
		"narthex.schema.json": schema,
		"policy.schema.json":  rules,
	}, nil
}

// key is one key of the file, with the keys of its block where it is one.
type key struct {
	name, path string
	doc        string
	typ        reflect.Type // without pointer
	optional   bool         // a block that means something by being there
	tag        reflect.StructTag
	keys       []*key
}

// elem is the type of a list's elements, or the type itself.
func (k *key) elem() reflect.Type {
	if k.typ.Kind() == reflect.Slice {
		return k.typ.Elem()
	}
	return k.typ
}

// readKeys returns the whole file as one block without a name.
func readKeys() (*key, error) {
	docs, err := readComments()
	if err != nil {
		return nil, err
	}
	root := &key{typ: reflect.TypeFor[config.Config]()}
	if err := addKeys(root, docs); err != nil {
		return nil, err
	}
	return root, nil
}

func addKeys(block *key, docs map[string]string) error {
	t := block.elem()
	for i := range t.NumField() {
		f := t.Field(i)
		name := f.Tag.Get("yaml")
		if name == "" || name == "-" {
			continue
		}
		k := &key{name: name, path: name, typ: f.Type, tag: f.Tag, doc: docs[t.Name()+"."+f.Name]}
		if k.doc == "" {
			return fmt.Errorf("%s.%s has no comment in %s", t.Name(), f.Name, typesFile)
		}
		if block.path != "" {
			k.path = block.path + "." + name
		}
		if k.typ.Kind() == reflect.Pointer {
			k.typ, k.optional = k.typ.Elem(), true
		}
		if k.typ.Kind() == reflect.Slice && isBlock(k.elem()) {
			k.path += "[]"
		}
		if isBlock(k.elem()) {
			if err := addKeys(k, docs); err != nil {
				return err
			}
		}
		block.keys = append(block.keys, k)
	}
	return nil
}

// isBlock reports whether the type is a block of keys of our own.
func isBlock(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t.PkgPath() == reflect.TypeFor[config.Config]().PkgPath()
}

// readComments returns the comment of each field, by "Type.Field".
func readComments() (map[string]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), typesFile, nil, parser.ParseComments)
	if err != nil {
		return nil, fmt.Errorf("read comments: %w", err)
	}
	docs := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if s, ok := spec.Type.(*ast.StructType); ok {
			for _, f := range s.Fields.List {
				for _, name := range f.Names {
					docs[spec.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
				}
			}
		}
		return false
	})
	return docs, nil
}
