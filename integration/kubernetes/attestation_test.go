//go:build integration

package kubernetes_test

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestNodeAttestation looks at what the server made of a node that proved
// itself by a token of its pod.
func TestNodeAttestation(t *testing.T) {
	narthex.serve(t)
	a := ourAgent(t)
	p := k8s.pod(t, "narthex", "app.kubernetes.io/component=node")
	if a.AttestationType != "k8s_psat" || a.Banned || !a.CanReattest {
		t.Errorf("the server knows the agent as %+v", a)
	}
	for _, want := range []string{
		"cluster:demo", "agent_ns:narthex", "agent_sa:narthex", "agent_pod_name:" + p.name(), "agent_pod_uid:" + p.Metadata.UID,
		"agent_node_name:" + p.Spec.NodeName, "agent_node_uid:" + path.Base(a.ID.Path),
	} {
		if !slices.ContainsFunc(a.Selectors, func(s struct{ Type, Value string }) bool { return s.Type == "k8s_psat" && s.Value == want }) {
			t.Errorf("the agent has no selector k8s_psat:%s", want)
		}
	}
}

// TestForeignToken has an agent come with a token for another audience.
func TestForeignToken(t *testing.T) {
	narthex.serve(t)
	t.Cleanup(func() {
		_, _ = k8s.tryKubectl("", "-n", "narthex", "delete", "pod", "foreign-token", "--ignore-not-found")
	})
	k8s.apply(t, render(t, "foreign-token.yaml", nil))
	stage.Eventually(t, ready, "the agent says that it was refused", func() error {
		said, err := k8s.log("narthex", "foreign-token", "agent")
		if err == nil && (!strings.Contains(said, "k8s_psat") || !strings.Contains(said, "audience")) {
			err = fmt.Errorf("it says:\n%s", said)
		}
		return err
	})
	ourAgent(t) // is the only one still
}

// ourAgent returns what the server knows of the agent of the DaemonSet, on
// the node on which all tests run.
func ourAgent(t *testing.T) attested {
	t.Helper()
	var node struct{ Metadata struct{ UID string } }
	if err := k8s.get("/api/v1/nodes/"+k8s.pod(t, "narthex", "app.kubernetes.io/component=node").Spec.NodeName, &node); err != nil {
		t.Fatal(err)
	}
	all := agents(t)
	ours := slices.DeleteFunc(slices.Clone(all), func(a attested) bool { return a.ID.Path != "/spire/agent/k8s_psat/demo/"+node.Metadata.UID })
	if len(ours) != 1 {
		t.Fatalf("the server should know one agent of node %s, and knows %+v", node.Metadata.UID, all)
	}
	return ours[0]
}

// TestLabels gives a running pod a label and takes it away: the open stream
// of its container is given an identity and loses it.
func TestLabels(t *testing.T) {
	narthex.serve(t)
	ns := k8s.namespace(t)
	register(t,
		entry{path: "/" + ns + "/plain", selectors: []string{"k8s:ns:" + ns, "k8s:pod-label:tier:plain"}},
		entry{path: "/" + ns + "/gold", selectors: []string{"k8s:ns:" + ns, "k8s:pod-label:tier:gold"}})
	startPod(t, ns, narthex, map[string]any{"Labels": map[string]string{"tier": "plain"}})
	p := k8s.pod(t, ns, "app=asks")
	_, at := k8s.happens(t, ns, p.name(), "app", 0, "is plain", isID(trustDomain+"/"+ns+"/plain"))

	k8s.kubectl(t, "-n", ns, "label", "pod", p.name(), "--overwrite", "tier=gold")
	e, at := k8s.happens(t, ns, p.name(), "app", at, "is gold", isID(trustDomain+"/"+ns+"/gold"))
	if len(e.IDs) != 1 {
		t.Errorf("with another label the pod has %v", e.IDs)
	}
	k8s.kubectl(t, "-n", ns, "label", "pod", p.name(), "tier-")
	k8s.happens(t, ns, p.name(), "app", at, "is nobody", isCode("PermissionDenied"))
}

// TestCSI gives a pod the Workload API by a volume of the CSI driver.
func TestCSI(t *testing.T) {
	narthex.serve(t)
	ns := k8s.namespace(t)
	register(t, entry{path: "/" + ns, selectors: []string{"k8s:ns:" + ns}})
	startPod(t, ns, narthex, map[string]any{"CSI": true})
	p := k8s.pod(t, ns, "app=asks")
	k8s.happens(t, ns, p.name(), "app", 0, "has its identity", isID(trustDomain+"/"+ns))
	k8s.kubectl(t, "-n", ns, "delete", "pod", p.name(), "--wait", "--timeout="+ready.String())
	k8s.pod(t, ns, "app=asks") // its successor
}
