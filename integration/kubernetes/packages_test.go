//go:build integration

package kubernetes_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestPackages has the API server check every object that the packages make,
// with every option on, and take none.
func TestPackages(t *testing.T) {
	ns := k8s.namespace(t)
	k8s.apply(t, render(t, "podmonitor.yaml", nil))
	k8s.kubectl(t, "wait", "--for=condition=Established", "crd/podmonitors.monitoring.coreos.com", "--timeout="+ready.String())
	k8s.apply(t, render(t, "namespace.yaml", map[string]any{"Name": "narthex"}))
	everything, err := filepath.Abs(filepath.Join("..", "deploy", "testdata", "everything.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for name, manifests := range map[string]string{
		"chart":                  helm(t, ns),
		"chart, of the tests":    chart(t),
		"chart, everything":      helm(t, ns, "-f", everything),
		"chart, network policy":  helm(t, ns, "--set", "networkPolicy.enabled=true"),
		"chart, older kubelets":  helm(t, ns, "--set", "rbac.kubelet=nodes-proxy"),
		"kustomize base":         kustomize(t, filepath.Join(packages, "kustomize", "base")),
		"kustomize, every piece": kustomize(t, filepath.Join(packages, "kustomize", "example")),
	} {
		t.Run(name, func(t *testing.T) {
			out, err := k8s.tryKubectl(manifests, "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-")
			if err != nil {
				t.Fatal(err)
			}
			if objects := strings.Count(out, "server"); objects < 4 {
				t.Errorf("it makes %d objects:\n%s", objects, out)
			}
		})
	}
}

// kustomize returns what `kubectl kustomize` makes of a folder.
func kustomize(t *testing.T, dir string) string {
	t.Helper()
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	return k8s.kubectl(t, "kustomize", dir)
}

// TestKustomize puts what kustomize makes in the place of what the chart has
// installed, and the chart's back.
func TestKustomize(t *testing.T) {
	narthex.serve(t)
	ns := k8s.namespace(t)
	register(t, entry{path: "/" + ns, selectors: []string{"k8s:ns:" + ns}})
	dir := stage.Folder(t, "overlay")
	here, err := filepath.Abs(filepath.Join(packages, "kustomize", "base"))
	if err != nil {
		t.Fatal(err)
	}
	base, err := filepath.Rel(dir, here)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.LastIndex(k8s.images.Narthex, ":")
	stage.WriteFile(t, filepath.Join(dir, "kustomization.yaml"), fmt.Sprintf(
		"resources: [%s]\nimages: [{name: ghcr.io/narthex-id/narthex, newName: %s, newTag: %q}]\n",
		base, k8s.images.Narthex[:at], k8s.images.Narthex[at+1:]), 0o644)
	t.Cleanup(func() {
		k8s.apply(t, chart(t))
		k8s.rolledOut(t, "narthex", "daemonset/narthex")
	})
	k8s.apply(t, kustomize(t, dir))
	k8s.rolledOut(t, "narthex", "daemonset/narthex")
	startPod(t, ns, narthex, nil)
	k8s.happens(t, ns, k8s.pod(t, ns, "app=asks").name(), "app", 0, "has its identity", isID(trustDomain+"/"+ns))
}
