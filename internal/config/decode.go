package config

import (
	"cmp"
	"encoding"
	"fmt"
	"iter"
	"math"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// maxNodes bounds how many nodes are visited, aliases followed, so that a
	// small file cannot unfold into a large one.
	maxNodes = 100_000
	// maxDepth bounds how deep blocks, lists and aliases may nest.
	maxDepth = 32
)

// decoder fills Go values from a syntax tree. Unlike a general decoder it
// goes on after a mistake, so that a person reads all of them at once, and
// remembers where each key stood, for the checks that come after it.
type decoder struct {
	*findings
	dir     string // what relative paths are relative to
	anchors map[string]ast.Node
	nodes   int
	depth   int
	quiet   bool // in a default value: positions are not those of the file
}

// keysOf yields the keys of a block and the fields that hold them.
func keysOf(t reflect.Type) iter.Seq2[string, reflect.StructField] {
	return func(yield func(string, reflect.StructField) bool) {
		for i := range t.NumField() {
			f := t.Field(i)
			if name := f.Tag.Get("yaml"); name != "" && name != "-" && !yield(name, f) {
				return
			}
		}
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func at(n ast.Node) position {
	if tk := n.GetToken(); tk != nil && tk.Position != nil {
		return position{max(tk.Position.Line, 1), max(tk.Position.Column, 1)}
	}
	return position{1, 1}
}

// value decodes n, which stands at path, into v. The tag is that of the field
// that v is, or is an element of.
func (d *decoder) value(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	if len(d.findings.list) >= maxFindings {
		return // nobody reads on; a file can be wrong a hundred thousand times
	}
	d.nodes++
	d.depth++
	defer func() { d.depth-- }()
	if d.nodes > maxNodes || d.depth > maxDepth {
		d.addf(path, "the file is too large or too deeply nested once its aliases are followed")
		return
	}
	if n == nil {
		d.addf(path, "has no value; give it one or leave the key out")
		return
	}
	switch n := n.(type) {
	case *ast.NullNode:
		d.add(at(n), path, noValue(v))
		return
	case *ast.AnchorNode:
		d.value(n.Value, v, path, tag)
		d.anchors[nameOf(n.Name)] = n.Value
		return
	case *ast.AliasNode:
		target, ok := d.anchors[nameOf(n.Value)]
		if !ok {
			problem := fmt.Sprintf("alias *%s has no anchor before it", nameOf(n.Value))
			if v.Kind() == reflect.String {
				problem += fmt.Sprintf("; quote a pattern that begins with *: %q", "*"+nameOf(n.Value))
			}
			d.add(at(n), path, problem)
			return
		}
		d.value(target, v, path, tag)
		return
	case *ast.TagNode:
		d.add(at(n), path, "YAML tags are not used here; write the plain value")
		return
	}
	if _, isList := n.(*ast.SequenceNode); isLater(path, shown(n)) || isList && isLater(path, "[]") {
		d.add(at(n), path, describe(n)+" is "+notYet)
		return
	}
	d.typed(n, v, path, tag)
}

func noValue(v reflect.Value) string {
	if t := v.Type(); t.Kind() == reflect.Pointer && t.Elem().Kind() == reflect.Struct {
		return "has no value; write {} for a block without keys, or leave it out"
	}
	return "has no value; give it one or leave the key out"
}

func (d *decoder) typed(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		d.typed(n, v.Elem(), path, tag)
		return
	}
	if text, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(n, text, v, path, tag)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.block(n, v, path, tag)
	case reflect.Slice:
		if _, isList := n.(*ast.SequenceNode); !isList && v.Type() == reflect.TypeFor[Targets]() {
			v.Set(reflect.ValueOf(make(Targets, 1)))
			d.typed(n, v.Index(0), path, tag)
			return
		}
		d.list(n, v, path, tag)
	case reflect.Map:
		d.mapping(n, v, path, tag)
	case reflect.String:
		d.string(n, v, path, tag)
	case reflect.Bool:
		if b, ok := n.(*ast.BoolNode); ok {
			v.SetBool(b.Value)
			return
		}
		d.wrongType(n, path, "true or false")
	case reflect.Int, reflect.Int64:
		d.number(n, v, path, tag)
	default:
		panic("config: no decoding for " + v.Type().String())
	}
}

func (d *decoder) wrongType(n ast.Node, path, want string) {
	d.add(at(n), path, "want "+want+", got "+describe(n))
}

