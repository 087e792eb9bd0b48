//go:build integration

package tcp_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// node is a `narthex proxy` with identity files. The zero fields are left out
// of its configuration.
type node struct {
	*stage.Process
	*stage.Face
	t    *testing.T
	name string
	dir  string
	td   string
	api  string // socket of a Workload API; empty: identity files

	listeners []*listener
	proxy     []string // further YAML under `proxy:`, "key: value" each
	top       []string // further YAML at the top
	how       []func(*exec.Cmd)
}

// listener is one listener as the tests write it.
type listener struct {
	name   string
	bind   string
	target string
	expect []string // SPIFFE IDs of the peer; makes the listener an outbound one
	more   []string // further YAML, "key: value" each
}

// newNode prepares a proxy that presents own and trusts the authorities, of
// whatever trust domain. Nothing runs yet.
func newNode(t *testing.T, name string, own *svid, authorities ...*authority) *node {
	t.Helper()
	n := &node{t: t, name: name, dir: stage.Folder(t, name)}
	n.Face = stage.NewFace(t, name, n.dir)
	n.td = strings.TrimPrefix(own.id, "spiffe://")
	n.td, _, _ = strings.Cut(n.td, "/")
	n.present(own)
	n.trust(authorities...)
	n.rules()
	return n
}

// newNodeAt prepares a proxy whose identities come from a Workload API.
func newNodeAt(t *testing.T, name, api string) *node {
	t.Helper()
	dir := stage.Folder(t, name)
	n := &node{t: t, name: name, dir: dir, api: api, Face: stage.NewFace(t, name, dir)}
	n.rules()
	return n
}

// present writes the identity files, in the order in which they fit together
// last.
func (n *node) present(own *svid) {
	n.t.Helper()
	stage.WriteFile(n.t, n.file("svid.key"), own.keyPEM(n.t), 0o600)
	stage.WriteFile(n.t, n.file("svid.pem"), own.certPEM(), 0o644)
}

