//go:build integration

package kubernetes_test

import (
	"sync"
	"testing"
)

// provider is an agent that serves the Workload API on every node.
type provider struct {
	name    string
	sockets string // folder on the nodes, of api.sock

	start func(t *testing.T)
	once  sync.Once
	ok    bool
}

// stock is SPIRE's own agent.
var stock = &provider{name: "stock", sockets: "/run/spire/agent/public", start: func(t *testing.T) {
	k8s.apply(t, render(t, "stock-agent.yaml", nil))
	k8s.rolledOut(t, "spire", "daemonset/spire-agent")
}}

// serve starts the server and the agent, once.
func (p *provider) serve(t *testing.T) {
	t.Helper()
	startServer(t)
	p.once.Do(func() {
		p.start(t)
		p.ok = true
	})
	if !p.ok {
		t.Fatalf("the agent (%s) did not start, see the first test that needed it", p.name)
	}
}

// withEach runs a test with each of the agents.
func withEach(t *testing.T, run func(t *testing.T, p *provider)) {
	for _, p := range []*provider{stock} {
		t.Run(p.name, func(t *testing.T) {
			p.serve(t)
			run(t, p)
		})
	}
}
