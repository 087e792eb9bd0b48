//go:build integration && bench

package kubernetes_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/figures"
	"github.com/narthex-id/narthex/integration/internal/stage"
)

var (
	benchQuick = flag.Bool("quick", false, "one small round: does it work? The figures say little")
	benchOut   = flag.String("out", "", "the page to write; only full runs write it")
)

// scale is how much a run measures.
type scale struct {
	rounds  int
	pods    int           // that hold a stream at each agent
	callers int           // of the pods, those that come at once
	fetches int           // at each agent, in a round
	rest    time.Duration // of one look at agents at rest
}

var (
	fullScale  = scale{rounds: 5, pods: 105, callers: 100, fetches: 1000, rest: time.Minute}
	quickScale = scale{rounds: 1, pods: 10, callers: 10, fetches: 100, rest: 5 * time.Second}
)

// bench is one run.
type bench struct {
	scale
	t         *testing.T
	namespace string
	sides     []*side
	orders    net.Listener // where pods come for what to do
	pods      []*benchPod
	results   map[*benchRow]map[string]figures.Series
	began     time.Time
}

// side is an agent that is measured.
type side struct {
	*provider
	pod *pod
	pid int
}

// benchPod is a pod of ours that does what we say.
type benchPod struct {
	name   string
	conn   net.Conn
	orders *json.Encoder
	says   *json.Decoder
}

// benchOrder and benchOutcome are those of workload/drive.go.
type benchOrder struct {
	Do     string   `json:"do"`
	Agents []string `json:"agents,omitempty"`
	Count  int      `json:"count,omitempty"`
}

type benchOutcome struct {
	Pod, Error string
	Took       map[string][]float64
}

// TestBench measures the agent beside SPIRE's own on one node, with the same
// pods as callers of both. It judges nothing but that it works.
func TestBench(t *testing.T) {
	if !k8s.own {
		t.Fatal("the agents' processes are looked at, which takes a node of our own: unset KUBECONFIG")
	}
	b := newBench(t)
	b.storms()
	b.order(b.pods, benchOrder{Do: "hold", Agents: b.names()})
	for range b.rounds {
		b.atRest()
		b.warm()
		b.load()
	}
	b.firstSVIDs()
	b.idleProxy()
	page := b.page()
	t.Log("\n" + page)
	if *benchOut == "" || *benchQuick {
		return
	}
	if err := os.WriteFile(*benchOut, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, scale: fullScale, began: time.Now(), results: map[*benchRow]map[string]figures.Series{}}
	if *benchQuick {
		b.scale = quickScale
	}
	syncInterval = "5s" // what both do unless told otherwise
	withProxy = false   // theirs has none
	withBrokers = false // likewise
	narthex.serve(t)
	stock.serve(t)
	b.namespace = k8s.namespace(t)
	register(t, entry{path: "/" + b.namespace, selectors: []string{"k8s:ns:" + b.namespace, "k8s:container-name:app"}})

	dir := filepath.Join(k8s.state, "run", "bench")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if b.orders, err = net.Listen("unix", filepath.Join(dir, "control.sock")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.orders.Close() })
	if err := os.Chmod(b.orders.Addr().String(), 0o666); err != nil {
		t.Fatal(err)
	}
	b.start("many", b.scale.pods, "")
	for range b.scale.pods {
		p, _ := b.arrival()
		b.pods = append(b.pods, p)
	}
	b.sides = []*side{
		b.side(narthex, "narthex", "app.kubernetes.io/component=node", "agent"),
		b.side(stock, "spire", "app=spire-agent", "spire-agent"),
	}
	return b
}

func (b *bench) side(p *provider, namespace, labels, container string) *side {
	agent := k8s.pod(b.t, namespace, labels)
	return &side{provider: p, pod: agent, pid: k8s.process(b.t, agent, container)}
}

func (b *bench) names() []string {
	var names []string
	for _, s := range b.sides {
		names = append(names, s.name)
	}
	return names
}

// start makes pods. With first they ask that agent before they come to us.
func (b *bench) start(name string, replicas int, first string) {
	b.t.Helper()
	k8s.apply(b.t, render(b.t, "driven.yaml", map[string]any{
		"Namespace": b.namespace, "Name": name, "Replicas": replicas, "First": first,
		"Agents": map[string]string{narthex.name: narthex.sockets, stock.name: stock.sockets},
	}))
}

