package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"
	_ "time/tzdata" // a sandboxed proxy may not read the host's

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/decls"
	celenv "cel.dev/cel-go/common/env"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	celref "cel.dev/cel-go/common/types/ref"
)

// maxParseDepth is how deep expressions may stand in each other.
const maxParseDepth = 48

// whenEnv is what all conditions are compiled in.
var whenEnv = sync.OnceValues(func() (*cel.Env, error) {
	options := []cel.EnvOption{
		cel.StdLib(cel.StdLibSubset(standard())),
		cel.EagerlyValidateDeclarations(true),
		cel.ParserExpressionSizeLimit(maxWhen),
		cel.ParserRecursionLimit(maxParseDepth),
		cel.ParserErrorRecoveryLimit(4),
		cel.Function(networkFunction,
			cel.Overload("in_network", []*cel.Type{cel.StringType, cel.StringType}, cel.BoolType, cel.BinaryBinding(inNetwork)),
			decls.DisableTypeGuards(true)),
	}
	for i := range clocks {
		options = append(options, clocks[i].function())
	}
	for i := range variables {
		options = append(options, cel.Variable(variables[i].name, variables[i].kind))
	}
	return cel.NewCustomEnv(options...)
})

// standardFunctions are the functions of the CEL definition that conditions
// may use, with those of their overloads that take the types there are. There
// are no regular expressions, no way to another type but from text, and
// nothing that makes a list longer or text of numbers.
var standardFunctions = map[string][]string{
	operators.Conditional:          nil,
	operators.LogicalAnd:           nil,
	operators.LogicalOr:            nil,
	operators.LogicalNot:           nil,
	operators.NotStrictlyFalse:     nil,
	operators.Equals:               nil,
	operators.NotEquals:            nil,
	operators.Index:                nil,
	operators.In:                   nil,
	operators.Less:                 {overloads.LessInt64, overloads.LessString, overloads.LessTimestamp, overloads.LessDuration},
	operators.LessEquals:           {overloads.LessEqualsInt64, overloads.LessEqualsString, overloads.LessEqualsTimestamp, overloads.LessEqualsDuration},
	operators.Greater:              {overloads.GreaterInt64, overloads.GreaterString, overloads.GreaterTimestamp, overloads.GreaterDuration},
	operators.GreaterEquals:        {overloads.GreaterEqualsInt64, overloads.GreaterEqualsString, overloads.GreaterEqualsTimestamp, overloads.GreaterEqualsDuration},
	operators.Add:                  {overloads.AddInt64, overloads.AddString, overloads.AddDurationDuration, overloads.AddTimestampDuration, overloads.AddDurationTimestamp},
	operators.Subtract:             {overloads.SubtractInt64, overloads.SubtractDurationDuration, overloads.SubtractTimestampDuration, overloads.SubtractTimestampTimestamp},
	operators.Multiply:             {overloads.MultiplyInt64},
	operators.Divide:               {overloads.DivideInt64},
	operators.Modulo:               {overloads.ModuloInt64},
	operators.Negate:               {overloads.NegateInt64},
	overloads.Size:                 {overloads.SizeString, overloads.SizeStringInst, overloads.SizeList, overloads.SizeListInst, overloads.SizeMap, overloads.SizeMapInst},
	overloads.StartsWith:           nil,
	overloads.EndsWith:             nil,
	overloads.Contains:             nil,
	overloads.TypeConvertInt:       {overloads.StringToInt},
	overloads.TypeConvertDuration:  {overloads.StringToDuration},
	overloads.TypeConvertTimestamp: {overloads.StringToTimestamp},
}

// whenMacros are those of the CEL definition that conditions may use: the ones
// that give true or false, so that a loop gathers nothing.
var whenMacros = []string{operators.Has, operators.All, operators.Exists, operators.ExistsOne}

func standard() *celenv.LibrarySubset {
	subset := celenv.NewLibrarySubset().AddIncludedMacros(whenMacros...)
	for name, ids := range standardFunctions {
		f := celenv.NewFunction(name)
		for _, id := range ids {
			f.Overloads = append(f.Overloads, &celenv.Overload{ID: id})
		}
		subset.AddIncludedFunctions(f)
	}
	return subset
}

// clock is a function that takes a part of a time, in UTC or in a time zone.
// The library's own would read the zone from disk at each call.
type clock struct {
	name   string
	part   func(time.Time) int
	length func(time.Duration) int64 // the same of a duration; nil: there is none
}

// clocks are as the CEL definition has them: months, and the days of
// getDayOfMonth and getDayOfYear, count from 0, and Sunday is 0.
var clocks = []clock{
	{overloads.TimeGetFullYear, time.Time.Year, nil},
	{overloads.TimeGetMonth, func(t time.Time) int { return int(t.Month()) - 1 }, nil},
	{overloads.TimeGetDayOfYear, func(t time.Time) int { return t.YearDay() - 1 }, nil},
	{overloads.TimeGetDayOfMonth, func(t time.Time) int { return t.Day() - 1 }, nil},
	{overloads.TimeGetDate, time.Time.Day, nil},
	{overloads.TimeGetDayOfWeek, func(t time.Time) int { return int(t.Weekday()) }, nil},
	{overloads.TimeGetHours, time.Time.Hour, func(d time.Duration) int64 { return int64(d / time.Hour) }},
	{overloads.TimeGetMinutes, time.Time.Minute, func(d time.Duration) int64 { return int64(d / time.Minute) }},
	{overloads.TimeGetSeconds, time.Time.Second, func(d time.Duration) int64 { return int64(d / time.Second) }},
	{overloads.TimeGetMilliseconds, func(t time.Time) int { return t.Nanosecond() / 1e6 }, func(d time.Duration) int64 { return d.Milliseconds() % 1000 }},
}