// text decodes what has its own reading of a string.
func (d *decoder) text(n ast.Node, into encoding.TextUnmarshaler, v reflect.Value, path string, tag reflect.StructTag) {
	s, ok := stringOf(n)
	if !ok {
		want := wanted(v)
		_, isAddress := into.(*Address)
		if _, isMap := n.(*ast.MappingNode); isMap && isAddress {
			want += " (in quotes, where it stands between braces or brackets)"
		}
		d.wrongType(n, path, want)
		return
	}
	if s == "" {
		d.add(at(n), path, "is empty; give it a value or leave the key out")
		return
	}
	if _, ok := into.(*spiffeid.TrustDomain); ok && strings.ContainsAny(s, ":/") {
		d.add(at(n), path, fmt.Sprintf("%q is more than the name of a trust domain; write for example example.org", clip(s)))
		return
	}
	if err := into.UnmarshalText([]byte(s)); err != nil {
		problem := err.Error()
		if strings.HasSuffix(v.Type().PkgPath(), "/spiffeid") {
			problem = fmt.Sprintf("%q is not %s: %v", clip(s), wanted(v), err)
		}
		if strings.Contains(s, "${") {
			problem += "; ${…} is not expanded"
		}
		d.add(at(n), path, problem)
		return
	}
	if dur, ok := into.(*Duration); ok {
		low, high := time.Duration(math.MinInt64), time.Duration(math.MaxInt64)
		if b, err := time.ParseDuration(tag.Get("min")); err == nil {
			low = b
		}
		if b, err := time.ParseDuration(tag.Get("max")); err == nil {
			high = b
		}
		if t := time.Duration(*dur); t < low || t > high {
			d.add(at(n), path, fmt.Sprintf("%s is out of bounds: %s to %s", t, tag.Get("min"), tag.Get("max")))
		}
	}
}

func wanted(v reflect.Value) string {
	switch v.Interface().(type) {
	case Duration:
		return "a duration such as 10s"
	case Address:
		return "an address: host:port or unix:/path"
	case ServerName:
		return "a server name such as db.example.org"
	case Network:
		return "a network such as 10.0.0.0/8"
	case IDPattern:
		return "a SPIFFE ID or a pattern such as spiffe://example.org/ns/*/sa/web"
	case SocketMode:
		return "a mode in quotes, such as \"0660\""
	case Socket:
		return "the absolute path of a socket"
	case HTTPVersion:
		return "h2 or http/1.1"
	case spiffeid.TrustDomain:
		return "the name of a trust domain"
	case spiffeid.ID:
		return "a SPIFFE ID such as spiffe://example.org/web"
	}
	return "text"
}

func (d *decoder) string(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	s, ok := stringOf(n)
	if !ok {
		if enum := tag.Get("enum"); enum != "" {
			d.wrongType(n, path, "one of "+strings.ReplaceAll(enum, "|", ", "))
			return
		}
		if n, ok := n.(ast.ScalarNode); ok {
			d.wrongType(n, path, "text (in quotes, as YAML would read it otherwise)")
			return
		}
		d.wrongType(n, path, "text")
		return
	}
	switch {
	case s == "" && tag.Get("empty") == "":
		d.add(at(n), path, "is empty; give it a value or leave the key out")
		return
	case strings.ContainsAny(s, "\x00\n\r") && v.Type() != reflect.TypeFor[Secret]():
		d.add(at(n), path, "has more than one line or a NUL character")
		return
	}
	if enum := tag.Get("enum"); enum != "" {
		words := strings.Split(enum, "|")
		if !slices.Contains(words, s) {
			problem := fmt.Sprintf("%q is none of %s", clip(s), strings.Join(words, ", "))
			if w := cmp.Or(nearest(s, words), meant(tag.Get("meant"), s)); w != "" {
				problem += fmt.Sprintf("; did you mean %q?", w)
			}
			d.add(at(n), path, problem)
			return
		}
	}
	if v.Type() == reflect.TypeFor[File]() && !filepath.IsAbs(s) {
		s = filepath.Join(d.dir, s)
	}
	v.SetString(s)
}

func (d *decoder) number(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	i, ok := n.(*ast.IntegerNode)
	if !ok {
		d.wrongType(n, path, "a whole number")
		return
	}
	low, high := bounds(tag)
	var x int64
	switch raw := i.Value.(type) {
	case int64:
		x = raw
	case uint64:
		x = int64(min(raw, math.MaxInt64))
	}
	if x < low || x > high {
		d.add(at(n), path, fmt.Sprintf("%s is out of bounds: %s", clip(shown(n)), boundsText(low, high)))
		return
	}
	v.SetInt(x)
}

func bounds(tag reflect.StructTag) (low, high int64) {
	low, high = math.MinInt64, math.MaxInt64
	if n, err := strconv.ParseInt(tag.Get("min"), 10, 64); err == nil {
		low = n
	}
	if n, err := strconv.ParseInt(tag.Get("max"), 10, 64); err == nil {
		high = n
	}
	return low, high
}

func boundsText(low, high int64) string {
	if high == math.MaxInt64 {
		return fmt.Sprintf("%d or more", low)
	}
	return fmt.Sprintf("%d to %d", low, high)
}

func (d *decoder) list(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		d.wrongType(n, path, "a list")
		return
	}
	if len(seq.Values) == 0 && tag.Get("empty") == "" {
		d.add(at(n), path, "is an empty list; give it an element or leave the key out")
		return
	}
	out := reflect.MakeSlice(v.Type(), len(seq.Values), len(seq.Values))
	for i, e := range seq.Values {
		elem := fmt.Sprintf("%s[%d]", path, i)
		if e != nil && !d.quiet {
			d.pos[elem] = at(e)
			if m := entries(e); len(m) > 0 { // a block's place is that of its first key, not of the colon
				d.pos[elem] = at(m[0].Key)
			}
		}
		d.value(e, out.Index(i), elem, tag)
	}
	v.Set(out)
}

