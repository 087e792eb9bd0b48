//go:build integration

package kubernetes_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// pod is what the tests read of a pod.
type pod struct {
	Metadata struct {
		Name, Namespace, UID string
		Labels               map[string]string
		DeletionTimestamp    string
		OwnerReferences      []struct{ Kind, Name, UID string }
	}
	Spec struct {
		NodeName, ServiceAccountName  string
		Containers, InitContainers    []struct{ Name, Image string }
		TerminationGracePeriodSeconds int
	}
	Status struct {
		Phase, PodIP                                                         string
		Conditions                                                           []struct{ Type, Status string }
		ContainerStatuses, InitContainerStatuses, EphemeralContainerStatuses []containerStatus
	}
}

type containerStatus struct {
	Name, ContainerID, Image, ImageID string
	RestartCount                      int
	Ready                             bool
	State                             map[string]any
}

func (p *pod) name() string { return p.Metadata.Name }

func (p *pod) ready() bool {
	return p.Metadata.DeletionTimestamp == "" && slices.ContainsFunc(p.Status.Conditions, func(c struct{ Type, Status string }) bool {
		return c.Type == "Ready" && c.Status == "True"
	})
}

// container returns the status of a container of any kind.
func (p *pod) container(name string) (containerStatus, bool) {
	all := slices.Concat(p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses)
	at := slices.IndexFunc(all, func(c containerStatus) bool { return c.Name == name })
	if at < 0 {
		return containerStatus{}, false
	}
	return all[at], true
}

