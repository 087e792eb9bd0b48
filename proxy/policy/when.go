package policy

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/types"
)

// The files whose names begin with when are the only ones that know the CEL
// library. A condition is checked when it is loaded: its names and types, the
// texts that must be constants, and what it can cost.

// maxWhen is how long a condition may be, in bytes.
const maxWhen = 4 << 10

// when is a compiled condition. It never changes, so any number of goroutines
// may ask it at once.
type when struct {
	text     string
	usesHTTP bool // reads something of request other than its time
	usesTime bool

	usesHeaders bool
	usesSubject bool
	program     cel.Program
}

// whens are the conditions of a policy by their text: each is compiled, and
// kept, once.
type whens struct {
	known map[string]*when
	size  int // of their texts
}

// maxWhens bounds the texts of the conditions of a policy together, in bytes:
// compiling takes some milliseconds a KiB, and a revocation must not wait for it.
const maxWhens = 1 << 20

// compile is compileWhen for a text that may have been seen before.
func (all *whens) compile(text string, at place) (*when, *Error) {
	if w, ok := all.known[text]; ok {
		return w, nil
	}
	if all.size += len(text); all.size > maxWhens {
		return nil, &Error{File: at.file, Line: at.line, Column: at.column, Msg: fmt.Sprintf("the conditions of all rules, those that are alike once, have more than %d KiB together", maxWhens>>10)}
	}
	w, problem := compileWhen(text, at)
	if problem == nil {
		all.known[text] = w
	}
	return w, problem
}

// compileWhen compiles a condition whose first character stands at that place.
// An error has the place of what is wrong: the lines of the text are taken to
// stand below each other in the file, each as far in as the first. That is so
// for text in one line and for a block that begins with |. Escapes and the
// lines of folded text are not counted, there the place is near.
func compileWhen(text string, at place) (*when, *Error) {
	c := whenCompiler{at: at, when: &when{text: text}}
	if strings.TrimSpace(text) == "" {
		return nil, c.problem(common.NewLocation(1, 0), "an empty condition; leave when out")
	}
	if len(text) > maxWhen {
		return nil, c.problem(common.NewLocation(1, 0), "%d bytes long; at most %d are allowed", len(text), maxWhen)
	}
	env, err := whenEnv()
	if err != nil {
		return nil, c.problem(common.NewLocation(1, 0), "the CEL library cannot be set up: %v", err)
	}
	parsed, issues := env.Parse(text)
	if problem := c.first(issues); problem != nil {
		return nil, problem
	}
	if problem := c.names(parsed.NativeRep()); problem != nil {
		return nil, problem
	}
	checked, issues := env.Check(parsed)
	if problem := c.first(issues); problem != nil {
		return nil, problem
	}
	if problem := c.plan(env, checked); problem != nil {
		return nil, problem
	}
	return c.when, nil
}

// whenCompiler compiles one condition.
type whenCompiler struct {
	when  *when
	at    place
	found bool // a variable
}

// problem is an Error at a location in the text. CEL counts lines from 1 and
// columns, in characters, from 0.
func (c *whenCompiler) problem(where common.Location, format string, args ...any) *Error {
	line, column := max(where.Line()-1, 0), max(where.Column(), 0)
	return &Error{File: c.at.file, Line: c.at.line + line, Column: c.at.column + column, Msg: fmt.Sprintf(format, args...)}
}

// plan makes the program of an expression that the library has checked.
func (c *whenCompiler) plan(env *cel.Env, checked *cel.Ast) *Error {
	tree := checked.NativeRep()
	start := common.NewLocation(1, 0)
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) {
		return c.problem(start, "must be true or false, not %s", t)
	}
	if problem := c.comparisons(tree); problem != nil {
		return problem
	}
	holds, problem := c.cost(env, checked)
	if problem != nil {
		return problem
	}
	c.constants(tree)
	options := []cel.ProgramOption{cel.EvalOptions(cel.OptOptimize)}
	if !holds {
		options = append(options, cel.CostLimit(maxCost)) // makes it some three times slower
	}
	program, err := env.Program(checked, options...)
	if err != nil {
		return c.problem(start, "cannot be compiled: %s", clip(err.Error()))
	}
	c.when.program = program
	if !c.found {
		return c.fold(start)
	}
	return nil
}

// fold evaluates a condition that reads nothing of the request, so that one
// that can only fail does so when it is loaded.
func (c *whenCompiler) fold(start common.Location) *Error {
	if _, err := c.when.eval(&Request{}); err != nil {
		return c.problem(start, "fails whatever the request is: %v", err)
	}
	return nil
}

// first is the first issue in the text, in words of ours.
func (c *whenCompiler) first(issues *cel.Issues) *Error {
	var first *cel.Error
	for _, e := range issues.Errors() {
		if first == nil || before(e.Location, first.Location) {
			first = e
		}
	}
	if first == nil {
		return nil
	}
	return c.problem(first.Location, "%s", inWords(first.Message))
}

func before(a, b common.Location) bool {
	return a.Line() < b.Line() || a.Line() == b.Line() && a.Column() < b.Column()
}

// eval reports whether the condition holds. An error says why it could not be
// told: a header that is not there, an index out of range, a request beyond
// the bounds that its cost was estimated with. It never panics. HTTP of the
// request must be there for a condition that uses it.
func (w *when) eval(q *Request) (bool, error) {
	if w.usesHTTP {
		if q.HTTP == nil {
			return false, errNoHTTP
		}
		if err := withinBounds(q.HTTP, w.usesHeaders); err != nil {
			return false, err
		}
	}
	v, _ := varsPool.Get().(*whenVars)
	v.begin(q)
	out, _, err := w.program.Eval(v)
	v.end()
	varsPool.Put(v)
	if err != nil {
		return false, errors.New(failure(err))
	}
	holds, ok := out.(types.Bool)
	if !ok {
		return false, errNoBool
	}
	return bool(holds), nil
}

var (
	errNoHTTP = errors.New("the HTTP request is not visible")
	errNoBool = errors.New("the result is neither true nor false")
)

// varsPool keeps vars between evaluations.
var varsPool = sync.Pool{New: func() any { return new(whenVars) }}
