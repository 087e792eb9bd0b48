package importer

import (
	"errors"
	"fmt"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/parser"
	"github.com/hashicorp/hcl/hcl/scanner"
	"github.com/hashicorp/hcl/hcl/token"
)

// readHCL reads a configuration entry in HCL 1, which Consul writes.
func readHCL(in *Input) ([]node, place, string) {
	if at, problem := checkHCL(in); problem != "" {
		return nil, at, problem
	}
	file, err := parser.Parse(in.Data)
	if err != nil {
		at, message := place{in.Name, 1, 1}, err.Error()
		if pos := (*parser.PosError)(nil); errors.As(err, &pos) {
			at, message = place{in.Name, pos.Pos.Line, pos.Pos.Column}, pos.Err.Error()
		}
		return nil, at, "not valid HCL: " + clip(message)
	}
	root, ok := file.Node.(*ast.ObjectList)
	if !ok {
		return nil, place{in.Name, 1, 1}, "not valid HCL: want keys and values"
	}
	n, at, problem := hclBlock(in.Name, root, place{in.Name, 1, 1})
	if problem != "" {
		return nil, at, problem
	}
	return []node{n}, place{}, ""
}

// checkHCL bounds the depth, because the parser recurses once for each level.
func checkHCL(in *Input) (place, string) {
	s := scanner.New(in.Data)
	var at place
	problem := ""
	s.Error = func(pos token.Pos, message string) {
		if problem == "" {
			at, problem = place{in.Name, pos.Line, pos.Column}, "not valid HCL: "+clip(message)
		}
	}
	depth := 0
	for {
		t := s.Scan()
		switch t.Type {
		case token.EOF, token.ILLEGAL:
			return at, problem
		case token.LBRACE, token.LBRACK:
			depth++
		case token.RBRACE, token.RBRACK:
			depth--
		}
		if depth > maxDepth {
			return place{in.Name, t.Pos.Line, t.Pos.Column}, fmt.Sprintf("more than %d levels deep", maxDepth)
		}
	}
}

// hclBlock converts keys and values. Blocks of one name, which HCL writes
// without an equals sign, become a list when there are several.
func hclBlock(file string, items *ast.ObjectList, at place) (node, place, string) {
	out := node{kind: block, at: at}
	blocks := map[string]int{} // index of the pair
	for _, item := range items.Items {
		pos := item.Pos()
		keyAt := place{file, pos.Line, pos.Column}
		if len(item.Keys) != 1 {
			return node{}, keyAt, "a block with labels: Consul's entries have none"
		}
		key, ok := item.Keys[0].Token.Value().(string)
		if !ok {
			return node{}, keyAt, "a key is a name"
		}
		value, at, problem := hclNode(file, item.Val)
		if problem != "" {
			return node{}, at, problem
		}
		isBlock := !item.Assign.IsValid()
		first, again := blocks[key]
		switch {
		case isBlock && again && out.pairs[first].value.kind == block:
			whole := out.pairs[first].value
			out.pairs[first].value = node{kind: list, at: whole.at, items: []node{whole, value}}
		case isBlock && again:
			out.pairs[first].value.items = append(out.pairs[first].value.items, value)
		default:
			if isBlock {
				blocks[key] = len(out.pairs)
			}
			out.pairs = append(out.pairs, pair{key, keyAt, value})
		}
	}
	return out, place{}, ""
}

func hclNode(file string, n ast.Node) (node, place, string) {
	pos := n.Pos()
	out := node{at: place{file, pos.Line, pos.Column}}
	switch n := n.(type) {
	case *ast.LiteralType:
		out.kind, out.text = number, n.Token.Text
		if n.Token.Type == token.STRING || n.Token.Type == token.HEREDOC {
			value, ok := n.Token.Value().(string)
			if !ok {
				return node{}, out.at, "not valid HCL text"
			}
			out.kind, out.text = text, value
		}
	case *ast.ListType:
		out.kind = list
		for _, item := range n.List {
			child, at, problem := hclNode(file, item)
			if problem != "" {
				return node{}, at, problem
			}
			out.items = append(out.items, child)
		}
	case *ast.ObjectType:
		return hclBlock(file, n.List, out.at)
	default:
		return node{}, out.at, "not read here"
	}
	return out, place{}, ""
}
