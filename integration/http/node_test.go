//go:build integration

package http_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// node is a `narthex proxy` with identity files.
type node struct {
	*stage.Process
	*stage.Face
	t         *testing.T
	name      string
	dir       string
	own       *svid
	listeners []string // YAML
}

// newNode prepares a proxy that presents own and trusts its authority.
// Nothing runs yet.
func newNode(t *testing.T, name string, own *svid) *node {
	t.Helper()
	dir := stage.Folder(t, name)
	return &node{t: t, name: name, dir: dir, own: own, Face: stage.NewFace(t, name, dir)}
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

// inbound adds a listener of HTTP and returns its address. More is further
// YAML of it, "key: value" each.
func (n *node) inbound(name, target string, more ...string) string {
	n.t.Helper()
	return n.listen(name, "inbound", target, more...)
}

// outbound adds one that goes to target as ours, where expect has to be.
func (n *node) outbound(name, target, expect string, more ...string) string {
	n.t.Helper()
	return n.listen(name, "outbound", target, append([]string{fmt.Sprintf("expect: [%q]", expect)}, more...)...)
}

func (n *node) listen(name, direction, target string, more ...string) string {
	n.t.Helper()
	bind := stage.FreeAddress(n.t)
	lines := []string{"protocol: http", "direction: " + direction, fmt.Sprintf("bind: %q", bind), fmt.Sprintf("target: %q", target)}
	n.listeners = append(n.listeners, "    - name: "+name+"\n      "+strings.Join(append(lines, more...), "\n      "))
	return bind
}

// rules writes the policy; each rule is YAML of one line, as allow makes
// them. What no rule allows is refused.
func (n *node) rules(rules ...string) {
	n.t.Helper()
	n.policy("rules:\n  - " + strings.Join(rules, "\n  - "))
}

// policy writes the policy file but for its version.
func (n *node) policy(text string) {
	n.t.Helper()
	stage.WriteFile(n.t, n.file("rules.yaml"), "version: 1\n"+text+"\n", 0o644)
}

// allow is a rule that lets from through to anybody; more is further YAML of
// it.
func allow(rule, from string, more ...string) string {
	return fmt.Sprintf("{id: %s, effect: allow, from: [%q]%s}", rule, from, strings.Join(append([]string{""}, more...), ", "))
}

// configure writes narthex.yaml. A proxy that runs takes it up.
func (n *node) configure() {
	n.t.Helper()
	stage.WriteFile(n.t, n.file("narthex.yaml"), fmt.Sprintf(`proxy:
  source: files
  files: {cert: %s, key: %s, bundle: %s}
  policies: [rules.yaml]
  listeners:
%s
%slog: {level: debug}
`, n.own.certFile, n.own.keyFile, n.own.ca.bundle, strings.Join(n.listeners, "\n"), n.YAML()), 0o644)
}

// start starts the proxy and waits until it can serve.
func (n *node) start() {
	n.t.Helper()
	n.configure()
	n.Process = stage.Start(n.t, n.name+": narthex proxy", stage.Narthex, []string{"proxy", "-c", n.file("narthex.yaml")})
	stage.Eventually(n.t, stage.Soon, n.name+" is ready", func() error {
		if err := n.Alive(); err != nil {
			n.t.Fatal(err)
		}
		return n.Ready()
	})
}

// changeRules puts another policy in force and waits until it is.
func (n *node) changeRules(rules ...string) {
	n.t.Helper()
	n.rules(rules...)
	n.reload()
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

// request waits for the access record of a request for a path, among those
// after the first skip ones.
func (n *node) request(skip int, path string) telemetry.Access {
	n.t.Helper()
	return n.Record(skip, "of "+path, func(a telemetry.Access) bool { return a.HTTP != nil && a.HTTP.Path == path })
}

// pair is a service behind two proxies: a caller speaks plaintext to the
// outbound one, which speaks mutual TLS to the inbound one.
type pair struct {
	ca            *authority
	client        *svid // the outbound proxy's, and good for clients of their own
	out, in       *node
	entry, secure string // addresses of the outbound listener, and of the inbound one
}

// newPair starts both before the service at target. More is further YAML of
// both listeners.
func newPair(t *testing.T, target string, more ...string) *pair {
	t.Helper()
	p := &pair{ca: newAuthority(t)}
	p.client = p.ca.leaf("/client")
	server := p.ca.leaf("/server")
	p.in, p.out = newNode(t, "in", server), newNode(t, "out", p.client)
	p.secure = p.in.inbound("in", target, more...)
	p.entry = p.out.outbound("out", p.secure, server.id, more...)
	for _, n := range []*node{p.in, p.out} {
		n.rules(allow("client-may", p.client.id))
		n.start()
	}
	return p
}
