// Package config reads narthex.yaml into Go types and says, with file, line,
// column and key, all that is wrong with it.
//
//	c, err := config.Load("narthex.yaml")
//	if err != nil {
//		return err // one line for each finding
//	}
//	if err := c.ForAgent(); err != nil {
//		return err
//	}
//	for _, w := range c.Warnings {
//		log.Warn(w.Error())
//	}
//
// The types in types.go are the contract: decoding, defaults, the JSON Schema
// and the reference in docs/ all come from them. A Config that Load returns
// has every default filled in and every single value checked. Whether the
// files, sockets and peers it names are there is for those who use them.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// MaxSize is the most bytes a configuration file may have: 1 MiB.
const MaxSize = 1 << 20

// maxTokens bounds the YAML tokens of a file: a thousand listeners have half
// as many, and the parser's time grows with the square of a block's keys.
const maxTokens = 100_000

// Load reads, decodes and checks a file. What is wrong in it is returned as
// an *Error; that it cannot be read, as the error of the file system.
func Load(path string) (*Config, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if err := checkPlain(path, info.Mode()); err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c, err := Parse(path, data)
	if err != nil {
		return nil, err
	}
	c.warnMode(info.Mode().Perm())
	return c, nil
}

// checkPlain refuses what is no plain file: to open a pipe may wait for ever,
// and neither a pipe nor a device says the same again at a reload.
func checkPlain(path string, mode fs.FileMode) error {
	switch {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		return fmt.Errorf("%s is a directory, not a plain file; name the file in it, such as %s", path, filepath.Join(path, "narthex.yaml"))
	}
	return fmt.Errorf("%s is not a plain file; the configuration is read again at each reload, so write it to a file and name that", path)
}

// Parse decodes and checks the bytes of a file. The name stands in findings,
// and relative paths are relative to its directory; the file itself is not
// opened. Every error is an *Error.
func Parse(name string, data []byte) (*Config, error) {
	f := newFindings(name)
	body, err := parse(f, data)
	if err != nil {
		return nil, err
	}
	c := &Config{file: name, pos: f.pos}
	d := &decoder{findings: f, dir: filepath.Dir(name), anchors: map[string]ast.Node{}}
	d.value(body, reflect.ValueOf(c).Elem(), "", "")
	if len(f.list) < maxFindings {
		c.validate(f)
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	c.warn()
	return c, nil
}

func newFindings(file string) *findings {
	return &findings{file: file, pos: positions{}, bad: map[string]bool{}}
}

// parse returns the one document of a file as a tree.
func parse(f *findings, data []byte) (body ast.Node, err error) {
	fail := func(at position, problem string) (ast.Node, error) { //nolint:unparam // so that callers return it as it is
		f.add(at, "", problem)
		return nil, f.err()
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // some editors write a byte order mark
	if len(data) > MaxSize {
		return fail(position{1, 1}, fmt.Sprintf("the file is larger than %d bytes", MaxSize))
	}
	// The YAML library indexes past the end of its tokens on some malformed
	// input; to a person that is one more syntax error.
	defer func() {
		if r := recover(); r != nil {
			body, err = fail(position{1, 1}, "the file is not YAML")
		}
	}()
	tokens := lexer.Tokenize(string(data))
	if len(tokens) > maxTokens {
		return fail(position{1, 1}, fmt.Sprintf("the file has more than %d words and signs", maxTokens))
	}
	if at, deep := tooDeep(tokens); deep {
		return fail(at, fmt.Sprintf("blocks and lists are nested more than %d deep", maxDepth))
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var syntax *yaml.SyntaxError
		if errors.As(err, &syntax) && syntax.GetToken() != nil && syntax.GetToken().Position != nil {
			p := syntax.GetToken().Position
			return fail(position{max(p.Line, 1), max(p.Column, 1)}, "not YAML: "+plainly(syntax.GetMessage()))
		}
		first, _, _ := strings.Cut(err.Error(), "\n")
		return fail(position{1, 1}, "not YAML: "+plainly(first))
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if body != nil {
			return fail(at(doc.Body), "a second YAML document; put everything in one")
		}
		body = doc.Body
	}
	if body == nil {
		return fail(position{1, 1}, "the file is empty; it needs an agent or a proxy block")
	}
	return body, nil
}

// mistakes says in other words what the YAML library says of the mistakes that
// people make. The first that fits counts.
var mistakes = []struct{ says, words string }{
	{"sequence end token", "a list that [ begins is not ended by ]"},
	{"flow mapping end token", "a block that { begins is not ended by }"},
	{"found character '\t'", "a tab; indent with spaces"},
	{"end character of double-quoted text", "the text that \" begins is not ended by \""},
	{"end character of single-quoted text", "the text that ' begins is not ended by '"},
	{"mapping value is not allowed", "a key and its value cannot stand here; is the indentation right? Text with a colon in it needs quotes"},
	{"block sequence entries are not allowed", "a list cannot begin here; put each - on a line of its own, below the key"},
	{"value is not allowed in this context", "this does not belong to what is around it; are indentation, brackets and quotes right?"},
	{"unexpected key name", "want key: value; is a colon missing, or the indentation wrong?"},
	{"non-map value is specified", "want key: value; is a colon missing, or the indentation wrong?"},
	{"unexpected scalar value type", "this cannot stand here; put text that begins with *, &, !, %, @ or ` in quotes"},
	{"is a reserved character", "text cannot begin with this character; put it in quotes"},
	{"unexpected directive value", "text cannot begin with %; put it in quotes"},
}

func plainly(message string) string {
	for _, p := range mistakes {
		if strings.Contains(message, p.says) {
			return p.words
		}
	}
	return message
}

// tooDeep finds nesting that would cost the recursive parser its stack, or
// time that grows with the square of the depth. Indentation needs a line and
// more bytes with each level and is bounded by the size of the file; brackets,
// and dashes and other indicators on one line, are counted here.
func tooDeep(tokens token.Tokens) (position, bool) {
	flow, indicators, line := 0, 0, 0
	for _, tk := range tokens {
		if tk.Position.Line != line && flow == 0 || tk.Type == token.CollectEntryType {
			indicators = 0
		}
		line = tk.Position.Line
		switch tk.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType, token.MappingValueType,
			token.AnchorType, token.AliasType, token.TagType, token.MergeKeyType:
			indicators++
		}
		if flow > maxDepth || indicators > 2*maxDepth {
			return position{max(line, 1), max(tk.Position.Column, 1)}, true
		}
	}
	return position{}, false
}
