package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
	"github.com/narthex-id/narthex/integration/internal/figures"
)

// report prints what was measured.
type report struct {
	options  options
	results  results
	p99      results
	notes    notes
	machine  figures.Machine
	versions map[string]string
	took     time.Duration
}

// tables are the groups of rows that have sides in common.
var tables = []struct {
	title string
	sides []string
	rows  []*row
}{
	{"The proxy", []string{ours, nginx, haproxy, ghostunnel}, []*row{
		rowHandshake, rowHandshakeLogged, rowHandshakeTickets, rowHandshakePQ, rowEcho, rowBulkUp, rowBulkDown, rowLatency, rowProxyRest, rowIdle, rowIdleAfterBulk,
	}},
	{"The proxy with many connections", []string{ours}, []*row{
		rowIdle100, rowIdle1000, rowIdle9000, rowHandshakeBeside, rowEchoBeside, rowRefuse,
	}},
	{"HTTP", []string{ours, nginx, haproxy}, []*row{
		rowRequests1, rowRequests16, rowRequests256, rowPosts, rowDown64, rowDown1M, rowUp64, rowUp1M, rowIdleHTTP, rowLatencyHTTP,
	}},
	{"HTTP/2", []string{ours, nginx, haproxy, grpcGo}, slices.Concat(h2Rows, h2cRows, []*row{
		rowGRPC, rowGRPCBoth, rowGRPCProxies, rowH2Idle, rowH2Stream,
	})},
	{"The agent", []string{ours, spireAgent}, []*row{
		rowAgentStart, rowAgentRest, rowAgentIdle, rowAgentStream, rowAgentFetch, rowAgentCPU, rowAgentJWT, rowAgentJWTCPU, rowAgentLatency,
	}},
	{"The agent with 10,000 entries", []string{ours, spireAgent}, []*row{rowAgentRest10000, rowAgentIdle10000}},
	{"The agent with 100,000 entries", []string{ours, spireAgent}, []*row{rowAgentRest100000, rowAgentIdle100000}},
	{"The agent that rotates 10,000 SVIDs", []string{ours, spireAgent}, []*row{rowAgentSigned, rowAgentRest10000SVIDs, rowAgentRotate}},
	{"Rules", ruleSides, ruleRows()},
	{"The demo", []string{ours}, []*row{rowDemo, rowDemoWhole}},
}

// rowsOf returns those of rows that were measured and asked for.
func (r *report) rowsOf(rows []*row) []*row {
	return slices.DeleteFunc(slices.Clone(rows), func(row *row) bool {
		return r.results[row.id] == nil || !r.options.wants(row)
	})
}

// bestPeer returns the peer that did best in a row, or nothing where there is
// none.
func (r *report) bestPeer(row *row) string {
	best := ""
	for side, values := range r.results[row.id] {
		if side == ours {
			continue
		}
		better := best == ""
		if !better {
			order := cmp.Compare(values.Median(), r.results[row.id][best].Median())
			better = order < 0 != row.higher && order != 0
		}
		if better {
			best = side
		}
	}
	return best
}

// ratio returns ours over a peer, the median of the rounds' ratios.
func (r *report) ratio(row *row, peer string) float64 {
	return r.results[row.id][ours].Over(r.results[row.id][peer]).Median()
}

// text is the report for a terminal.
func (r *report) text() string {
	var b strings.Builder
	for _, t := range tables {
		rows := r.rowsOf(t.rows)
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n%s: median of %d, and ours / theirs\n\n", t.title, r.options.pairs)
		w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintf(w, "row\tunit\t%s\tbest peer\ttarget\t\n", strings.Join(t.sides, "\t"))
		for _, row := range rows {
			fmt.Fprintf(w, "%s\n", strings.Join(append([]string{row.id, row.unit}, r.cells(row, t.sides)...), "\t"))
		}
		if late := r.lateOf(rows); len(late) > 0 {
			fmt.Fprintf(w, "\n%s\n", strings.Join(append([]string{"p99", "unit"}, t.sides...), "\t"))
			for _, row := range late {
				fmt.Fprintf(w, "%s\n", strings.Join(append([]string{row.id, "µs"}, r.waits(row, t.sides)...), "\t"))
			}
		}
		_ = w.Flush() // a strings.Builder takes all
		for _, row := range rows {
			for _, note := range r.notes[row.id] {
				fmt.Fprintf(&b, "%s: %s\n", row.id, note)
			}
		}
	}
	return b.String()
}

// cells are a row's values by side, its ratio to the best peer, its target and
// whether that was met.
func (r *report) cells(row *row, sides []string) []string {
	best := "–"
	if peer := r.bestPeer(row); peer != "" {
		best = figures.Times(r.ratio(row, peer)) + " " + peer
	}
	goal, met := r.judge(row)
	return append(bySide(r.results[row.id], sides), best, goal, met)
}

