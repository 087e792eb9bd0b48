package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/narthex-id/narthex/internal/report"
)

// object is one of Kubernetes', as it is written.
type object struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct {
		Template struct {
			Spec podSpec
		}
	}
}

type podSpec struct {
	InitContainers []container `yaml:"initContainers"`
	Containers     []container
	Volumes        []struct {
		Name      string
		ConfigMap struct{ Name string } `yaml:"configMap"`
	}
}

type container struct {
	Name, Image  string
	Args         []string
	VolumeMounts []struct {
		Name, MountPath, SubPath string
	} `yaml:"volumeMounts"`
}

func readObjects(t *testing.T, file string) (objects []object) {
	t.Helper()
	decoder := yaml.NewDecoder(strings.NewReader(readPage(t, file)))
	for {
		var o object
		err := decoder.Decode(&o)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		objects = append(objects, o)
	}
}

// checkMounted checks files as `narthex check` would in the container in which
// they are at /etc/narthex, rules perhaps in a directory of their own.
func checkMounted(t *testing.T, least report.Level, files map[string]string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "policies"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		text = strings.ReplaceAll(text, "/etc/narthex/", dir+"/")
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	found := checkFiles(filepath.Join(dir, "narthex.yaml"))
	found.Keep(least)
	for _, f := range found.List {
		t.Error(f)
	}
}

// TestKubernetesExamples: what runs narthex in them is called as it can be,
// with files that are good.
func TestKubernetesExamples(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "deploy", "examples", "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	index := readPage(t, "deploy/examples/README.md")
	configs := map[string]bool{}
	for _, file := range files {
		for _, o := range readObjects(t, "deploy/examples/"+filepath.Base(file)) {
			if o.Kind == "ConfigMap" {
				configs[o.Metadata.Name] = true
			}
		}
	}
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(index, "["+name+"]("+name+")") {
				t.Error("the README does not name it")
			}
			for _, o := range readObjects(t, "deploy/examples/"+name) {
				if o.Data["narthex.yaml"] != "" {
					checkMounted(t, report.Warning, o.Data)
				}
				checkPod(t, o.Spec.Template.Spec)
				for _, v := range o.Spec.Template.Spec.Volumes {
					if c := v.ConfigMap.Name; c != "" && !configs[c] {
						t.Errorf("volume %s: there is no ConfigMap %s", v.Name, c)
					}
				}
			}
		})
	}
}

// checkPod holds a pod's calls of narthex against its commands, and its mounts
// against its volumes.
func checkPod(t *testing.T, pod podSpec) {
	t.Helper()
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if strings.Contains(c.Image, "narthex-id") {
			cmd, args, err := newRoot().Find(c.Args)
			if err == nil {
				err = cmd.ParseFlags(args)
			}
			if err != nil || len(c.Args) == 0 || len(cmd.Flags().Args()) != 0 {
				t.Errorf("container %s: narthex %s: %v", c.Name, strings.Join(c.Args, " "), err)
			}
		}
		for _, m := range c.VolumeMounts {
			if m.SubPath != "" {
				t.Errorf("container %s: %s is mounted by subPath, which follows no change", c.Name, m.MountPath)
			}
			found := false
			for _, v := range pod.Volumes {
				found = found || v.Name == m.Name
			}
			if !found {
				t.Errorf("container %s: there is no volume %s", c.Name, m.Name)
			}
		}
	}
}

// TestKustomizeFiles: the files that are rendered as they are. Metrics open to
// the network and targets elsewhere are what a gateway is for.
func TestKustomizeFiles(t *testing.T) {
	page := func(name string) string { return readPage(t, "deploy/kustomize/"+name) }
	checkMounted(t, report.Warning, map[string]string{"narthex.yaml": page("base/agent.yaml")})
	checkMounted(t, report.Error, map[string]string{"narthex.yaml": page("base/proxy.yaml"), "policies.rules.yaml": page("base/rules.yaml")})
	checkMounted(t, report.Error, map[string]string{"narthex.yaml": page("example/agent.yaml")})
	checkMounted(t, report.Error, map[string]string{"narthex.yaml": page("example/proxy.yaml"), "policies.rules.yaml": page("example/rules.yaml")})
	for _, file := range []string{"base/daemonset.yaml", "components/csi/csi.yaml"} {
		for _, o := range readObjects(t, "deploy/kustomize/"+file) {
			checkPod(t, o.Spec.Template.Spec)
		}
	}
}

// chartValue is a value of the chart with what is said of it.
type chartValue struct {
	path, comment string
	value         any
}

// chartValues reads values.yaml with its comments: each stands before its key,
// on one line.
func chartValues(t *testing.T) (values []chartValue, all map[string]any) {
	t.Helper()
	text := readPage(t, "deploy/helm/narthex/values.yaml")
	if err := yaml.Unmarshal([]byte(text), &all); err != nil {
		t.Fatal(err)
	}
	_, text, _ = strings.Cut(text, "\n\n") // what the file is
	comment, path := "", []string(nil)
	key := regexp.MustCompile(`^( *)([A-Za-z0-9.-]+):`)
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if c, ok := strings.CutPrefix(strings.TrimSpace(line), "# "); ok {
			if comment != "" {
				t.Errorf("%q: a comment of two lines", c)
			}
			comment = c
			continue
		}
		if m := key.FindStringSubmatch(line); m != nil {
			path = append(path[:len(m[1])/2:len(m[1])/2], m[2])
			if comment != "" {
				values = append(values, chartValue{strings.Join(path, "."), comment, valueAt(all, path)})
			}
		}
		comment = ""
	}
	return values, all
}