// trust writes the bundles: each domain's holds all of its authorities that
// are given, a domain of which none is given keeps its file.
func (n *node) trust(authorities ...*authority) {
	n.t.Helper()
	byDomain := map[string][]*authority{}
	for _, a := range authorities {
		byDomain[a.td] = append(byDomain[a.td], a)
	}
	for td, list := range byDomain {
		stage.WriteFile(n.t, n.file(td+".bundle"), bundlePEM(list...), 0o644)
	}
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

// inbound adds a listener and returns its address.
func (n *node) inbound(name, target string, more ...string) string {
	n.t.Helper()
	return n.listen(&listener{name: name, target: target, more: more})
}

// outbound adds a listener and returns its address.
func (n *node) outbound(name, target, expect string, more ...string) string {
	n.t.Helper()
	return n.listen(&listener{name: name, target: target, expect: []string{expect}, more: more})
}

func (n *node) listen(l *listener) string {
	n.t.Helper()
	if l.bind == "" {
		l.bind = stage.FreeAddress(n.t)
	}
	n.listeners = append(n.listeners, l)
	return l.bind
}

// rules writes the policy; each rule is YAML of one line, as allow makes
// them. What no rule allows is refused.
func (n *node) rules(rules ...string) {
	n.t.Helper()
	n.policy("rules: [" + strings.Join(rules, ", ") + "]")
}

// policy writes the policy file but for its version.
func (n *node) policy(text string) {
	n.t.Helper()
	stage.WriteFile(n.t, n.file("rules.yaml"), "version: 1\n"+text+"\n", 0o644)
}

// allow is a rule that lets from through to anybody; more is further YAML of
// it.
func allow(id, from string, more ...string) string {
	return fmt.Sprintf("{id: %s, effect: allow, from: [%q]%s}", id, from, strings.Join(append([]string{""}, more...), ", "))
}

// configure writes narthex.yaml. A proxy that runs takes it up.
func (n *node) configure() {
	n.t.Helper()
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("proxy:")
	if n.api == "" {
		n.identityFiles(line)
	} else {
		line("  workload_api: {socket: %s}", n.api)
	}
	line("  policies: [rules.yaml]")
	for _, text := range n.proxy {
		line("  %s", text)
	}
	if len(n.listeners) == 0 {
		line("  listeners: []")
	} else {
		line("  listeners:")
	}
	for _, l := range n.listeners {
		line("    - name: %s", l.name)
		line("      bind: %q", l.bind)
		if l.target != "" {
			line("      target: %s", l.target)
		}
		line("      direction: %s", l.direction())
		if len(l.expect) > 0 {
			line("      expect: [\"%s\"]", strings.Join(l.expect, `", "`))
		}
		for _, text := range l.more {
			line("      %s", text)
		}
	}
	for _, text := range n.top {
		line("%s", text)
	}
	b.WriteString(n.YAML())
	line("log: {level: debug}")
	stage.WriteFile(n.t, n.file("narthex.yaml"), b.String(), 0o644)
}

// identityFiles writes the part of narthex.yaml that names them.
func (n *node) identityFiles(line func(string, ...any)) {
	n.t.Helper()
	line("  source: files")
	line("  files:")
	line("    cert: svid.pem")
	line("    key: svid.key")
	line("    bundle: %s.bundle", n.td)
	bundles, err := filepath.Glob(n.file("*.bundle"))
	if err != nil {
		n.t.Fatal(err)
	}
	var others []string
	for _, file := range bundles {
		if td := strings.TrimSuffix(filepath.Base(file), ".bundle"); td != n.td {
			others = append(others, td+": "+filepath.Base(file))
		}
	}
	line("    bundles: {%s}", strings.Join(others, ", "))
}

func (l *listener) direction() string {
	if len(l.expect) > 0 {
		return "outbound"
	}
	return "inbound"
}

// start starts the proxy and waits until it can serve.
func (n *node) start() {
	n.t.Helper()
	n.configure()
	n.Process = stage.Start(n.t, n.name+": narthex proxy", stage.Narthex, []string{"proxy", "-c", n.file("narthex.yaml")}, n.how...)
	n.ready()
}

func (n *node) ready() {
	n.t.Helper()
	stage.Eventually(n.t, stage.Soon, n.name+" is ready", func() error {
		if err := n.Alive(); err != nil {
			n.t.Fatal(err)
		}
		return n.Ready()
	})
}

// reload makes the proxy read its files again and waits until it has.
func (n *node) reload() {
	n.t.Helper()
	const ok, bad = `narthex_policy_reloads_total{result="ok"}`, `narthex_policy_reloads_total{result="error"}`
	before, errors := n.Metric(ok), n.Metric(bad)
	n.Signal(syscall.SIGHUP)
	stage.Eventually(n.t, stage.Soon, n.name+" has read its files again", func() error {
		if n.Metric(bad) > errors {
			n.t.Fatalf("%s cannot reload:\n%s", n.name, n.Said())
		}
		if n.Metric(ok) == before {
			return fmt.Errorf("not yet")
		}
		return nil
	})
}

// changeRules puts another policy in force.
func (n *node) changeRules(rules ...string) {
	n.t.Helper()
	n.rules(rules...)
	n.reload()
}

// refused waits for the access record of a connection that was refused.
func (n *node) refused(skip int, reason string) telemetry.Access {
	n.t.Helper()
	a := n.Record(skip, reason, func(a telemetry.Access) bool { return strings.Contains(a.Reason, reason) })
	if a.Outcome != "failure" || a.Decision == "allow" || a.Source == "" {
		n.t.Errorf("the record of a refused connection: %+v", a)
	}
	return a
}

// live returns how many connections are open.
func (n *node) live() (live int) {
	n.t.Helper()
	s, err := n.Status()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range s.Proxy.Listeners {
		live += l.Active
	}
	return live
}

// quiet waits until no connection is open any more.
func (n *node) quiet() {
	n.t.Helper()
	stage.Eventually(n.t, stage.Soon, n.name+" has no connection left", func() error {
		if live := n.live(); live > 0 {
			return fmt.Errorf("%d are open", live)
		}
		return nil
	})
}
