package k8s

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestSelectors(t *testing.T) {
	image := func(key, name string) string {
		return "k8s:" + key + ":registry.example.org/shop/" + name + ":1.4\nk8s:" + key + ":registry.example.org/shop/" + name + "@sha256:" + strings.Repeat("e", 64) + "\n"
	}
	rest := `k8s:node-name:node-1
k8s:ns:shop
k8s:pod-image-count:2
` + image("pod-image", "app") + image("pod-image", "log") +
		"k8s:pod-init-image-count:2\n" + image("pod-init-image", "mesh") + image("pod-init-image", "migrate") + `k8s:pod-label:app.kubernetes.io/part-of:shop
k8s:pod-label:app:orders
k8s:pod-label:pod-template-hash:7d9c5b8f6d
k8s:pod-label:version:v1
k8s:pod-name:orders-7
k8s:pod-owner-uid:ReplicaSet:11111111-2222-3333-4444-555555555555
k8s:pod-owner:ReplicaSet:orders-7d9c5b8f6d
k8s:pod-uid:` + podUID(7) + `
k8s:sa:orders`
	l, err := decode(bytes.NewReader(podList(podJSON(7, nil))), nodeName, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := values(l.pods[podUID(7)].selectors); got != rest {
		t.Errorf("pod:\n%s\nwant:\n%s", got, rest)
	}
	for kind, name := range map[string]string{"app": "app", "log": "log", "init": "migrate", "sidecar": "mesh", "debug": "debugger"} {
		got, err := question{place: place{podUID(7), containerID(7, kind)}}.in(l)
		if err != nil || got == nil {
			t.Errorf("%s: %v, %v", kind, got, err)
			continue
		}
		want := image("container-image", name) + "k8s:container-name:" + name + "\n" + rest
		if got := values(got.all()); got != want {
			t.Errorf("%s:\n%s\nwant:\n%s", kind, got, want)
		}
	}
}

// TestOddPods are pods that are not as most are: of each, the container
// "app" of the first is asked for.
func TestOddPods(t *testing.T) {
	meta := func(p map[string]any) map[string]any { return p["metadata"].(map[string]any) }
	inPod := func(n int) place { return place{podUID(n), containerID(n, "app")} }
	with := func(change func(map[string]any)) map[string]any { return podJSON(1, change) }
	for name, test := range map[string]struct {
		pods    []map[string]any
		at      place
		podOnly bool
		has     string // a selector that is there
		hasNot  string
		err     string // neither: not known yet
	}{
		"another pod's":     {pods: []map[string]any{podJSON(2, nil)}, at: inPod(1)},
		"no UID":            {pods: []map[string]any{with(func(p map[string]any) { delete(meta(p), "uid") })}, at: inPod(1)},
		"no UID, no pod":    {pods: []map[string]any{with(func(p map[string]any) { delete(meta(p), "uid") })}, at: place{"", containerID(1, "app")}},
		"no name":           {pods: []map[string]any{with(func(p map[string]any) { delete(meta(p), "name") })}, at: inPod(1), has: "k8s:pod-name:\n"},
		"no labels":         {pods: []map[string]any{with(func(p map[string]any) { delete(meta(p), "labels") })}, at: inPod(1), has: "k8s:ns:shop\n", hasNot: "pod-label"},
		"no owners":         {pods: []map[string]any{with(func(p map[string]any) { meta(p)["ownerReferences"] = nil })}, at: inPod(1), has: "k8s:ns:shop\n", hasNot: "pod-owner"},
		"null status":       {pods: []map[string]any{with(func(p map[string]any) { p["status"] = nil })}, at: inPod(1)},
		"null status, pod":  {pods: []map[string]any{with(func(p map[string]any) { p["status"] = nil })}, at: inPod(1), podOnly: true, has: "k8s:pod-image-count:0\n", hasNot: "container-name"},
		"not made yet":      {pods: []map[string]any{with(func(p map[string]any) { status(p, "containerStatuses", 0)["containerID"] = "" })}, at: inPod(1)},
		"not made yet, pod": {pods: []map[string]any{with(func(p map[string]any) { status(p, "containerStatuses", 0)["containerID"] = "" })}, at: inPod(1), podOnly: true, has: "k8s:ns:shop\n", hasNot: "container-name"},
		"pod only":          {pods: []map[string]any{with(nil)}, at: inPod(1), podOnly: true, has: "k8s:ns:shop\n", hasNot: "container-name"},
		"pod only, no UID":  {pods: []map[string]any{with(nil)}, at: place{"", containerID(1, "app")}, podOnly: true, has: "k8s:ns:shop\n"},
		"pod only, unknown": {pods: []map[string]any{with(nil)}, at: place{"", containerID(2, "app")}, podOnly: true},
		"cri-o": {pods: []map[string]any{with(func(p map[string]any) {
			status(p, "containerStatuses", 0)["containerID"] = "cri-o://" + containerID(1, "app")
		})}, at: inPod(1), has: "k8s:container-name:app\n"},
		"docker": {pods: []map[string]any{with(func(p map[string]any) {
			status(p, "containerStatuses", 0)["containerID"] = "docker://" + containerID(1, "app")
		})}, at: inPod(1), has: "k8s:container-name:app\n"},
		"ID of another kind": {pods: []map[string]any{with(func(p map[string]any) { status(p, "containerStatuses", 0)["containerID"] = "app" })}, at: inPod(1)},
		"no image ID":        {pods: []map[string]any{with(func(p map[string]any) { delete(status(p, "containerStatuses", 0), "imageID") })}, at: inPod(1), has: "k8s:container-image:\n"},
		"label with colons":  {pods: []map[string]any{with(func(p map[string]any) { labels(p)["a"] = "b:c" })}, at: inPod(1), has: "k8s:pod-label:a:b:c\n"},

		"another UID": {
			pods: []map[string]any{with(nil)}, at: place{podUID(2), containerID(1, "app")},
			err: "is of pod " + podUID(2) + " by its cgroup, and of pod " + podUID(1) + " (shop/orders-1 app) by the kubelet",
		},
		"another UID, pod only": {pods: []map[string]any{with(nil), podJSON(2, nil)}, at: place{podUID(2), containerID(1, "app")}, podOnly: true, err: "by its cgroup"},
		"another node": {
			pods: []map[string]any{with(func(p map[string]any) { p["spec"].(map[string]any)["nodeName"] = "node-2" })}, at: inPod(1),
			err: `pod shop/orders-1 is one of node "node-2", and this is node "node-1"; is node_name_env right?`,
		},
		"two of an ID": {
			pods: []map[string]any{with(nil), podJSON(2, func(p map[string]any) {
				status(p, "containerStatuses", 1)["containerID"] = "containerd://" + containerID(1, "app")
			})}, at: inPod(1),
			err: "two containers with the ID " + containerID(1, "app") + ": shop/orders-1 app and shop/orders-2 log",
		},
		"two of an ID in a pod": {
			pods: []map[string]any{with(func(p map[string]any) {
				status(p, "ephemeralContainerStatuses", 0)["containerID"] = "containerd://" + containerID(1, "app")
			})}, at: inPod(1), podOnly: true, err: "two containers",
		},
		"two of a UID": {pods: []map[string]any{with(nil), podJSON(2, func(p map[string]any) { meta(p)["uid"] = podUID(1) })}, at: inPod(1), err: "two pods with the UID"},
		"two of a UID, no pod": {
			pods: []map[string]any{with(nil), podJSON(2, func(p map[string]any) { meta(p)["uid"] = podUID(1) })}, at: place{"", containerID(1, "app")}, err: "two pods with the UID",
		},
		"too many labels": {
			pods: []map[string]any{with(func(p map[string]any) {
				for i := range maxSelectors {
					labels(p)[fmt.Sprint(i)] = ""
				}
			})}, at: inPod(1), err: "more than 1024 labels",
		},
		"too many labels of another": {
			pods: []map[string]any{with(nil), podJSON(2, func(p map[string]any) {
				for i := range maxSelectors {
					labels(p)[fmt.Sprint(i)] = ""
				}
			})}, at: inPod(1), has: "k8s:ns:shop\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, err := decode(bytes.NewReader(podList(test.pods...)), nodeName, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := question{place: test.at, podOnly: test.podOnly}.in(l)
			switch {
			case test.err != "":
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("%v, %v; want error %q", got, err, test.err)
				}
			case err != nil:
				t.Fatal(err)
			case test.has == "":
				if got != nil {
					t.Fatalf("found %s", got.who)
				}
			case got == nil:
				t.Fatal("not known")
			default:
				all := values(got.all()) + "\n"
				if !strings.Contains(all, test.has) || test.hasNot != "" && strings.Contains(all, test.hasNot) {
					t.Fatalf("got:\n%swant %q and not %q", all, test.has, test.hasNot)
				}
			}
		})
	}
}

