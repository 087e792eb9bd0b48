package policy

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

var benchSizes = []int{10, 100, 1000, 10000, 100000}

// mixText is the text of a mix that benchmarks run on.
func mixText(t testing.TB, m *rulemix.Mix) []byte {
	var text bytes.Buffer
	if err := m.WriteYAML(&text); err != nil {
		t.Fatal(err)
	}
	return text.Bytes()
}

// mixed returns the policy of a mix, and 1024 requests.
func mixed(t testing.TB, kind rulemix.Kind, n int) (*Policy, []Request) {
	m := rulemix.Generate(kind, n, 1)
	p, err := Parse("mix.yaml", mixText(t, m))
	if err != nil {
		t.Fatal(err)
	}
	list := m.Requests(1024, 2)
	requests := make([]Request, len(list))
	for i := range list {
		requests[i] = mixRequest(&list[i])
	}
	return p, requests
}

func mixRequest(q *rulemix.Request) Request {
	r := Request{
		Listener: q.Listener,
		From:     Peer{ID: spiffeid.RequireFromString(q.From), Serial: "1f", Issuer: "aa"},
		To:       Peer{ID: spiffeid.RequireFromString(q.To), Serial: "2f", Issuer: "aa"},
		Source:   netip.MustParseAddrPort("10.1.2.3:4567"), Port: 8443, Time: time.Unix(1700000000, 0),
	}
	if q.Outbound {
		r.Direction = Outbound
	}
	if q.Method != "" {
		r.HTTP = &HTTP{Method: q.Method, Host: q.Host, Path: q.Path}
		for _, h := range q.Headers {
			r.HTTP.Headers = append(r.HTTP.Headers, Header{h.Name, h.Value})
		}
	}
	return r
}

func mixID(namespace, account int) string {
	return fmt.Sprintf("spiffe://example.org/ns/n%d/sa/s%d", namespace, account)
}

// eachSize runs a benchmark for each number of rules of a mix.
func eachSize(b *testing.B, kind rulemix.Kind, run func(*testing.B, *Policy, []Request)) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			p, requests := mixed(b, kind, n)
			b.ReportAllocs()
			run(b, p, requests)
		})
	}
}

func benchmarkDecide(b *testing.B, p *Policy, requests []Request) {
	var d Decision
	allowed, i := 0, 0
	for b.Loop() {
		p.Decide(&requests[i%len(requests)], &d)
		if d.Allow {
			allowed++
		}
		i++
	}
	b.ReportMetric(float64(allowed)/float64(i), "allowed/op")
}

func BenchmarkDecide(b *testing.B) { eachSize(b, rulemix.Identity, benchmarkDecide) }

func BenchmarkDecideHTTP(b *testing.B) { eachSize(b, rulemix.HTTP, benchmarkDecide) }

func BenchmarkAdmit(b *testing.B) {
	eachSize(b, rulemix.HTTP, func(b *testing.B, p *Policy, requests []Request) {
		i := 0
		for b.Loop() {
			p.Admit(&requests[i%len(requests)])
			i++
		}
	})
}

