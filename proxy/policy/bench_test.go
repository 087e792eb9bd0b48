package policy

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The mix that benchmarks run on, of any number of rules:
//
//	65 %  one workload to one workload
//	10 %  one workload to one, on a named listener, at the inbound end
//	10 %  a namespace (/ns/x/**) to one workload
//	 5 %  a service account of any namespace (/ns/*/sa/x) to one workload
//	 5 %  a group of ten workloads to one
//	 4 %  deny of one workload, half of them to one workload
//	 1 %  deny of a namespace to a namespace
//
// There are as many namespaces as the tenth part of the rules, ten service
// accounts in each, a ceiling on another trust domain, and five revoked
// identities. Of the requests 60 % are taken from a rule, 20 % are from a
// random workload to a random one, 15 % are from a workload that no rule
// names, and 5 % from another trust domain.
func mixPolicy(n int, r *rand.Rand) string {
	var b strings.Builder
	namespaces := max(n/10, 3)
	id := func() string { return mixID(r.IntN(namespaces), r.IntN(10)) }
	b.WriteString("version: 1\ntrust_domains:\n  partner.example: {ids: [/exports/**]}\ngroups:\n")
	groups := max(n/20, 1)
	for i := range groups {
		fmt.Fprintf(&b, "  g%d:\n", i)
		for range 10 {
			fmt.Fprintf(&b, "    - %s\n", id())
		}
	}
	b.WriteString("revoked:\n")
	for i := range 5 {
		fmt.Fprintf(&b, "  - spiffe://example.org/ns/gone/sa/%d\n", i)
	}
	b.WriteString("rules:\n")
	for i := range n {
		effect, from, to, more := "allow", id(), id(), ""
		switch k := i * 37 % 100; { // small policies have a bit of everything
		case k < 65:
		case k < 75:
			more = fmt.Sprintf("    on: [l%d]\n    at: inbound\n", r.IntN(8))
		case k < 85:
			from = fmt.Sprintf("spiffe://example.org/ns/n%d/**", r.IntN(namespaces))
		case k < 90:
			from = fmt.Sprintf("spiffe://example.org/ns/*/sa/s%d", r.IntN(10))
		case k < 95:
			from = fmt.Sprintf("group:g%d", r.IntN(groups))
		case k < 99:
			effect = "deny"
			if k%2 == 0 {
				to = ""
			}
		default:
			effect = "deny"
			from = fmt.Sprintf("spiffe://example.org/ns/n%d/**", r.IntN(namespaces))
			to = fmt.Sprintf("spiffe://example.org/ns/n%d/**", r.IntN(namespaces))
		}
		fmt.Fprintf(&b, "  - id: r%06d\n    effect: %s\n%s    from: [%s]\n", i, effect, more, from)
		if to != "" {
			fmt.Fprintf(&b, "    to: [%s]\n", to)
		}
	}
	return b.String()
}

func mixID(namespace, account int) string {
	return fmt.Sprintf("spiffe://example.org/ns/n%d/sa/s%d", namespace, account)
}

func mixRequests(p *Policy, n, count int, r *rand.Rand) []Request {
	namespaces := max(n/10, 3)
	out := make([]Request, count)
	for i := range out {
		from, to := mixID(r.IntN(namespaces), r.IntN(10)), mixID(r.IntN(namespaces), r.IntN(10))
		switch k := r.IntN(100); {
		case k < 60:
			rule := &p.rules[r.IntN(len(p.rules))]
			if len(rule.from.patterns) > 0 {
				from = anIDOf(rule.from.patterns[0].text, r)
			} else {
				g := rule.from.groups[0]
				from = g.patterns[r.IntN(len(g.patterns))].text
			}
			if rule.to.given {
				to = anIDOf(rule.to.patterns[0].text, r)
			}
		case k < 80:
		case k < 95:
			from = fmt.Sprintf("spiffe://example.org/ns/n%d/sa/other%d", r.IntN(namespaces), r.IntN(100))
		default:
			from = fmt.Sprintf("spiffe://partner.example/exports/e%d", r.IntN(100))
		}
		// Each request has texts of its own, as each connection has.
		out[i] = Request{
			Listener: fmt.Sprintf("l%d", r.IntN(8)), Direction: Direction(r.IntN(2)),
			From:   Peer{ID: spiffeid.RequireFromString(strings.Clone(from)), Serial: "1f", Issuer: "aa"},
			To:     Peer{ID: spiffeid.RequireFromString(strings.Clone(to)), Serial: "2f", Issuer: "aa"},
			Source: netip.MustParseAddrPort("10.1.2.3:4567"), Time: time.Unix(1700000000, 0),
		}
	}
	return out
}

func anIDOf(pattern string, r *rand.Rand) string {
	pattern = strings.Replace(pattern, "**", fmt.Sprintf("sa/s%d", r.IntN(20)), 1)
	return strings.Replace(pattern, "*", fmt.Sprintf("n%d", r.IntN(20)), 1)
}

var benchSizes = []int{10, 100, 1000, 10000, 100000}

func mixed(b testing.TB, n int) (*Policy, []Request) {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	p, err := Parse("mix.yaml", []byte(mixPolicy(n, r)))
	if err != nil {
		b.Fatal(err)
	}
	return p, mixRequests(p, n, 1024, r)
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			p, requests := mixed(b, n)
			var d Decision
			allowed, i := 0, 0
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(&requests[i&1023], &d)
				if d.Allow {
					allowed++
				}
				i++
			}
			b.ReportMetric(float64(allowed)/float64(i), "allowed/op")
		})
	}
}

func BenchmarkParse(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			text := []byte(mixPolicy(n, rand.New(rand.NewPCG(1, uint64(n)))))
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

func BenchmarkCompile(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			p, _ := mixed(b, n)
			b.ReportAllocs()
			for b.Loop() {
				compile(p)
			}
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
				var text strings.Builder
				text.WriteString("version: 1\ngroups:\n  g:\n")
				for i := range 10 {
					fmt.Fprintf(&text, "  - %s\n", mixID(i, 0))
				}
				text.WriteString("rules:\n")
				for i := range n {
					fmt.Fprintf(&text, "- {id: r%d, effect: allow, %s}\n", i, shape.rule(i, n))
				}
				p, err := Parse("shape.yaml", []byte(text.String()))
				if err != nil {
					b.Fatal(err)
				}
				r := rand.New(rand.NewPCG(1, 1))
				requests := make([]Request, 1024)
				for i := range requests {
					requests[i] = request(mixID(r.IntN(min(n, 10)), 0), mixID(r.IntN(n), 0))
					requests[i].Listener = fmt.Sprintf("l%d", r.IntN(n))
				}
				var d Decision
				i := 0
				b.ReportAllocs()
				for b.Loop() {
					p.Decide(&requests[i&1023], &d)
					i++
				}
			})
		}
	}
}