// arrival waits for the next pod to come, and returns what it says.
func (b *bench) arrival() (*benchPod, benchOutcome) {
	b.t.Helper()
	if err := b.orders.(*net.UnixListener).SetDeadline(time.Now().Add(ready)); err != nil {
		b.t.Fatal(err)
	}
	c, err := b.orders.Accept()
	if err != nil {
		b.t.Fatalf("%d pods have come: %v", len(b.pods), err)
	}
	b.t.Cleanup(func() { c.Close() })
	p := &benchPod{conn: c, orders: json.NewEncoder(c), says: json.NewDecoder(c)}
	said, err := p.answer()
	if err != nil {
		b.t.Fatal(err)
	}
	p.name = said.Pod
	return p, said
}

func (p *benchPod) answer() (benchOutcome, error) {
	var said benchOutcome
	err := p.conn.SetReadDeadline(time.Now().Add(ready))
	if err == nil {
		err = p.says.Decode(&said)
	}
	if err == nil && said.Error != "" {
		err = fmt.Errorf("pod %s: %s", said.Pod, said.Error)
	}
	return said, err
}

// order has pods do something at the same time, and returns what all SVIDs
// took, by agent, in ms.
func (b *bench) order(pods []*benchPod, o benchOrder) map[string][]float64 {
	b.t.Helper()
	for _, p := range pods { // a moment for all of them: none needs long to read it
		if err := p.orders.Encode(o); err != nil {
			b.t.Fatal(err)
		}
	}
	said := make([]benchOutcome, len(pods))
	failed := make([]error, len(pods))
	var answers sync.WaitGroup
	for i, p := range pods {
		answers.Go(func() { said[i], failed[i] = p.answer() })
	}
	answers.Wait()
	took := map[string][]float64{}
	for i := range pods {
		if failed[i] != nil {
			b.t.Fatal(failed[i])
		}
		for agent, times := range said[i].Took {
			took[agent] = append(took[agent], times...)
		}
	}
	return took
}

// turns is who begins in a round: the sides take turns.
func (b *bench) turns(round int) []*side {
	turns := slices.Clone(b.sides)
	if round%2 == 1 {
		slices.Reverse(turns)
	}
	return turns
}

func (b *bench) add(row *benchRow, side string, value float64) {
	if b.results[row] == nil {
		b.results[row] = map[string]figures.Series{}
	}
	b.results[row][side] = append(b.results[row][side], value)
}

// pass lets time pass.
func (b *bench) pass(d time.Duration) {
	b.t.Helper()
	select {
	case <-time.After(d):
	case <-b.t.Context().Done():
		b.t.Fatal(b.t.Context().Err())
	}
}

// forgotten is after how long without callers no agent knows what the kubelet
// said: ours is content with an answer of the last 15 s.
const forgotten = 16 * time.Second

// storms has pods come at once whom no agent knows.
func (b *bench) storms() {
	b.t.Helper()
	callers := b.pods[:b.callers]
	for round := range b.rounds {
		for _, s := range b.turns(round) {
			b.pass(forgotten)
			before := kubeletRequests(b.t)
			took := b.order(callers, benchOrder{Do: "hold", Agents: []string{s.name}})[s.name]
			b.add(rowStorm, s.name, float64(kubeletRequests(b.t)-before))
			b.add(rowStormLast, s.name, slices.Max(took))
			b.order(callers, benchOrder{Do: "drop"})
		}
	}
}

// atRest looks at agents whose callers hold streams and want nothing.
func (b *bench) atRest() {
	b.t.Helper()
	b.pass(2 * time.Second)
	var before []time.Duration
	for _, s := range b.sides {
		before = append(before, b.cpu(s))
	}
	b.pass(b.rest)
	for i, s := range b.sides {
		b.add(rowRest, s.name, (b.cpu(s)-before[i]).Seconds()*1e3*(time.Minute.Seconds()/b.rest.Seconds()))
		m := memoryOf(b.t, s.pid)
		b.add(rowResident, s.name, mib(m.resident))
		b.add(rowAnonymous, s.name, mib(m.anonymous))
		b.add(rowWorkingSet, s.name, mib(m.workingSet))
	}
}

func (b *bench) cpu(s *side) time.Duration {
	b.t.Helper()
	used, err := figures.CPUTime(s.pid)
	if err != nil {
		b.t.Fatal(err)
	}
	return used
}

func mib(bytes int) float64 { return float64(bytes) / (1 << 20) }

// warm has one pod ask both agents in turns, one call at a time.
func (b *bench) warm() {
	b.t.Helper()
	before := b.attestations()
	took := b.order(b.pods[:1], benchOrder{Do: "fetch", Agents: b.names(), Count: b.fetches / 2})
	for _, s := range b.sides {
		b.add(rowWarm, s.name, figures.Quantile(took[s.name], 0.5))
		b.add(rowWarmTail, s.name, figures.Quantile(took[s.name], 0.99))
	}
	b.add(rowAttestor, narthex.name, before.until(b.attestations()).quantile(0.5))
	b.add(rowAttestorTail, narthex.name, before.until(b.attestations()).quantile(0.99))
}

