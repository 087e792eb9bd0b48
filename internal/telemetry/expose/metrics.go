package expose

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"strings"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

// collector shows a telemetry.Metrics to client_golang. It is unchecked
// (Describe sends nothing): families come into being while the program runs.
type collector struct{ metrics *telemetry.Metrics }

func (collector) Describe(chan<- *prometheus.Desc) {}

func (c collector) Collect(out chan<- prometheus.Metric) {
	c.metrics.Each(func(s telemetry.Sample) {
		desc := prometheus.NewDesc(s.Name, s.Help, s.LabelNames, nil)
		var m prometheus.Metric
		var err error
		switch s.Kind {
		case telemetry.KindHistogram:
			m, err = prometheus.NewConstHistogram(desc, s.Count, s.Sum, s.Buckets, s.LabelValues...)
		case telemetry.KindGauge:
			m, err = prometheus.NewConstMetric(desc, prometheus.GaugeValue, s.Value, s.LabelValues...)
		default:
			m, err = prometheus.NewConstMetric(desc, prometheus.CounterValue, s.Value, s.LabelValues...)
		}
		if err != nil {
			m = prometheus.NewInvalidMetric(desc, err)
		}
		out <- m
	})
}

// gatherer gathers the metrics of this process: ours, those of the Go runtime
// and the process (labelled with which process it is, as there are two under
// `narthex run`), and the build.
func (s *Server) gatherer() prometheus.Gatherer {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector{s.cfg.Metrics}, collector{s.build()})
	own := prometheus.Registerer(reg)
	if s.cfg.Process != "" {
		own = prometheus.WrapRegistererWith(prometheus.Labels{"process": s.cfg.Process}, reg)
	}
	own.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

func (s *Server) build() *telemetry.Metrics {
	m := telemetry.NewMetrics()
	m.Gauge("narthex_build_info", "Always 1; the labels tell which Narthex this is.", "version", "go").
		With(s.status().Version, runtime.Version()).Set(1)
	return m
}

// metricsHandler writes what gather returns as Prometheus text. Some families
// in error do not take the others from the page.
func (s *Server) metricsHandler(gather prometheus.Gatherer) http.Handler {
	return promhttp.HandlerFor(gather, promhttp.HandlerOpts{
		ErrorLog:            gatherLog{s},
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
		EnableOpenMetrics:   true,
	})
}

type gatherLog struct{ s *Server }

func (l gatherLog) Println(v ...any) {
	l.s.cfg.Log.Warn("metrics are not complete", "error", strings.TrimSpace(fmt.Sprintln(v...)))
}

// merged gathers both halves. The other half being away leaves its families
// out; the status page and /readyz say why.
func (s *Server) merged(own prometheus.Gatherer) prometheus.Gatherer {
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		ours, err := own.Gather()
		theirs, awayErr := s.remote.metrics(context.Background()) // bounded by remoteTimeout
		if awayErr != nil {
			s.cfg.Log.Debug("no metrics of the other half", "process", s.remote.Process, "error", awayErr)
		}
		return merge(ours, theirs), err
	})
}

// merge adds their families to ours. Where both halves have a metric with the
// same labels (narthex_build_info), or one name in two types, ours stands:
// what is twice on the page would make a scraper refuse all of it.
func merge(ours []*dto.MetricFamily, theirs map[string]*dto.MetricFamily) []*dto.MetricFamily {
	all := map[string]*dto.MetricFamily{}
	for _, f := range ours {
		all[f.GetName()] = f
	}
	for name, their := range theirs {
		our, ok := all[name]
		if !ok {
			all[name] = their
			continue
		}
		if our.GetType() != their.GetType() {
			continue
		}
		seen := map[string]bool{}
		for _, m := range our.Metric {
			seen[labelsOf(m)] = true
		}
		for _, m := range their.Metric {
			if !seen[labelsOf(m)] {
				our.Metric = append(our.Metric, m)
			}
		}
	}
	out := make([]*dto.MetricFamily, 0, len(all))
	for _, name := range slices.Sorted(maps.Keys(all)) {
		f := all[name]
		slices.SortFunc(f.Metric, func(a, b *dto.Metric) int { return strings.Compare(labelsOf(a), labelsOf(b)) })
		out = append(out, f)
	}
	return out
}

func labelsOf(m *dto.Metric) string {
	pairs := make([]string, len(m.Label))
	for i, l := range m.Label {
		pairs[i] = l.GetName() + "\xff" + l.GetValue()
	}
	slices.Sort(pairs)
	return strings.Join(pairs, "\xfe")
}
