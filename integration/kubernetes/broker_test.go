//go:build integration

package kubernetes_test

import (
	"strings"
	"testing"
)

// Where brokers find the agent of their node.
const (
	brokerSocket  = "unix:///broker/broker.sock"
	brokerService = "narthex-broker.narthex.svc:9905"
)

// question is what a broker asks, and how it is answered.
type question struct {
	Name         string // of the container that asks
	Args         []string
	code, reason string // empty: it gets the pod's identity
	says         string
}

// ask starts a pod whose containers ask. Its app label is the broker's.
func ask(t *testing.T, namespace, broker string, questions []question) {
	t.Helper()
	k8s.apply(t, render(t, "broker.yaml", map[string]any{
		"Name": broker, "Namespace": namespace, "Agent": trustDomain + ourAgent(t).ID.Path, "Sockets": narthex.sockets, "Asks": questions,
	}))
}

// isEnd tells of a stream that ended so.
func (q question) isEnd(e event) bool {
	return e.Event == "failed" && e.Code == q.code && e.Reason == q.reason && strings.Contains(e.Error, q.says)
}

// TestBroker has brokers ask for the identity of a pod that never asks itself,
// until that pod is gone.
func TestBroker(t *testing.T) {
	narthex.serve(t)
	ns := k8s.namespace(t)
	in := "k8s:ns:" + ns
	register(t,
		entry{path: "/mesh", selectors: []string{in, "k8s:pod-label:app:mesh"}},
		entry{path: "/pids", selectors: []string{in, "k8s:pod-label:app:pids"}},
		entry{path: "/" + ns + "/web", selectors: []string{in, "k8s:pod-label:app:web"}},
		entry{path: "/" + ns + "/container", selectors: []string{in, "k8s:pod-label:app:web", "k8s:container-name:app"}}) // which a pod is not
	startPod(t, ns, narthex, map[string]any{"Name": "web", "Args": []string{"sleep"}})
	startPod(t, ns, narthex, map[string]any{"Name": "nobody", "Args": []string{"sleep"}})
	web, nobody := k8s.pod(t, ns, "app=web"), k8s.pod(t, ns, "app=nobody")
	name, uid := ns+"/"+web.name(), web.Metadata.UID

	mesh := []question{
		{Name: "name", Args: []string{"-at", brokerSocket, "-pod", name}},
		{Name: "uid", Args: []string{"-at", brokerSocket, "-uid", uid}},
		{Name: "both", Args: []string{"-at", brokerSocket, "-pod", name, "-uid", uid}},
		{Name: "tcp", Args: []string{"-at", brokerService, "-pod", name, "-uid", uid}},
		{
			Name: "nobody", Args: []string{"-at", brokerSocket, "-pod", ns + "/" + nobody.name()},
			code: "PermissionDenied", reason: "WORKLOAD_NOT_ENTITLED", says: "no registration entry matches the workload",
		},
		{
			Name: "another", Args: []string{"-at", brokerSocket, "-pod", name, "-uid", nobody.Metadata.UID},
			code: "NotFound", reason: "WORKLOAD_NOT_FOUND",
		},
		{Name: "none", Args: []string{"-at", brokerService, "-pod", ns + "/none"}, code: "NotFound", reason: "WORKLOAD_NOT_FOUND"},
		{Name: "pid", Args: []string{"-at", brokerSocket, "-pid", "1"}, code: "PermissionDenied", says: "may not use references of type"},
	}
	pids := []question{
		{Name: "name", Args: []string{"-at", brokerSocket, "-pod", name}, code: "PermissionDenied", says: "may not use references of type"},
		{Name: "pid", Args: []string{"-at", brokerSocket, "-pid", "1"}, code: "PermissionDenied", says: "another PID namespace"},
	}
	ask(t, ns, "mesh", mesh)
	ask(t, ns, "pids", pids)
	var streams []question
	for _, q := range mesh {
		if q.code != "" {
			k8s.happens(t, ns, "mesh", q.Name, 0, "is refused", q.isEnd)
			continue
		}
		e, _ := k8s.happens(t, ns, "mesh", q.Name, 0, "has the pod's identity", isID(trustDomain+"/"+ns+"/web"))
		if len(e.IDs) != 1 {
			t.Errorf("%s: it has %v", q.Name, e.IDs)
		}
		q.code, q.reason = "NotFound", "WORKLOAD_NOT_FOUND"
		streams = append(streams, q)
	}
	for _, q := range pids {
		k8s.happens(t, ns, "pids", q.Name, 0, "is refused", q.isEnd)
	}

	k8s.kubectl(t, "-n", ns, "delete", "pod", web.name(), "--wait", "--timeout="+ready.String())
	for _, q := range streams {
		k8s.happens(t, ns, "mesh", q.Name, 0, "is told that the pod is gone", q.isEnd)
	}
}

// TestAdmin asks on the admin socket, which the agent's container has and the
// proxy's has not.
func TestAdmin(t *testing.T) {
	narthex.serve(t)
	p := k8s.pod(t, "narthex", "app.kubernetes.io/component=node")
	if level := k8s.exec(t, "narthex", p.name(), "agent", "/narthex", "logger", "get"); !strings.Contains(level, "info") {
		t.Errorf("the level of the log is %q", level)
	}
	out, err := k8s.tryKubectl("", "-n", "narthex", "exec", p.name(), "-c", "proxy", "--", "/narthex", "logger", "get")
	if err == nil || !strings.Contains(err.Error(), "no agent has its admin socket") {
		t.Errorf("the proxy asks on the admin socket: %v\n%s", err, out)
	}
}
