package policy

import (
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	celref "cel.dev/cel-go/common/types/ref"
)

// The names of a condition are looked up before the library checks its types:
// the library says only that a name is not declared, not which one was meant.

// maxLoops is how deep all, exists and exists_one may stand in each other.
const maxLoops = 2

// roots are what the names of variables begin with.
var roots = func() []string {
	var all []string
	for i := range variables {
		root, _, _ := strings.Cut(variables[i].name, ".")
		all = append(all, root)
	}
	slices.Sort(all)
	return slices.Compact(all)
}()

// functionNames are what may be called.
var functionNames = func() []string {
	all := append(slices.Clone(whenMacros), networkFunction)
	for i := range clocks {
		all = append(all, clocks[i].name)
	}
	for name := range standardFunctions {
		if strings.IndexFunc(name, isLetter) == 0 {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}()

func isLetter(c rune) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }

// misnamed are functions that people know from elsewhere.
var misnamed = map[string]string{
	overloads.Matches: "there are no regular expressions; use ==, startsWith, endsWith or contains",
	operators.Map:     "map and filter are not there; use all, exists or exists_one",
	operators.Filter:  "map and filter are not there; use all, exists or exists_one",
	"existsOne":       "write exists_one",
	"type":            "types are checked when the policy is loaded",
	"dyn":             "types are checked when the policy is loaded",
	"now":             "the time of the request is request.time, or time for short",
	"string":          "there is no conversion to text",
	"format":          "text is not formatted; compare its parts",
	"lowerAscii":      "text is compared as it is; hosts and header names are in lower case already",
}

// names looks up every name, and checks every text that must be a constant.
func (c *whenCompiler) names(tree *ast.AST) *Error {
	w := nameWalker{whenCompiler: c, tree: tree}
	w.expr(tree.Expr())
	return w.problem
}

// nameWalker goes over the tree of a condition until it finds a problem.
type nameWalker struct {
	*whenCompiler
	tree    *ast.AST
	locals  []string // that the loops around give a value
	loops   int
	problem *Error
}

func (w *nameWalker) refuse(e ast.Expr, format string, args ...any) {
	if w.problem == nil {
		w.problem = w.whenCompiler.problem(w.tree.SourceInfo().GetStartLocation(e.ID()), format, args...)
	}
}

func (w *nameWalker) expr(e ast.Expr) {
	if w.problem != nil {
		return
	}
	switch e.Kind() {
	case ast.IdentKind, ast.SelectKind:
		w.name(e)
	case ast.CallKind:
		w.call(e)
	case ast.ListKind:
		for _, item := range e.AsList().Elements() {
			w.expr(item)
		}
	case ast.MapKind:
		for _, entry := range e.AsMap().Entries() {
			w.expr(entry.AsMapEntry().Key())
			w.expr(entry.AsMapEntry().Value())
		}
	case ast.StructKind:
		w.refuse(e, "there are no messages; {\"key\": value} is a map")
	case ast.ComprehensionKind:
		w.loop(e)
	}
}

// loop takes in what the library makes of all, exists and exists_one.
func (w *nameWalker) loop(e ast.Expr) {
	loop := e.AsComprehension()
	w.expr(loop.IterRange())
	if slices.Contains(roots, loop.IterVar()) {
		w.refuse(e, "%s is a name of the language already; call what all, exists or exists_one goes over something else", loop.IterVar())
	}
	if w.loops == maxLoops {
		w.refuse(e, "more than %d of all, exists and exists_one in each other", maxLoops)
	}
	w.loops++
	w.locals = append(w.locals, loop.IterVar(), loop.AccuVar())
	for _, part := range []ast.Expr{loop.AccuInit(), loop.LoopCondition(), loop.LoopStep(), loop.Result()} {
		w.expr(part)
	}
	w.locals = w.locals[:len(w.locals)-2]
	w.loops--
}

// name takes in a name with dots, or a field of something else.
func (w *nameWalker) name(e ast.Expr) {
	var parts []string
	root := e
	for root.Kind() == ast.SelectKind {
		s := root.AsSelect()
		if s.IsTestOnly() && w.alwaysThere(s) {
			w.refuse(root, "%s.%s is always there; has asks for the key of a map, as in has(request.headers.cookie)", s.Operand().AsIdent(), s.FieldName())
			return
		}
		parts = append(parts, s.FieldName())
		root = s.Operand()
	}
	if root.Kind() != ast.IdentKind {
		w.expr(root)
		return
	}
	if slices.Contains(w.locals, root.AsIdent()) {
		return
	}
	parts = append(parts, root.AsIdent())
	slices.Reverse(parts)
	for n := 1; n <= min(len(parts), 2); n++ {
		name := strings.Join(parts[:n], ".")
		if variablesByName[name] == nil {
			continue
		}
		w.uses(name)
		if name == headersVariable && len(parts) > n {
			w.headerName(e, parts[n])
		}
		return
	}
	w.unknown(root, parts)
}

// alwaysThere reports whether has was asked for a variable.
func (w *nameWalker) alwaysThere(s ast.SelectExpr) bool {
	operand := s.Operand()
	return operand.Kind() == ast.IdentKind && !slices.Contains(w.locals, operand.AsIdent()) &&
		variablesByName[operand.AsIdent()+"."+s.FieldName()] != nil
}

// uses notes that the condition reads a variable.
func (w *nameWalker) uses(name string) {
	w.found = true
	switch {
	case name == "time" || name == "request.time":
		w.when.usesTime = true
	case strings.HasPrefix(name, "request."):
		w.when.usesHTTP = true
	}
	switch {
	case name == headersVariable:
		w.when.usesHeaders = true
	case strings.HasPrefix(name, subjectVariable):
		w.when.usesSubject = true
	}
}

// unknown refuses a name, and says which one was likely meant.
func (w *nameWalker) unknown(root ast.Expr, parts []string) {
	first := parts[0]
	if !slices.Contains(roots, first) {
		if meant := nearest(first, roots); meant != "" {
			w.refuse(root, "unknown name %s; did you mean %s?", clip(first), meant)
			return
		}
		w.refuse(root, "unknown name %s; known: %s", clip(first), strings.Join(roots, ", "))
		return
	}
	var fields []string
	for i := range variables {
		if field, ok := strings.CutPrefix(variables[i].name, first+"."); ok {
			fields = append(fields, field)
		}
	}
	if len(parts) == 1 {
		w.refuse(root, "%s is no value; its fields are: %s", first, strings.Join(fields, ", "))
		return
	}
	if meant := nearest(parts[1], fields); meant != "" {
		w.refuse(root, "unknown field %s.%s; did you mean %s.%s?", first, clip(parts[1]), first, meant)
		return
	}
	w.refuse(root, "unknown field %s.%s; known: %s", first, clip(parts[1]), strings.Join(fields, ", "))
}

// call takes in a call of a function or operator.
func (w *nameWalker) call(e ast.Expr) {
	call := e.AsCall()
	name := call.FunctionName()
	switch {
	case slices.Contains(whenMacros, name): // used rightly it would be no call any more
		w.refuseCall(e, "%s", macroUses[name])
	case strings.IndexFunc(name, isLetter) == 0 && !slices.Contains(functionNames, name):
		w.unknownFunction(e, name)
	}
	if call.IsMemberFunction() {
		w.expr(call.Target())
	}
	for _, arg := range call.Args() {
		w.expr(arg)
	}
	switch {
	case w.problem != nil:
	case name == operators.Index || name == operators.In:
		w.headerKey(call.Args(), name == operators.In)
	case slices.ContainsFunc(conversions, func(c conversion) bool { return c.name == name }):
		w.conversion(call)
	case constantOf(call) != nil:
		w.constant(call)
	}
}

// refuseCall is refuse at the name of what is called: the library has the
// place of the bracket behind it.
func (w *nameWalker) refuseCall(e ast.Expr, format string, args ...any) {
	if w.problem == nil {
		w.refuse(e, format, args...)
		if name := len(e.AsCall().FunctionName()); w.problem.Column-w.at.column >= name {
			w.problem.Column -= name
		}
	}
}

var macroUses = map[string]string{
	operators.Has:       "has takes one key of a map, as in has(request.headers.cookie)",
	operators.All:       "all is written list.all(x, condition on x)",
	operators.Exists:    "exists is written list.exists(x, condition on x)",
	operators.ExistsOne: "exists_one is written list.exists_one(x, condition on x)",
}

func (w *nameWalker) unknownFunction(e ast.Expr, name string) {
	if hint, ok := misnamed[name]; ok {
		w.refuseCall(e, "unknown function %s; %s", name, hint)
		return
	}
	if meant := nearest(name, functionNames); meant != "" {
		w.refuseCall(e, "unknown function %s; did you mean %s?", clip(name), meant)
		return
	}
	w.refuseCall(e, "unknown function %s; known: %s", clip(name), strings.Join(functionNames, ", "))
}

// headerKey checks a constant that headers are asked for.
func (w *nameWalker) headerKey(args []ast.Expr, in bool) {
	if len(args) != 2 {
		return
	}
	from, key := args[0], args[1]
	if in {
		from, key = key, from
	}
	if !isHeaders(from) {
		return
	}
	if name, ok := constantText(key); ok {
		w.headerName(key, name)
	}
}

// isHeaders reports whether an expression is the map of headers, before or
// after the library has made its name one.
func isHeaders(e ast.Expr) bool {
	switch e.Kind() {
	case ast.IdentKind:
		return e.AsIdent() == headersVariable
	case ast.SelectKind:
		s := e.AsSelect()
		return !s.IsTestOnly() && s.Operand().Kind() == ast.IdentKind && s.Operand().AsIdent()+"."+s.FieldName() == headersVariable
	}
	return false
}

// headerName refuses a name that no header can have.
func (w *nameWalker) headerName(at ast.Expr, name string) {
	switch lower := strings.ToLower(name); {
	case lower == "host" || strings.HasPrefix(name, ":"):
		w.refuse(at, "%q is not among the headers; use request.host, request.method or request.path", clip(name))
	case lower != name:
		w.refuse(at, "%q: header names are in lower case here; write %q", clip(name), clip(lower))
	}
}

// conversion is a function that reads text.
type conversion struct {
	name    string
	to      celref.Type
	always  bool // the text is a constant
	example string
}

var conversions = []conversion{
	{overloads.TypeConvertDuration, types.DurationType, true, "1h30m"},
	{overloads.TypeConvertTimestamp, types.TimestampType, true, "2026-01-02T15:04:05Z"},
	{overloads.TypeConvertInt, types.IntType, false, "443"},
}

// conversion checks duration("…"), timestamp("…") and int("…").
func (w *nameWalker) conversion(call ast.CallExpr) {
	args := call.Args()
	if len(args) != 1 || call.IsMemberFunction() {
		return // the library says what is wrong with it
	}
	for _, c := range conversions {
		if c.name != call.FunctionName() {
			continue
		}
		text, ok := constantText(args[0])
		switch {
		case !ok && c.always:
			w.refuse(args[0], "%s takes a constant text, like %q", c.name, c.example)
		case ok && types.IsError(types.String(text).ConvertToType(c.to)):
			w.refuse(args[0], "%q is no %s; write one like %q", clip(text), c.name, c.example)
		}
	}
}

// constant checks the name of a time zone or a network.
func (w *nameWalker) constant(call ast.CallExpr) {
	argument := constantOf(call)
	text, ok := constantText(argument)
	what, parse := "time zone", func() error { _, err := parseZone(text); return err }
	if call.FunctionName() == networkFunction {
		what, parse = "network", func() error { _, err := parseNetwork(text); return err }
	}
	if !ok {
		w.refuse(argument, "the %s of %s must be a constant text", what, call.FunctionName())
		return
	}
	if err := parse(); err != nil {
		w.refuse(argument, "%q: %v", clip(text), err)
	}
}

// comparisons refuses == and != between maps, which would compare each entry
// with each.
func (c *whenCompiler) comparisons(tree *ast.AST) *Error {
	w := nameWalker{whenCompiler: c, tree: tree}
	ast.PostOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() != ast.CallKind {
			return
		}
		switch call := e.AsCall(); call.FunctionName() {
		case operators.Equals, operators.NotEquals, operators.In:
			if of := tree.GetType(call.Args()[0].ID()); holdsMap(of) {
				w.refuse(e, "maps are not compared; compare what is under their keys")
			}
		}
	}))
	return w.problem
}

func holdsMap(t *types.Type) bool {
	return t.Kind() == types.MapKind || slices.ContainsFunc(t.Parameters(), holdsMap)
}
