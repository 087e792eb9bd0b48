//go:build integration

package spire_test

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// shortLife is how long agents' SVIDs live where a test wants them renewed at
// once: SPIRE Server dates them back by 10 s, so that half of their life is
// over when they come, and a tenth of the rest is waited for.
const shortLife = 8 * time.Second

// TestBundleSources bootstraps two nodes: one by HTTPS, in PEM, one over a Unix
// socket, as a SPIFFE bundle.
func TestBundleSources(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	asked := make(chan url.Values, 100)
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/spiffe" {
			asked <- r.URL.Query()
			fmt.Fprint(w, s.cli("bundle", "show", "-format", "spiffe"))
			return
		}
		fmt.Fprint(w, s.bundlePEM())
	})
	https := httptest.NewTLSServer(answer)
	t.Cleanup(https.Close)
	roots := filepath.Join(stage.Folder(t, "roots"), "roots.pem")
	stage.WriteFile(t, roots, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: https.Certificate().Raw})), 0o644)
	socket := filepath.Join(stage.Folder(t, "bundle"), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	plain := &httptest.Server{Listener: listener, Config: &http.Server{Handler: answer, ReadHeaderTimeout: time.Minute}}
	plain.Start()
	t.Cleanup(plain.Close)

	for name, trust := range map[string]string{
		"https":  fmt.Sprintf("{url: %q}", https.URL),
		"socket": fmt.Sprintf("{url: %q, unix_socket: %s, format: spiffe}", "http://x/spiffe", socket),
	} {
		n := newNode(t, name, proxyUser)
		s.add(entry{path: "/" + name, parent: n.joins(s), selector: "unix:uid:0"})
		n.trust = trust
		n.start("agent", func(cmd *exec.Cmd) { cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+roots) })
		if got := n.fetches(stage.Soon).ID.Path(); got != "/"+name {
			t.Errorf("%s: it gives %s", name, got)
		}
	}
	told := <-asked
	host, port, _ := net.SplitHostPort(s.address)
	for key, want := range map[string]string{
		"spire-attest-mode": "bootstrap", "spire-connection-attempts": "1", "spire-server-address": host,
		"spire-server-port": port, "spiffe-trust-domain": s.td.Name(),
	} {
		if got := told.Get(key); got != want {
			t.Errorf("over the socket it tells %s=%q, want %q", key, got, want)
		}
	}
}

// TestServerSetUpAnew replaces the server by one that knows nothing of it. The
// node that bootstraps again is the new one's; the other keeps what it has, and
// says what to do.
func TestServerSetUpAnew(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	auto, never := newNode(t, "auto", proxyUser), newNode(t, "never", proxyUser)
	auto.serving = "rebootstrap: {mode: auto, delay: 2s}"
	ids := map[*node]string{}
	add := func() {
		for n, id := range ids {
			s.add(entry{path: "/" + n.name, parent: id, selector: "unix:uid:0"})
		}
	}
	for _, n := range []*node{auto, never} {
		ids[n] = n.proves(s)
		n.start("agent")
	}
	add()
	before := auto.fetches(stage.Soon)
	never.fetches(stage.Soon)

	s.anew()
	stage.WriteFile(t, auto.bundle, s.bundlePEM(), 0o644)
	add()
	auto.Says(stage.Soon, "the server is not one of the saved trust bundle", "bootstrapped again")
	authority := s.localAuthorities("x509").Active.ID
	stage.Eventually(t, stage.Soon, "the workload's SVID is of the new server", func() error {
		svid, err := auto.fetch(callTime)
		if err != nil {
			return err
		}
		if got := hex.EncodeToString(svid.Certificates[0].AuthorityKeyId); got != authority || svid.ID != before.ID {
			return fmt.Errorf("it is %s of authority %s", svid.ID, got)
		}
		return nil
	})
	auto.Becomes(stage.Soon, "is well", func(st telemetry.Status) bool { return st.Agent.Problem == "" && st.Agent.ID == ids[auto] })
	never.Says(stage.Soon, "remove "+never.dataDir())
	never.fetches(stage.Soon)
}

// state reads, or with change writes, the agent's state.
func (n *node) state(change func(map[string]any)) map[string]any {
	n.t.Helper()
	path := filepath.Join(n.dataDir(), "agent.json")
	var state map[string]any
	if err := json.Unmarshal([]byte(stage.ReadFile(n.t, path)), &state); err != nil {
		n.t.Fatal(err)
	}
	if change == nil {
		return state
	}
	change(state)
	data, err := json.Marshal(state)
	if err != nil {
		n.t.Fatal(err)
	}
	stage.WriteFile(n.t, path, string(data), 0o600)
	return state
}

