package rulemix

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy/policy"
)

// The mixes are what their description says, and Narthex reads them.
func TestShares(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Identity, HTTP} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			m := Generate(kind, 2000, 7)
			got := map[string]float64{}
			for i := range m.Rules {
				for what, is := range properties(&m.Rules[i]) {
					if is {
						got[what] += 100.0 / float64(len(m.Rules))
					}
				}
			}
			want := map[string]float64{"deny": 5, "on": 10, "namespace": 11, "any namespace": 5, "group": 5, "without to": 2}
			if kind == HTTP {
				want["http"], want["host"], want["header"] = 50, 10, 50.0/7
			}
			for what, share := range want {
				if math.Abs(got[what]-share) > 0.5 {
					t.Errorf("%.1f %% are %s, want %v %%", got[what], what, share)
				}
			}
			var text bytes.Buffer
			if err := m.WriteYAML(&text); err != nil {
				t.Fatal(err)
			}
			if p, err := policy.Parse("mix.yaml", text.Bytes()); err != nil || p.Rules() != 2000 {
				t.Errorf("%d rules, %v", p.Rules(), err)
			}
		})
	}
}

func properties(r *Rule) map[string]bool {
	return map[string]bool{
		"deny": !r.Allow, "on": r.On != "" && r.At == "inbound", "without to": r.To == "",
		"namespace":     strings.HasSuffix(r.From, "/**"),
		"any namespace": strings.Contains(r.From, "/*/"),
		"group":         strings.HasPrefix(r.From, "group:"),
		"http":          r.Conditions() && r.Paths != nil, "host": r.Hosts != nil, "header": len(r.Values) == 2,
	}
}

func TestRequests(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{Identity, HTTP} {
		m := Generate(kind, 500, 7)
		got := map[string]float64{}
		requests := m.Requests(10000, 3)
		for i := range requests {
			q := &requests[i]
			got[q.Kind] += 0.01
			if (kind == HTTP) != (q.Method != "" && q.Host != "" && strings.HasPrefix(q.Path, "/") && len(q.Headers) == 7) {
				t.Fatalf("%+v", q)
			}
			if strings.Contains(q.From+q.To+q.Path+q.Host, "*") || strings.HasSuffix(q.Path, "/") {
				t.Fatalf("%+v: a pattern, or an empty segment", q)
			}
		}
		for _, part := range requestKinds {
			if math.Abs(got[part.name]-float64(part.share)) > 2 {
				t.Errorf("%.1f %% are %s, want %d %%", got[part.name], part.name, part.share)
			}
		}
	}
}

func TestSameForSameSeed(t *testing.T) {
	t.Parallel()
	a, b, c := Generate(HTTP, 100, 1), Generate(HTTP, 100, 1), Generate(HTTP, 100, 2)
	if !reflect.DeepEqual(a, b) || !reflect.DeepEqual(a.Requests(10, 5), b.Requests(10, 5)) {
		t.Error("the same seed makes other rules or requests")
	}
	if reflect.DeepEqual(a.Rules, c.Rules) || reflect.DeepEqual(a.Requests(10, 5), a.Requests(10, 6)) {
		t.Error("another seed makes the same rules or requests")
	}
}
