package policy

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// The one file that knows the YAML library. A document becomes a tree of
// nodes, each with its place, and everything a rule file has no use for and an
// attacker might (anchors, aliases, tags, merge keys, depth) is refused on the
// way.

type kind uint8

const (
	nothing kind = iota // a key without a value, or null
	text
	number
	truth
	list
	block // of keys
)

// node is a value in a document.
type node struct {
	kind  kind
	text  string // of a scalar, as it stands in the file when it is no text
	at    place
	items []node // of a list
	pairs []pair // of a block

	down, right int32 // from at to the first character of a text
}

// start is where the first character of a text stands.
func (n *node) start() place {
	return place{n.at.file, n.at.line + int(n.down), n.at.column + int(n.right)}
}

// pair is a key of a block and its value.
type pair struct {
	key   string
	at    place
	value node
}

// describe says what a node is, for a person.
func (n *node) describe() string {
	switch n.kind {
	case nothing:
		return "nothing"
	case text:
		return fmt.Sprintf("%q", clip(n.text))
	case number:
		return "the number " + clip(n.text)
	case truth:
		return clip(n.text)
	case list:
		return "a list"
	}
	return "a block of keys"
}

// maxDepth is how deep lists and blocks may stand in each other. The language
// needs five; the YAML library recurses once for each.
const maxDepth = 32

// readNode parses one document by the YAML library. Lines count from that of
// base, which is 0 for a whole file.
func readNode(file string, base int, data []byte) (n node, problem *Error) {
	r := reader{file: file, base: base}
	defer r.rescue(&problem)
	_, body, problem := r.parse(lineFeeds(data))
	if problem != nil {
		return node{}, problem
	}
	if body == nil {
		return node{at: place{file, base + 1, 1}}, nil
	}
	return r.node(body)
}

// rescue makes a panic of the library a problem: it is fed what strangers
// wrote to disk, and a slice index it gets wrong must cost the load, not the
// process.
func (r *reader) rescue(problem **Error) {
	if p := recover(); p != nil {
		*problem = r.problem(nil, "not valid YAML: the parser gave up on it")
	}
}

// parse returns the tokens of a document, and its tree, nil where it holds
// nothing.
func (r *reader) parse(data string) (token.Tokens, ast.Node, *Error) {
	tokens := lexer.Tokenize(data)
	if problem := r.checkTokens(tokens); problem != nil {
		return nil, nil, problem
	}
	tokens = joinColons(tokens)
	tree, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return nil, nil, r.syntax(err)
	}
	var body ast.Node
	for _, doc := range tree.Docs {
		if doc.Body == nil {
			continue
		}
		if body != nil {
			return nil, nil, r.problem(doc.Body.GetToken(), "a second YAML document; a policy file holds one")
		}
		body = doc.Body
	}
	return tokens, body, nil
}

// lineFeeds returns the text with each line ended by \n alone: the lexer
// counts the line twice where a comment ends with \r\n.
func lineFeeds(data []byte) string {
	if bytes.IndexByte(data, '\r') < 0 {
		return string(data)
	}
	return strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(string(data))
}

// checkText refuses bytes that no text file holds, so that messages can show
// what a file says.
func checkText(file string, data []byte) *Error {
	line, start := 1, 0
	for i := 0; i < len(data); {
		c, size := rune(data[i]), 1
		if c >= ' ' && c < 0x7f {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			c, size = utf8.DecodeRune(data[i:])
		}
		msg := ""
		switch {
		case c == utf8.RuneError && size == 1:
			msg = "not UTF-8 text"
		case c < ' ' && c != '\n' && c != '\r' && c != '\t', c >= 0x7f && c < 0xa0, c == 0xfeff:
			msg = fmt.Sprintf("control character %U", c)
		}
		if msg != "" {
			return &Error{File: file, Line: line, Column: 1 + utf8.RuneCount(data[start:i]), Msg: msg}
		}
		i += size
		if c == '\n' {
			line, start = line+1, i
		}
	}
	return nil
}