func isClock(name string) bool {
	for i := range clocks {
		if clocks[i].name == name {
			return true
		}
	}
	return false
}

func (c *clock) function() cel.EnvOption {
	timestamp := func(t, in celref.Val) celref.Val {
		at, ok := t.(types.Timestamp)
		z, known := in.(constantZone)
		if !ok || !known {
			return types.NoSuchOverloadErr()
		}
		return types.Int(c.part(at.In(z.location)))
	}
	options := []cel.FunctionOpt{
		cel.MemberOverload("timestamp_"+c.name, []*cel.Type{cel.TimestampType}, cel.IntType,
			cel.UnaryBinding(func(t celref.Val) celref.Val { return timestamp(t, constantZone{location: time.UTC}) })),
		cel.MemberOverload("timestamp_"+c.name+"_in", []*cel.Type{cel.TimestampType, cel.StringType}, cel.IntType,
			cel.BinaryBinding(timestamp)),
		decls.DisableTypeGuards(true), // the zone is no text any more: see constants
	}
	if c.length != nil {
		options = append(options, cel.MemberOverload("duration_"+c.name, []*cel.Type{cel.DurationType}, cel.IntType,
			cel.UnaryBinding(func(d celref.Val) celref.Val {
				if length, ok := d.(types.Duration); ok {
					return types.Int(c.length(length.Duration))
				}
				return types.NoSuchOverloadErr()
			})))
	}
	return cel.Function(c.name, options...)
}

// constantZone is a time zone whose name stood in the condition.
type constantZone struct {
	opaque
	location *time.Location
}

// Type returns the type of the name that the zone stands for.
func (constantZone) Type() celref.Type { return types.StringType }

// parseZone returns a time zone by its IANA name, or by its offset from UTC as
// in +01:00.
func parseZone(name string) (constantZone, error) {
	if strings.HasPrefix(name, "+") || strings.HasPrefix(name, "-") {
		t, err := time.Parse("-07:00", name)
		if err != nil {
			return constantZone{}, errors.New("an offset from UTC is written like +01:00")
		}
		_, seconds := t.Zone()
		return constantZone{location: time.FixedZone(name, seconds)}, nil
	}
	if name == "" || name == "Local" {
		return constantZone{}, errors.New("name a zone, such as Europe/Berlin: nodes may stand in different ones")
	}
	if known, ok := zones.Load(name); ok {
		return constantZone{location: known.(*time.Location)}, nil
	}
	location, err := time.LoadLocation(name)
	if err != nil {
		return constantZone{}, errors.New("there is no such time zone; use an IANA name, such as Europe/Berlin")
	}
	zones.Store(name, location)
	return constantZone{location: location}, nil
}

// zones are the time zones that were read, by name; there are some 600.
var zones sync.Map // of *time.Location

const networkFunction = "inNetwork"

// constantNetwork is a network that stood in the condition.
type constantNetwork struct {
	opaque
	prefix netip.Prefix
}

// Type returns the type of the text that the network stands for.
func (constantNetwork) Type() celref.Type { return types.StringType }

// parseNetwork returns a network in CIDR form, or that of a single address.
func parseNetwork(text string) (constantNetwork, error) {
	if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
		ip = ip.Unmap()
		return constantNetwork{prefix: netip.PrefixFrom(ip, ip.BitLen())}, nil
	}
	prefix, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return constantNetwork{}, errors.New("not a network; write one like 10.0.0.0/8 or 2001:db8::/32")
	case prefix.Addr().Is4In6():
		return constantNetwork{}, errors.New("write an IPv4 network in its own form, like 10.0.0.0/8")
	case prefix != prefix.Masked():
		return constantNetwork{}, fmt.Errorf("bits after the prefix are set; write %s", prefix.Masked())
	}
	return constantNetwork{prefix: prefix}, nil
}

// inNetwork fails for what is no address, so that a request without one is
// denied: an allow does not match then, and a deny does.
func inNetwork(ip, in celref.Val) celref.Val {
	text, ok := ip.(types.String)
	n, known := in.(constantNetwork)
	if !ok || !known {
		return types.NoSuchOverloadErr()
	}
	address, err := netip.ParseAddr(string(text))
	if err != nil {
		return types.NewErr("inNetwork: %q is no address", clip(string(text)))
	}
	return types.Bool(n.prefix.Contains(address.Unmap().WithZone("")))
}

// constants puts zones and networks into the place of the texts that name
// them. names has seen to it that they are constants, and good.
func (c *whenCompiler) constants(tree *ast.AST) {
	literals := ast.NewExprFactory()
	ast.PostOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() != ast.CallKind {
			return
		}
		argument := constantOf(e.AsCall())
		if argument == nil {
			return
		}
		text, _ := constantText(argument)
		if e.AsCall().FunctionName() == networkFunction {
			if n, err := parseNetwork(text); err == nil {
				argument.SetKindCase(literals.NewLiteral(argument.ID(), n))
			}
		} else if z, err := parseZone(text); err == nil {
			argument.SetKindCase(literals.NewLiteral(argument.ID(), z))
		}
	}))
}

// constantOf returns the argument of a call that names a zone or network; nil
// if it has none.
func constantOf(call ast.CallExpr) ast.Expr {
	args := call.Args()
	switch {
	case call.FunctionName() == networkFunction && len(args) == 2:
		return args[1]
	case isClock(call.FunctionName()) && call.IsMemberFunction() && len(args) == 1:
		return args[0]
	}
	return nil
}

// constantText returns the text of a text constant.
func constantText(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := e.AsLiteral().(types.String)
	return string(s), ok
}