// pods returns the pods of a namespace that have the labels ("app=shop").
func (c *cluster) pods(t *testing.T, namespace, labels string) []pod {
	t.Helper()
	var list struct{ Items []pod }
	if err := c.get("/api/v1/namespaces/"+namespace+"/pods?labelSelector="+url.QueryEscape(labels), &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// pod waits for the one pod that has the labels and is ready.
func (c *cluster) pod(t *testing.T, namespace, labels string) *pod {
	t.Helper()
	var found *pod
	stage.Eventually(t, ready, namespace+": one pod "+labels+" is ready", func() error {
		var is []pod
		for _, p := range c.pods(t, namespace, labels) {
			if p.ready() {
				is = append(is, p)
			}
		}
		if len(is) != 1 {
			return fmt.Errorf("%d are", len(is))
		}
		found = &is[0]
		return nil
	})
	return found
}

// log returns what a container has written.
func (c *cluster) log(namespace, pod, container string) (string, error) {
	text, err := c.ask(context.Background(), http.MethodGet,
		fmt.Sprintf("/api/v1/namespaces/%s/pods/%s/log?container=%s", namespace, pod, container), nil)
	return string(text), err
}

// exec runs a program in a container.
func (c *cluster) exec(t *testing.T, namespace, pod, container string, args ...string) string {
	t.Helper()
	return c.kubectl(t, append([]string{"-n", namespace, "exec", pod, "-c", container, "--"}, args...)...)
}

// event is a line of the workload program.
type event struct {
	Time         time.Time
	Event        string
	IDs          []string
	Serial, Body string
	Good, Failed int
	Code, Error  string
	Reason       string
}

// events returns what a container that runs the workload program has said.
func (c *cluster) events(namespace, pod, container string) ([]event, error) {
	return lines[event](c.log(namespace, pod, container))
}

// lines parses a log of JSON objects. A line that is none is somebody else's.
func lines[T any](text string, err error) ([]T, error) {
	var all []T
	for line := range strings.Lines(text) {
		var one T
		if json.Unmarshal([]byte(line), &one) == nil {
			all = append(all, one)
		}
	}
	return all, err
}

// happens waits for an event of a container, after the first skip ones. It
// returns the event and how many there are up to it.
func (c *cluster) happens(t *testing.T, namespace, pod, container string, skip int, what string, ok func(event) bool) (event, int) {
	t.Helper()
	var found event
	var at int
	stage.Eventually(t, ready, fmt.Sprintf("%s/%s/%s: %s", namespace, pod, container, what), func() error {
		all, err := c.events(namespace, pod, container)
		if err != nil {
			return err
		}
		rest := all[min(skip, len(all)):]
		i := slices.IndexFunc(rest, ok)
		if i < 0 {
			return fmt.Errorf("there are %d other events: %+v", len(rest), rest[max(0, len(rest)-3):])
		}
		found, at = rest[i], skip+i+1
		return nil
	})
	return found, at
}

// identities returns the SPIFFE IDs that a container was told of last.
func (c *cluster) identities(namespace, pod, container string) ([]string, error) {
	all, err := c.events(namespace, pod, container)
	for _, e := range slices.Backward(all) {
		if e.Event == "svids" {
			return e.IDs, nil
		}
	}
	return nil, err
}

// addContainer adds an ephemeral container to a running pod, as kubectl debug
// does, with the Workload API mounted.
func (c *cluster) addContainer(t *testing.T, p *pod, name string, args ...string) {
	t.Helper()
	path := "/api/v1/namespaces/" + p.Metadata.Namespace + "/pods/" + p.name() + "/ephemeralcontainers"
	patch := map[string]any{"spec": map[string]any{"ephemeralContainers": []any{map[string]any{
		"name": name, "image": c.images.Workload, "imagePullPolicy": "IfNotPresent", "args": args,
		"env":          []any{map[string]any{"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///spiffe-workload-api/api.sock"}},
		"volumeMounts": []any{map[string]any{"name": "workload-api", "mountPath": "/spiffe-workload-api", "readOnly": true}},
	}}}}
	if _, err := c.ask(t.Context(), http.MethodPatch, path, patch); err != nil {
		t.Fatal(err)
	}
}

// isID tells of SVIDs of which one is the ID's.
func isID(id string) func(event) bool {
	return func(e event) bool { return e.Event == "svids" && slices.Contains(e.IDs, id) }
}

// isCode tells of a call that failed so.
func isCode(code string) func(event) bool {
	return func(e event) bool { return e.Event == "failed" && e.Code == code }
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// namespace makes a namespace for a test, which goes with it. When the test
// has failed, what its pods and the agents said is shown.
func (c *cluster) namespace(t *testing.T) string {
	t.Helper()
	name := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(strings.TrimPrefix(t.Name(), "Test")), "-"), "-")
	name = "t-" + name[max(0, len(name)-40):]
	c.apply(t, render(t, "namespace.yaml", map[string]any{"Name": name}))
	t.Cleanup(func() {
		showWhenFailed(t, name, "narthex", "spire")
		_, _ = c.tryKubectl("", "delete", "namespace", name, "--wait=false")
	})
	return name
}

func showWhenFailed(t *testing.T, namespaces ...string) {
	for _, ns := range namespaces {
		if t.Failed() {
			k8s.show(t, ns)
		}
	}
}

// show logs the state of the pods of a namespace and the last they said.
func (c *cluster) show(t *testing.T, namespace string) {
	out, _ := c.tryKubectl("", "-n", namespace, "get", "pods,daemonsets", "-o", "wide")
	t.Logf("---- %s\n%s", namespace, out)
	var list struct{ Items []pod }
	if c.get("/api/v1/namespaces/"+namespace+"/pods", &list) != nil {
		return
	}
	for _, p := range list.Items {
		for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses) {
			state, _ := json.Marshal(s.State)
			said, _ := c.log(namespace, p.name(), s.Name)
			all := strings.Split(strings.TrimSpace(said), "\n")
			t.Logf("---- %s/%s/%s, %d restarts, %s\n%s", namespace, p.name(), s.Name, s.RestartCount, state, strings.Join(all[max(0, len(all)-20):], "\n"))
		}
	}
}

// process returns the PID, on this machine, of the first process of a
// container of our own node.
func (c *cluster) process(t *testing.T, p *pod, container string) int {
	t.Helper()
	if !c.own {
		t.Fatal("processes of containers are looked for on a node of ours only")
	}
	status, ok := p.container(container)
	_, id, isID := strings.Cut(status.ContainerID, "://")
	if !ok || !isID {
		t.Fatalf("%s has no running container %s", p.name(), container)
	}
	groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		text, err := os.ReadFile(g)
		if err == nil && strings.Contains(string(text), id) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(g)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no process is in container %s of %s", container, p.name())
	return 0
}
