package importer

import (
	"errors"
	"fmt"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// readYAML reads a file of one document or more.
func readYAML(in *Input) ([]node, place, string) {
	r := yamlReader{in.Name}
	tokens := lexer.Tokenize(string(in.Data))
	if at, problem := r.check(tokens); problem != "" {
		return nil, at, problem
	}
	tree, err := parser.Parse(tokens, 0)
	if err != nil {
		at, message := place{in.Name, 1, 1}, err.Error()
		if syntax := (*yaml.SyntaxError)(nil); errors.As(err, &syntax) {
			at, message = r.place(syntax.Token), syntax.Message
		}
		return nil, at, "not valid YAML: " + clip(message)
	}
	var documents []node
	for _, doc := range tree.Docs {
		if doc.Body == nil {
			continue
		}
		n, at, problem := r.node(doc.Body)
		if problem != "" {
			return nil, at, problem
		}
		documents = append(documents, n)
	}
	return documents, place{}, ""
}

type yamlReader struct{ file string }

func (r *yamlReader) place(t *token.Token) place {
	if t == nil || t.Position == nil {
		return place{r.file, 1, 1}
	}
	return place{r.file, t.Position.Line, t.Position.Column}
}

// check bounds the depth before anything recurses, and refuses what exported
// objects do not hold and could hide what a rule says.
func (r *yamlReader) check(tokens token.Tokens) (place, string) {
	var columns []int // of the blocks around the token
	flow := 0
	for _, t := range tokens {
		switch t.Type {
		case token.InvalidType:
			return r.place(t), "not valid YAML: " + clip(t.Error)
		case token.AnchorType, token.AliasType, token.MergeKeyType, token.TagType, token.DirectiveType, token.MappingKeyType:
			return r.place(t), "anchors, aliases, merge keys, tags, directives and complex keys are not read here; export the object, as `kubectl get -o yaml` writes it"
		case token.DocumentHeaderType:
			columns = columns[:0]
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
			return r.place(t), fmt.Sprintf("more than %d levels deep", maxDepth)
		}
	}
	return place{}, ""
}

// nest pushes a column after it has popped those that end there.
func nest(columns []int, column int) []int {
	for len(columns) > 0 && columns[len(columns)-1] >= column {
		columns = columns[:len(columns)-1]
	}
	return append(columns, column)
}

func (r *yamlReader) node(n ast.Node) (node, place, string) {
	out := node{at: r.place(n.GetToken())}
	switch n := n.(type) {
	case *ast.NullNode:
		out.kind = nothing
	case *ast.StringNode:
		out.kind, out.text = text, n.Value
	case *ast.LiteralNode:
		out.kind = text
		if n.Value != nil {
			out.text = n.Value.Value
		}
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode, *ast.BoolNode:
		out.kind, out.text = number, n.GetToken().Value
	case *ast.SequenceNode:
		out.kind = list
		for _, item := range n.Values {
			child, at, problem := r.node(item)
			if problem != "" {
				return node{}, at, problem
			}
			out.items = append(out.items, child)
		}
	case *ast.MappingNode:
		return r.block(out, n.Values)
	case *ast.MappingValueNode:
		return r.block(out, []*ast.MappingValueNode{n})
	default:
		return node{}, out.at, "not read here: export the object, as `kubectl get -o yaml` writes it"
	}
	return out, place{}, ""
}

func (r *yamlReader) block(out node, values []*ast.MappingValueNode) (node, place, string) {
	out.kind = block
	for _, v := range values {
		key, at, problem := r.node(v.Key)
		if problem != "" {
			return node{}, at, problem
		}
		if key.kind == list || key.kind == block {
			return node{}, key.at, "a key is plain text before a colon"
		}
		value, at, problem := r.node(v.Value)
		if problem != "" {
			return node{}, at, problem
		}
		if value.kind == nothing {
			value.at = key.at
		}
		out.pairs = append(out.pairs, pair{key.text, key.at, value})
	}
	if len(out.pairs) > 0 {
		out.at = out.pairs[0].at
	}
	return out, place{}, ""
}
