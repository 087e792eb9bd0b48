package policy

import (
	"math"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/checker"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/overloads"
)

// maxCost bounds what a condition may cost, in the units of the library: one
// is about a step of the evaluation, or ten characters of text looked at.
const maxCost = 50_000

// cost refuses a condition that may cost too much. It reports whether the
// estimate holds for every request; else the evaluation is to be bounded too.
func (c *whenCompiler) cost(env *cel.Env, checked *cel.Ast) (holds bool, problem *Error) {
	start := common.NewLocation(1, 0)
	mean, err := env.EstimateCost(checked, sizes{mean: true})
	if err != nil {
		return false, c.problem(start, "the cost cannot be estimated: %s", clip(err.Error()))
	}
	const hint = "loops in loops, and loops that search long text, cost most"
	switch {
	case mean.Max > math.MaxUint32: // something in it has no size that is known
		return false, c.problem(start, "the cost has no bound: %s", hint)
	case mean.Max > maxCost:
		return false, c.problem(start, "may cost %d steps where %d are allowed: %s", mean.Max, maxCost, hint)
	}
	most, err := env.EstimateCost(checked, sizes{})
	return err == nil && most.Max <= maxCost, nil
}

// sizes tells the library how large what a condition reads can be, and what
// those functions cost whose cost it does not know. With mean, what a loop
// goes over has the mean size: there can be many headers or long ones, but all
// together are bounded.
type sizes struct{ mean bool }

var _ checker.CostEstimator = sizes{}

// EstimateSize returns the bounds of a variable or of a part of one. Paths are
// those of the library: a variable, then @keys or @values, then @items.
func (s sizes) EstimateSize(of checker.AstNode) *checker.SizeEstimate {
	path := of.Path()
	if len(path) == 0 {
		return nil
	}
	known := variablesByName[path[0]]
	switch {
	case known == nil:
		return nil
	case len(path) == 1 && known.most > 0:
		return &checker.SizeEstimate{Max: known.most}
	case path[0] != headersVariable:
		return nil
	}
	looped := s.mean && of.Expr().Kind() == ast.IdentKind
	name, value := uint64(mostHeaderBytes), uint64(mostHeaderValue)
	if looped {
		name, value = mostHeaderBytes/mostHeaderLines, mostHeaderBytes/mostHeaderLines
	}
	switch last := path[len(path)-1]; {
	case last == "@keys":
		return &checker.SizeEstimate{Max: name}
	case last == "@items" && len(path) == 3:
		return &checker.SizeEstimate{Max: value}
	case len(path) == 2 && s.mean && ofLoopedName(of.Expr()):
		return &checker.SizeEstimate{Max: 1}
	case len(path) == 2:
		return &checker.SizeEstimate{Max: mostHeaderLines}
	}
	return nil
}

// ofLoopedName reports whether headers are asked for a name that a loop goes
// over: all together then have as many values as there are lines.
func ofLoopedName(e ast.Expr) bool {
	if e.Kind() != ast.CallKind {
		return false
	}
	args := e.AsCall().Args()
	return len(args) == 2 && args[1].Kind() == ast.IdentKind
}

// EstimateCallCost returns the cost of functions that take longer than the
// one step the library takes them for.
func (sizes) EstimateCallCost(_, overload string, target *checker.AstNode, args []checker.AstNode) *checker.CallEstimate {
	steps := func(n uint64) *checker.CallEstimate {
		return &checker.CallEstimate{CostEstimate: checker.CostEstimate{Min: 1, Max: n}}
	}
	switch overload {
	case "in_network":
		return steps(4)
	case overloads.IndexMap, overloads.InMap:
		return steps(8) // a header is looked for among all lines
	case overloads.SizeMap, overloads.SizeMapInst:
		return steps(mostHeaderLines)
	case overloads.SizeString, overloads.StringToInt:
		return steps(1 + textSteps(args[0]))
	case overloads.SizeStringInst:
		return steps(1 + textSteps(*target))
	}
	return nil
}

func textSteps(of checker.AstNode) uint64 {
	size := of.ComputedSize()
	if size == nil {
		return maxCost // no variable is without bounds
	}
	return checker.SizeEstimate{Max: size.Max}.MultiplyByCostFactor(common.StringTraversalCostFactor).Max
}
