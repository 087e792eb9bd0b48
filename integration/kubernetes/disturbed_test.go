//go:build integration

package kubernetes_test

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// traffic is what goes on while a test disturbs the node: a shop whose orders
// call inventory, and a pod that asks the Workload API again and again.
type traffic struct {
	shop   *shop
	failed map[string]int // calls that had failed when it was all well
	start  time.Time
}

const fetchTimeout = 2 * time.Second

func startTraffic(t *testing.T) *traffic {
	t.Helper()
	narthex.serve(t)
	s := openShop(t, narthex, "orders")
	register(t, entry{path: s.path("asks"), selectors: []string{"k8s:ns:" + s.namespace, "k8s:container-name:app", "k8s:pod-label:app:asks"}})
	startPod(t, s.namespace, narthex, map[string]any{"Args": []string{"fetch", "-every", "50ms", "-timeout", fetchTimeout.String()}})
	k8s.happens(t, s.namespace, k8s.pod(t, s.namespace, "app=asks").name(), "app", 0, "has its identity", isID(s.id("asks")))
	s.goOn("orders", 10)
	f := &traffic{shop: s, failed: map[string]int{}, start: time.Now()}
	for _, container := range []string{"app", "live"} {
		_, f.failed[container] = s.totals("orders", container)
	}
	return f
}

// unharmed fails the test if a call has failed since the start.
func (f *traffic) unharmed(t *testing.T) {
	t.Helper()
	f.shop.goOn("orders", 20)
	for _, container := range []string{"app", "live"} {
		if _, failed := f.shop.totals("orders", container); failed != f.failed[container] {
			t.Errorf("%d calls have failed (%s)", failed-f.failed[container], container)
		}
	}
	if t.Failed() {
		f.complaints(t)
	}
}

// complaints logs what the proxies of the shop have warned of since the start.
func (f *traffic) complaints(t *testing.T) {
	t.Helper()
	for _, app := range []string{"orders", "inventory"} {
		said, _ := k8s.log(f.shop.namespace, k8s.pod(t, f.shop.namespace, f.shop.label(app)).name(), "proxy")
		for line := range strings.Lines(said) {
			at, what, _ := strings.Cut(line, " ")
			if since, err := time.Parse(time.RFC3339, at); err == nil && since.After(f.start) && strings.HasPrefix(what, "[WARN]") {
				t.Logf("%s's proxy: %s", app, line)
			}
		}
	}
}

// gap returns the longest time since the start in which the Workload API
// answered no fetch.
func (f *traffic) gap(t *testing.T) time.Duration {
	t.Helper()
	var longest time.Duration
	var since time.Time
	for _, e := range f.shop.calls("asks", "app") {
		switch {
		case e.Time.Before(f.start):
		case e.Event == "failed" && since.IsZero():
			since = e.Time
		case e.Event == "failed":
			longest = max(longest, e.Time.Sub(since))
		default:
			since = time.Time{}
		}
	}
	return longest
}

// TestRollingUpdate replaces the DaemonSet's pods under traffic.
func TestRollingUpdate(t *testing.T) {
	f := startTraffic(t)
	before, serial := k8s.pod(t, "narthex", "app.kubernetes.io/component=node").name(), ourAgent(t).SerialNumber
	patch := map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		"annotations": map[string]any{"test/update": strconv.FormatInt(time.Now().UnixNano(), 10)},
	}}}}
	if _, err := k8s.ask(t.Context(), http.MethodPatch, "/apis/apps/v1/namespaces/narthex/daemonsets/narthex", patch); err != nil {
		t.Fatal(err)
	}
	k8s.rolledOut(t, "narthex", "daemonset/narthex")
	after := k8s.pod(t, "narthex", "app.kubernetes.io/component=node").name()
	if after == before {
		t.Errorf("%s is still there", before)
	}
	f.unharmed(t)
	if gap := f.gap(t); gap > time.Second {
		t.Errorf("the Workload API answered nobody for %s", gap)
	}
	if now := ourAgent(t).SerialNumber; now != serial {
		t.Error("the new agent has attested again: it did not go on with what the old one has")
	}
}

