package proxy

import (
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/testca"
	"github.com/narthex-id/narthex/proxy/policy"
)

// TestShadowIsNewsOnce: what a rule in shadow would have made of a connection
// is counted and logged when it is other than before.
func TestShadowIsNewsOnce(t *testing.T) {
	ca := testca.New(t, "example.org")
	log := &lines{}
	p := run(t, Config{
		Listeners: []Listener{inbound("orders", "127.0.0.1:1")}, Policy: rulesOf(t, allowAll),
		Identities: source(t, ca.SVID("/orders"), ca), Log: hclog.New(&hclog.LoggerOptions{Output: log}),
	})
	c := newConn(p.world.Load().named("orders"), nil, nil)
	for i, step := range []struct {
		allow              bool
		shadow             []string
		denies, of, allows float64 // of rule a, of rule b, and of rule a
		lines              int
	}{
		{true, nil, 0, 0, 0, 0},
		{true, []string{"a"}, 1, 0, 0, 1},
		{true, []string{"a"}, 1, 0, 0, 1},
		{true, []string{"a", "b"}, 1, 1, 0, 2},
		{true, []string{"b"}, 1, 1, 0, 2},
		{true, nil, 1, 1, 0, 2},
		{true, []string{"a"}, 2, 1, 0, 3},
		{false, []string{"a"}, 2, 1, 1, 4},
		{false, nil, 2, 1, 1, 4},
	} {
		c.mu.Lock()
		c.decision = policy.Decision{Allow: step.allow, Shadow: step.shadow}
		c.noteShadow()
		c.mu.Unlock()
		of := func(rule, decision string) float64 {
			return p.metric("narthex_policy_decisions_total", "orders", rule, decision)
		}
		if a, b, allows := of("a", "would_deny"), of("b", "would_deny"), of("a", "would_allow"); a != step.denies || b != step.of || allows != step.allows {
			t.Errorf("step %d: %v, %v and %v", i, a, b, allows)
		}
		if n := log.count("rules in shadow would"); n != step.lines {
			t.Errorf("step %d: %d lines", i, n)
		}
	}
	if log.count("would refuse what passes") != 3 || log.count("would allow what no rule allows") != 1 || log.count("shadow=b") != 1 {
		t.Errorf("log:\n%s", log.text.String())
	}
}
