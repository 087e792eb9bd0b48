//go:build integration

package spire_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestRefusedAgents starts agents that cannot be attested. Each says so once,
// in words a person can act on, in its log and to those who ask it; none
// ends.
func TestRefusedAgents(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	nobody := stage.FreeAddress(t)
	used, _ := s.token()
	first := newNode(t, "first", proxyUser)
	first.joins(s)
	first.useToken(used)
	first.start("agent")
	first.ready()

	cases := []struct {
		name  string
		spoil func(*node)
		says  []string // in the log
		told  []string // to a caller
	}{
		{
			"wrong-token", func(n *node) { n.useToken("f0000000-0000-0000-0000-00000000000f") },
			[]string{"join token not accepted", s.address, "spire-server token generate"},
			[]string{"join token not accepted", s.address},
		},
		{
			"used-token", func(n *node) { n.useToken(used) },
			[]string{"join token not accepted", "works once", "spire-server token generate"},
			[]string{"join token not accepted"},
		},
		{
			"no-token", func(n *node) { n.attestor = "join_token: {token_file: " + filepath.Join(n.dir, "nothing-here") + "}" },
			[]string{"nothing-here", "no such file"},
			[]string{"nothing-here"},
		},
		{
			"trust-domain", func(n *node) { n.td = "other.example" },
			[]string{"not the server of this trust domain", s.id("/spire/server"), "spiffe://other.example/spire/server", "trust_domain"},
			[]string{s.id("/spire/server"), "spiffe://other.example/spire/server"},
		},
		{
			"bundle", func(n *node) { stage.WriteFile(t, n.bundle, newAuthority(t, "stranger").pem(), 0o644) },
			[]string{"authority that is not in the trust bundle", s.address, "spire-server bundle show", "agent.server.bundle"},
			[]string{"authority that is not in the trust bundle", s.address},
		},
		{
			"no-bundle", func(n *node) { n.bundle = filepath.Join(n.dir, "nothing-here") },
			[]string{"bootstrap bundle", "nothing-here", "no such file"},
			[]string{"nothing-here"},
		},
		{
			"unreachable", func(n *node) { n.server = nobody },
			[]string{"unreachable", nobody, "connection refused", "agent.server.address"},
			[]string{nobody, "unreachable since"},
		},
		{
			"certificate", func(n *node) {
				cert, key, _ := newAuthority(t, "stranger").issue("stranger", "")
				n.attestor = "x509pop: {certificate: " + cert + ", key: " + key + "}"
			},
			[]string{"attest node", s.address, "server's log"},
			[]string{"x509pop", s.address},
		},
	}
	nodes := make([]*node, len(cases))
	for i, c := range cases {
		nodes[i] = newNode(t, c.name, proxyUser)
		nodes[i].joins(s)
		c.spoil(nodes[i])
		nodes[i].start("agent")
	}
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) { checkRefused(t, nodes[i], c.says, c.told) })
	}
}

func checkRefused(t *testing.T, n *node, says, told []string) {
	const telling = "cannot go on yet"
	n.Says(stage.Soon, append(says, telling)...)
	stage.Eventually(t, stage.Soon, "a caller is told", func() error { return n.tells(told...) })
	if code, body, err := n.Get("/readyz"); err != nil || code != 503 || !strings.Contains(body, told[0]) {
		t.Errorf("/readyz: %d %q, %v; want 503 with the reason", code, body, err)
	}
	if code, _, err := n.Get("/livez"); err != nil || code != 200 {
		t.Errorf("/livez: %d, %v; want 200: a restart would not help", code, err)
	}
	if err := n.Alive(); err != nil {
		t.Error(err)
	}
	if errors := n.Count("[ERROR]"); errors != 1 {
		t.Errorf("the agent logged %d errors, want one:\n%s", errors, n.Said())
	}
}

// tells returns nil when the agent answers callers with Unavailable and all of
// texts.
func (n *node) tells(texts ...string) error {
	_, err := n.fetch(callTime)
	if err == nil {
		return fmt.Errorf("it gives an SVID")
	}
	for _, want := range append([]string{"Unavailable"}, texts...) {
		if !strings.Contains(err.Error(), want) {
			return fmt.Errorf("%q is not in: %w", want, err)
		}
	}
	return nil
}

// TestMendedAgent replaces a wrong token and a wrong bundle while the agent
// runs: it goes on without a restart.
func TestMendedAgent(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "mended", proxyUser)
	n.joins(s)
	good := stage.ReadFile(t, n.bundle)
	stage.WriteFile(t, n.bundle, newAuthority(t, "stranger").pem(), 0o644)
	n.start("agent")
	n.Says(stage.Soon, "authority that is not in the trust bundle")
	stage.WriteFile(t, n.bundle, good, 0o644)
	n.ready()
}

// TestNewEntryReachesWaitingCaller measures the time from a new entry to the
// SVID, with the server's own cache of 5 s.
func TestNewEntryReachesWaitingCaller(t *testing.T) {
	t.Parallel()
	const within = 30 * time.Second // half of what the agent waits by itself
	s := newServer(t, serverOptions{})
	n := newNode(t, "waiting", proxyUser)
	agent := n.joins(s)
	s.add(entry{path: "/others", parent: agent, selector: otherProxyUser.selector()}) // a server that knows the node
	n.syncs = time.Minute                                                             // so that it is the caller who makes the agent ask
	n.start("agent")
	n.ready()
	stage.Eventually(t, stage.Soon, "a caller is denied", func() error {
		if _, err := n.fetch(callTime); err == nil || !strings.Contains(err.Error(), "PermissionDenied") {
			return fmt.Errorf("without an entry: %w, want PermissionDenied", err)
		}
		return nil
	})
	made := time.Now()
	s.add(entry{path: "/waiting", parent: agent, selector: "unix:uid:0"})
	svid := n.fetches(within)
	t.Logf("the SVID came %s after the entry was made", time.Since(made).Round(time.Millisecond))
	if svid.ID.Path() != "/waiting" {
		t.Errorf("SVID of %s", svid.ID)
	}
}
