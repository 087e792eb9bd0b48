//go:build integration

// Package deploy renders the packages for Kubernetes with Helm and kustomize.
// To run it:
//
//	go test -tags integration ./integration/deploy/
package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

var helm, kustomize, manifests string

func TestMain(m *testing.M) { os.Exit(stage.Main(m, 4, findTools)) }

func findTools() error {
	for _, tool := range []struct {
		path           *string
		name, variable string
	}{{&helm, "helm", "NARTHEX_HELM"}, {&kustomize, "kustomize", "NARTHEX_KUSTOMIZE"}, {&manifests, "manifests", "NARTHEX_MANIFESTS"}} {
		dir, err := stage.Tools(tool.name, tool.variable, tool.name)
		if err != nil {
			return err
		}
		*tool.path = filepath.Join(dir, tool.name)
	}
	return nil
}

// kubernetes is the version that is rendered for: built as it is here, Helm
// takes a very old one for granted.
const kubernetes = "1.34.0"

// chart renders the chart.
func chart(args ...string) ([]byte, error) {
	return run(helm, append([]string{"template", "narthex", "../../deploy/helm/narthex", "-n", "narthex", "--kube-version", kubernetes}, args...)...)
}

func run(program string, args ...string) ([]byte, error) {
	cmd := exec.Command(program, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s: %w\n%s", filepath.Base(program), err, said.Bytes())
	}
	return out, nil
}

// object is one of Kubernetes'.
type object map[string]any

// at returns the value at a path of keys and indexes; nil where there is none.
func at(value any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			if o, ok := value.(object); ok {
				value = o[p]
				continue
			}
			m, _ := value.(map[string]any)
			value = m[p]
		case int:
			l, _ := value.([]any)
			if p >= len(l) {
				return nil
			}
			value = l[p]
		}
	}
	return value
}

// objects reads a render, by "Kind/name".
func objects(t *testing.T, render []byte, err error) map[string]object {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	strict(t, render)
	found := map[string]object{}
	decoder := yaml.NewDecoder(bytes.NewReader(render))
	for {
		var o object
		err := decoder.Decode(&o)
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if o == nil {
			continue
		}
		name := fmt.Sprint(o["kind"], "/", at(o, "metadata", "name"))
		if found[name] != nil {
			t.Errorf("%s is there twice", name)
		}
		found[name] = o
	}
}

// strict has every key of every object known.
func strict(t *testing.T, render []byte) {
	t.Helper()
	cmd := exec.Command(manifests, "-other", "PodMonitor")
	cmd.Stdin = bytes.NewReader(render)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestHelmAndKustomizeAgree: both packages make the same objects, field by
// field. What differs is who says that it made them.
func TestHelmAndKustomizeAgree(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, overlay string
		values        []string
	}{
		{name: "defaults", overlay: "deploy/kustomize/base"},
		{name: "example", overlay: "deploy/kustomize/example", values: []string{"-f", "testdata/example.yaml"}},
		{name: "nodes-proxy", overlay: "integration/deploy/testdata/nodes-proxy", values: []string{"--set", "rbac.kubelet=nodes-proxy"}},
		{name: "without-proxy", overlay: "integration/deploy/testdata/without-proxy", values: []string{"--set", "proxy.enabled=false"}},
		{name: "broker", overlay: "integration/deploy/testdata/broker", values: []string{"-f", "testdata/broker.yaml"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			render, err := chart(tt.values...)
			ours := objects(t, render, err)
			render, err = run(kustomize, "build", filepath.Join("..", "..", tt.overlay))
			theirs := objects(t, render, err)
			delete(theirs, "Namespace/narthex") // Helm's user makes it
			for name := range theirs {
				if ours[name] == nil {
					t.Errorf("the chart has no %s", name)
				}
			}
			for name, o := range ours {
				k := theirs[name]
				if k == nil {
					t.Errorf("kustomize has no %s", name)
					continue
				}
				compare(t, name, plain(t, o), plain(t, k))
			}
		})
	}
}

