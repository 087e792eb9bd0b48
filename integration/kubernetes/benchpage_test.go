//go:build integration && bench

package kubernetes_test

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// benchRow is one line of the table.
type benchRow struct {
	title, unit string
	bound       float64 // the target; 0: there is none
	ratio       bool    // bound is ours by theirs, and not in the row's unit
	did         string
}

var (
	rowWarm = &benchRow{
		title: "connect, attest, fetch an SVID, close: median", unit: "ms",
		did: "One pod asks both agents in turns, each time on a new connection, with a bare HTTP/2 client; 500 times in each round, of which this is the median. The other pods' streams are open.",
	}
	rowWarmTail = &benchRow{
		title: "the same, 99th percentile", unit: "ms",
		did: "Of the same fetches. spire-agent asks the kubelet again for callers that come half a second after its last answer; narthex has an answer of the last 15 s at hand, and asks anew beside the calls.",
	}
	rowAttestor = &benchRow{
		title: "of that, the attestor k8s alone: median", unit: "ms", bound: 1,
		did: "`narthex_attestation_duration_seconds{attestor=\"k8s\"}` over the same fetches: the upper bound of the bucket that the median is in, so it is at most this. Buckets are 0.1, 0.25, 0.5, 1 ms and so on.",
	}
	rowAttestorTail = &benchRow{
		title: "of that, the attestor k8s alone: 99th percentile", unit: "ms",
		did: "As above.",
	}
	rowCPU = &benchRow{
		title: "1,000 fetches", unit: "ms CPU", bound: 0.5, ratio: true,
		did: "CPU time of the agent's process while one pod fetches 1,000 times, each on a new connection. The sides take turns.",
	}
	rowRest = &benchRow{
		title: "at rest, a minute", unit: "ms CPU", bound: 0.5, ratio: true,
		did: "CPU time of the agent's process in a minute in which the pods hold their streams and nothing changes: syncs with the server each 5 s, probes, and on narthex's side the kubelet's pods each 10 s, by which it notices a changed label; spire-agent does not look at pods it has attested.",
	}
	rowResident = &benchRow{
		title: "resident memory (VmRSS)", unit: "MiB", bound: 30,
		did: "Of the agent's process at the end of that minute, the pages of its program included.",
	}
	rowAnonymous = &benchRow{
		title: "of the container, anonymous memory", unit: "MiB",
		did: "`total_rss` in the memory.stat of its cgroup.",
	}
	rowWorkingSet = &benchRow{
		title: "of the container, working set", unit: "MiB", bound: 30,
		did: "What the kubelet counts for limits and evictions. It has the pages of files that the container was the first to read, its program's too, so it depends on who ran that program before.",
	}
	rowStorm = &benchRow{
		title: "requests to the kubelet for 100 new callers at once", unit: "requests", bound: 1,
		did: "By `kubelet_http_requests_total` for the path pods, after 16 s without callers. The callers are as many pods, told at the same moment.",
	}
	rowStormLast = &benchRow{
		title: "until the last of them has its SVID", unit: "ms",
		did: "The longest time from the order to connect to the SVID, of the same callers.",
	}
	rowFirst = &benchRow{
		title: "start of a container to its first SVID", unit: "ms",
		did: "From the first instruction of the container's program to its SVID, of pods started one after the other; a caller that is refused asks again after 5 ms. Most of it is the time until the kubelet lists the container as running, for which both wait: spire-agent asks each 500 ms, narthex after ten times as long as the last request took, 100 to 500 ms.",
	}
	rowProxy = &benchRow{
		title: "an idle proxy, resident memory (VmRSS)", unit: "MiB", bound: 20,
		did: "A sidecar with an identity, rules and an outbound listener that nobody uses.",
	}
	rowProxySet = &benchRow{
		title: "an idle proxy, working set", unit: "MiB", bound: 20,
		did: "Of its container.",
	}
)

var benchRows = []*benchRow{
	rowWarm, rowWarmTail, rowAttestor, rowAttestorTail, rowCPU, rowRest, rowResident, rowAnonymous, rowWorkingSet,
	rowStorm, rowStormLast, rowFirst, rowProxy, rowProxySet,
}

