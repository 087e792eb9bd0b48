package mesh

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// Node is a `narthex proxy` with identity files.
type Node struct {
	*stage.Process
	*stage.Face
	t         *testing.T
	Name      string
	Dir       string
	Own       *SVID
	Listeners []string // YAML
}

// NewNode prepares a proxy that presents own and trusts its authority.
// Nothing runs yet.
func NewNode(t *testing.T, name string, own *SVID) *Node {
	t.Helper()
	dir := stage.Folder(t, name)
	return &Node{t: t, Name: name, Dir: dir, Own: own, Face: stage.NewFace(t, name, dir)}
}

// File returns the path of a file in its folder.
func (n *Node) File(name string) string { return filepath.Join(n.Dir, name) }

// Inbound adds a listener of HTTP and returns its address. More is further
// YAML of it, "key: value" each.
func (n *Node) Inbound(name, target string, more ...string) string {
	n.t.Helper()
	return n.Listen(name, "inbound", target, more...)
}

// Outbound adds one that goes to target as ours, where expect has to be.
func (n *Node) Outbound(name, target, expect string, more ...string) string {
	n.t.Helper()
	return n.Listen(name, "outbound", target, append([]string{fmt.Sprintf("expect: [%q]", expect)}, more...)...)
}

func (n *Node) Listen(name, direction, target string, more ...string) string {
	n.t.Helper()
	bind := stage.FreeAddress(n.t)
	lines := []string{"protocol: http", "direction: " + direction, fmt.Sprintf("bind: %q", bind), fmt.Sprintf("target: %q", target)}
	n.Listeners = append(n.Listeners, "    - name: "+name+"\n      "+strings.Join(append(lines, more...), "\n      "))
	return bind
}

// Rules writes the policy; each rule is YAML of one line, as Allow makes
// them. What no rule allows is refused.
func (n *Node) Rules(rules ...string) {
	n.t.Helper()
	n.Policy("rules:\n  - " + strings.Join(rules, "\n  - "))
}

// Policy writes the policy file but for its version.
func (n *Node) Policy(text string) {
	n.t.Helper()
	stage.WriteFile(n.t, n.File("rules.yaml"), "version: 1\n"+text+"\n", 0o644)
}

// Allow is a rule that lets from through to anybody; more is further YAML of
// it.
func Allow(rule, from string, more ...string) string {
	return fmt.Sprintf("{id: %s, effect: allow, from: [%q]%s}", rule, from, strings.Join(append([]string{""}, more...), ", "))
}

// Configure writes narthex.yaml. A proxy that runs takes it up.
func (n *Node) Configure() {
	n.t.Helper()
	stage.WriteFile(n.t, n.File("narthex.yaml"), fmt.Sprintf(`proxy:
  source: files
  files: {cert: %s, key: %s, bundle: %s}
  policies: [rules.yaml]
  listeners:
%s
%slog: {level: debug}
`, n.Own.CertFile, n.Own.KeyFile, n.Own.CA.Bundle, strings.Join(n.Listeners, "\n"), n.YAML()), 0o644)
}

// Start starts the proxy and waits until it can serve.
func (n *Node) Start() {
	n.t.Helper()
	n.Configure()
	n.Process = stage.Start(n.t, n.Name+": narthex proxy", stage.Narthex, []string{"proxy", "-c", n.File("narthex.yaml")})
	stage.Eventually(n.t, stage.Soon, n.Name+" is ready", func() error {
		if err := n.Alive(); err != nil {
			n.t.Fatal(err)
		}
		return n.Ready()
	})
}

// ChangeRules puts another policy in force and waits until it is.
func (n *Node) ChangeRules(rules ...string) {
	n.t.Helper()
	n.Rules(rules...)
	n.Reload()
}

// Reload makes the proxy read its files again and waits until it has.
func (n *Node) Reload() {
	n.t.Helper()
	const ok, bad = `narthex_policy_reloads_total{result="ok"}`, `narthex_policy_reloads_total{result="error"}`
	before, errors := n.Metric(ok), n.Metric(bad)
	n.Signal(syscall.SIGHUP)
	stage.Eventually(n.t, stage.Soon, n.Name+" has read its files again", func() error {
		if n.Metric(bad) > errors {
			n.t.Fatalf("%s cannot reload:\n%s", n.Name, n.Said())
		}
		if n.Metric(ok) == before {
			return fmt.Errorf("not yet")
		}
		return nil
	})
}

// Live returns how many connections are open.
func (n *Node) Live() (live int) {
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

// Request waits for the access record of a request for a path, among those
// after the first skip ones.
func (n *Node) Request(skip int, path string) telemetry.Access {
	n.t.Helper()
	return n.Record(skip, "of "+path, func(a telemetry.Access) bool { return a.HTTP != nil && a.HTTP.Path == path })
}