// TestRefusals has the server refuse agents for each of its reasons. That of a
// banned one, and of one that was evicted, is TestEvictedAndBanned's.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second, agentTTL: shortLife})
	proves := func(name string) (*node, string) {
		n := newNode(t, name, proxyUser)
		id := n.proves(s)
		s.add(entry{path: "/" + name, parent: id, selector: "unix:uid:0"})
		n.start("agent")
		n.fetches(stage.Soon)
		return n, id
	}

	// AGENT_MUST_REATTEST: the agent believes that it cannot attest again.
	must, id := proves("must")
	stage.Eventually(t, stage.Soon, "the server knows the agent's version", func() error {
		agent, err := s.agent(id)
		if err == nil && agent.AgentVersion == "" {
			err = errors.New("it knows none")
		}
		return err
	})
	must.Stop()
	must.state(func(state map[string]any) { delete(state, "reattestable") })
	must.start("agent")
	must.Says(stage.Soon, "the server wants this node to attest again instead of renewing", "attested: ")
	if state := must.state(nil); state["reattestable"] != true {
		t.Error("it does not know yet that it can attest again")
	}
	must.fetches(stage.Soon)

	// AGENT_NOT_ACTIVE: another agent has attested as this one.
	rival := newNode(t, "rival", proxyUser)
	rival.server, rival.td, rival.bundle, rival.attestor, rival.syncs = must.server, must.td, must.bundle, must.attestor, must.syncs
	attested := must.Count("attested: ")
	rival.start("agent")
	rival.Says(stage.Soon, "attested: ")
	rival.Stop()
	stage.Eventually(t, stage.Soon, "it attests again", func() error {
		if must.Count("attested: ") == attested {
			return fmt.Errorf("attested %d times", attested)
		}
		return nil
	})
	must.fetches(stage.Soon)

	// A token that was used, by an agent whose SVID has expired.
	once := newNode(t, "once", proxyUser)
	once.joins(s)
	once.start("agent")
	once.ready()
	once.Kill()
	time.Sleep(shortLife)
	once.start("agent")
	once.Says(stage.Soon, "the saved SVID has expired", "join token not accepted", "does not exist or has already been used", "spire-server token generate")
	stage.Eventually(t, stage.Soon, "a caller is told", func() error { return once.tells("join token not accepted") })
	token, _ := s.token()
	once.useToken(token)
	once.ready()
}

// TestBannedForLong bans an agent that cannot attest again: it has nothing left,
// and does not ask each few seconds.
func TestBannedForLong(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "banned", proxyUser)
	id := n.joins(s)
	n.start("agent")
	n.ready()
	s.cli("agent", "ban", "-spiffeID", id)
	n.Becomes(stage.Soon, "says that it is banned", func(st telemetry.Status) bool { return strings.Contains(st.Agent.Problem, "banned") })
	if state := n.state(nil); state["svid"] != nil {
		t.Error("the SVID of a banned agent is on disk still")
	}
	text := n.Said()
	_, wait, _ := strings.Cut(text[strings.Index(text, "banned"):], "next_try_in=")
	if pause, err := time.ParseDuration(strings.Fields(wait)[0]); err != nil || pause < 4*time.Minute {
		t.Errorf("it asks again in %s (%v)", pause, err)
	}
	n.Stop()
	n.start("agent") // with the token that it has used
	stage.Eventually(t, stage.Soon, "a caller is told", func() error { return n.tells("join token not accepted") })
}

// TestPostQuantum holds an agent against a server without X25519MLKEM768, then
// with it.
func TestPostQuantum(t *testing.T) {
	t.Parallel()
	s := newServer(t, serverOptions{cacheReload: time.Second})
	s.Stop()
	s.env = []string{"GODEBUG=tlsmlkem=0"}
	s.start()
	n := newNode(t, "pq", proxyUser)
	n.joins(s)
	n.serving = "require_pq_kem: true"
	n.start("agent")
	n.Says(stage.Soon, "does not offer X25519MLKEM768", "agent.server.require_pq_kem")
	if n.Count("attested: ") > 0 {
		t.Error("it attested without")
	}
	s.Stop()
	s.env = nil
	s.start()
	n.ready()
}

// TestEntryAfterDenial makes an entry for a caller that was denied, far from the
// next sync of the interval, and then takes the server away: what the caller is
// told tells apart what happened.
func TestEntryAfterDenial(t *testing.T) {
	t.Parallel()
	const reload = time.Second
	s := newServer(t, serverOptions{cacheReload: reload})
	n := newNode(t, "denied", proxyUser)
	agent := n.joins(s)
	s.add(entry{path: "/others", parent: agent, selector: otherProxyUser.selector()}) // a server that knows the node
	n.syncs = 10 * time.Minute
	n.start("agent")
	n.ready()
	denied := func() error {
		_, err := n.fetch(callTime)
		if err == nil || !strings.Contains(err.Error(), "PermissionDenied") || !strings.Contains(err.Error(), "no registration entry matches") {
			return fmt.Errorf("a caller without entry is told %w", err)
		}
		return nil
	}
	stage.Eventually(t, stage.Soon, "a caller is denied", denied)
	ids := s.add(entry{path: "/late", parent: agent, selector: "unix:uid:0"})
	made := time.Now()
	stage.Eventually(t, stage.Soon, "the entry is of use", func() error { _, err := n.fetch(callTime); return err })
	t.Logf("the entry was of use %s after it was made, of which the server had up to %s", time.Since(made).Round(time.Millisecond), reload)

	n.Stop()
	s.remove(ids...)
	time.Sleep(2 * reload)
	n.start("agent")
	n.ready()
	s.Stop()
	stage.Eventually(t, stage.Soon, "the caller is told that the server is away", func() error {
		return n.tells("no registration entry that the agent knows of matches", "unreachable since", s.address)
	})
}