// bySide are the values of the sides, those of a peer with what ours are of
// them.
func bySide(values map[string]figures.Series, sides []string) []string {
	var cells []string
	for _, side := range sides {
		series, ok := values[side]
		switch {
		case !ok:
			cells = append(cells, "–")
		case side == ours:
			cells = append(cells, figures.Number(series.Median()))
		default:
			cells = append(cells, fmt.Sprintf("%s (%s)", figures.Number(series.Median()), figures.Times(values[ours].Over(series).Median())))
		}
	}
	return cells
}

// lateOf returns those of rows of whose requests it was measured how long they
// took.
func (r *report) lateOf(rows []*row) []*row {
	return slices.DeleteFunc(slices.Clone(rows), func(row *row) bool { return r.p99[row.id] == nil })
}

// waits are the µs within which all but one of a hundred of a row's requests
// were answered, by side.
func (r *report) waits(row *row, sides []string) []string { return bySide(r.p99[row.id], sides) }

// judge says what the target is and whether it was met.
func (r *report) judge(row *row) (goal, met string) {
	t := row.target
	if t.bound == 0 {
		return "–", ""
	}
	sign := "≤"
	if row.higher {
		sign = "≥"
	}
	var got float64
	if t.absolute {
		goal = fmt.Sprintf("%s %s %s", sign, figures.Number(t.bound), strings.TrimSuffix(row.unit, " CPU"))
		got = r.results[row.id][ours].Median()
	} else {
		peer := t.against
		if peer == bestPeer {
			peer = r.bestPeer(row)
		}
		goal = fmt.Sprintf("%s %.1f× %s", sign, t.bound, t.against)
		got = r.ratio(row, peer)
	}
	return goal, figures.Verdict(got, t.bound, row.higher)
}

// markdown is the report as a page of the documentation.
func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Benchmarks

<!-- Written by integration/bench. Do not edit: run "make bench". -->

What Narthex costs beside what people would use instead. Run it yourself: `+"`make bench`"+` installs the peers (Debian packages,
Go modules), takes about %.0f minutes and writes this page; `+"`make bench ARGS='-quick'`"+` shows in a minute that it works, and
`+"`make bench ARGS='-only handshake,echo'`"+` measures some rows. Where those are all of a table (`+"`-only 'http-*'`"+`), it is renewed on this page.

- A figure is the CPU time (user and system) or the memory (PSS) of the measured process and its children. Who makes the load and
  who answers it are other processes and do not count.
- Values are medians of %d rounds in which the sides take turns. **A number with × is ours divided by theirs**, the median
  of the rounds' ratios. Microseconds differ by machine and by day; ratios hold. Smaller is better unless the row says otherwise.
- "Target" is what we hold ourselves to; "nearly" is a miss by no more than a fifth.
- All configurations are in `+"[`integration/bench/peers`](../integration/bench/peers)"+`, what the peers of the rules are given in
  `+"[`integration/bench/policypeers`](../integration/bench/policypeers)"+`.