// plain returns an object without what only Helm writes, and with the files of
// a ConfigMap as what they say. Numbers are all of one type after it.
func plain(t *testing.T, o object) any {
	t.Helper()
	meta := at(o, "metadata").(map[string]any)
	if labels, ok := meta["labels"].(map[string]any); ok {
		for _, l := range []string{"name", "instance", "version", "managed-by"} {
			delete(labels, "app.kubernetes.io/"+l)
		}
		if len(labels) == 0 {
			delete(meta, "labels")
		}
	}
	if a, ok := at(o, "spec", "template", "metadata", "annotations").(map[string]any); ok {
		delete(a, "checksum/agent")
		if len(a) == 0 {
			delete(at(o, "spec", "template", "metadata").(map[string]any), "annotations")
		}
	}
	if data, ok := at(o, "data").(map[string]any); ok {
		for name, text := range data {
			var said any
			if err := yaml.Unmarshal([]byte(text.(string)), &said); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			data[name] = said
		}
	}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	var out any
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// compare names each field in which two values differ.
func compare(t *testing.T, path string, a, b any) {
	t.Helper()
	switch x := a.(type) {
	case map[string]any:
		y, ok := b.(map[string]any)
		if !ok {
			break
		}
		for key := range x {
			compare(t, path+"."+key, x[key], y[key])
		}
		for key := range y {
			if _, ok := x[key]; !ok {
				t.Errorf("%s.%s: only kustomize has it: %v", path, key, y[key])
			}
		}
		return
	case []any:
		y, ok := b.([]any)
		if !ok || len(x) != len(y) {
			break
		}
		for i := range x {
			compare(t, fmt.Sprintf("%s[%d]", path, i), x[i], y[i])
		}
		return
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("%s: the chart has %v, kustomize %v", path, a, b)
	}
}

// TestStrictIsStrict: what the tests here call strict finds what it is for.
func TestStrictIsStrict(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {port: 1}\n",
		"apiVersion: v1\nkind: Service\nmetadata: {name: a, name: b}\n",
		"apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: x}]}\n",
		"apiVersion: v1\nkind: Servce\nmetadata: {name: a}\n",
	} {
		cmd := exec.Command(manifests, "-other", "PodMonitor")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("accepted:\n%s%s", text, out)
		}
	}
}

// TestExamplesAreStrict: no example has a key that its kind has not.
func TestExamplesAreStrict(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../deploy/examples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		strict(t, text)
	}
}

// TestRenderedFilesAreGood: `narthex check` accepts what a render holds.
func TestRenderedFilesAreGood(t *testing.T) {
	t.Parallel()
	for _, values := range [][]string{
		nil,
		{"-f", "testdata/example.yaml"},
		{"-f", "testdata/everything.yaml"},
		{"-f", "testdata/example.yaml", "--set", "hostNetwork=true"},
		{"--set", "agent.kubelet.clientSecret=kubelet,rbac.kubelet=none"},
		{"--set", "agent.sigstore.trustedRootConfigMap=sigstore"},
		{"--set", "agent.admin.enabled=true"},
		{"-f", "testdata/broker.yaml"},
		{"--set", "proxy.enabled=false"},
	} {
		render, err := chart(values...)
		checkRendered(t, values, objects(t, render, err))
	}
}

// checkRendered has `narthex check` look at each narthex.yaml of a render, with
// the files that are mounted beside it.
func checkRendered(t *testing.T, what any, found map[string]object) {
	t.Helper()
	mounted := map[string]any{"agent": map[string]any{"narthex.yaml": at(found["ConfigMap/narthex"], "data", "agent.yaml")}}
	if proxy := at(found["ConfigMap/narthex-proxy"], "data"); proxy != nil {
		mounted["proxy"] = proxy
	}
	for name, files := range mounted {
		dir := t.TempDir()
		for name, text := range files.(map[string]any) {
			write(t, filepath.Join(dir, name), strings.ReplaceAll(text.(string), "/etc/narthex/", dir+"/"))
		}
		if out, err := run(stage.Narthex, "check", "-c", filepath.Join(dir, "narthex.yaml"), "--level", "error"); err != nil {
			t.Errorf("%v: %s: %v\n%s", what, name, err, out)
		}
	}
}

