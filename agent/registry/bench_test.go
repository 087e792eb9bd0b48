package registry

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/attestor"
)

const benchEntries = 100_000

// kubernetes returns entries as a cluster has them: one selector nearly all
// share, one a namespace shares, one of their own. As off the wire, no two
// strings share memory.
func kubernetes(n int) []Entry {
	entries := make([]Entry, n)
	for i := range entries {
		namespace := i % 300
		entries[i] = Entry{
			ID:       fmt.Sprintf("%08x-8a2b-4c1e-9f3d-%012x", i*7919, i),
			SPIFFEID: spiffeid.RequireFromPath(testDomain, fmt.Sprintf("/ns/team-%d/sa/service-%d", namespace, i)),
			Selectors: []attestor.Selector{
				k8s("ns:team-%d", namespace), k8s("sa:service-%d", i), k8s("pod-label:mesh:%s", "on"),
			},
			Revision: 1, CreatedAt: epoch,
		}
	}
	return entries
}

func k8s(format string, args ...any) attestor.Selector {
	return attestor.Selector{Type: strings.Clone("k8s"), Value: fmt.Sprintf(format, args...)}
}

// pod is what the processes of one pod attest to; it matches one entry.
func pod(i int) []attestor.Selector {
	s := []attestor.Selector{
		k8s("ns:team-%d", i%300), k8s("sa:service-%d", i), k8s("pod-label:mesh:%s", "on"),
		k8s("pod-uid:%032x", i), k8s("pod-name:service-%d-x7k2p", i), k8s("node-name:node-%d", 1),
		k8s("container-name:%s", "app"), k8s("container-image:registry.example.org/service:%d", i),
	}
	for _, v := range []string{"uid:1000", "user:app", "gid:1000", "group:app"} {
		s = append(s, attestor.Selector{Type: "unix", Value: v})
	}
	return s
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func benchRegistry() *Registry {
	r := New(testOptions())
	r.Apply(Update{Entries: kubernetes(benchEntries), HasEntries: true})
	return r
}

// BenchmarkApplyAll is the first sync. B/entry is what the registry holds.
func BenchmarkApplyAll(b *testing.B) {
	before := heap()
	r := benchRegistry()
	held := heap() - before
	runtime.KeepAlive(r)
	entries := kubernetes(benchEntries)
	for b.Loop() {
		New(testOptions()).Apply(Update{Entries: entries, HasEntries: true})
	}
	b.ReportMetric(float64(held)/benchEntries, "B/entry")
}

// BenchmarkApplyNone is a sync that brings nothing new.
func BenchmarkApplyNone(b *testing.B) {
	r := benchRegistry()
	for b.Loop() {
		r.Apply(Update{Entries: r.Entries(), HasEntries: true})
	}
}

// BenchmarkApplyOne is a sync in which one entry of the 100,000 has changed.
func BenchmarkApplyOne(b *testing.B) {
	r := benchRegistry()
	entries := slices.Clone(r.Entries())
	b.ReportAllocs()
	for b.Loop() {
		entries[500].Revision++
		r.Apply(Update{Entries: entries, HasEntries: true})
	}
}

// BenchmarkWatch is a caller who comes and goes.
func BenchmarkWatch(b *testing.B) {
	r := benchRegistry()
	selectors := pod(500)
	b.ReportAllocs()
	for b.Loop() {
		r.Watch(selectors).Close()
	}
}

// BenchmarkWatchKnown is a caller like one who is there already.
func BenchmarkWatchKnown(b *testing.B) {
	r := benchRegistry()
	selectors := pod(500)
	defer r.Watch(selectors).Close()
	b.ReportAllocs()
	for b.Loop() {
		r.Watch(selectors).Close()
	}
}

// BenchmarkRotation is one SVID replaced while 9,000 callers watch. B/watch is
// what each distinct one costs.
func BenchmarkRotation(b *testing.B) {
	const callers = 9000
	r := benchRegistry()
	before := heap()
	for i := range callers {
		w := r.Watch(pod(i))
		defer w.Close()
	}
	held := heap() - before
	e := r.Entries()[500]
	svid := SVID{ID: e.SPIFFEID, NotBefore: epoch, NotAfter: epoch.Add(time.Hour)}
	n := 0
	for b.Loop() {
		n++
		s := svid
		s.Serial = strconv.Itoa(n)
		r.Apply(Update{SVIDs: map[string]*SVID{e.ID: &s}})
	}
	b.ReportMetric(float64(held)/callers, "B/watch")
}

// benchHeld is a registry in which 9,000 SVIDs are held, watched by a caller each,
// and none is due.
func benchHeld(b *testing.B) *Registry {
	b.Helper()
	r := benchRegistry()
	u := Update{SVIDs: map[string]*SVID{}}
	for i := range 9000 {
		b.Cleanup(r.Watch(pod(i)).Close)
	}
	for _, e := range r.Due(epoch) {
		u.SVIDs[e.ID] = &SVID{ID: e.SPIFFEID, NotBefore: epoch, NotAfter: epoch.Add(time.Hour)}
	}
	r.Apply(u)
	return r
}

// BenchmarkDue is the agent's question after each sync.
func BenchmarkDue(b *testing.B) {
	r := benchHeld(b)
	b.ReportAllocs()
	for b.Loop() {
		if due := r.Due(epoch); len(due) > 0 {
			b.Fatalf("%d entries are due", len(due))
		}
	}
}

// BenchmarkWatchAmongMany is a caller that comes while others hold theirs.
func BenchmarkWatchAmongMany(b *testing.B) {
	r := benchHeld(b)
	b.ReportAllocs()
	for b.Loop() {
		w := r.Watch(pod(0))
		if w.Due(epoch) {
			b.Fatal("it is due")
		}
		w.Close()
	}
}
