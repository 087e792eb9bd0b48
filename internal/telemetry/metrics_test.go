package telemetry

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
)

func samples(m *Metrics) []Sample {
	var out []Sample
	m.Each(func(s Sample) { out = append(out, s) })
	return out
}

func TestCounterAndGauge(t *testing.T) {
	m := NewMetrics()
	total := m.Counter("b_total", "B.", "result")
	total.With("ok").Inc()
	total.With("ok").Add(2)
	g := m.Gauge("a", "A.").With()
	g.Set(1.5)
	g.Add(-2)
	got := samples(m)
	want := []Sample{
		{Name: "a", Help: "A.", Kind: KindGauge, LabelValues: []string{}, Value: -.5},
		{Name: "b_total", Help: "B.", Kind: KindCounter, LabelNames: []string{"result"}, LabelValues: []string{"ok"}, Value: 3},
	}
	for i := range got {
		if len(got[i].LabelValues) == 0 {
			got[i].LabelValues = []string{}
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	g.SetTime(time.Unix(1700000000, 250_000_000))
	if g.Value() != 1700000000.25 {
		t.Errorf("SetTime: %f", g.Value())
	}
	g.SetTime(time.Time{})
	if g.Value() != 0 {
		t.Errorf("the zero time: %f", g.Value())
	}
}

func TestHistogram(t *testing.T) {
	m := NewMetrics()
	h := m.Histogram("h_seconds", "H.", []float64{1, 2}).With()
	for _, v := range []float64{0, 1, 1.5, 2, 2.5, math.Inf(1)} {
		h.Observe(v)
	}
	s := samples(m)[0]
	if s.Kind != KindHistogram || s.Count != 6 || !math.IsInf(s.Sum, 1) || !reflect.DeepEqual(s.Buckets, map[float64]uint64{1: 2, 2: 4}) {
		t.Errorf("got %+v", s)
	}
	h.Since(time.Now().Add(-time.Hour))
	if s := samples(m)[0]; s.Count != 7 {
		t.Errorf("Since did not count: %+v", s)
	}
	for i := 1; i < len(DurationBounds); i++ {
		if DurationBounds[i] <= DurationBounds[i-1] {
			t.Errorf("bound %d is out of order", i)
		}
	}
}

func TestFamilies(t *testing.T) {
	m := NewMetrics()
	a := m.Counter("x_total", "X.", "l")
	if m.Counter("x_total", "X.", "l") != a {
		t.Error("the same family came twice")
	}
	a.With("1").Inc()
	a.With("2").Inc()
	a.Delete("1")
	if got := samples(m); len(got) != 1 || got[0].LabelValues[0] != "2" {
		t.Errorf("after Delete: %+v", got)
	}
	for name, f := range map[string]func(){
		"another kind":   func() { m.Gauge("x_total", "X.", "l") },
		"another labels": func() { m.Counter("x_total", "X.", "m") },
		"few values":     func() { a.With() },
		"many values":    func() { a.With("1", "2") },
	} {
		if !panics(f) {
			t.Errorf("%s: no panic", name)
		}
	}
}

func panics(f func()) (did bool) {
	defer func() {
		if r := recover(); r != nil {
			did = strings.HasPrefix(fmt.Sprint(r), "telemetry: ")
		}
	}()
	f()
	return false
}

func TestNilMetrics(t *testing.T) {
	var m *Metrics
	c := m.Counter("x_total", "X.", "l").With("v")
	c.Inc()
	m.Gauge("g", "G.").With().Set(1)
	m.Histogram("h", "H.", DurationBounds).With().Observe(1)
	if c.Value() != 1 || len(samples(m)) != 0 {
		t.Errorf("count %d, samples %v", c.Value(), samples(m))
	}
}

func TestTogether(t *testing.T) {
	m := NewMetrics()
	total := m.Counter("x_total", "X.", "l")
	gauge := m.Gauge("g", "G.").With()
	h := m.Histogram("h", "H.", []float64{1}).With()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 1000 {
				total.With(fmt.Sprint(i % 2)).Inc()
				gauge.Add(1)
				h.Observe(1)
				if i == 0 {
					samples(m)
				}
			}
		})
	}
	wg.Wait()
	if total.With("0").Value()+total.With("1").Value() != 8000 || gauge.Value() != 8000 {
		t.Errorf("lost counts: %+v", samples(m))
	}
}

// TestPadding keeps two counters off one cache line.
func TestPadding(t *testing.T) {
	if unsafe.Sizeof(Counter{}) != cacheLine || unsafe.Sizeof(Gauge{}) != cacheLine {
		t.Errorf("counter %d, gauge %d bytes, want %d", unsafe.Sizeof(Counter{}), unsafe.Sizeof(Gauge{}), cacheLine)
	}
}

func BenchmarkCounter(b *testing.B) {
	c := NewMetrics().Counter("x_total", "X.").With()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c.Inc()
		}
	})
}
