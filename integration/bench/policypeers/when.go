package main

import (
	"fmt"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// conditioned is what a decision by a condition takes, in ns.
type conditioned struct {
	Without float64 `json:"without"` // by the same rules, less the condition
	With    float64 `json:"with"`
	Allocs  float64 `json:"allocs"` // with it
}

// condition is what is asked of every request that one of the rules is about.
const condition = `request.method in ["GET", "HEAD"] && request.path.startsWith("/v1/") && inNetwork(source.ip, "10.0.0.0/8")`

// when measures a rule between two workloads with and without a condition.
func (o *options) when() (*conditioned, error) {
	const from, to = "spiffe://example.org/ns/shop/sa/web", "spiffe://example.org/ns/shop/sa/orders"
	request := rulemix.Request{From: from, To: to, Method: "GET", Host: "orders.shop.svc.example.org", Path: "/v1/orders/7"}
	measure := func(more string) (ns, allocations float64, err error) {
		n := &narthex{}
		text := fmt.Sprintf("version: 1\nrules:\n  - id: web-to-orders\n    effect: allow\n    from: [%s]\n    to: [%s]\n%s", from, to, more)
		if err := n.load([]byte(text)); err != nil {
			return 0, 0, err
		}
		requests := []rulemix.Request{request}
		if err := n.prepare(requests); err != nil {
			return 0, 0, err
		}
		a := asker{engine: n, requests: requests, want: []bool{true}}
		return a.measure(o.asking)
	}
	var got conditioned
	var err error
	if got.Without, _, err = measure(""); err != nil {
		return nil, err
	}
	got.With, got.Allocs, err = measure(fmt.Sprintf("    when: '%s'\n", condition))
	return &got, err
}