`, math.Ceil(r.took.Minutes()), r.options.pairs)
	r.writeMachine(&b)
	for _, t := range tables {
		if rows := r.rowsOf(t.rows); len(rows) > 0 {
			r.writeTable(&b, t.title, t.sides, rows)
		}
	}
	return b.String()
}

// splice puts the tables of which every row was measured in the place that they
// have in a page. It returns which, and the page.
func (r *report) splice(page string) (titles []string, spliced string) {
	for _, t := range tables {
		if len(r.rowsOf(t.rows)) < len(t.rows) || r.options.sides != nil {
			continue
		}
		var b strings.Builder
		r.writeTable(&b, t.title, t.sides, t.rows)
		fmt.Fprintf(&b, "Measured by itself, in %.0f minutes: %s.\n\n", math.Ceil(r.took.Minutes()), r.versions[ours])
		begin := strings.Index(page, "## "+t.title+"\n")
		if begin < 0 { // it is new: before the one that follows it
			if begin = indexAfter(page, t.title); begin < 0 {
				continue
			}
			page = page[:begin] + b.String() + page[begin:]
		} else {
			end := len(page)
			if next := strings.Index(page[begin+1:], "\n## "); next >= 0 {
				end = begin + 1 + next + 1
			}
			page = page[:begin] + b.String() + page[end:]
		}
		titles = append(titles, t.title)
	}
	return titles, page
}

// indexAfter returns where the first of the tables begins that come after
// another and that the page has, or -1.
func indexAfter(page, title string) int {
	behind := false
	for _, t := range tables {
		if begin := strings.Index(page, "## "+t.title+"\n"); behind && begin >= 0 {
			return begin
		}
		behind = behind || t.title == title
	}
	return -1
}

// did is what each proxy does on every connection.
var did = []string{
	"All proxies: TLS 1.3 alone, client certificate required and its chain verified, ECDSA P-256, the same server certificate and key, " +
		"TLS_AES_128_GCM_SHA256, X25519 unless the row says otherwise, no session tickets, plaintext TCP to one backend on loopback, a new connection to it for each client's. " +
		"The harness refuses a peer that negotiates anything else or lets in a client without a certificate.",
	"narthex: reads the client's SPIFFE ID, decides by a rule, and keeps the connection in the table that every change of policy asks again. GOMAXPROCS is the number of cores.",
	"nginx: `stream`, one worker a core, buffers of 16 KiB (the default). Verifies the chain, and does not look at who the client is.",
	"haproxy: `mode tcp`, one thread a core, buffers of 16 KiB (the default). Verifies the chain, and does not look at who the client is.",
	"ghostunnel: `--allow-uri` with the client's SPIFFE ID. GOMAXPROCS is the number of cores.",
	"HTTP: as above, but requests go to the backend on connections that are kept for those that follow. ghostunnel reads no HTTP and is left out.",
	"HTTP/2: the same, the client offering h2 alone. gRPC: the service, and the client where two proxies are measured, are grpc-go's.",
	"Agents: the same SPIRE Server on loopback, join_token, the unix attestor alone, keys on disk, logs from `warn` on, the server's data in memory.",
	"Rules: " + rulemix.About(),
	"The programs that decide by rules are Go libraries, each in a process of its own. The answers of all are compared. Denies win over allows in each.",
	"opa: a prepared query over a policy whose rules are data, filed by the identity they go to or come from; the store keeps them as the evaluator reads them, `glob.match` for patterns.",
	"cedar-go: a policy for each rule, exact identities in its scope, groups as entities, `like` for patterns. `Authorize` asks each policy of the set.",
	"casbin: a line for each rule, groups as roles, a matcher that asks first where a request goes to, `globMatch` and `keyMatch3` for patterns. `Enforce` asks line after line.",
}

func (r *report) writeMachine(b *strings.Builder) {
	b.WriteString("## Where and what\n\n")
	fmt.Fprintf(b, "- Machine: %s; the harness was built with %s and took %.0f minutes.\n", r.machine, r.machine.Golang, math.Ceil(r.took.Minutes()))
	var list []string
	for _, side := range allSides {
		if v := r.versions[side]; v != "" {
			list = append(list, v)
		}
	}
	fmt.Fprintf(b, "- Versions: %s.\n", strings.Join(list, "; "))
	for _, line := range did {
		fmt.Fprintf(b, "- %s\n", line)
	}
	b.WriteString("\n")
}

func (r *report) writeTable(b *strings.Builder, title string, sides []string, rows []*row) {
	fmt.Fprintf(b, "## %s\n\n", title)
	fmt.Fprintf(b, "| Row | Unit | %s | Best peer | Target | |\n|---|---|%s---|---|---|\n", strings.Join(sides, " | "), strings.Repeat("---:|", len(sides)))
	for _, row := range rows {
		unit := row.unit
		if row.higher {
			unit += " (more is better)"
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", row.title, unit, strings.Join(r.cells(row, sides), " | "))
	}
	fmt.Fprintf(b, "\nSmallest and largest of the rounds:\n\n| Row | %s |\n|---|%s\n", strings.Join(sides, " | "), strings.Repeat("---:|", len(sides)))
	for _, row := range rows {
		var cells []string
		for _, side := range sides {
			cell := "–"
			if values, ok := r.results[row.id][side]; ok {
				low, high := values.Spread()
				cell = figures.Number(low) + " – " + figures.Number(high)
			}
			cells = append(cells, cell)
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", row.id, strings.Join(cells, " | "))
	}
	if late := r.lateOf(rows); len(late) > 0 {
		fmt.Fprintf(b, "\nMicroseconds within which 99 of 100 requests of these rows were answered, the cores being full (the client, the proxy and the service share them):\n\n| Row | %s |\n|---|%s\n",
			strings.Join(sides, " | "), strings.Repeat("---:|", len(sides)))
		for _, row := range late {
			fmt.Fprintf(b, "| `%s` | %s |\n", row.id, strings.Join(r.waits(row, sides), " | "))
		}
	}
	b.WriteString("\nWhat was done:\n\n")
	for _, row := range rows {
		fmt.Fprintf(b, "- `%s`: %s\n", row.id, row.did)
		if row.goes != "" {
			fmt.Fprintf(b, "  Where ours goes: %s\n", row.goes)
		}
		for _, note := range r.notes[row.id] {
			fmt.Fprintf(b, "  %s\n", note)
		}
	}
	b.WriteString("\n")
}
