// Command bench measures what Narthex costs beside the programs people would
// use instead: nginx, haproxy and ghostunnel for the proxy, the stock
// spire-agent for the agent, and OPA, cedar-go and Casbin for the rules. `make
// bench` installs them and runs it.
//
//	bench -narthex bin/narthex -out docs/benchmarks.md
//	bench -narthex bin/narthex -quick -only handshake,echo
//	bench -narthex bin/narthex -out docs/benchmarks.md -only 'http-*'
//
// A figure is the CPU time or the memory of the measured process and its
// children alone; who makes the load and who answers it are in this process.
// The sides of a row take turns, round after round, and a ratio is the median
// of the rounds' ratios, so that what slows the machine for a while slows
// both. Peers run from the configurations in peers/.
//
// The files: rows.go has the table of what is measured; proxies.go and
// agents.go start the sides, throughput.go, idle.go, agents.go and demo.go
// measure them, and so do many.go, latency.go, http.go, h2.go, grpc.go, manyentries.go and rules.go; report.go prints.
// Decisions by rules are measured by a program of its own, in policypeers, on
// what rulemix makes. It measures and judges nothing else: what must not be slow
// is asserted by tests, with wider bounds.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

func main() { os.Exit(run()) }

func run() int {
	if len(os.Args) == 5 && os.Args[1] == roleCallers {
		if err := runCallers(os.Args[2], os.Args[3], os.Args[4]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", roleCallers, err)
			return 1
		}
		return 0
	}
	if len(os.Args) > 2 && (os.Args[1] == roleService || os.Args[1] == roleClient) {
		if err := runGRPC(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
			return 1
		}
		return 0
	}
	var o options
	flag.StringVar(&o.narthex, "narthex", "bin/narthex", "the binary that is measured")
	flag.StringVar(&o.policies, "policypeers", "bin/policypeers", "the program that decisions by rules are measured with")
	flag.StringVar(&o.out, "out", "", "the Markdown file to write; a run of some rows renews the tables it has measured whole")
	flag.IntVar(&o.pairs, "pairs", 5, "rounds; the sides take turns in each")
	flag.BoolVar(&o.quick, "quick", false, "one small round: does it work? The figures say little")
	only := flag.String("only", "", "comma-separated rows to measure, http-* being all that begin so (left out: all): "+strings.Join(rowIDs(), ", "))
	among := flag.String("sides", "", "comma-separated sides to measure (left out: all)")
	flag.IntVar(&o.connections, "connections", 4000, "idle connections held")
	flag.StringVar(&o.profiles, "profiles", "", "a folder for CPU profiles of narthex, which was built with -tags profile")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "bench: unexpected argument %q\n", flag.Arg(0))
		return 2
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	if *among != "" {
		o.sides = strings.Split(*among, ",")
	}
	if err := o.check(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := measure(ctx, o); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// options are what the command line says.
type options struct {
	narthex     string
	policies    string
	out         string
	pairs       int
	quick       bool
	only        []string // rows; nil: all
	sides       []string // nil: all
	connections int
	profiles    string // a folder, or empty
}

// check completes the options and refuses those that cannot be.
func (o *options) check() error {
	var err error
	if o.only, err = namedRows(o.only); err != nil {
		return err
	}
	for _, side := range o.sides {
		if !slices.Contains(allSides, side) {
			return fmt.Errorf("-sides: no side %q; there are %s", side, strings.Join(allSides, ", "))
		}
	}
	if o.pairs < 1 {
		return errors.New("-pairs: want at least 1")
	}
	if o.quick {
		o.pairs, o.connections = 1, min(o.connections, 400)
	}
	if o.narthex, err = filepath.Abs(o.narthex); err != nil {
		return err
	}
	if o.profiles != "" {
		if o.profiles, err = filepath.Abs(o.profiles); err != nil {
			return err
		}
	}
	if _, err := os.Stat(o.narthex); err != nil {
		return fmt.Errorf("%w: build it with `make build`, or name it with -narthex", err)
	}
	if o.policies, err = filepath.Abs(o.policies); err != nil {
		return err
	}
	if _, err := os.Stat(o.policies); err != nil && o.wants(ruleRows()...) {
		return fmt.Errorf("%w: build it as `make bench` does, or name it with -policypeers", err)
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	// This process holds both ends of each connection, a proxy as many.
	if need := uint64(2*max(o.connections, o.scaled(manyConnections)) + 1000); files.Max < need {
		return fmt.Errorf("%d connections need %d open files, the limit is %d: raise it (ulimit -Hn), or lower -connections", o.connections, need, files.Max)
	}
	return nil
}

// namedRows returns the rows that names name: one by its id, several by what
// their ids begin with and a star, such as http-*.
func namedRows(names []string) (ids []string, err error) {
	for _, name := range names {
		before := len(ids)
		begin, several := strings.CutSuffix(name, "*")
		for _, id := range rowIDs() {
			if id == name || several && strings.HasPrefix(id, begin) {
				ids = append(ids, id)
			}
		}
		if len(ids) == before {
			return nil, fmt.Errorf("-only: no row %q; there are %s", name, strings.Join(rowIDs(), ", "))
		}
	}
	return ids, nil
}

// full reports whether all is measured as the published table wants it.
func (o *options) full() bool { return o.only == nil && o.sides == nil && o.profiles == "" && !o.quick }

// wants reports whether one of rows is to be measured.
func (o *options) wants(rows ...*row) bool {
	return o.only == nil || slices.ContainsFunc(rows, func(r *row) bool { return slices.Contains(o.only, r.id) })
}

// measures reports whether a side is to be measured.
func (o *options) measures(side string) bool { return o.sides == nil || slices.Contains(o.sides, side) }

// bench is one run: what all experiments share.
type bench struct {
	options
	dir         string
	keeper      *keeper
	backend     *backend
	certificate tls.Certificate // the client's
	other       tls.Certificate // of a client whom new rules will refuse
	results     results
	p99         results // of requests, in µs, in the rows that measure it beside CPU time
	notes       notes
	folders     int
	port        int
}

// measure runs the experiments and reports. Whatever it starts has ended when
// it returns.
func measure(ctx context.Context, o options) (err error) {
	b := &bench{options: o, results: results{}, p99: results{}, notes: notes{}, keeper: newKeeper(), port: firstPort}
	defer b.keeper.close()
	stop := context.AfterFunc(ctx, b.keeper.close)
	defer stop()
	if b.dir, err = os.MkdirTemp("", "narthex-bench-"); err != nil {
		return err
	}
	defer func() { b.keeper.close(); err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := os.Mkdir(b.certs(), 0o700); err != nil {
		return err
	}
	if b.certificate, b.other, err = makeCertificates(b.certs()); err != nil {
		return err
	}
	if b.backend, err = startBackend(); err != nil {
		return err
	}
	defer b.backend.close()

	begin := time.Now()
	for _, e := range experiments {
		if !o.wants(e.rows...) {
			continue
		}
		since := time.Now()
		fmt.Fprintf(os.Stderr, "measuring %s", e.name)
		err := e.run(ctx, b)
		fmt.Fprintf(os.Stderr, " %.0f s\n", time.Since(since).Seconds())
		if err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	versions, err := b.versions(ctx)
	if err != nil {
		return err
	}
	r := report{options: o, results: b.results, p99: b.p99, notes: b.notes, machine: figures.DescribeMachine(), versions: versions, took: time.Since(begin)}
	fmt.Print(r.text())
	if o.out == "" {
		return nil
	}
	if !o.full() {
		return r.spliceInto(o.out)
	}
	return os.WriteFile(o.out, []byte(r.markdown()), 0o644)
}

// spliceInto renews the tables of a page that were measured whole.
func (r *report) spliceInto(path string) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	titles, spliced := r.splice(string(page))
	if len(titles) == 0 || r.options.quick || r.options.profiles != "" {
		fmt.Fprintf(os.Stderr, "%s is left as it is: only whole tables are written, measured on all sides without -quick\n", path)
		return nil
	}
	fmt.Fprintf(os.Stderr, "%s: %s renewed\n", path, strings.Join(titles, ", "))
	return os.WriteFile(path, []byte(spliced), 0o644)
}

// rounds has the sides take turns, b.pairs times. Who begins changes from
// round to round.
func (b *bench) rounds(ctx context.Context, sides int, turn func(side int) error) error {
	return b.roundsOf(ctx, b.pairs, sides, turn)
}

// roundsOf is rounds with a number of their own.
func (b *bench) roundsOf(ctx context.Context, rounds, sides int, turn func(side int) error) error {
	for round := range rounds {
		for i := range sides {
			if err := turn((round + i) % sides); err != nil {
				return err
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		fmt.Fprint(os.Stderr, ".")
	}
	return nil
}

// scaled returns n, or a tenth of it with -quick.
func (o *options) scaled(n int) int {
	if o.quick {
		return n / 10
	}
	return n
}

func (b *bench) certs() string { return filepath.Join(b.dir, "certs") }

// folder makes a new folder. Its path is short: those of sockets have 107
// bytes.
func (b *bench) folder() (string, error) {
	b.folders++
	dir := filepath.Join(b.dir, itoa(b.folders))
	return dir, os.Mkdir(dir, 0o700)
}

// firstPort is below the ports that the kernel gives to outgoing connections,
// so that what is free here is not taken by one of those.
const firstPort = 23000

// freePort returns a port of 127.0.0.1 on which nobody listens, and never the
// same twice.
func (b *bench) freePort() (int, error) {
	for range 1000 {
		b.port++
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", itoa(b.port)))
		if err == nil {
			return b.port, l.Close()
		}
	}
	return 0, errors.New("no free port on 127.0.0.1")
}

func itoa(n int) string { return strconv.Itoa(n) }