// TestStorm starts many pods at once, and as many again: all that a node of
// Kubernetes runs by default.
func TestStorm(t *testing.T) {
	narthex.serve(t)
	ns := k8s.namespace(t)
	register(t, entry{path: "/" + ns, selectors: []string{"k8s:ns:" + ns, "k8s:container-name:app"}})
	for _, many := range []int{50, 105} {
		asked := kubeletRequests(t)
		startPod(t, ns, narthex, map[string]any{"Replicas": many})
		k8s.kubectl(t, "-n", ns, "rollout", "status", "deployment/asks", "--timeout=100s")
		for _, p := range k8s.pods(t, ns, "app=asks") {
			k8s.happens(t, ns, p.name(), "app", 0, "has its identity", isID(trustDomain+"/"+ns))
		}
		asked = kubeletRequests(t) - asked
		t.Logf("%d pods: the kubelet was asked %d times for its pods", many, asked)
		if asked > many {
			t.Errorf("for %d pods the kubelet was asked %d times", many, asked)
		}
	}
	if k8s.own {
		pid := k8s.process(t, k8s.pod(t, "narthex", "app.kubernetes.io/component=node"), "agent")
		withinMemory(t, "the agent, with 105 callers", pid, 34<<20) // of which half are pages of the program
	}
}

// kubeletRequests returns how often the kubelet has been asked for its pods.
func kubeletRequests(t *testing.T) int {
	t.Helper()
	node := k8s.pod(t, "narthex", "app.kubernetes.io/component=node").Spec.NodeName
	text, err := k8s.ask(t.Context(), http.MethodGet, "/api/v1/nodes/"+node+"/proxy/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "kubelet_http_requests_total{") && strings.Contains(line, `path="pods"`) {
			n, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndex(line, " "):]), 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return int(sum)
}

// withinMemory fails the test if the container of a process takes more memory
// than bytes, by any way to count it but the narrowest.
func withinMemory(t *testing.T, what string, pid, bytes int) {
	t.Helper()
	m := memoryOf(t, pid)
	t.Logf("%s: working set %.1f MiB, anonymous %.1f, resident with the pages of the program %.1f",
		what, float64(m.workingSet)/(1<<20), float64(m.anonymous)/(1<<20), float64(m.resident)/(1<<20))
	if m.workingSet > bytes || m.resident > bytes {
		t.Errorf("%s: a working set of %d bytes and %d resident, want at most %d", what, m.workingSet, m.resident, bytes)
	}
}

// memory is what a process's container takes, in bytes.
type memory struct {
	workingSet int // as the kubelet counts
	anonymous  int // of that, what no file backs
	resident   int // as the process has it, with the pages of the program that it shares with others
}

func memoryOf(t *testing.T, pid int) memory {
	t.Helper()
	group := ""
	for line := range strings.Lines(stage.ReadFile(t, fmt.Sprintf("/proc/%d/cgroup", pid))) {
		if _, path, ok := strings.Cut(strings.TrimSpace(line), ":memory:"); ok {
			group = "/sys/fs/cgroup/memory" + path
		}
	}
	used, err := strconv.Atoi(strings.TrimSpace(stage.ReadFile(t, group+"/memory.usage_in_bytes")))
	if err != nil {
		t.Fatal(err)
	}
	stat := map[string]int{}
	for line := range strings.Lines(stage.ReadFile(t, group+"/memory.stat")) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		stat[key], _ = strconv.Atoi(value)
	}
	return memory{workingSet: used - stat["total_inactive_file"], anonymous: stat["total_rss"], resident: stage.RSS(t, pid)}
}

// TestKubeletRefuses takes away the right to ask the kubelet: who is known by
// that alone is told to come again, others go on.
func TestKubeletRefuses(t *testing.T) {
	narthex.serve(t)
	ns := k8s.namespace(t)
	const uid = 4711
	register(t,
		entry{path: "/" + ns + "/pod", selectors: []string{"k8s:ns:" + ns, "k8s:pod-label:app:asks"}},
		entry{path: "/" + ns + "/user", selectors: []string{"unix:uid:" + strconv.Itoa(uid)}})
	loop := []string{"fetch", "-every", "500ms", "-timeout", "20s"}
	startPod(t, ns, narthex, map[string]any{"Args": loop})
	startPod(t, ns, narthex, map[string]any{"Args": loop, "Name": "user", "User": uid})
	known, user := k8s.pod(t, ns, "app=asks"), k8s.pod(t, ns, "app=user")
	_, at := k8s.happens(t, ns, known.name(), "app", 0, "has its identity", isID(trustDomain+"/"+ns+"/pod"))
	k8s.happens(t, ns, user.name(), "app", 0, "has its identity", isID(trustDomain+"/"+ns+"/user"))

	k8s.kubectl(t, "delete", "clusterrolebinding", "narthex")
	restore := func() { k8s.apply(t, chart(t)) }
	t.Cleanup(restore)
	e, at := k8s.happens(t, ns, known.name(), "app", at, "is told to come again", isCode("Unavailable"))
	if !strings.Contains(e.Error, "403") {
		t.Errorf("a caller is told %q, which does not say what the kubelet said", e.Error)
	}
	goesOn(t, ns, user.name())
	restore()
	k8s.happens(t, ns, known.name(), "app", at, "has its identity again", isID(trustDomain+"/"+ns+"/pod"))
	noneFailed(t, ns, user.name())
}

