// Package telemetry holds what Narthex counts and records: plain counters,
// the access record and the status document. It imports nothing but the
// standard library, so every room may use it; how the figures reach
// Prometheus or a person is the business of internal/telemetry/expose.
//
//	m := telemetry.NewMetrics()
//	total := m.Counter("narthex_sync_total", "Syncs with the server.", "result")
//	ok := total.With("ok") // once, when a listener or loop starts
//	ok.Inc()               // on the hot path: one atomic add
package telemetry

import (
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// cacheLine keeps two hot counters from sharing one line of CPU cache.
const cacheLine = 64

// Counter only goes up. The zero value is ready to use.
type Counter struct {
	n atomic.Uint64
	_ [cacheLine - 8]byte
}

// Inc adds one.
func (c *Counter) Inc() { c.n.Add(1) }

// Add adds n.
func (c *Counter) Add(n uint64) { c.n.Add(n) }

// Value returns the count so far.
func (c *Counter) Value() uint64 { return c.n.Load() }

// Gauge goes up and down. The zero value is ready to use.
type Gauge struct {
	bits atomic.Uint64
	_    [cacheLine - 8]byte
}

// Set replaces the value.
func (g *Gauge) Set(v float64) { g.bits.Store(math.Float64bits(v)) }

// SetTime sets the gauge to t in seconds since the Unix epoch, or to 0 for
// the zero time.
func (g *Gauge) SetTime(t time.Time) {
	if t.IsZero() {
		g.Set(0)
		return
	}
	g.Set(float64(t.UnixMilli()) / 1000)
}

// Add adds v, which may be negative.
func (g *Gauge) Add(v float64) {
	for {
		old := g.bits.Load()
		if g.bits.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+v)) {
			return
		}
	}
}

// Value returns the value last set.
func (g *Gauge) Value() float64 { return math.Float64frombits(g.bits.Load()) }

// DurationBounds are the upper bounds, in seconds, of the histograms that
// time handshakes, attestations and syncs: 100 µs to 10 s.
var DurationBounds = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// Histogram counts observations by upper bound. Make it with
// Metrics.Histogram.
type Histogram struct {
	bounds []float64
	counts []atomic.Uint64 // one more than bounds: the last is +Inf
	sum    Gauge
}

// Observe counts v.
func (h *Histogram) Observe(v float64) {
	h.counts[sort.SearchFloat64s(h.bounds, v)].Add(1)
	h.sum.Add(v)
}

// Since observes the seconds passed since start.
func (h *Histogram) Since(start time.Time) { h.Observe(time.Since(start).Seconds()) }

// Kind tells what a metric is.
type Kind int

// The kinds of metric.
const (
	KindCounter Kind = iota
	KindGauge
	KindHistogram
)

// Sample is one value of one metric at the moment of Metrics.Each.
type Sample struct {
	Name, Help  string
	Kind        Kind
	LabelNames  []string
	LabelValues []string
	Value       float64            // of a counter or gauge
	Count       uint64             // of a histogram
	Sum         float64            // of a histogram
	Buckets     map[float64]uint64 // of a histogram: cumulative, by upper bound
}

// Family is one metric under its name, with a child for each set of label
// values.
type Family[T any] struct {
	name, help string
	labels     []string
	kind       Kind
	make       func() *T
	read       func(*T, *Sample)

	mu       sync.Mutex // guards the following
	children map[string]*child[T]
}

type child[T any] struct {
	values []string
	metric *T
}

// With returns the child with these label values, in the order in which the
// family names its labels, and makes it when it is new. Keep the result:
// With takes a lock. A wrong number of values panics, as a mistake in the
// program. Values must come from a bounded set (listener names, result
// words), never from a peer.
func (f *Family[T]) With(values ...string) *T {
	if len(values) != len(f.labels) {
		panic(fmt.Sprintf("telemetry: %s has labels %v, got values %v", f.name, f.labels, values))
	}
	key := strings.Join(values, "\xff")
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok := f.children[key]
	if !ok {
		c = &child[T]{slices.Clone(values), f.make()}
		f.children[key] = c
	}
	return c.metric
}

// Delete forgets the child with these label values: a listener was removed.
func (f *Family[T]) Delete(values ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.children, strings.Join(values, "\xff"))
}

func (f *Family[T]) each(yield func(Sample)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.children {
		s := Sample{Name: f.name, Help: f.help, Kind: f.kind, LabelNames: f.labels, LabelValues: c.values}
		f.read(c.metric, &s)
		yield(s)
	}
}

// Metrics is the set of metrics of one process. A nil *Metrics works too:
// its metrics count and are shown to nobody.
type Metrics struct {
	mu       sync.Mutex // guards the following
	families map[string]interface{ each(func(Sample)) }
}

// NewMetrics returns an empty set.
func NewMetrics() *Metrics {
	return &Metrics{families: map[string]interface{ each(func(Sample)) }{}}
}

// Counter returns the counter family of that name, new or as first made.
func (m *Metrics) Counter(name, help string, labels ...string) *Family[Counter] {
	return family(m, &Family[Counter]{
		name: name, help: help, labels: labels, kind: KindCounter,
		make: func() *Counter { return new(Counter) },
		read: func(c *Counter, s *Sample) { s.Value = float64(c.Value()) },
	})
}

// Gauge returns the gauge family of that name, new or as first made.
func (m *Metrics) Gauge(name, help string, labels ...string) *Family[Gauge] {
	return family(m, &Family[Gauge]{
		name: name, help: help, labels: labels, kind: KindGauge,
		make: func() *Gauge { return new(Gauge) },
		read: func(g *Gauge, s *Sample) { s.Value = g.Value() },
	})
}

// Histogram returns the histogram family of that name, new or as first made.
// Bounds are upper bounds in ascending order, without +Inf.
func (m *Metrics) Histogram(name, help string, bounds []float64, labels ...string) *Family[Histogram] {
	return family(m, &Family[Histogram]{
		name: name, help: help, labels: labels, kind: KindHistogram,
		make: func() *Histogram {
			return &Histogram{bounds: bounds, counts: make([]atomic.Uint64, len(bounds)+1)}
		},
		read: func(h *Histogram, s *Sample) {
			s.Buckets = make(map[float64]uint64, len(h.bounds))
			for i, b := range h.bounds {
				s.Count += h.counts[i].Load()
				s.Buckets[b] = s.Count
			}
			s.Count += h.counts[len(h.bounds)].Load()
			s.Sum = h.sum.Value()
		},
	})
}

// family registers f under its name, or returns the family that has the name
// already. One name with two kinds or label sets is a mistake in the program
// and panics.
func family[T any](m *Metrics, f *Family[T]) *Family[T] {
	f.children = map[string]*child[T]{}
	if m == nil {
		return f
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if old, ok := m.families[f.name]; ok {
		same, ok := old.(*Family[T])
		if !ok || !slices.Equal(same.labels, f.labels) {
			panic("telemetry: metric " + f.name + " is registered twice in different shapes")
		}
		return same
	}
	m.families[f.name] = f
	return f
}

// Each calls yield with every sample there is, families in the order of their
// names.
func (m *Metrics) Each(yield func(Sample)) {
	if m == nil {
		return
	}
	m.mu.Lock()
	names := make([]string, 0, len(m.families))
	for name := range m.families {
		names = append(names, name)
	}
	slices.Sort(names)
	families := make([]interface{ each(func(Sample)) }, len(names))
	for i, name := range names {
		families[i] = m.families[name]
	}
	m.mu.Unlock()
	for _, f := range families {
		f.each(yield)
	}
}