func TestBadLists(t *testing.T) {
	const most, each = 256 << 10, 64 << 10 // less than of a kubelet, so that the test is quick
	good := string(manyPods(3))
	for name, test := range map[string]struct{ list, err string }{
		"nothing":         {"", "ends in the middle"},
		"no JSON":         {"<html>", `"<" where "{" should be`},
		"key no text":     {`{7:1}`, "a key: json: cannot unmarshal"},
		"no colon":        {`{"items" []}`, `"[" where ":" should be`},
		"no comma":        {`{"items":[] "kind":"PodList"}`, `"\"" where "," should be`},
		"comma at end":    {`{"items":[],}`, `"}" after a comma`},
		"pods, no comma":  {`{"items":[{} {}]}`, `"{" where "," should be`},
		"pod no JSON":     {`{"items":[{"a":}]}`, "items[0]: invalid character"},
		"brackets":        {`{"items":[{"a":[}]}]}`, "items[0]: invalid character"},
		"no value":        {`{"kind":}`, "invalid character"},
		"no pod":          {`{"items":[,]}`, "items[0]: unexpected end"},
		"cut off":         {good[:len(good)/2], "items[1]: it ends in the middle"},
		"cut at the end":  {good[:len(good)-1], "ends in the middle"},
		"two of them":     {good + good, "something follows"},
		"a list":          {"[]", `"[" where "{" should be`},
		"a word":          {`"PodList"`, "should be"},
		"another kind":    {`{"kind":"Status","items":[]}`, `kind "Status"`},
		"kind no text":    {`{"kind":7}`, "cannot unmarshal"},
		"no items":        {`{"kind":"PodList"}`, "no items"},
		"items twice":     {`{"items":[],"items":[]}`, "two lists"},
		"items no list":   {`{"items":{}}`, "items is no list"},
		"pod no object":   {`{"items":[7]}`, "items[0]: json: cannot unmarshal"},
		"labels no text":  {`{"items":[{"metadata":{"labels":{"a":1}}}]}`, "items[0]: json: cannot unmarshal"},
		"status no list":  {`{"items":[{"status":{"containerStatuses":{}}}]}`, "items[0]"},
		"deep":            {`{"x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000), "exceeded max depth"},
		"pod too long":    {`{"items":[{"spec":{"x":"` + strings.Repeat("x", each) + `"}}]}`, "a pod of more than 64 KiB"},
		"prefix too long": {`{"metadata":"` + strings.Repeat("x", each), "more than 64 KiB"},
		"list too long":   {`{"items":[` + strings.Repeat(`{"spec":{"x":"`+strings.Repeat("x", each-100)+`"}},`, 5), "more than 256 KiB"},
		"too many":        {`{"items":[` + strings.Repeat("{},", maxPods) + `{}]}`, "more than 4096 pods"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := decodeWithin(newSplitter(strings.NewReader(test.list), most, each), nodeName, nil)
			if err == nil || l != nil || !strings.Contains(err.Error(), test.err) {
				t.Fatalf("got %v, %v; want error %q", l, err, test.err)
			}
		})
	}
}

func TestEmptyLists(t *testing.T) {
	for _, list := range []string{`{"items":null}`, `{"items":[]}`, `{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[]}` + "\n"} {
		if l, err := decode(strings.NewReader(list), nodeName, nil); err != nil || l.count != 0 {
			t.Errorf("%s: %v, %v", list, l, err)
		}
	}
}

func TestRecordsAreUsedOn(t *testing.T) {
	first, err := decode(bytes.NewReader(manyPods(3)), nodeName, nil)
	if err != nil {
		t.Fatal(err)
	}
	next := podList(podJSON(0, nil), podJSON(1, func(p map[string]any) { labels(p)["version"] = "v2" }), podJSON(3, nil))
	second, err := decode(bytes.NewReader(next), nodeName, first)
	if err != nil {
		t.Fatal(err)
	}
	for id, r := range second.containers {
		unchanged := r.uid == podUID(0)
		if (r == first.containers[id]) != unchanged || (second.pods[r.uid] == first.pods[r.uid]) != unchanged || r.ofPod != second.pods[r.uid] {
			t.Errorf("%s: used on: %v, want %v", r.who, r == first.containers[id], unchanged)
		}
	}
}

// TestPiecemeal: it does not matter how the answer is cut into reads.
func TestPiecemeal(t *testing.T) {
	data := podList(podJSON(0, nil), podJSON(1, func(p map[string]any) { labels(p)["quoted"] = `\"{[\\` }))
	for name, r := range map[string]io.Reader{
		"bytes": iotest.OneByteReader(bytes.NewReader(data)), "halves": iotest.HalfReader(bytes.NewReader(data)), "end with data": iotest.DataErrReader(bytes.NewReader(data)),
	} {
		l, err := decode(r, nodeName, nil)
		if err != nil || l.count != 2 || len(l.containers) != 10 {
			t.Fatalf("%s: %v, %v", name, l, err)
		}
		if all := values(l.pods[podUID(1)].selectors); !strings.Contains(all, `k8s:pod-label:quoted:\"{[\\`) {
			t.Errorf("%s: %s", name, all)
		}
	}
}

// TestKnownPods: what is wrong with two pods is seen whichever of them was in
// the list before, and in whichever order they come.
func TestKnownPods(t *testing.T) {
	meta := func(p map[string]any) map[string]any { return p["metadata"].(map[string]any) }
	first, plain := podJSON(1, nil), podJSON(2, nil)
	for name, second := range map[string]map[string]any{
		"two of a UID": podJSON(3, func(p map[string]any) { meta(p)["uid"] = podUID(1) }),
		"two of an ID": podJSON(3, func(p map[string]any) {
			status(p, "containerStatuses", 1)["containerID"] = "containerd://" + containerID(1, "app")
		}),
	} {
		both := [][]map[string]any{{first, plain, second}, {second, first, plain}}
		for _, before := range append(both, []map[string]any{first, plain}, []map[string]any{second}) {
			for _, now := range both {
				old, err := decode(bytes.NewReader(podList(before...)), nodeName, nil)
				if err != nil {
					t.Fatal(err)
				}
				l, err := decode(bytes.NewReader(podList(now...)), nodeName, old)
				if err != nil {
					t.Fatal(err)
				}
				if r, err := (question{place: place{podUID(1), containerID(1, "app")}}).in(l); err == nil {
					t.Errorf("%s: found %v", name, r)
				}
				if r, err := (question{place: place{podUID(2), containerID(2, "app")}}).in(l); err != nil || r == nil {
					t.Errorf("%s: of another pod %v, %v", name, r, err)
				}
			}
		}
	}
}

// TestMemory bounds what is kept of a full node: of 550 containers, for
// which 1 MiB is measured.
func TestMemory(t *testing.T) {
	data := manyPods(110)
	if len(data) < 110*10<<10 {
		t.Fatalf("the pods have %d bytes each", len(data)/110)
	}
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	var l *list
	before := heap()
	for range 2 { // as often as the kubelet is asked, the one before kept meanwhile
		var err error
		if l, err = decode(bytes.NewReader(data), nodeName, l); err != nil {
			t.Fatal(err)
		}
	}
	kept := heap() - before
	t.Logf("%d bytes of JSON, %d kept", len(data), kept)
	if kept > 10<<20 {
		t.Errorf("%d bytes are kept of 110 pods", kept)
	}
	runtime.KeepAlive(l)
	runtime.KeepAlive(data)
}

func BenchmarkDecode110Pods(b *testing.B) {
	data := manyPods(110)
	before, err := decode(bytes.NewReader(data), nodeName, nil)
	if err != nil {
		b.Fatal(err)
	}
	for name, old := range map[string]*list{"new": nil, "as before": before} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := decode(bytes.NewReader(data), nodeName, old); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// FuzzDecode holds to this: whatever is decoded is JSON, no container has the
// selectors of a pod it is not listed in, and nothing of another node counts.
// A list that knows the same pods already comes to the same.
func FuzzDecode(f *testing.F) {
	small := func(p map[string]any) { // the fuzzer is slow on long seeds
		delete(p["spec"].(map[string]any), "containers")
		delete(p["metadata"].(map[string]any), "annotations")
		for _, l := range []string{"initContainerStatuses", "ephemeralContainerStatuses"} {
			delete(p["status"].(map[string]any), l)
		}
	}
	f.Add(podList(podJSON(1, small)))
	f.Add(podList(podJSON(1, small), podJSON(1, small)))
	f.Add([]byte(`{"items":[{"metadata":{"uid":"a","labels":{"a":"b"}},"spec":{"nodeName":"node-1"},"status":{"containerStatuses":[{"containerID":"x://` + idA + `"}]}}]}`))
	f.Add([]byte(`{"kind":"PodList","items":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		began := time.Now()
		l, err := decode(bytes.NewReader(data), nodeName, nil)
		if took := time.Since(began); took > 5*time.Second {
			t.Fatalf("decoding took %s", took)
		}
		if err != nil {
			if l != nil || strings.ContainsRune(err.Error(), '\n') {
				t.Fatalf("list %v, error %q", l, err)
			}
			return
		}
		if !json.Valid(data) {
			t.Fatal("this is no JSON")
		}
		again, err := decode(bytes.NewReader(data), nodeName, l)
		if err != nil || len(again.pods) != len(l.pods) || again.count != l.count || again.elsewhere != l.elsewhere {
			t.Fatalf("the second time: %v, %v", again, err)
		}
		for id, r := range l.containers {
			if a := again.containers[id]; a == nil || fmt.Sprint(a.err) != fmt.Sprint(r.err) || !slices.Equal(a.all(), r.all()) {
				t.Fatalf("container %q: %v, and the second time %v", id, r, a)
			}
			if !isContainerID(id) || l.pods[r.uid] == nil {
				t.Fatalf("container %q of pod %q", id, r.uid)
			}
			if r.err != nil {
				continue
			}
			all := "\n" + values(r.all()) + "\n"
			if !strings.Contains(all, "\nk8s:pod-uid:"+r.uid+"\n") || !strings.Contains(all, "\nk8s:node-name:"+nodeName+"\n") {
				t.Fatalf("container %s of pod %s has %s", id, r.uid, all)
			}
		}
	})
}

// TestWhatIsKeptIsBounded: pods with many labels and containers, and lists that
// are nothing but many, cost no more than is read of them.
func TestWhatIsKeptIsBounded(t *testing.T) {
	many := map[string]any{}
	for i := range maxSelectors - 20 {
		many[fmt.Sprintf("label-%d", i)] = "x"
	}
	var containers []any
	for i := range maxListed {
		containers = append(containers, map[string]any{"name": fmt.Sprintf("c%d", i), "containerID": fmt.Sprintf("containerd://%064x", i), "image": "i", "imageID": "i"})
	}
	fat := podJSON(0, func(p map[string]any) {
		p["metadata"].(map[string]any)["labels"] = many
		p["status"].(map[string]any)["containerStatuses"] = containers[:100]
		p["status"].(map[string]any)["initContainerStatuses"] = nil
	})
	l, err := decode(bytes.NewReader(podList(fat)), nodeName, nil)
	if err != nil {
		t.Fatal(err)
	}
	kept := 0
	for _, r := range l.containers {
		if kept += len(r.selectors); r.err != nil {
			t.Fatal(r.err)
		}
	}
	if len(l.containers) < 100 || kept > 3*len(l.containers) {
		t.Errorf("%d containers keep %d selectors of their own", len(l.containers), kept)
	}
	empty := []byte(`{"metadata":{"uid":"` + podUID(1) + `","name":"many","namespace":"n"},"spec":{"nodeName":"` + nodeName + `"},"status":{"containerStatuses":[` +
		strings.TrimSuffix(strings.Repeat("{},", 1<<20), ",") + `]}}`)
	one, err := json.Marshal(podJSON(2, nil))
	if err != nil {
		t.Fatal(err)
	}
	allocated := testing.AllocsPerRun(1, func() {
		if l, err = decode(io.MultiReader(strings.NewReader(`{"items":[`), bytes.NewReader(empty), strings.NewReader(","), bytes.NewReader(one), strings.NewReader("]}")), nodeName, nil); err != nil {
			t.Error(err)
		}
	})
	if allocated > 20_000 {
		t.Errorf("a million empty containers took %.0f allocations", allocated)
	}
	if r := l.pods[podUID(1)]; r == nil || r.err == nil || !strings.Contains(r.err.Error(), "containers of a kind") {
		t.Errorf("got %+v", r)
	}
	if r := l.pods[podUID(2)]; r == nil || r.err != nil {
		t.Errorf("the pod beside it: %+v", r)
	}
}

// TestFatPods: pods of the largest size that an API server takes keep nobody
// else of the node from an identity.
func TestFatPods(t *testing.T) {
	if maxList < 250*(9<<20) {
		t.Errorf("250 pods of 9 MiB are more than %d bytes", int64(maxList))
	}
	pods := []map[string]any{podJSON(100, nil)}
	for n := range 8 {
		pods = append(pods, podJSON(n, func(p map[string]any) {
			p["spec"].(map[string]any)["containers"] = []any{map[string]any{"args": []any{strings.Repeat("<", 1400<<10)}}}
		}))
	}
	data := podList(pods...)
	if len(data) < 64<<20 {
		t.Fatalf("the list has %d bytes", len(data))
	}
	k := startKubelet(t, data)
	a := running(t, New(Config{NodeName: nodeName, Kubelet: k.cfg}).inside(100, "app"))
	if found, err := a.Attest(t.Context(), self(t)); err != nil || len(found) == 0 {
		t.Errorf("got %d selectors, %v", len(found), err)
	}
}