// goesOn waits for more fetches of a pod that went well.
func goesOn(t *testing.T, namespace, pod string) {
	t.Helper()
	all, err := k8s.events(namespace, pod, "app")
	if err != nil {
		t.Fatal(err)
	}
	var good int
	for _, e := range all {
		good = max(good, e.Good)
	}
	k8s.happens(t, namespace, pod, "app", len(all), "is answered", func(e event) bool { return e.Good > good+1 })
}

// noneFailed fails the test if a fetch of the pod has failed since it first
// had its identity.
func noneFailed(t *testing.T, namespace, pod string) {
	t.Helper()
	all, err := k8s.events(namespace, pod, "app")
	if err != nil {
		t.Fatal(err)
	}
	served := false
	for _, e := range all {
		served = served || e.Event == "svids"
		if served && e.Event == "failed" {
			t.Errorf("%s was told %q", pod, e.Error)
		}
	}
}

// daemon stops or starts a daemon of our own node.
func daemon(t *testing.T, what, name string) {
	t.Helper()
	if out, err := k8s.command(context.Background(), "cluster/daemon", what, k8s.state, name).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", what, name, err, out)
	}
}

// onlyOnOurNode skips tests that need the node itself.
func onlyOnOurNode(t *testing.T) {
	t.Helper()
	if !k8s.own {
		t.Skip("restarts parts of the node, which is not ours here")
	}
}

// TestKubeletRestarts stops the kubelet and starts it again. Meanwhile nobody
// who is new can be attested, and nobody who is served is cut off.
func TestKubeletRestarts(t *testing.T) {
	onlyOnOurNode(t)
	f := startTraffic(t)
	asks := k8s.pod(t, f.shop.namespace, "app=asks").name()
	before := len(agentLog(t))
	daemon(t, "stop", "kubelet")
	t.Cleanup(func() { daemon(t, "start", "kubelet") })
	// Logs come through the kubelet; the agent says it on the node.
	stage.Eventually(t, ready, "the agent misses the kubelet", func() error {
		if said := agentLog(t)[before:]; !strings.Contains(said, "cannot list the pods") && !strings.Contains(said, "cannot be attested now") {
			return fmt.Errorf("it says:\n%s", said)
		}
		return nil
	})
	daemon(t, "start", "kubelet")
	f.unharmed(t)
	goesOn(t, f.shop.namespace, asks)
	for _, e := range f.shop.calls("asks", "app") {
		if e.Event == "failed" && e.Code != "Unavailable" && e.Time.After(f.start) {
			t.Errorf("a caller was told %s: %s", e.Code, e.Error)
		}
	}
	// A pod that is new to the agent and the kubelet.
	startPod(t, f.shop.namespace, narthex, map[string]any{"Name": "late"})
	register(t, entry{path: f.shop.path("late"), selectors: []string{"k8s:ns:" + f.shop.namespace, "k8s:pod-label:app:late"}})
	k8s.happens(t, f.shop.namespace, k8s.pod(t, f.shop.namespace, "app=late").name(), "app", 0, "has its identity", isID(f.shop.id("late")))
}

// agentLog reads on our node what the agents have said.
func agentLog(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(k8s.state, "var/log/pods/narthex_narthex-*/agent/*.log"))
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for _, f := range files {
		said.WriteString(stage.ReadFile(t, f))
	}
	return said.String()
}

// TestReboot ends every process of the node and boots it again.
func TestReboot(t *testing.T) {
	onlyOnOurNode(t)
	f := startTraffic(t)
	k8s.reboot(t)
	k8s.rolledOut(t, "spire", "statefulset/spire-server")
	k8s.rolledOut(t, "narthex", "daemonset/narthex", "daemonset/narthex-csi")
	f.shop.goOn("orders", 20)
	k8s.happens(t, f.shop.namespace, k8s.pod(t, f.shop.namespace, "app=asks").name(), "app", 0, "has its identity", isID(f.shop.id("asks")))
}
