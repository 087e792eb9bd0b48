//go:build integration

package kubernetes_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// startPod starts a pod that asks the Workload API: values are those of
// testdata/pod.yaml. It does not wait.
func startPod(t *testing.T, namespace string, agent *provider, values map[string]any) {
	t.Helper()
	all := map[string]any{
		"Namespace": namespace, "Name": "asks", "Args": []string{"watch"}, "User": 65532, "Labels": map[string]string{},
		"Init": false, "Sidecar": false, "CSI": false, "Sockets": agent.sockets, "Replicas": 1,
	}
	for k, v := range values {
		all[k] = v
	}
	k8s.apply(t, render(t, "pod.yaml", all))
}

// TestSelectors gives an identity for each selector of a pod, as the API
// server describes it.
func TestSelectors(t *testing.T) {
	withEach(t, func(t *testing.T, agent *provider) {
		ns := k8s.namespace(t)
		register(t, entry{path: "/" + ns + "/all", selectors: []string{"k8s:ns:" + ns}}) // the first container ends once it has an identity
		startPod(t, ns, agent, map[string]any{"Labels": map[string]string{"tier": "gold", "shop.example/part": "till"}, "Init": true})
		p := k8s.pod(t, ns, "app=asks")
		ids := make([]string, 0, 20)
		entries := make([]entry, 0, 20)
		for i, s := range selectorsOf(t, p, "app") {
			e := entry{path: "/" + ns + "/" + strconv.Itoa(i), selectors: slices.Compact([]string{"k8s:ns:" + ns, s})}
			entries, ids = append(entries, e), append(ids, trustDomain+e.path)
		}
		register(t, entries...)
		stage.Eventually(t, ready, "the pod has all identities", func() error {
			got, err := k8s.identities(ns, p.name(), "app")
			for i, id := range ids {
				if err == nil && !slices.Contains(got, id) {
					err = fmt.Errorf("not that of %v", entries[i].selectors)
				}
			}
			return err
		})
	})
}

// selectorsOf returns the k8s selectors of a container, read from the API
// server's description of its pod.
func selectorsOf(t *testing.T, p *pod, container string) []string {
	t.Helper()
	status, ok := p.container(container)
	if !ok || len(p.Metadata.OwnerReferences) == 0 {
		t.Fatalf("pod %s is not as the test has made it: %+v", p.name(), p)
	}
	all := []string{
		"ns:" + p.Metadata.Namespace, "sa:" + p.Spec.ServiceAccountName, "node-name:" + p.Spec.NodeName,
		"pod-uid:" + p.Metadata.UID, "pod-name:" + p.name(),
		"container-name:" + container, "container-image:" + status.Image, "container-image:" + status.ImageID,
		"pod-image-count:" + strconv.Itoa(len(p.Spec.Containers)), "pod-init-image-count:" + strconv.Itoa(len(p.Spec.InitContainers)),
	}
	for _, s := range p.Status.ContainerStatuses {
		all = append(all, "pod-image:"+s.Image, "pod-image:"+s.ImageID)
	}
	for _, s := range p.Status.InitContainerStatuses {
		all = append(all, "pod-init-image:"+s.Image, "pod-init-image:"+s.ImageID)
	}
	for k, v := range p.Metadata.Labels {
		all = append(all, "pod-label:"+k+":"+v)
	}
	for _, o := range p.Metadata.OwnerReferences {
		all = append(all, "pod-owner:"+o.Kind+":"+o.Name, "pod-owner-uid:"+o.Kind+":"+o.UID)
	}
	slices.Sort(all)
	all = slices.Compact(all)
	for i := range all {
		all[i] = "k8s:" + all[i]
	}
	return all
}

// TestContainers gives each container of a pod an identity of its own: one
// that runs before the others, one that runs beside them, and one that is
// added while they run.
func TestContainers(t *testing.T) {
	withEach(t, func(t *testing.T, agent *provider) {
		ns := k8s.namespace(t)
		containers := []string{"first", "sidecar", "app"}
		id := func(container string) string { return "/" + ns + "/" + container }
		var entries []entry
		for _, c := range append([]string{"debugger"}, containers...) {
			entries = append(entries, entry{path: id(c), selectors: []string{"k8s:ns:" + ns, "k8s:container-name:" + c}})
		}
		register(t, entries...)
		startPod(t, ns, agent, map[string]any{"Init": true, "Sidecar": true})
		p := k8s.pod(t, ns, "app=asks")
		if agent != stock { // which does not find those
			containers = append(containers, "debugger")
			k8s.addContainer(t, p, "debugger", "watch")
		}
		for _, c := range containers {
			e, _ := k8s.happens(t, ns, p.name(), c, 0, "has an identity", func(e event) bool { return e.Event == "svids" })
			if want := []string{trustDomain + id(c)}; !slices.Equal(e.IDs, want) {
				t.Errorf("container %s is %s, want %s", c, strings.Join(e.IDs, ", "), want)
			}
		}
	})
}
