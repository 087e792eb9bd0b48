//go:build integration

package spire_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// node is one host as far as narthex is concerned: a configuration, a data
// directory and sockets of its own. The zero fields below are left out of the
// configuration.
type node struct {
	*stage.Process
	*stage.Face
	t    *testing.T
	name string
	dir  string
	user user // whom the proxy becomes

	// The agent's half, unless server is empty.
	server   string // host:port
	td       string
	bundle   string // file
	trust    string // YAML of the server's bundle, instead of that file
	serving  string // further YAML of the server, "key: value" separated by commas
	attestor string // YAML of node_attestor
	broker   string // YAML of broker
	cacheMax int
	syncs    time.Duration

	admin     string   // its admin socket
	delegates []string // SPIFFE IDs

	// The proxy's half, unless there are no listeners.
	api       string // Workload API socket; the agent's own, or another agent's
	listeners []listener
}

// listener is one listener as the tests write it.
type listener struct {
	name     string
	bind     string // a free address where empty
	target   string
	identity string // SPIFFE ID to present; the default one where empty
	expect   string // SPIFFE ID of the peer; makes the listener an outbound one
	more     string // further YAML, "key: value" of one line
}

// newNode prepares a host whose proxy runs as u. Nothing runs yet.
func newNode(t *testing.T, name string, u user) *node {
	t.Helper()
	n := &node{t: t, name: name, user: u, dir: stage.Folder(t, name)}
	n.Face = stage.NewFace(t, name, n.own())
	n.api = filepath.Join(n.dir, "public", "api.sock")
	// The proxy makes its sockets and its access log here.
	if err := os.Mkdir(n.own(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(n.own(), u.uid, u.uid); err != nil {
		t.Fatal(err)
	}
	return n
}

// joins makes the node an agent of s that attests with a join token, and
// returns the agent's SPIFFE ID.
func (n *node) joins(s *server) (agentID string) {
	n.t.Helper()
	n.pairs(s)
	token, id := s.token()
	n.useToken(token)
	return id
}

// useToken makes the node attest with this token.
func (n *node) useToken(token string) {
	n.t.Helper()
	file := filepath.Join(n.dir, "token")
	stage.WriteFile(n.t, file, token+"\n", 0o600)
	n.attestor = "join_token: {token_file: " + file + "}"
}

// proves makes the node an agent of s that attests with a certificate, and
// returns the agent's SPIFFE ID.
func (n *node) proves(s *server) (agentID string) {
	n.t.Helper()
	n.pairs(s)
	cert, key, parsed := s.nodes.issue(n.name, "")
	n.attestor = "x509pop: {certificate: " + cert + ", key: " + key + "}"
	return s.id("/spire/agent/x509pop/" + fingerprint(parsed))
}

func (n *node) pairs(s *server) {
	n.t.Helper()
	n.server, n.td, n.syncs = s.address, s.td.Name(), time.Second
	n.bundle = filepath.Join(n.dir, "bundle.pem")
	stage.WriteFile(n.t, n.bundle, s.bundlePEM(), 0o644)
}

func (n *node) own() string        { return filepath.Join(n.dir, "own") }
func (n *node) dataDir() string    { return filepath.Join(n.dir, "data") }
func (n *node) policyFile() string { return filepath.Join(n.dir, "policy.yaml") }
func (n *node) configFile() string { return filepath.Join(n.dir, "narthex.yaml") }

// configure writes narthex.yaml.
func (n *node) configure() {
	n.t.Helper()
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if n.server != "" {
		line("trust_domain: %s", n.td)
		line("data_dir: %s", n.dataDir())
		line("agent:")
		trust, more := n.trust, n.serving
		if trust == "" {
			trust = "{file: " + n.bundle + "}"
		}
		if more != "" {
			more = ", " + more
		}
		line("  server: {address: %q, bundle: %s%s}", n.server, trust, more)
		line("  node_attestor: {%s}", n.attestor)
		line("  workload_api: {socket: %s}", n.api)
		line("  sync: {interval: %s}", n.syncs)
		if n.admin != "" {
			line("  admin: {socket: %s, authorized_delegates: [%s]}", n.admin, strings.Join(n.delegates, ", "))
		}
		if n.broker != "" {
			line("  broker: {%s}", n.broker)
		}
		if n.cacheMax > 0 {
			line("  svid: {x509_cache: %d}", n.cacheMax)
		}
	}
	if len(n.listeners) > 0 {
		line("proxy:")
		line("  user: %s", n.user.name)
		line("  workload_api: {socket: %s}", n.api)
		line("  policies: [%s]", n.policyFile())
		line("  listeners:")
		for i := range n.listeners {
			n.configureListener(&n.listeners[i], line)
		}
	}
	b.WriteString(n.YAML())
	line("log: {level: debug}")
	stage.WriteFile(n.t, n.configFile(), b.String(), 0o644)
}

func (n *node) configureListener(l *listener, line func(string, ...any)) {
	if l.bind == "" {
		l.bind = stage.FreeAddress(n.t)
	}
	line("    - name: %s", l.name)
	line("      bind: %q", l.bind)
	line("      target: %q", l.target)
	if l.identity != "" {
		line("      identity: {spiffe_id: %q}", l.identity)
	}
	if l.expect == "" {
		line("      direction: inbound")
	} else {
		line("      direction: outbound")
		line("      expect: [%q]", l.expect)
	}
	if l.more != "" {
		line("      %s", l.more)
	}
}

// rule is one rule of a policy file.
type rule struct {
	id, effect, at, from, to string
}

// rules writes the node's policy: every SPIFFE ID of revoked, and the rules.
func (n *node) rules(revoked []string, rules ...rule) {
	n.t.Helper()
	var b strings.Builder
	b.WriteString("version: 1\n")
	if len(revoked) > 0 {
		b.WriteString("revoked:\n")
		for _, id := range revoked {
			fmt.Fprintf(&b, "  - %q\n", id)
		}
	}
	b.WriteString("rules:\n")
	for _, r := range rules {
		if r.effect == "" {
			r.effect = "allow"
		}
		fmt.Fprintf(&b, "  - {id: %s, effect: %s, from: [%q]", r.id, r.effect, r.from)
		if r.to != "" {
			fmt.Fprintf(&b, ", to: [%q]", r.to)
		}
		if r.at != "" {
			fmt.Fprintf(&b, ", at: %s", r.at)
		}
		b.WriteString("}\n")
	}
	stage.WriteFile(n.t, n.policyFile(), b.String(), 0o644)
}

// start starts `narthex run`, `agent` or `proxy` on the node.
func (n *node) start(command string, how ...func(*exec.Cmd)) {
	n.t.Helper()
	n.configure()
	n.Process = stage.Start(n.t, n.name+": narthex "+command, stage.Narthex, []string{command, "-c", n.configFile()}, how...)
}

// bind returns the address of a listener.
func (n *node) bind(name string) string {
	n.t.Helper()
	for _, l := range n.listeners {
		if l.name == name {
			return l.bind
		}
	}
	n.t.Fatalf("%s has no listener %s", n.name, name)
	return ""
}

// ready waits until the node can do its work.
func (n *node) ready() {
	n.t.Helper()
	n.readyWithin(stage.Soon)
}

func (n *node) readyWithin(d time.Duration) {
	n.t.Helper()
	stage.Eventually(n.t, d, n.name+" is ready", func() error {
		if err := n.Alive(); err != nil {
			return err
		}
		return n.Ready()
	})
}

// half returns the pid of a half of `narthex run`.
func (n *node) half(command string) (int, error) {
	list := fmt.Sprintf("/proc/%d/task/*/children", n.PID())
	files, err := filepath.Glob(list)
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that has ended
		}
		for _, child := range strings.Fields(string(data)) {
			line, err := os.ReadFile("/proc/" + child + "/cmdline")
			if err != nil {
				continue
			}
			if args := strings.Split(string(line), "\x00"); len(args) > 1 && args[1] == command {
				return strconv.Atoi(child)
			}
		}
	}
	return 0, fmt.Errorf("%s runs no %s", n.name, command)
}