// reader turns tokens and trees of the library into nodes.
type reader struct {
	file string
	base int // lines before the text
}

func (r *reader) place(t *token.Token) place {
	if t == nil || t.Position == nil {
		return place{r.file, r.base + 1, 1}
	}
	return place{r.file, r.base + t.Position.Line, t.Position.Column}
}

func (r *reader) problem(t *token.Token, format string, args ...any) *Error {
	at := r.place(t)
	return &Error{File: at.file, Line: at.line, Column: at.column, Msg: fmt.Sprintf(format, args...)}
}

func (r *reader) syntax(err error) *Error {
	if syntax := (*yaml.SyntaxError)(nil); errors.As(err, &syntax) {
		return r.problem(syntax.Token, "not valid YAML: %s", plainly(syntax.Message))
	}
	return r.problem(nil, "not valid YAML: %s", plainly(err.Error()))
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
	return clip(message)
}

// checkTokens refuses what the language has no use for, and bounds the depth
// before anything recurses.
func (r *reader) checkTokens(tokens token.Tokens) *Error {
	var columns []int // of the blocks around the token
	flow := 0
	for i, t := range tokens {
		switch t.Type {
		case token.InvalidType:
			return r.problem(t, "not valid YAML: %s", plainly(t.Error))
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			return r.problem(t, "anchors, aliases and merge keys are not supported; write it out, or use a group; text that begins with * or & needs quotes")
		case token.TagType:
			return r.problem(t, "tags are not supported")
		case token.DirectiveType:
			return r.problem(t, "directives are not supported")
		case token.MappingKeyType:
			return r.problem(t, "a key is plain text before a colon")
		case token.DocumentHeaderType:
			if i > 0 && tokens[i-1].Type != token.CommentType {
				return r.problem(t, "a second YAML document; a policy file holds one")
			}
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType:
			columns = nest(columns, t.Position.Column)
		case token.MappingValueType:
			if flow == 0 && t.Prev != nil {
				columns = nest(columns, t.Prev.Position.Column)
			}
		}
		if flow+len(columns) > maxDepth {
			return r.problem(t, "more than %d levels deep", maxDepth)
		}
	}
	return nil
}

// joinColons mends what the lexer breaks: between braces it takes any colon
// for the end of a key, also that of [group:web]. YAML 1.2, section 7.3.3, wants
// white space after the colon of a plain key.
func joinColons(tokens token.Tokens) token.Tokens {
	var out token.Tokens
	flow := 0
	for i := 0; i < len(tokens); i++ {
		t := tokens[i]
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.MappingValueType:
			if flow > 0 && i+1 < len(tokens) && len(out) > 0 && touch(out[len(out)-1], t) && touch(t, tokens[i+1]) {
				before, after := out[len(out)-1], tokens[i+1]
				*before = *token.String(before.Value+":"+after.Value, before.Origin+":"+after.Origin, before.Position)
				i++
				continue
			}
		}
		out = append(out, t)
	}
	for i, t := range out {
		t.Prev, t.Next = nil, nil
		if i > 0 {
			t.Prev, out[i-1].Next = out[i-1], t
		}
	}
	return out
}

// touch reports whether two tokens stand in one line with nothing between
// them, and each is a colon or plain text.
func touch(a, b *token.Token) bool {
	plain := func(t *token.Token) bool {
		return t.Type == token.MappingValueType || t.Indicator == token.NotIndicator && t.Type != token.CommentType
	}
	return plain(a) && plain(b) && a.Position.Line == b.Position.Line &&
		a.Position.Column+utf8.RuneCountInString(a.Value) == b.Position.Column
}

// nest pushes a column after it has popped those that end there.
func nest(columns []int, column int) []int {
	for len(columns) > 0 && columns[len(columns)-1] >= column {
		columns = columns[:len(columns)-1]
	}
	return append(columns, column)
}

