//go:build integration

package kubernetes_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// provider is an agent that serves the Workload API on every node.
type provider struct {
	name    string
	sockets string // folder on the nodes, of api.sock

	start func(t *testing.T)
	once  sync.Once
	ok    bool
}

// syncInterval is how often both agents ask the server for entries. The tests
// do not want to wait.
var syncInterval = "1s"

// withProxy says whether our agent has the proxy of the chart beside it.
var withProxy = true

// withBrokers says whether it has the admin socket and the Broker API.
var withBrokers = true

// narthex is our agent, as the chart installs it.
var narthex = &provider{name: "narthex", sockets: "/run/narthex/public", start: func(t *testing.T) {
	k8s.apply(t, render(t, "namespace.yaml", map[string]any{"Name": "narthex"}))
	bringBundle(t, "narthex")
	k8s.apply(t, chart(t))
	k8s.rolledOut(t, "narthex", "daemonset/narthex", "daemonset/narthex-csi")
}}

// stock is SPIRE's own agent.
var stock = &provider{name: "stock", sockets: "/run/spire/agent/public", start: func(t *testing.T) {
	k8s.apply(t, render(t, "stock-agent.yaml", map[string]any{"Sync": syncInterval}))
	k8s.rolledOut(t, "spire", "daemonset/spire-agent")
}}

// serve starts the server and the agent, once.
func (p *provider) serve(t *testing.T) {
	t.Helper()
	startServer(t)
	p.once.Do(func() {
		defer showWhenFailed(t, "narthex", "spire")
		p.start(t)
		p.ok = true
	})
	if !p.ok {
		t.Fatalf("the agent (%s) did not start, see the first test that needed it", p.name)
	}
}

// withEach runs a test with each of the agents.
func withEach(t *testing.T, run func(t *testing.T, p *provider)) {
	for _, p := range []*provider{narthex, stock} {
		t.Run(p.name, func(t *testing.T) {
			p.serve(t)
			run(t, p)
		})
	}
}

// packages is where the packages are that users install.
var packages = filepath.Join("..", "..", "deploy")

// chart returns what the chart makes of the values of the tests.
func chart(t *testing.T) string {
	t.Helper()
	at := strings.LastIndex(k8s.images.Narthex, ":")
	values := filepath.Join(stage.Folder(t, "helm"), "values.yaml")
	stage.WriteFile(t, values, render(t, "values.yaml", map[string]any{
		"Repository": k8s.images.Narthex[:at], "Tag": k8s.images.Narthex[at+1:], "Sync": syncInterval, "Proxy": withProxy, "Brokers": withBrokers,
	}), 0o600)
	return helm(t, "narthex", "-f", values)
}

// helm returns what `helm template` makes of the chart in a namespace.
func helm(t *testing.T, namespace string, flags ...string) string {
	t.Helper()
	dir, err := stage.Tools("helm", "NARTHEX_HELM", "helm")
	if err != nil {
		t.Fatal(err)
	}
	var is struct{ GitVersion string }
	if err := k8s.get("/version", &is); err != nil {
		t.Fatal(err)
	}
	args := []string{"template", "narthex", filepath.Join(packages, "helm", "narthex"), "-n", namespace, "--kube-version", is.GitVersion}
	cmd := exec.Command(filepath.Join(dir, "helm"), append(args, flags...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("helm template: %v", err)
	}
	return string(out)
}