func BenchmarkParse(b *testing.B) {
	for _, kind := range []rulemix.Kind{rulemix.Identity, rulemix.HTTP} {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("%s/rules=%d", kind, n), func(b *testing.B) {
				text := mixText(b, rulemix.Generate(kind, n, 1))
				b.SetBytes(int64(len(text)))
				b.ReportAllocs()
				for b.Loop() {
					if _, err := Parse("mix.yaml", text); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	for _, kind := range []rulemix.Kind{rulemix.Identity, rulemix.HTTP} {
		b.Run(string(kind), func(b *testing.B) {
			eachSize(b, kind, func(b *testing.B, p *Policy, _ []Request) {
				for b.Loop() {
					compile(p)
				}
			})
		})
	}
}

// BenchmarkDecideShapes asks policies that an index by one side only would
// answer in time proportional to their size.
func BenchmarkDecideShapes(b *testing.B) {
	shapes := []struct {
		name string
		rule func(i, n int) string // without id and effect
	}{
		{"one wildcard to all", func(i, n int) string {
			return fmt.Sprintf("from: ['spiffe://example.org/**'], to: ['%s']", mixID(i, 0))
		}},
		{"all to one wildcard", func(i, n int) string {
			return fmt.Sprintf("from: ['%s'], to: ['spiffe://example.org/**']", mixID(i, 0))
		}},
		{"one to all", func(i, n int) string {
			return fmt.Sprintf("from: ['%s', '%s'], to: ['%s']", mixID(0, 0), mixID(i, 1), mixID(i, 0))
		}},
		{"a group to all", func(i, n int) string {
			return fmt.Sprintf("from: [group:g], to: ['%s']", mixID(i, 0))
		}},
		{"a listener each", func(i, n int) string {
			return fmt.Sprintf("on: [l%d], from: ['spiffe://example.org/ns/**']", i)
		}},
		{"square", func(i, n int) string {
			side := max(int(math.Sqrt(float64(n))), 1)
			return fmt.Sprintf("from: ['%s'], to: ['%s']", mixID(i/side, 0), mixID(i%side, 0))
		}},
	}
	for _, shape := range shapes {
		for _, n := range []int{10, 100000} {
			b.Run(fmt.Sprintf("%s/rules=%d", shape.name, n), func(b *testing.B) {
				p := shaped(b, n, shape.rule)
				r := rand.New(rand.NewPCG(1, 1))
				requests := make([]Request, 1024)
				for i := range requests {
					requests[i] = request(mixID(r.IntN(min(n, 10)), 0), mixID(r.IntN(n), 0))
					requests[i].Listener = fmt.Sprintf("l%d", r.IntN(n))
				}
				b.ReportAllocs()
				benchmarkDecide(b, p, requests)
			})
		}
	}
}

// shaped is a policy of n rules that are alike.
func shaped(t testing.TB, n int, rule func(i, n int) string) *Policy {
	var text strings.Builder
	text.WriteString("version: 1\ngroups:\n  g:\n")
	for i := range 10 {
		fmt.Fprintf(&text, "  - %s\n", mixID(i, 0))
	}
	text.WriteString("rules:\n")
	for i := range n {
		fmt.Fprintf(&text, "- {id: r%d, effect: allow, %s}\n", i, rule(i, n))
	}
	p, err := Parse("shape.yaml", []byte(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// BenchmarkDecideHTTPShapes asks policies whose rules are all of one pair of
// identities, and differ in what they ask of HTTP alone.
func BenchmarkDecideHTTPShapes(b *testing.B) {
	methods := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "LOCK", "UNLOCK", "COPY"}
	shapes := []struct {
		name  string
		sizes []int
		http  func(i, n int) string // conditions of the i-th rule
		asks  func(i int) HTTP      // what it is about
	}{
		{"a path each", []int{10, 100000}, func(i, _ int) string {
			return fmt.Sprintf("paths: [/v1/r%d/items]", i)
		}, func(i int) HTTP { return HTTP{Method: "GET", Host: "a", Path: fmt.Sprintf("/v1/r%d/items", i)} }},
		{"a path and what is below each", []int{10, 100000}, func(i, _ int) string {
			return fmt.Sprintf("paths: ['/v1/{tenant}/r%d/**']", i)
		}, func(i int) HTTP { return HTTP{Method: "GET", Host: "a", Path: fmt.Sprintf("/v1/t/r%d/a/b", i)} }},
		{"a host each", []int{10, 100000}, func(i, _ int) string {
			return fmt.Sprintf("hosts: [h%d.example.org]", i)
		}, func(i int) HTTP { return HTTP{Method: "GET", Host: fmt.Sprintf("h%d.example.org:8080", i), Path: "/"} }},
		{"a host with a wildcard each", []int{10, 1000}, func(i, _ int) string { // these are asked one by one
			return fmt.Sprintf("hosts: ['*.h%d.example.org']", i)
		}, func(i int) HTTP { return HTTP{Method: "GET", Host: fmt.Sprintf("a.h%d.example.org", i), Path: "/"} }},
		{"a method each of one path", []int{10}, func(i, _ int) string {
			return fmt.Sprintf("methods: [%s], paths: [/v1/items]", methods[i])
		}, func(i int) HTTP { return HTTP{Method: methods[i], Host: "a", Path: "/v1/items"} }},
	}
	for _, shape := range shapes {
		for _, n := range shape.sizes {
			b.Run(fmt.Sprintf("%s/rules=%d", shape.name, n), func(b *testing.B) {
				p := shaped(b, n, func(i, n int) string {
					return fmt.Sprintf("from: ['%s'], to: ['%s'], http: {%s}", mixID(0, 0), mixID(1, 0), shape.http(i, n))
				})
				r := rand.New(rand.NewPCG(1, 1))
				requests := make([]Request, 1024)
				for i := range requests {
					requests[i] = request(mixID(0, 0), mixID(1, 0))
					h := shape.asks(r.IntN(n))
					requests[i].HTTP = &h
				}
				b.ReportAllocs()
				benchmarkDecide(b, p, requests)
			})
		}
	}
}
