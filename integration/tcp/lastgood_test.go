//go:build integration

package tcp_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// notRules is a rule file of somebody who was interrupted.
const notRules = "version: 1\nrules:\n  - {id: half, effect: al"

// TestRestartWithBrokenRules: a proxy that restarts while its rule files cannot
// be used goes on with those that were last in force, in its sandbox, and says
// so, until the files are good again.
func TestRestartWithBrokenRules(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	own, client, late := ca.leaf("/service"), ca.leaf("/client"), ca.leaf("/late")
	s := serve(t, answerLines)
	n := newNode(t, "inbound", own, ca)
	n.top = append(n.top, "data_dir: data")
	at := n.inbound("in", s.address)
	n.rules(allow("another", ca.id("/another")))
	n.start()
	n.changeRules(allow("client", client.id)) // what a reload has put in force is kept, too

	caller := func(name string, as *svid) string {
		out := newNode(t, name, as, ca)
		to := out.outbound("out", at, own.id)
		out.rules(allow("all", as.id))
		out.start()
		return to
	}
	good, stranger := caller("client", client), caller("late", late)
	if err := call(good); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(n.file("data/proxy/last-good")); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v", info, err)
	}

	for round, broken := range []string{notRules, ""} {
		n.Stop()
		if stage.WriteFile(t, n.file("rules.yaml"), broken, 0o644); broken == "" {
			if err := os.Remove(n.file("rules.yaml")); err != nil {
				t.Fatal(err)
			}
		}
		n.start()
		n.Says(stage.Soon, "the rule files cannot be used: the last good rules are in force until they can be")
		checkSandboxed(t, n)
		if err := call(good); err != nil {
			t.Errorf("round %d: whom the last good rules allow: %v\n%s", round, err, n.Said())
		}
		if call(stranger) == nil {
			t.Errorf("round %d: whom they do not allow is let in", round)
		}
		if n.Metric(`narthex_policy_reloads_total{result="error"}`) == 0 {
			t.Errorf("round %d: no error is counted", round)
		}
		st, err := n.Status()
		if err != nil || !strings.Contains(st.Proxy.Policy.Problem, "rules.yaml") || st.Proxy.Policy.LastGood.IsZero() {
			t.Errorf("round %d: status: %+v, %v", round, st.Proxy.Policy, err)
		}
	}

	n.rules(allow("late", late.id))
	n.Becomes(stage.Soon, "the files are in force again", func(st telemetry.Status) bool {
		return st.Proxy.Policy.Problem == "" && st.Proxy.Policy.LastGood.IsZero()
	})
	if err := call(stranger); err != nil {
		t.Error(err)
	}
	if call(good) == nil {
		t.Error("the new rules are not in force")
	}

	// The sandbox let the copy be replaced.
	n.Stop()
	stage.WriteFile(t, n.file("rules.yaml"), notRules, 0o644)
	n.start()
	if err := call(stranger); err != nil {
		t.Error(err)
	}
	n.Stop()
	withoutCopy(t, n)
}

// withoutCopy starts a proxy whose copy was edited, and whose listeners lead
// elsewhere: it fails as one that has none.
func withoutCopy(t *testing.T, n *node) {
	t.Helper()
	fails := func(why string) {
		t.Helper()
		out, err := stage.Tell(t, stage.Narthex, "proxy", "-c", n.file("narthex.yaml"))
		if err == nil || !strings.Contains(out, "rules.yaml") || !strings.Contains(out, why) {
			t.Errorf("%v, and nothing of %q in\n%s", err, why, out)
		}
	}
	n.listeners[0].target = "127.0.0.1:1"
	n.configure()
	fails("for other listeners")
	texts, err := filepath.Glob(n.file("data/proxy/last-good/*.yaml"))
	if err != nil || len(texts) != 1 {
		t.Fatalf("%v, %v", texts, err)
	}
	n.listeners[0].target = "127.0.0.1:2"
	if err := os.RemoveAll(n.file("data")); err != nil {
		t.Fatal(err)
	}
	n.configure()
	fails("rules.yaml")
}

// TestRunRestartsWithBrokenRules is the same for both halves: the proxy is
// another user who may not enter data_dir.
func TestRunRestartsWithBrokenRules(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.start()
	kept := h.file("data/proxy/last-good/manifest.json")
	stage.Eventually(t, stage.Soon, "the rules are kept", func() error { _, err := os.Stat(kept); return err })
	if info, err := os.Stat(h.file("data")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("data_dir: %v, %v", info, err)
	}
	h.Stop()
	stage.WriteFile(t, h.file("rules.yaml"), notRules, 0o644)
	h.start()
	h.Says(stage.Soon, "the last good rules are in force")
	if uid := stage.UIDOf(t, h.half("proxy")); uid != 1 {
		t.Errorf("the proxy runs as uid %d", uid)
	}
	h.Becomes(stage.Soon, "sandboxed, on the last good rules", func(st telemetry.Status) bool {
		return st.Proxy != nil && !st.Proxy.Policy.LastGood.IsZero() && strings.Contains(fmt.Sprint(st.Proxy.Sandbox.Enforced), "landlock")
	})
	before := stage.ReadFile(t, kept)
	stage.WriteFile(t, h.file("rules.yaml"), `version: 1
rules:
  - {id: again, effect: allow, from: ["spiffe://example.org/orders"], to: ["spiffe://example.org/inventory"]}
`, 0o644)
	stage.Eventually(t, stage.Soon, "the new rules are kept", func() error {
		if stage.ReadFile(t, kept) == before {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if err := call(h.entry); err != nil {
		t.Error(err)
	}
	if strings.Contains(h.Said(), "not kept") {
		t.Error(h.Said())
	}
}
