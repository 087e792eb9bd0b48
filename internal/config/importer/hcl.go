package importer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/parser"
	"github.com/hashicorp/hcl/hcl/scanner"
	"github.com/hashicorp/hcl/hcl/token"
	jsonparser "github.com/hashicorp/hcl/json/parser"
)

// MaxSize is the most bytes a spire-agent's configuration may have: 1 MiB.
const MaxSize = 1 << 20

// maxDepth bounds how deep blocks and lists nest. spire-agent's own keys go
// eight levels down.
const maxDepth = 32

// place is where something stands, lines and columns from 1.
type place struct{ line, column int }

// kind tells what a value is.
type kind int

const (
	block  kind = iota
	list        // of values
	text        // a string, or a number as it was written
	number      // as it was written
	flag        // true or false
)

// value is a value of the file. Labels of a block are blocks around it:
// KeyManager "disk" {} is a block KeyManager with the key disk.
type value struct {
	at    place
	kind  kind
	text  string
	items []value // of a list
	pairs []pair  // of a block
}

// pair is a key and its value.
type pair struct {
	key   string
	at    place
	value value
}

// read parses the file, in HCL or JSON as spire-agent takes both: JSON is what
// begins with a brace.
func read(data []byte) (root value, at place, err error) {
	// The library panics on some of what it cannot make sense of, such as a
	// number out of range; to a person that is one more thing that is no HCL.
	defer func() {
		if r := recover(); r != nil {
			root, at, err = value{}, place{1, 1}, errors.New("the file is not HCL")
		}
	}()
	isJSON := strings.HasPrefix(strings.TrimSpace(string(data)), "{")
	switch {
	case len(data) > MaxSize:
		return value{}, place{1, 1}, fmt.Errorf("the file is larger than %d bytes; is it a spire-agent's configuration?", MaxSize)
	case !utf8.Valid(data):
		return value{}, place{1, 1}, errors.New("the file is not UTF-8 text; is it a spire-agent's configuration?")
	case isJSON && tooDeepJSON(data):
		return value{}, place{1, 1}, fmt.Errorf("blocks and lists are nested more than %d deep", maxDepth)
	}
	var file *ast.File
	if isJSON {
		file, err = jsonparser.Parse(data)
	} else {
		if at, err := checkHCL(data); err != nil {
			return value{}, at, err
		}
		file, err = parser.Parse(data)
	}
	if err != nil {
		at, message := blame(data, isJSON, err)
		return value{}, at, errors.New(message)
	}
	items, ok := file.Node.(*ast.ObjectList)
	if !ok {
		return value{}, place{1, 1}, errors.New("not valid HCL: want keys and values")
	}
	root, err = readBlock(items, place{1, 1})
	return root, place{1, 1}, err
}

// blame says where and what is wrong, and never a word of the file: it may be a
// secret.
func blame(data []byte, isJSON bool, err error) (place, string) {
	var syntax *json.SyntaxError
	var pos *parser.PosError
	switch {
	case isJSON && errors.As(json.Unmarshal(data, new(any)), &syntax):
		before := data[:min(int(syntax.Offset), len(data))]
		line := bytes.Count(before, []byte("\n"))
		return place{line + 1, max(len(before)-1-bytes.LastIndexByte(before, '\n'), 1)}, "not valid JSON: " + clip(syntax.Error())
	case isJSON:
		return place{1, 1}, "not valid JSON, or not of the kind that HCL takes"
	case errors.As(err, &pos):
		message := pos.Err.Error()
		if strings.Contains(message, "'") { // which is around names of the file
			message = "want a key, then = and its value, or a block"
		}
		return placeOf(pos.Pos), "not valid HCL: " + clip(message)
	}
	return place{1, 1}, "not valid HCL"
}

func placeOf(p token.Pos) place { return place{max(p.Line, 1), max(p.Column, 1)} }

// checkHCL bounds the depth, because the parser recurses once for each level.
func checkHCL(data []byte) (place, error) {
	s := scanner.New(data)
	at := place{1, 1}
	var err error
	s.Error = func(pos token.Pos, message string) {
		if err == nil {
			at, err = placeOf(pos), fmt.Errorf("not valid HCL: %s", clip(message))
		}
	}
	for depth := 0; ; {
		t := s.Scan()
		switch t.Type {
		case token.EOF, token.ILLEGAL:
			return at, err
		case token.LBRACE, token.LBRACK:
			depth++
		case token.RBRACE, token.RBRACK:
			depth--
		}
		if depth > maxDepth {
			return placeOf(t.Pos), fmt.Errorf("blocks and lists are nested more than %d deep", maxDepth)
		}
	}
}

// tooDeepJSON counts brackets outside of strings, for the same reason.
func tooDeepJSON(data []byte) bool {
	depth, quoted := 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// readBlock converts the keys and values of a block.
func readBlock(items *ast.ObjectList, at place) (value, error) {
	out := value{kind: block, at: at}
	for _, item := range items.Items {
		if len(item.Keys) == 0 {
			return value{}, errors.New("not valid HCL: a value without a key")
		}
		v, err := readValue(item.Val)
		if err != nil {
			return value{}, err
		}
		for i := len(item.Keys) - 1; i >= 0; i-- {
			key, ok := item.Keys[i].Token.Value().(string)
			if !ok {
				return value{}, errors.New("not valid HCL: a key is a name")
			}
			p := pair{key: key, at: placeOf(item.Keys[i].Pos()), value: v}
			if i == 0 {
				out.pairs = append(out.pairs, p)
				break
			}
			v = value{kind: block, at: p.at, pairs: []pair{p}}
		}
	}
	return out, nil
}

func readValue(n ast.Node) (value, error) {
	switch n := n.(type) {
	case *ast.LiteralType:
		v := value{at: placeOf(n.Pos()), kind: number, text: n.Token.Text}
		switch n.Token.Type {
		case token.STRING, token.HEREDOC: // JSON's null comes as an empty one
			v.kind = text
			v.text, _ = n.Token.Value().(string)
		case token.BOOL:
			v.kind = flag
		}
		return v, nil
	case *ast.ListType:
		out := value{at: placeOf(n.Pos()), kind: list}
		for _, item := range n.List {
			v, err := readValue(item)
			if err != nil {
				return value{}, err
			}
			out.items = append(out.items, v)
		}
		return out, nil
	case *ast.ObjectType:
		return readBlock(n.List, placeOf(n.Pos()))
	}
	return value{}, errors.New("not valid HCL: a key without a value")
}

// clip shortens what a file can make as long as it likes, and shows no control
// characters.
func clip(s string) string {
	const most = 80
	s = strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 || c == 0x2028 || c == 0x2029 || c == 0xfeff {
			return utf8.RuneError
		}
		return c
	}, strings.ToValidUTF8(s[:min(len(s), 4*most)], "\ufffd"))
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return s
}