// TestReadmeOfTheChart: its values and rules, given as it says, are good.
func TestReadmeOfTheChart(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../../deploy/helm/narthex/README.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, m := range regexp.MustCompile("(?s)```yaml\n# ([a-z]+\\.yaml)\n(.*?)```").FindAllSubmatch(readme, -1) {
		write(t, filepath.Join(dir, string(m[1])), string(m[2]))
	}
	file := regexp.MustCompile(`--set-file '(.*=)rules\.yaml'`).FindSubmatch(readme)
	if file == nil {
		t.Fatal("it does not say how rules are given")
	}
	render, err := chart("-f", filepath.Join(dir, "values.yaml"), "-f", filepath.Join(dir, "signatures.yaml"), "-f", filepath.Join(dir, "brokers.yaml"), "--set-file", string(file[1])+filepath.Join(dir, "rules.yaml"))
	checkRendered(t, "as in the README", objects(t, render, err))
	if out, err := run(stage.Narthex, "policy", "test", "-f", filepath.Join(dir, "rules.yaml")); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestRulesRollNoPod: what the proxy follows leaves the DaemonSet as it is, and
// what only a start reads does not.
func TestRulesRollNoPod(t *testing.T) {
	t.Parallel()
	template := func(args ...string) any {
		render, err := chart(append([]string{"-f", "testdata/example.yaml"}, args...)...)
		return plainTemplate(objects(t, render, err)["DaemonSet/narthex"])
	}
	before := template()
	for _, change := range []string{
		"proxy.policies.rules\\.yaml=version: 1",
		"proxy.listeners[0].bind=0.0.0.0:9443",
		"proxy.config.max_connections=7",
	} {
		if !reflect.DeepEqual(template("--set", change), before) {
			t.Errorf("%s: rolls the pods", change)
		}
	}
	for _, change := range []string{"trustDomain=other.example", "agent.config.sync.interval=1m", "server.address=other:1"} {
		if reflect.DeepEqual(template("--set", change), before) {
			t.Errorf("%s: reaches no agent that runs", change)
		}
	}
}

func plainTemplate(o object) any { return at(o, "spec", "template") }

// TestLeastPrivilege: what a container must never have, whatever the values.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"example", "everything"} {
		render, err := chart("-f", "testdata/"+file+".yaml")
		found := objects(t, render, err)
		pod := at(found["DaemonSet/narthex"], "spec", "template", "spec")
		if at(pod, "automountServiceAccountToken") != false || at(pod, "securityContext", "seccompProfile", "type") != "RuntimeDefault" {
			t.Errorf("%s: the pod has a token for all, or no seccomp profile", file)
		}
		allowed := map[string]string{ // volumes
			"agent": "run data agent-config bundle node-token api-token kubelet-client sigstore registries",
			"proxy": "workload-api proxy-data proxy-config rules handover",
		}
		for _, c := range at(pod, "containers").([]any) {
			name := at(c, "name").(string)
			security := at(c, "securityContext")
			if at(security, "readOnlyRootFilesystem") != true || at(security, "allowPrivilegeEscalation") != false ||
				at(security, "privileged") != nil || fmt.Sprint(at(security, "capabilities", "drop")) != "[ALL]" {
				t.Errorf("%s: %s: %v", file, name, security)
			}
			if add := at(security, "capabilities", "add"); name == "agent" && fmt.Sprint(add) != "[SYS_PTRACE]" || name == "proxy" && add != nil {
				t.Errorf("%s: %s adds %v", file, name, add)
			}
			if uid := fmt.Sprint(at(security, "runAsUser")); (name == "proxy") != (uid == "47531") {
				t.Errorf("%s: %s runs as %s", file, name, uid)
			}
			for _, m := range at(c, "volumeMounts").([]any) {
				if !strings.Contains(" "+allowed[name]+" ", " "+at(m, "name").(string)+" ") {
					t.Errorf("%s: %s mounts %v", file, name, at(m, "name"))
				}
				if at(m, "subPath") != nil {
					t.Errorf("%s: %s: subPath follows no change", file, name)
				}
			}
		}
		csi := at(found["DaemonSet/narthex-csi"], "spec", "template", "spec")
		if at(csi, "hostPID") != nil || at(csi, "hostNetwork") != nil || at(csi, "serviceAccountName") != nil || at(csi, "automountServiceAccountToken") != false {
			t.Errorf("%s: the driver has more than its mounts: %v", file, csi)
		}
	}
}