// resolve returns what a text without quotes is. The library is asked where it
// may be anything but text: a word such as null, True or FALSE, or what begins
// as a number does.
func resolve(s string) kind {
	switch c := s[0]; {
	case c >= '0' && c <= '9', c == '-', c == '+', c == '.', c == '~':
	case len(s) == len("null") && strings.IndexByte("nNtT", c) >= 0:
	case len(s) == len("false") && (c == 'f' || c == 'F'):
	default:
		return text
	}
	switch token.New(s, s, nil).Type {
	case token.NullType:
		return nothing
	case token.BoolType:
		return truth
	case token.StringType:
		return text
	}
	return number
}

// node converts a tree.
func (r *reader) node(n ast.Node) (node, *Error) {
	out := node{at: r.place(n.GetToken())}
	switch n := n.(type) {
	case *ast.NullNode:
		out.kind = nothing
	case *ast.StringNode:
		out.kind, out.text = text, n.Value
		if n.Token.Indicator == token.QuotedScalarIndicator {
			out.right = 1
		}
	case *ast.LiteralNode:
		out.kind = text
		if n.Value != nil {
			out.text = n.Value.Value
			out.down, out.right = 1, int32(indentation(n.Value.Token.Origin)+1-out.at.column)
		}
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		out.kind, out.text = number, n.GetToken().Value
	case *ast.BoolNode:
		out.kind, out.text = truth, n.Token.Value
	case *ast.SequenceNode:
		out.kind = list
		for _, item := range n.Values {
			child, problem := r.node(item)
			if problem != nil {
				return node{}, problem
			}
			out.items = append(out.items, child)
		}
	case *ast.MappingNode:
		return r.block(out, n.Values)
	case *ast.MappingValueNode:
		return r.block(out, []*ast.MappingValueNode{n})
	default:
		return node{}, r.problem(n.GetToken(), "not supported in a policy file")
	}
	return out, nil
}

// indentation is how many spaces the first line with text begins with.
func indentation(lines string) int {
	lines = strings.TrimLeft(lines, "\r\n")
	return len(lines) - len(strings.TrimLeft(lines, " "))
}

func (r *reader) block(out node, values []*ast.MappingValueNode) (node, *Error) {
	out.kind = block
	out.pairs = make([]pair, 0, len(values))
	for _, v := range values {
		key, problem := r.key(v.Key)
		if problem != nil {
			return node{}, problem
		}
		value, problem := r.node(v.Value)
		if problem != nil {
			return node{}, problem
		}
		if value.kind == nothing {
			value.at = key.at
		}
		out.pairs = append(out.pairs, pair{key.text, key.at, value})
	}
	if len(out.pairs) > 0 {
		out.at = out.pairs[0].at
	}
	return out, nil
}

func (r *reader) key(n ast.Node) (node, *Error) {
	key, problem := r.node(n)
	switch {
	case problem != nil:
		return node{}, problem
	case key.kind == list || key.kind == block:
		return node{}, r.problem(n.GetToken(), "a key is plain text before a colon")
	case key.kind == nothing:
		key.text = n.GetToken().Value
	}
	return key, nil
}

// readSource parses one document as readNode does, and keeps how it was
// written. spaced says that an empty line stands above the text.
func readSource(file string, base int, data []byte, spaced bool) (s *source, problem *Error) {
	r := sourceReader{reader: reader{file: file, base: base}, index: map[*token.Token]int{}}
	defer r.rescue(&problem)
	written := lineFeeds(data)
	tokens, body, problem := r.parse(written)
	if problem != nil {
		return nil, problem
	}
	r.lines = strings.Split(written, "\n")
	r.spaced = spaced
	s = &source{root: element{at: place{file, base + 1, 1}, last: len(tokens), open: -1}}
	before := -1
	for i, t := range tokens {
		r.index[t] = i
		switch t.Type {
		case token.CommentType:
			s.comments = append(s.comments, r.comment(t, i, before))
		case token.CollectEntryType:
		default:
			before = i
		}
	}
	if body == nil {
		return s, nil
	}
	s.root.at = r.place(body.GetToken())
	return s, r.value(&s.root, body)
}

