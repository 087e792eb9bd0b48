package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/policy"
)

const goodRules = `version: 1
rules:
  - {id: web, effect: allow, from: ["spiffe://example.org/web"]}
`

// keeping is a directory with a configuration, its rules and a copy of them.
type keeping struct {
	*lastGood
	t    *testing.T
	dir  string
	want manifest
}

func (k *keeping) file(name string) string { return filepath.Join(k.dir, name) }

func (k *keeping) write(name, text string) {
	k.t.Helper()
	if err := os.WriteFile(k.file(name), []byte(text), 0o600); err != nil {
		k.t.Fatal(err)
	}
}

// configured returns what the copy is to be good for, by narthex.yaml.
func (k *keeping) configured(listener string) manifest {
	k.t.Helper()
	k.write("narthex.yaml", `
data_dir: data
proxy:
  source: files
  files: {cert: a.pem, key: a.key, bundle: b.pem}
  policies: [rules*.yaml]
  listeners:
    - `+listener+"\n")
	c, err := config.Load(k.file("narthex.yaml"))
	if err != nil {
		k.t.Fatal(err)
	}
	k.lastGood = openLastGood(c, nil, hclog.NewNullLogger())
	if k.lastGood.dir != k.file("data/proxy/last-good") {
		k.t.Fatalf("the copy is in %q", k.lastGood.dir)
	}
	return purpose(c, k.file("narthex.yaml"))
}

const inListener = `{name: orders, direction: inbound, bind: "127.0.0.1:8443", target: "127.0.0.1:8080"}`

func newKept(t *testing.T) *keeping {
	k := &keeping{t: t, dir: t.TempDir()}
	k.write("rules.yaml", goodRules)
	k.write("rules-2.yaml", "version: 1\nrevoked: [\"spiffe://example.org/evil\"]\n")
	k.want = k.configured(inListener)
	k.keep(k.want, fingerprint([]string{k.file("rules.yaml"), k.file("rules-2.yaml")}))
	if k.said != "" {
		t.Fatal(k.said)
	}
	return k
}

func (k *keeping) names() (names []string) {
	entries, err := os.ReadDir(k.lastGood.dir)
	if err != nil {
		k.t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.Mode().Perm() != 0o600 {
			k.t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
		names = append(names, e.Name())
	}
	return names
}

func TestLastGood(t *testing.T) {
	k := newKept(t)
	files := []string{k.file("rules.yaml"), k.file("rules-2.yaml")}
	want, err := policy.Load(files...)
	if err != nil {
		t.Fatal(err)
	}
	got, at, err := (&lastGood{dir: k.lastGood.dir}).load(k.want)
	if err != nil || !got.Equal(want) || at.IsZero() {
		t.Fatalf("%v, made at %v: %v", got, at, err)
	}
	for _, dir := range []string{"data", "data/proxy", "data/proxy/last-good"} {
		if info, err := os.Stat(k.file(dir)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, info.Mode(), err)
		}
	}
	if n := k.names(); len(n) != 3 {
		t.Errorf("the copy is %v", n)
	}

	// Exactly one is kept, and what a crash has left goes with the old one.
	k.write("data/proxy/last-good/"+strings.Repeat("a", 64)+".yaml.new", "half")
	k.write("rules.yaml", strings.ReplaceAll(goodRules, "web", "front"))
	k.keep(k.want, fingerprint(files[:1]))
	if n := k.names(); k.said != "" || len(n) != 2 {
		t.Errorf("the copy is %v: %s", n, k.said)
	}

	// What is no longer what was loaded is not kept.
	k.write("rules.yaml", goodRules)
	loaded := fingerprint(files)
	k.write("rules.yaml", goodRules+"\n# changed meanwhile\n")
	k.keep(k.want, loaded)
	if got, _, err = k.load(k.want); err != nil || got.Rules() != 1 || k.said != "" {
		t.Errorf("%v: %v, %s", got, err, k.said)
	}
	if n := k.names(); len(k.kept.Files) != 1 || len(n) < 2 {
		t.Errorf("the copy is %v of %v", n, k.kept)
	}
}