// TestHostNetwork: two pods of an update are on the node at a time, so neither
// may claim a port of it.
func TestHostNetwork(t *testing.T) {
	t.Parallel()
	render, err := chart("-f", "testdata/everything.yaml")
	pod := at(objects(t, render, err)["DaemonSet/narthex"], "spec", "template", "spec")
	if at(pod, "dnsPolicy") != "ClusterFirstWithHostNet" {
		t.Errorf("dnsPolicy %v", at(pod, "dnsPolicy"))
	}
	for _, c := range at(pod, "containers").([]any) {
		if at(c, "ports") != nil {
			t.Errorf("%v claims %v", at(c, "name"), at(c, "ports"))
		}
		if !strings.Contains(fmt.Sprint(at(c, "args")), "--standby") {
			t.Errorf("%v: %v", at(c, "name"), at(c, "args"))
		}
	}
}

// TestServicePorts: the listeners that others than the pod reach.
func TestServicePorts(t *testing.T) {
	t.Parallel()
	render, err := chart("-f", "testdata/everything.yaml")
	var ports []string
	for _, p := range at(objects(t, render, err)["Service/narthex"], "spec", "ports").([]any) {
		ports = append(ports, fmt.Sprint(at(p, "port")))
	}
	if got := strings.Join(ports, " "); got != "8443 15002" {
		t.Errorf("ports %s", got)
	}
}

// TestPrivateSockets: only who is asked for has the identities of others, at
// sockets whose directories are mounted into nothing but the agent, and on the
// network only where that is asked for too.
func TestPrivateSockets(t *testing.T) {
	t.Parallel()
	render, err := chart()
	for name, o := range objects(t, render, err) {
		if text := fmt.Sprint(o); strings.Contains(text, "broker") || strings.Contains(text, "admin") {
			t.Errorf("%s: nobody asked for admins or brokers:\n%s", name, text)
		}
	}
	const brokers = `agent.broker.brokers=[{"id": "spiffe://example.org/mesh", "references": [{"type_url": "*"}]}]`
	render, err = chart("--set", "agent.admin.enabled=true,csi.enabled=true,networkPolicy.enabled=true", "--set-json", brokers)
	found := objects(t, render, err)
	agent := fmt.Sprint(at(found["ConfigMap/narthex"], "data", "agent.yaml"))
	if !strings.Contains(agent, "/run/narthex/private/admin.sock") || !strings.Contains(agent, "/run/narthex/broker/broker.sock") || strings.Contains(agent, "listen: :") {
		t.Errorf("the agent listens elsewhere than asked for:\n%s", agent)
	}
	if found["Service/narthex-broker"] != nil {
		t.Error("a Service leads to the socket")
	}
	proxy := at(found["DaemonSet/narthex"], "spec", "template", "spec", "containers", 1)
	for _, m := range at(proxy, "volumeMounts").([]any) {
		if path := at(m, "mountPath").(string); strings.HasPrefix("/run/narthex/private", path) || strings.HasPrefix("/run/narthex/broker", path) {
			t.Errorf("the proxy has %s", path)
		}
	}
	render, err = chart("-f", "testdata/broker.yaml", "--set", "networkPolicy.enabled=true")
	if policy := fmt.Sprint(objects(t, render, err)["NetworkPolicy/narthex"]); strings.Contains(policy, "9905") {
		t.Errorf("everybody reaches the port of brokers: %s", policy)
	}
}