// sourceReader turns tokens and trees of the library into elements.
type sourceReader struct {
	reader
	lines  []string
	spaced bool // an empty line stands above the first
	index  map[*token.Token]int
	seen   int // the last token that an element has
}

// blank reports whether a line, counted from 1, is empty.
func (r *sourceReader) blank(line int) bool {
	if line < 1 || line > len(r.lines) {
		return line == 0 && r.spaced
	}
	return strings.Trim(r.lines[line-1], " \t") == ""
}

func (r *sourceReader) comment(t *token.Token, i, before int) comment {
	c := comment{text: "#" + strings.TrimRight(t.Value, " \t"), token: i, before: before, line: t.Position.Line, column: 1}
	c.spaced = r.blank(c.line - 1)
	if c.line <= len(r.lines) {
		line := strings.TrimRight(r.lines[c.line-1], " \t")
		text := strings.TrimLeft(line, " \t")
		if c.alone = text == c.text; c.alone {
			c.column += len(line) - len(text)
		}
	}
	return c
}

// begin notes where an element begins; the library makes up a token for a
// value that is left out.
func (r *sourceReader) begin(e *element, t *token.Token) {
	i, ok := r.index[t]
	if !ok {
		i = r.seen
	}
	r.seen = max(r.seen, i)
	e.first, e.last, e.open = i, i, -1
	e.line, e.column = t.Position.Line, t.Position.Column
	e.spaced = r.blank(e.line - 1)
}

func (r *sourceReader) end(e *element, t *token.Token) {
	if i, ok := r.index[t]; ok {
		e.last = max(e.last, i)
		r.seen = max(r.seen, i)
	}
}

// value reads the value of an element.
func (r *sourceReader) value(e *element, n ast.Node) *Error {
	switch n := n.(type) {
	case *ast.SequenceNode:
		e.kind = list
		r.brackets(e, n.IsFlowStyle, n.Start)
		for i, item := range n.Values {
			t := firstToken(item)
			if !n.IsFlowStyle {
				t = n.Entries[i].Start
			}
			child := element{item: true}
			r.begin(&child, t)
			if problem := r.value(&child, item); problem != nil {
				return problem
			}
			e.add(child)
		}
		r.end(e, n.End)
	case *ast.MappingNode:
		r.brackets(e, n.IsFlowStyle, n.Start)
		if problem := r.pairs(e, n.Values); problem != nil {
			return problem
		}
		r.end(e, n.End)
	case *ast.MappingValueNode:
		return r.pairs(e, []*ast.MappingValueNode{n})
	default:
		scalar, problem := r.node(n)
		if problem != nil {
			return problem
		}
		e.kind, e.text = scalar.kind, scalar.text
		r.end(e, n.GetToken())
		if lines, ok := n.(*ast.LiteralNode); ok && lines.Value != nil {
			r.end(e, lines.Value.GetToken())
		}
	}
	return nil
}

func (r *sourceReader) brackets(e *element, flow bool, start *token.Token) {
	if i, ok := r.index[start]; ok && flow {
		e.open = i
	}
}

func (r *sourceReader) pairs(e *element, values []*ast.MappingValueNode) *Error {
	e.kind = block
	for _, v := range values {
		key, problem := r.key(v.Key)
		if problem != nil {
			return problem
		}
		child := element{key: key.text}
		r.begin(&child, v.Key.GetToken())
		r.end(&child, v.Start)
		if problem := r.value(&child, v.Value); problem != nil {
			return problem
		}
		e.add(child)
	}
	return nil
}

// firstToken returns where a value in brackets begins.
func firstToken(n ast.Node) *token.Token {
	if pair, ok := n.(*ast.MappingValueNode); ok {
		return pair.Key.GetToken()
	}
	return n.GetToken()
}