// load has one pod ask one agent after the other, for the CPU time that takes
// them.
func (b *bench) load() {
	b.t.Helper()
	for _, s := range b.turns(len(b.results[rowCPU][narthex.name])) {
		before := b.cpu(s)
		b.order(b.pods[:1], benchOrder{Do: "fetch", Agents: []string{s.name}, Count: b.fetches})
		b.add(rowCPU, s.name, (b.cpu(s)-before).Seconds()*1e3*1000/float64(b.fetches))
	}
}

// buckets are the counts of a histogram, by upper bound in seconds.
type buckets map[float64]float64

// attestations reads how long the attestor k8s took, of those that went well.
func (b *bench) attestations() buckets {
	b.t.Helper()
	text, err := k8s.ask(b.t.Context(), http.MethodGet, "/api/v1/namespaces/narthex/pods/"+b.sides[0].pod.name()+":9901/proxy/metrics", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	all := buckets{}
	for line := range strings.Lines(string(text)) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		labels, ok := strings.CutPrefix(series, "narthex_attestation_duration_seconds_bucket{")
		if !ok || !strings.Contains(labels, `attestor="k8s"`) || !strings.Contains(labels, `result="ok"`) {
			continue
		}
		_, bound, _ := strings.Cut(labels, `le="`)
		upper, boundErr := strconv.ParseFloat(strings.TrimSuffix(strings.SplitN(bound, ",", 2)[0], `"`), 64)
		count, err := strconv.ParseFloat(value, 64)
		if err != nil || boundErr != nil {
			b.t.Fatalf("cannot read %q", line)
		}
		all[upper] = count
	}
	if len(all) == 0 {
		b.t.Fatal("the agent shows no duration of the attestor k8s")
	}
	return all
}

// until returns what came after h.
func (h buckets) until(later buckets) buckets {
	came := buckets{}
	for bound, count := range later {
		came[bound] = count - h[bound]
	}
	return came
}

// quantile returns the upper bound, in ms, of the bucket in which the part q
// of the values ends: what is said cannot be too little.
func (h buckets) quantile(q float64) float64 {
	var bounds []float64
	most := 0.0
	for bound, count := range h {
		bounds = append(bounds, bound)
		most = max(most, count)
	}
	slices.Sort(bounds)
	for _, bound := range bounds {
		if h[bound] >= q*most {
			return bound * 1e3
		}
	}
	return 0
}

// firstSVIDs starts pods one after the other, each of which asks one agent as
// the first thing it does. The kubelet looks at its containers once a second: a
// pod that was started as soon as the one before is served would always meet it
// at the same moment.
func (b *bench) firstSVIDs() {
	b.t.Helper()
	for round := range 2 * b.rounds {
		for _, s := range b.turns(round) {
			name := fmt.Sprintf("first-%d-%s", round, s.name)
			b.pass(rand.N(time.Second))
			b.start(name, 1, s.name)
			p, said := b.arrival()
			b.add(rowFirst, s.name, said.Took[s.name][0])
			k8s.kubectl(b.t, "-n", b.namespace, "delete", "deployment", name, "--wait=false")
			p.conn.Close()
		}
	}
}

// idleProxy measures a proxy with an identity and a listener that nobody uses.
func (b *bench) idleProxy() {
	b.t.Helper()
	k8s.kubectl(b.t, "-n", b.namespace, "delete", "deployment", "many", "--wait=false")
	s := openShop(b.t, narthex, "idle")
	m := memoryOf(b.t, k8s.process(b.t, k8s.pod(b.t, s.namespace, "app=idle"), "proxy"))
	b.add(rowProxy, narthex.name, mib(m.resident))
	b.add(rowProxySet, narthex.name, mib(m.workingSet))
}

// versions of what was measured, and on what.
func (b *bench) versions() []string {
	b.t.Helper()
	agent, err := spireProgram("spire-agent")()
	if err != nil {
		b.t.Fatal(err)
	}
	theirs, err := figures.ProgramVersion(agent)
	if err != nil {
		b.t.Fatal(err)
	}
	var kubernetes struct{ GitVersion string }
	if err := k8s.get("/version", &kubernetes); err != nil {
		b.t.Fatal(err)
	}
	out, err := exec.CommandContext(b.t.Context(), stage.Narthex, "version").Output()
	if err != nil {
		b.t.Fatal(err)
	}
	ours, _, _ := strings.Cut(string(out), "\n")
	return []string{ours, theirs, "Kubernetes " + kubernetes.GitVersion}
}