// TestNoListeners: both containers are there, and nobody can reach the proxy.
// Its first listener then changes two ConfigMaps and makes a Service.
func TestNoListeners(t *testing.T) {
	t.Parallel()
	render, err := chart()
	before := objects(t, render, err)
	render, err = chart("-f", "testdata/example.yaml", "--set", "metrics.podAddress=false,metrics.podMonitor.enabled=false")
	after := objects(t, render, err)
	if !reflect.DeepEqual(plainTemplate(before["DaemonSet/narthex"]), plainTemplate(after["DaemonSet/narthex"])) {
		t.Error("the first listener rolls the pods")
	}
	if before["Service/narthex"] != nil || after["Service/narthex"] == nil {
		t.Error("there is a Service without listeners, or none with one")
	}
	var names []string
	for _, c := range plainTemplate(before["DaemonSet/narthex"]).(map[string]any)["spec"].(map[string]any)["containers"].([]any) {
		names = append(names, at(c, "name").(string))
	}
	if got := strings.Join(names, " "); got != "agent proxy" {
		t.Errorf("containers %s", got)
	}
}

// TestDriver: what the CSI driver has on the node, each at its own path, as
// the driver and the kubelet name paths to each other.
func TestDriver(t *testing.T) {
	t.Parallel()
	for kubelet, args := range map[string][]string{
		"/var/lib/kubelet":  {"--set", "csi.enabled=true"},
		"/var/snap/kubelet": {"--set", "csi.enabled=true,csi.kubeletDir=/var/snap/kubelet"},
	} {
		render, err := chart(args...)
		found := objects(t, render, err)
		spec := at(found["DaemonSet/narthex-csi"], "spec")
		pod := at(spec, "template", "spec")
		got := map[string]string{}
		for i, v := range at(pod, "volumes").([]any) {
			m := at(pod, "containers", 0, "volumeMounts", i)
			if at(m, "name") != at(v, "name") || at(m, "mountPath") != at(v, "hostPath", "path") {
				t.Errorf("%v is mounted at %v", v, m)
			}
			got[at(m, "mountPath").(string)] = fmt.Sprint(at(v, "hostPath", "type"), " ", at(m, "mountPropagation"))
		}
		want := map[string]string{
			"/run/narthex":                     "DirectoryOrCreate HostToContainer",
			kubelet + "/plugins/csi.spiffe.io": "DirectoryOrCreate <nil>",
			kubelet + "/plugins_registry":      "Directory <nil>",
			kubelet + "/pods":                  "Directory Bidirectional",
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("mounts %v, want %v", got, want)
		}
		if said := fmt.Sprint(at(pod, "containers", 0, "args")); (kubelet == "/var/lib/kubelet") == strings.Contains(said, "--kubelet-dir="+kubelet) {
			t.Errorf("%s: args %s", kubelet, said)
		}
		driver := at(found["CSIDriver/csi.spiffe.io"], "spec")
		if s := fmt.Sprintln(at(driver, "attachRequired"), at(driver, "podInfoOnMount"), at(driver, "fsGroupPolicy"), at(driver, "volumeLifecycleModes")); s != "false true None [Ephemeral]\n" {
			t.Errorf("CSIDriver: %s", s)
		}
		if s := fmt.Sprint(at(spec, "updateStrategy", "rollingUpdate")); s != "map[maxSurge:0 maxUnavailable:1]" {
			t.Errorf("update: %s", s)
		}
	}
}