// TestLastGoodIsRefused: what was torn, edited, or made for something else is
// no copy.
func TestLastGoodIsRefused(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(t *testing.T, k *keeping)
		want  string
	}{
		"edited text": {func(t *testing.T, k *keeping) {
			k.write("data/proxy/last-good/"+k.kept.Files[0].copyName(), strings.ReplaceAll(goodRules, "web", "evil"))
		}, "is not what was kept"},
		"torn text": {func(t *testing.T, k *keeping) {
			if err := os.Truncate(k.file("data/proxy/last-good/"+k.kept.Files[0].copyName()), 10); err != nil {
				t.Fatal(err)
			}
		}, "is not what was kept"},
		"missing text": {func(t *testing.T, k *keeping) {
			if err := os.Remove(k.file("data/proxy/last-good/" + k.kept.Files[1].copyName())); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		"edited manifest": {func(t *testing.T, k *keeping) {
			data, err := os.ReadFile(k.file("data/proxy/last-good/manifest.json"))
			if err != nil {
				t.Fatal(err)
			}
			k.write("data/proxy/last-good/manifest.json", strings.Replace(string(data), "rules-2.yaml", "rules-3.yaml", 1))
		}, "was edited or is torn"},
		"torn manifest":    {func(t *testing.T, k *keeping) { k.write("data/proxy/last-good/manifest.json", `{"version":1,`) }, "unexpected EOF"},
		"another version":  {func(t *testing.T, k *keeping) { k.write("data/proxy/last-good/manifest.json", `{"version":2}`) }, "version 2"},
		"another config":   {func(t *testing.T, k *keeping) { k.want.Config = "/etc/other.yaml" }, "are those of "},
		"another listener": {func(t *testing.T, k *keeping) { k.want = k.configured(strings.Replace(inListener, "8080", "8081", 1)) }, "for other listeners"},
		"another listener's name": {func(t *testing.T, k *keeping) {
			k.want = k.configured(strings.Replace(inListener, "orders", "admin", 1))
		}, "for other listeners"},
		"no copy": {func(t *testing.T, k *keeping) {
			if err := os.Remove(k.file("data/proxy/last-good/manifest.json")); err != nil {
				t.Fatal(err)
			}
		}, errNoCopy.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			if _, _, err := k.load(k.want); err != nil {
				t.Fatal(err)
			}
			test.spoil(t, k)
			rules, _, err := k.load(k.want)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("%d rules, %v, want %q", rules.Rules(), err, test.want)
			}
			said := strings.Contains(err.Error(), "there is a copy of the last good rules in "+k.lastGood.dir+", but it is not used: ")
			if none := errors.Is(err, errNoCopy); said == none {
				t.Errorf("%v: does not say whether there is a copy", err)
			}
		})
	}
	k := newKept(t)
	if other := k.configured(inListener[:len(inListener)-1] + `, timeouts: {idle: 1h}}`); other.Listeners != k.want.Listeners {
		t.Error("another timeout makes the copy one of other listeners")
	}
	if _, _, err := (&lastGood{}).load(k.want); !errors.Is(err, errNoCopy) {
		t.Error(err)
	}
}

// TestLastGoodNeedsItsDirectory: rules are not kept where others could put
// theirs.
func TestLastGoodNeedsItsDirectory(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(k *keeping) error
		want  string // of a start with broken rules
	}{
		"open to others": {func(k *keeping) error { return os.Chmod(k.file("data/proxy"), 0o750) }, "has mode 0750"},
		"open below":     {func(k *keeping) error { return os.Chmod(k.file("data/proxy/last-good"), 0o777) }, "has mode 0777"},
		"a file": {func(k *keeping) error {
			return errors.Join(os.RemoveAll(k.file("data/proxy")), os.WriteFile(k.file("data/proxy"), nil, 0o600))
		}, errNoCopy.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			if err := test.spoil(k); err != nil {
				t.Fatal(err)
			}
			c, err := config.Load(k.file("narthex.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			var log strings.Builder
			g := openLastGood(c, nil, hclog.New(&hclog.LoggerOptions{Output: &log}))
			if g.dir != "" || !strings.Contains(log.String(), "the rules in force are not kept") {
				t.Errorf("kept in %q: %s", g.dir, log.String())
			}
			if _, _, err := g.load(k.want); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// runner is a proxy that is about to start with the files.
func (k *keeping) runner() *proxyRunner {
	k.t.Helper()
	c, err := config.Load(k.file("narthex.yaml"))
	if err != nil {
		k.t.Fatal(err)
	}
	return &proxyRunner{
		path: k.file("narthex.yaml"), config: c, log: hclog.NewNullLogger(), metrics: telemetry.NewMetrics(),
		place: &succession{}, good: openLastGood(c, nil, hclog.NewNullLogger()),
	}
}

// TestStartSaysWhyNoCopyIsUsed: who starts with broken rules is told of the
// rules, and of the copy.
func TestStartSaysWhyNoCopyIsUsed(t *testing.T) {
	k := newKept(t)
	k.write("rules.yaml", "version: 1\nrulez: []\n")
	if r := k.runner(); r.firstRules() != nil || r.copied.IsZero() {
		t.Error("the copy is not used")
	}
	k.configured(strings.Replace(inListener, "8080", "8081", 1))
	err := k.runner().firstRules()
	for _, want := range []string{"rules.yaml:2:1", "rulez", "there is a copy", k.lastGood.dir, "for other listeners", "Mend the rule files"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: says nothing of %q", err, want)
		}
	}
}

// TestReloadErrorsAreCountedOnce: one save that is no good is one error,
// however often the watch wakes for it; a person who asks is told again.
func TestReloadErrorsAreCountedOnce(t *testing.T) {
	k := newKept(t)
	r := k.runner()
	if err := r.firstRules(); err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct {
		rules string // left out: as before
		asked bool
		want  uint64
	}{
		{rules: "version: 1\nrulez: []\n", want: 1},
		{want: 1},
		{want: 1},
		{asked: true, want: 2},
		{rules: "version: 1\nrule: []\n", want: 3},
		{want: 3},
	} {
		if step.rules != "" {
			k.write("rules.yaml", step.rules)
		}
		r.reload(step.asked)
		if got := r.reloads().With("error").Value(); got != step.want || r.last.Result != "error" {
			t.Errorf("step %d: %d errors, want %d; the last reload: %+v", i, got, step.want, r.last)
		}
	}
}

// FuzzManifest: what is read is what is written.
func FuzzManifest(f *testing.F) {
	data, err := manifest{Version: manifestVersion, Config: "/etc/narthex.yaml", Files: []ruleFile{{"/r.yaml", strings.Repeat("0a", 32)}}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest(data)
		if err != nil {
			return
		}
		if again, err := m.encode(); err != nil || string(again) != string(data) {
			t.Errorf("%q is written as %q, %v", data, again, err)
		}
		for _, f := range m.Files {
			if strings.Contains(f.copyName(), "/") {
				t.Errorf("the copy of %s is %s", f.Name, f.copyName())
			}
		}
	})
}
