// Command policypeers measures one program that decides by rules: Narthex's
// proxy/policy, or one of those that people would embed instead.
//
//	policypeers -engine opa -mix http -rules 1000
//
// It makes the rules and requests of the package rulemix, has the program load
// the rules as its own users would write them, makes sure that it gives the
// answers that Narthex gives, and prints what loading and deciding cost, as
// JSON. integration/bench runs it, each time a new process, and has the programs
// take turns.
//
//	policypeers -what reload       Narthex alone: decisions while rules are loaded
//	policypeers -what when         and a decision by a condition in CEL
//
// How each peer is used is in its file. Requests are in the program's own form
// before the clock starts. A module of its own, so that the product does not
// depend on its peers.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// engine is a program that decides by rules.
type engine interface {
	// write returns the rules as users of the program write them.
	write(m *rulemix.Mix) ([]byte, error)
	// load makes the program ready to decide by such a text.
	load(text []byte) error
	// prepare keeps the requests in the program's own form.
	prepare(requests []rulemix.Request) error
	// allows decides the i-th request.
	allows(i int) (bool, error)
}

var engines = map[string]func() engine{
	"narthex":  func() engine { return &narthex{} },
	"opa":      func() engine { return &opa{} },
	"cedar-go": func() engine { return &cedarGo{} },
	"casbin":   func() engine { return &casbinEnforcer{} },
}

// options are what the command line says.
type options struct {
	engine, mix, what string
	rules             int
	asking            time.Duration // how long decisions are measured
	checking          time.Duration // how long answers are compared before
	patience          time.Duration
	memory            int // bytes
}

func main() {
	var o options
	flag.StringVar(&o.engine, "engine", "narthex", "narthex, opa, cedar-go or casbin")
	flag.StringVar(&o.mix, "mix", string(rulemix.Identity), "identity or http")
	flag.StringVar(&o.what, "what", "decide", "decide, reload or when")
	flag.IntVar(&o.rules, "rules", 1000, "how many")
	flag.DurationVar(&o.asking, "for", time.Second, "how long to measure")
	flag.DurationVar(&o.checking, "check", time.Minute, "how long to compare answers before; those that are measured are compared as well")
	flag.DurationVar(&o.patience, "patience", 2*time.Minute, "how long loading may take")
	flag.IntVar(&o.memory, "memory", 8<<30, "how much the heap may grow by loading, in bytes")
	flag.Parse()
	got, err := o.run()
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(got)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "policypeers:", err)
		os.Exit(1)
	}
}

func (o *options) run() (any, error) {
	kinds := []string{string(rulemix.Identity), string(rulemix.HTTP)}
	switch {
	case flag.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case engines[o.engine] == nil:
		return nil, fmt.Errorf("-engine: no %q", o.engine)
	case !slices.Contains(kinds, o.mix):
		return nil, fmt.Errorf("-mix: no %q", o.mix)
	case o.rules < 1:
		return nil, fmt.Errorf("-rules: want at least 1")
	}
	switch o.what {
	case "decide":
		runtime.GOMAXPROCS(1)
		return o.decide()
	case "reload":
		runtime.GOMAXPROCS(2)
		return o.reload()
	case "when":
		runtime.GOMAXPROCS(1)
		return o.when()
	}
	return nil, fmt.Errorf("-what: no %q", o.what)
}