// TestBadValues: Helm refuses what cannot be, before anything is applied.
func TestBadValues(t *testing.T) {
	t.Parallel()
	example, broker := []string{"-f", "testdata/example.yaml"}, []string{"-f", "testdata/broker.yaml"}
	tests := []struct {
		args []string
		want string
	}{
		{[]string{"--set", "trustDomian=example.org"}, "trustDomian"},
		{[]string{"--set", "agent.kubelet.skipverification=true"}, "skipverification"},
		{[]string{"--set", "trustDomain=spiffe://example.org"}, "trustDomain"},
		{[]string{"--set", "server.address=spire-server"}, "address"},
		{[]string{"--set", "rbac.kubelet=all"}, "kubelet"},
		{[]string{"--set", "image.digest=sha256:0"}, "digest"},
		{[]string{"--set", "log.level=verbose"}, "level"},
		{[]string{"--set", "agent.resources.limits.memory=lots"}, "memory"},
		{[]string{"--set", "terminationGracePeriodSeconds=1"}, "terminationGracePeriodSeconds"},
		{[]string{"--set-json", `proxy.policies={"rules.yaml": {"version": 1}}`}, "rules.yaml"},
		{append(example, "--set", "proxy.policies=null"), "proxy.listeners need proxy.policies"},
		{append(example, "--set", "proxy.listeners[0].bind=:99999"), "proxy.listeners[0].bind :99999: the port"},
		{append(example, "--set", "proxy.listeners[0].bind=:9902"), "port 9902 is that of the probes of the agent"},
		{append(example, "--set-json", `proxy.listeners=[{"name": "a", "direction": "inbound", "bind": ":8443", "target": "a:1"}, {"name": "b", "direction": "inbound", "bind": "0.0.0.0:8443", "target": "a:1"}]`), "proxy.listeners[1].bind 0.0.0.0:8443: port 8443 is that of the listener a"},
		{append(example, "--set-json", `proxy.listeners=[{"name": "a", "direction": "inbound", "bind": ":8443"}]`), "missing property 'target'"},
		{[]string{"--set", "server.address=spire-server:99999"}, "server.address"},
		{[]string{"--set", "rbac.kubelet=null"}, "kubelet"},
		{[]string{"--set", "agent.config=null"}, "config"},
		{append(example, "--set", "proxy.policiesConfigMap=rules"), "only one of them"},
		{append(example, "--set", "proxy.enabled=false"), "nobody would listen"},
		{append(example, "--set", "proxy.listeners[0].bind=8443"), "bind"},
		{append(example, "--set", "proxy.listeners[0].tarjet=a:1"), "tarjet"},
		{append(example, "--set", "proxy.listeners[0].enforcement=off"), "enforcement"},
		{append(example, "--set-string", "proxy.listeners[0].max_connections=many"), "max_connections"},
		{append(example, "--set", "proxy.listeners=8443"), "listeners"},
		{[]string{"--set-json", `proxy.config={"listeners": []}`}, "say it in proxy.listeners"},
		{[]string{"--set", "agent.sigstore.allowUnsigned=true"}, "agent.sigstore needs trustedRootConfigMap"},
		{[]string{"--set", "agent.sigstore.trusted_root=a"}, "trusted_root"},
		{[]string{"--set", "agent.sigstore.trustedRootConfigMap=a,agent.sigstore.allowedIdentities[0].issuer=https://a.example"}, "subjects"},
		{[]string{"--set", "agent.sigstore.trustedRootConfigMap=a,agent.sigstore.registries[0].host=a,agent.sigstore.registries[0].password=a"}, "registries[0].password is a key of registrySecret"},
		{[]string{"--set", "agent.admin.authorizedDelegates[0]=spiffe://example.org/a"}, "set agent.admin.enabled"},
		{[]string{"--set", "agent.admin.enabled=true,agent.admin.authorizedDelegates[0]=spiffe://other.example/a"}, "agent.admin.authorizedDelegates[0]: spiffe://other.example/a is not of trust domain example.org"},
		{[]string{"--set", "agent.admin.enabled=true,agent.admin.authorizedDelegates[0]=a"}, "authorizedDelegates"},
		{append(broker, "--set", "agent.broker.brokers=null"), "brokers"},
		{append(broker, "--set-json", "agent.broker.brokers=[]"), "agent.broker.brokers is empty"},
		{append(broker, "--set", "agent.broker.brokers[0].references=null"), "references"},
		{append(broker, "--set", "trustDomain=other.example"), "is not of trust domain other.example"},
		{append(broker, "--set", "agent.broker.port=0"), "needs agent.broker.port"},
		{append(broker, "--set", "agent.broker.port=0,agent.broker.socket=false,agent.broker.service=false"), "need a socket or a port"},
		{append(broker, "--set", "agent.broker.port=9904"), "it is that of the metrics of the proxy"},
		{append(broker, "--set", "agent.broker.port=65536"), "port"},
		{append(broker, "-f", "testdata/example.yaml", "--set", "agent.broker.port=8443"), "port 8443 is that of the brokers"},
		{[]string{"--set-json", `agent.config={"broker": {}}`}, "say it in agent.broker"},
		{append(example, "--set", "metrics.podAddress=false"), "needs metrics.podAddress"},
		{[]string{"--set", "agent.kubelet.readOnly=true"}, "set rbac.kubelet to none"},
		{[]string{"--set", "agent.kubelet.clientSecret=kubelet"}, "set rbac.kubelet to none"},
		{[]string{"--set", "agent.kubelet.clientSecret=kubelet,agent.kubelet.readOnly=true,rbac.kubelet=none"}, "no use with readOnly"},
		{[]string{"--set", "rbac.kubelet=none"}, "would refuse the agent"},
		{[]string{"--kube-version", "1.29.0"}, "requires kubeVersion"},
	}
	for _, tt := range tests {
		_, err := chart(tt.args...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want it to name %q", tt.args, err, tt.want)
		}
	}
}

