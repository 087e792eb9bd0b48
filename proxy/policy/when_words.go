package policy

import (
	"errors"
	"fmt"
	"strings"

	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/interpreter"
)

// misread says in other words what the CEL library says of the mistakes that
// people make. The first that fits counts.
var misread = []struct{ says, words string }{
	{"input '<EOF>'", "ends too early; is something missing at the end?"},
	{"missing ')'", "a bracket that ( begins is not ended by )"},
	{"missing ']'", "a list that [ begins is not ended by ]"},
	{"token recognition error at: '\"", "text that begins here has no end; is a quote missing?"},
	{"token recognition error at: ''", "text that begins here has no end; is a quote missing?"},
	{"token recognition error at: '=", "a single =; == compares"},
	{"token recognition error at: '&", "a single &; && is and"},
	{"token recognition error at: '|", "a single |; || is or"},
	{"input 'and'", "and is written &&"},
	{"input 'or'", "or is written ||"},
	{"input 'not'", "not is written !"},
	{"recursion", "too many expressions in each other"},
	{"invalid argument to has() macro", macroUses[operators.Has]},
	{"argument must be a simple name", "all, exists and exists_one take a name first, as in list.all(x, condition on x)"},
	{"cannot be range of a comprehension", "all, exists and exists_one go over a list or a map"},
	{"reserved identifier", "a word that CEL keeps for itself"},
	{"does not support field selection", "this has no fields"},
}

// inWords puts a message of the library into words of ours.
func inWords(message string) string {
	for _, m := range misread {
		if strings.Contains(message, m.says) {
			return m.words
		}
	}
	if rest, ok := strings.CutPrefix(message, "found no matching overload for '"); ok {
		if name, applied, ok := strings.Cut(rest, "' applied to '"); ok {
			return noOverload(name, strings.TrimSuffix(applied, "'"))
		}
	}
	message, _, _ = strings.Cut(message, " expecting ")
	return clip(strings.TrimPrefix(message, "Syntax error: "))
}

// noOverload says that a function or operator does not take those types.
func noOverload(name, types string) string {
	if shown, ok := operators.FindReverse(name); ok && shown != "" {
		name = shown
	}
	switch name {
	case operators.Conditional:
		return "?: takes a condition and two values of one type, not " + clip(types)
	case operators.Index:
		name = "[]"
	}
	return name + " does not take " + clip(types)
}

// failure puts an error of an evaluation into one line.
func failure(err error) string {
	var cancelled interpreter.EvalCancelledError
	if errors.As(err, &cancelled) && cancelled.Cause == interpreter.CostLimitExceeded {
		return fmt.Sprintf("the evaluation takes more than %d steps", maxCost)
	}
	return clip(err.Error())
}