func valueAt(values any, path []string) any {
	for _, key := range path {
		values = values.(map[string]any)[key]
	}
	return values
}

// TestChartValues: every value of the chart is explained where it is, and in
// the README in the same words.
func TestChartValues(t *testing.T) {
	values, all := chartValues(t)
	var table strings.Builder
	table.WriteString("| value | default | |\n|---|---|---|\n")
	explained := map[string]bool{}
	for _, v := range values {
		var shown bytes.Buffer
		encoder := json.NewEncoder(&shown)
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(v.value); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&table, "| `%s` | `%s` | %s |\n", v.path, strings.TrimSpace(shown.String()), v.comment)
		explained[v.path] = true
	}
	if readme := readPage(t, "deploy/helm/narthex/README.md"); !strings.HasSuffix(readme, "\n\n"+table.String()) {
		t.Errorf("deploy/helm/narthex/README.md has to end with this table:\n%s", table.String())
	}
	var walk func(path string, value any)
	walk = func(path string, value any) {
		inner, ok := value.(map[string]any)
		if explained[path] {
			return
		}
		if !ok {
			t.Errorf("values.yaml does not explain %s", path)
		}
		for key, value := range inner {
			walk(strings.TrimPrefix(path+"."+key, "."), value)
		}
	}
	walk("", all)
}

// TestChartSchema: the schema has every value, and takes no other.
func TestChartSchema(t *testing.T) {
	type schema struct {
		Properties           map[string]json.RawMessage
		AdditionalProperties *bool
	}
	_, all := chartValues(t)
	var walk func(path string, raw []byte, value map[string]any)
	walk = func(path string, raw []byte, value map[string]any) {
		var s schema
		if json.Unmarshal(raw, &s) != nil || s.Properties == nil {
			return // any keys, or a reference
		}
		if s.AdditionalProperties == nil || *s.AdditionalProperties {
			t.Errorf("the schema takes any key of %q", path)
		}
		delete(s.Properties, "global") // Helm's own
		want, got := slices.Sorted(maps.Keys(value)), slices.Sorted(maps.Keys(s.Properties))
		if !slices.Equal(want, got) {
			t.Errorf("%q: values.yaml has %v, the schema %v", path, want, got)
		}
		for key, raw := range s.Properties {
			if inner, ok := value[key].(map[string]any); ok {
				walk(strings.TrimPrefix(path+"."+key, "."), raw, inner)
			}
		}
	}
	walk("", []byte(readPage(t, "deploy/helm/narthex/values.schema.json")), all)
}

// TestChartSchemaOfNarthex: what the chart takes as it is in narthex.yaml, Helm
// refuses where narthex would.
func TestChartSchemaOfNarthex(t *testing.T) {
	read := func(file string) (schema map[string]any) {
		if err := json.Unmarshal([]byte(readPage(t, file)), &schema); err != nil {
			t.Fatal(err)
		}
		return schema
	}
	part := func(schema any, path ...string) any {
		for _, key := range path {
			schema = schema.(map[string]any)["properties"].(map[string]any)[key]
		}
		return schema.(map[string]any)["items"]
	}
	chart, narthex := read("deploy/helm/narthex/values.schema.json"), read("docs/narthex.schema.json")
	signatures := []string{"agent", "workload_attestors", "k8s", "sigstore"}
	for _, tt := range []struct {
		name       string
		ours, want any
	}{
		{"proxy.listeners", part(chart, "proxy", "listeners"), part(narthex, "proxy", "listeners")},
		{
			"agent.sigstore.allowedIdentities",
			part(chart, "agent", "sigstore", "allowedIdentities"), part(narthex, slices.Concat(signatures, []string{"allowed_identities"})...),
		},
		{"agent.broker.brokers", part(chart, "agent", "broker", "brokers"), part(narthex, "agent", "broker", "brokers")},
		{"agent.admin.authorizedDelegates", part(chart, "agent", "admin", "authorizedDelegates"), part(narthex, "agent", "admin", "authorized_delegates")},
	} {
		if !reflect.DeepEqual(tt.ours, tt.want) {
			t.Errorf("values.schema.json: the items of %s are not those of docs/narthex.schema.json: copy them", tt.name)
		}
	}
}

// TestDockerfile: every line is an instruction, the versions are those of the
// module, and nothing that the program is built from is kept out.
func TestDockerfile(t *testing.T) {
	text := readPage(t, "Dockerfile")
	text = strings.ReplaceAll(regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(text, ""), "\\\n", "")
	var stages, entry string
	for line := range strings.Lines(text) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "FROM":
			stages += rest + "; "
		case "USER", "ENTRYPOINT":
			entry += word + " " + rest + "; "
		case "", "ARG", "LABEL", "COPY", "RUN", "WORKDIR":
		default:
			t.Errorf("%s: no instruction", line)
		}
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(readPage(t, "go.mod"))[1]
	if want := "--platform=$BUILDPLATFORM golang:" + version + " AS build; scratch; "; stages != want {
		t.Errorf("stages %q, want %q", stages, want)
	}
	if want := `USER 65532:65532; ENTRYPOINT ["/narthex"]; `; entry != want {
		t.Errorf("ends with %q, want %q", entry, want)
	}
	kept := readPage(t, ".dockerignore")
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if .Module}}{{if .Module.Main}}{{.ImportPath}}{{end}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, room := range strings.Fields(string(out)) {
		top, _, _ := strings.Cut(strings.TrimPrefix(room, module), "/")
		if !strings.Contains(kept, "\n!"+top+"\n") {
			t.Errorf(".dockerignore leaves out %s", room)
		}
	}
}