// page is the report as a page of the documentation.
func (b *bench) page() string {
	b.t.Helper()
	var p strings.Builder
	fmt.Fprintf(&p, `# Benchmarks on Kubernetes

<!-- Written by integration/kubernetes. Do not edit: run "make bench-k8s". -->

What the agent costs on a node of Kubernetes, beside SPIRE's own. Run it yourself: `+"`make bench-k8s`"+` boots a one-node cluster,
takes about a quarter of an hour and writes this page; `+"`make bench-k8s ARGS=-quick`"+` shows in two minutes that it works.

- Both agents run on the node at the same time, each as a DaemonSet, with the same SPIRE Server, and the same %d pods hold a stream
  at each. Who calls is another process and does not count.
- Values are medians of the rounds (%d, and twice as many for the first SVIDs), in which the sides take turns. **A number with ×
  is ours divided by theirs**, the median of the rounds' ratios. Milliseconds differ by machine and by day; ratios hold. Smaller is
  better.
- "Target" is what we hold ourselves to; "nearly" is a miss by no more than a fifth.

## Where and what

`, b.scale.pods, b.rounds)
	m := figures.DescribeMachine()
	fmt.Fprintf(&p, "- Machine: %s; the harness was built with %s and took %.0f minutes. The whole cluster, with its API server, shares the cores.\n",
		m, m.Golang, math.Ceil(time.Since(b.began).Minutes()))
	fmt.Fprintf(&p, "- Versions: %s.\n", strings.Join(b.versions(), "; "))
	p.WriteString("- Both: k8s_psat, the attestors k8s and unix, a sync with the server each 5 s, logs from `info` on, SVIDs of an hour, liveness and readiness probes by HTTP each 10 s and 5 s.\n" +
		"- narthex: the chart, with the agent alone; it verifies the kubelet's certificate.\n" +
		"- spire-agent: [`stock-agent.yaml`](../integration/kubernetes/testdata/stock-agent.yaml), as SPIRE's documentation shows it, with keys in memory; it does not verify the kubelet's certificate.\n\n")

	fmt.Fprintf(&p, "## The agent\n\n| Row | Unit | %s | %s | Ratio | Target | |\n|---|---|---:|---:|---:|---|---|\n", narthex.name, "spire-agent")
	for _, r := range benchRows {
		fmt.Fprintf(&p, "| %s | %s | %s |\n", r.title, r.unit, strings.Join(b.cells(r), " | "))
	}
	fmt.Fprintf(&p, "\nSmallest and largest of the rounds:\n\n| Row | %s | %s |\n|---|---:|---:|\n", narthex.name, "spire-agent")
	for _, r := range benchRows {
		fmt.Fprintf(&p, "| %s | %s | %s |\n", r.title, spread(b.results[r][narthex.name]), spread(b.results[r][stock.name]))
	}
	p.WriteString("\nWhat was done:\n\n")
	for _, r := range benchRows {
		fmt.Fprintf(&p, "- %s: %s\n", r.title, r.did)
	}
	return p.String()
}

func (b *bench) cells(r *benchRow) []string {
	ours, theirs := b.results[r][narthex.name], b.results[r][stock.name]
	ratio, beside := math.NaN(), "–"
	if len(theirs) > 0 {
		ratio = ours.Over(theirs).Median()
		beside = figures.Times(ratio)
	}
	goal, verdict := "–", ""
	switch {
	case r.ratio:
		goal, verdict = fmt.Sprintf("≤ %.1f×", r.bound), figures.Verdict(ratio, r.bound, false)
	case r.bound > 0:
		goal, verdict = fmt.Sprintf("≤ %.0f %s", r.bound, r.unit), figures.Verdict(ours.Median(), r.bound, false)
	}
	return []string{figures.Number(ours.Median()), figures.Number(theirs.Median()), beside, goal, verdict}
}

// spread prints the smallest and the largest value.
func spread(values figures.Series) string {
	if len(values) == 0 {
		return "–"
	}
	low, high := values.Spread()
	return figures.Number(low) + " – " + figures.Number(high)
}
