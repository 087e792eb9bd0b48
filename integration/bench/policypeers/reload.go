package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
	"github.com/narthex-id/narthex/proxy/policy"
)

// reloaded is what decisions took at most, 99 of 100 of them, in ns.
type reloaded struct {
	Quiet   float64 `json:"quiet"`
	Busy    float64 `json:"busy"`    // while the policy was loaded, over and over
	Reloads int     `json:"reloads"` // in that time
}

// reload measures decisions while another goroutine loads the policy again and
// again, and while none does.
func (o *options) reload() (*reloaded, error) {
	mix := rulemix.Generate(rulemix.Kind(o.mix), o.rules, rulesSeed)
	n := &narthex{}
	text, err := n.write(mix)
	if err != nil {
		return nil, err
	}
	if err := n.load(text); err != nil {
		return nil, err
	}
	if err := n.prepare(mix.Requests(requestCount, requestsSeed)); err != nil {
		return nil, err
	}
	var current atomic.Pointer[policy.Policy]
	current.Store(n.policy)
	n.times(&current, o.asking/10) // warm
	got := &reloaded{Quiet: n.times(&current, o.asking)}

	var stop atomic.Bool
	var failed error
	var loading sync.WaitGroup
	loading.Go(func() {
		for !stop.Load() && failed == nil {
			var p *policy.Policy
			if p, failed = policy.Parse("rules.yaml", text); failed == nil {
				current.Store(p)
				got.Reloads++
			}
		}
	})
	got.Busy = n.times(&current, o.asking)
	stop.Store(true)
	loading.Wait()
	if failed == nil && got.Reloads == 0 {
		failed = fmt.Errorf("not one reload in %v", o.asking)
	}
	return got, failed
}

// longest is beyond what a decision may take to be told from others, in ns.
const longest = 1 << 20

// times asks for some time and returns the 99th percentile of what decisions
// took, reading the clock included.
func (n *narthex) times(current *atomic.Pointer[policy.Policy], lasting time.Duration) float64 {
	counts := make([]uint32, longest+1) // by ns
	total := 0
	for begin := time.Now(); ; {
		before := time.Now()
		if before.Sub(begin) >= lasting {
			break
		}
		current.Load().Decide(&n.requests[total%len(n.requests)], &n.decision)
		counts[min(time.Since(before), longest)]++
		total++
	}
	slower := total / 100
	for ns := longest; ns > 0; ns-- {
		if slower -= int(counts[ns]); slower < 0 {
			return float64(ns)
		}
	}
	return 0
}
