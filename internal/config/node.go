package config

import (
	"fmt"

	"github.com/goccy/go-yaml/ast"
)

// stringOf returns the text of a node that YAML reads as a string.
func stringOf(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		if n.Value == nil {
			return "", true
		}
		return n.Value.Value, true
	}
	return "", false
}

// nameOf returns the name of an anchor or alias.
func nameOf(n ast.Node) string {
	if n == nil || n.GetToken() == nil {
		return ""
	}
	return n.GetToken().Value
}

// shown returns the text of a scalar as it stands in the file; empty for
// blocks and lists.
func shown(n ast.Node) string {
	if s, ok := stringOf(n); ok {
		return s
	}
	if _, ok := n.(ast.ScalarNode); ok && n.GetToken() != nil {
		return n.GetToken().Value
	}
	return ""
}

// describe says what a node is, for a person.
func describe(n ast.Node) string {
	switch n := n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a block of keys"
	case *ast.SequenceNode:
		return "a list"
	case *ast.NullNode:
		return "nothing"
	case *ast.BoolNode:
		return clip(shown(n))
	case *ast.StringNode, *ast.LiteralNode:
		return fmt.Sprintf("%q", clip(shown(n)))
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "the number " + clip(shown(n))
	case *ast.MappingKeyNode:
		return "a key of more than plain text"
	}
	return "something else"
}

// clip shortens what a file can make as long as it likes.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	runes := []rune(s[:most])
	return string(runes[:len(runes)-1]) + "…"
}