// TestNotes: what is said after an install names what is risky in it. Without
// a cluster Helm shows the notes to nobody, so they are made an object's text.
func TestNotes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../deploy/helm/narthex")); err != nil {
		t.Fatal(err)
	}
	notes, err := os.ReadFile(filepath.Join(dir, "templates", "NOTES.txt"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "templates", "notes.yaml"), "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: notes}\ndata:\n  notes: |\n    "+
		strings.ReplaceAll(string(notes), "\n", "\n    "))
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "create configmap spire-bundle --from-file=bundle.crt=/dev/stdin"},
		{nil, "proxy.enabled=false leaves it out"},
		{[]string{"-f", "testdata/example.yaml"}, "one for the gateways themselves:\n"},
		{[]string{"-f", "testdata/example.yaml"}, "k8s:container-name:proxy"},
		{[]string{"--set", "hostNetwork=true"}, "needs /run/narthex-proxy on every node"},
		{[]string{"--set", "rbac.kubelet=nodes-proxy"}, "run commands in any pod"},
		{[]string{"--set", "agent.kubelet.skipVerification=true"}, "WARNING: agent.kubelet.skipVerification"},
		{[]string{"--set", "metrics.podAddress=true"}, "without authentication"},
		{[]string{"-f", "testdata/broker.yaml"}, "spiffe://example.org/ns/mesh/sa/node-proxy can have the identity of every pod of its node"},
		{[]string{"-f", "testdata/broker.yaml"}, "spiffe://example.org/ns/mesh/sa/cni can have the identity of every process of its node"},
		{[]string{"--kube-version", "1.32.0"}, "older than 1.33"},
	} {
		args := []string{"template", "narthex", dir, "-n", "narthex", "--kube-version", kubernetes, "--show-only", "templates/notes.yaml"}
		out, err := run(helm, append(args, tt.args...)...)
		if err != nil || !strings.Contains(string(out), tt.want) {
			t.Errorf("%v: %v\n%s", tt.args, err, out)
		}
	}
}

// TestImageBuilds does what the Dockerfile's build stage does, for both
// platforms.
func TestImageBuilds(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^RUN (CGO_ENABLED=0 .* -o )/narthex( \./cmd/narthex)$`).FindStringSubmatch(string(text))
	if m == nil {
		t.Fatal("the Dockerfile builds nothing that this test knows")
	}
	for _, arch := range []string{"amd64", "arm64"} {
		program := filepath.Join(t.TempDir(), "narthex")
		cmd := exec.Command("sh", "-c", m[1]+program+m[2])
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "TARGETOS=linux", "TARGETARCH="+arch, "VERSION=v1.2.3")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", arch, err, out)
		}
		out, err := run("go", "version", "-m", program)
		if err != nil || !strings.Contains(string(out), "GOARCH="+arch) || !strings.Contains(string(out), "CGO_ENABLED=0") {
			t.Errorf("%s: %v\n%s", arch, err, out)
		}
	}
}