// entries returns the key-value pairs of a mapping, which the parser gives
// in one of two shapes.
func entries(n ast.Node) []*ast.MappingValueNode {
	switch n := n.(type) {
	case *ast.MappingNode:
		return n.Values
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}
	}
	return nil
}

func isMapping(n ast.Node) bool {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return true
	}
	return false
}

// eachKey yields the pairs of a mapping whose keys are text and come once.
func (d *decoder) eachKey(n ast.Node, path string) iter.Seq2[string, *ast.MappingValueNode] {
	return func(yield func(string, *ast.MappingValueNode) bool) {
		seen := map[string]position{}
		for _, e := range entries(n) {
			if _, ok := e.Key.(*ast.MergeKeyNode); ok {
				d.add(at(e.Key), path, "merge keys (<<) are not used here; write the keys out")
				continue
			}
			key, ok := stringOf(e.Key)
			if !ok {
				d.add(at(e.Key), path, "want a key in plain text, got "+describe(e.Key))
				continue
			}
			if first, ok := seen[key]; ok {
				d.add(at(e.Key), join(path, clip(key)), fmt.Sprintf("is there already, in line %d", first.line))
				continue
			}
			seen[key] = at(e.Key)
			if !yield(key, e) {
				return
			}
		}
	}
}

func (d *decoder) block(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	d.fillDefaults(v)
	if !isMapping(n) {
		d.wrongType(n, path, "a block of keys")
		return
	}
	fields := map[string]reflect.StructField{}
	var known []string
	for key, f := range keysOf(v.Type()) {
		fields[key] = f
		known = append(known, key)
	}
	given := map[string]bool{}
	for key, e := range d.eachKey(n, path) {
		sub := join(path, clip(key))
		if !d.quiet {
			d.pos[sub] = at(e.Key)
		}
		f, ok := fields[key]
		switch {
		case ok:
			given[key] = true
			v.FieldByIndex(f.Index).SetZero()
			d.value(e.Value, v.FieldByIndex(f.Index), sub, f.Tag)
		case isLater(sub, ""):
			d.add(at(e.Key), sub, notYet)
			if tag.Get("oneof") != "" {
				d.bad[path] = true
			}
		default:
			meant, problem := unknown(key, known)
			d.add(at(e.Key), sub, problem)
			if meant != "" {
				d.bad[join(path, meant)] = true
			}
		}
	}
	d.complete(v, path, tag, known, given)
}

// complete reports the keys that a block must have and has not.
func (d *decoder) complete(v reflect.Value, path string, tag reflect.StructTag, known []string, given map[string]bool) {
	for key, f := range keysOf(v.Type()) {
		if f.Tag.Get("required") != "" && !given[key] {
			d.addf(join(path, key), "is required")
		}
	}
	if tag.Get("oneof") == "" || len(given) == 1 {
		return
	}
	for _, key := range known {
		if d.isBad(join(path, key)) {
			return
		}
	}
	d.addf(path, "needs exactly one of %s; it has %s", strings.Join(known, ", "), count(len(given)))
}

func count(n int) string {
	if n == 0 {
		return "none"
	}
	return strconv.Itoa(n)
}

// mapping decodes a block whose keys are not ours to choose.
func (d *decoder) mapping(n ast.Node, v reflect.Value, path string, tag reflect.StructTag) {
	if !isMapping(n) {
		d.wrongType(n, path, "a block of keys")
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	for key, e := range d.eachKey(n, path) {
		sub := join(path, clip(key))
		if !d.quiet {
			d.pos[sub] = at(e.Key)
		}
		k, elem := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		d.text(e.Key, k.Addr().Interface().(encoding.TextUnmarshaler), k, sub, tag)
		d.value(e.Value, elem, sub, tag)
		if !d.isBad(sub) {
			v.SetMapIndex(k, elem)
		}
	}
}

// fillDefaults gives every key of a block the value it has when it is left
// out.
func (d *decoder) fillDefaults(v reflect.Value) {
	for key, f := range keysOf(v.Type()) {
		field := v.FieldByIndex(f.Index)
		text := f.Tag.Get("default")
		switch {
		case text != "":
			decodeDefault(text, field, key, f.Tag)
		case field.Kind() == reflect.Struct:
			d.fillDefaults(field)
		}
	}
}

// decodeDefault decodes the text of a default tag. A tag that does not
// decode is a mistake in the program.
func decodeDefault(text string, v reflect.Value, key string, tag reflect.StructTag) {
	file, err := parser.ParseBytes([]byte(text), 0)
	if err != nil || len(file.Docs) != 1 {
		panic(fmt.Sprintf("config: default %q of %s does not parse: %v", text, key, err))
	}
	d := &decoder{findings: newFindings("default"), anchors: map[string]ast.Node{}, quiet: true}
	d.value(file.Docs[0].Body, v, key, tag)
	if err := d.err(); err != nil {
		panic(fmt.Sprintf("config: default %q of %s: %v", text, key, err))
	}
}
