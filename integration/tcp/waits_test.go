//go:build integration

package tcp_test

import (
	"os"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// TestFirstListener: a proxy without listeners is ready, though nobody has
// given it an identity or a rule yet. What is put beside it later, in a file
// that was not there, is served with all that a listener needs.
func TestFirstListener(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	own, client := ca.leaf("/service"), ca.leaf("/client")
	n := newNode(t, "waits", own, ca)
	if err := os.Remove(n.file("rules.yaml")); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	n.start()
	checkSandboxed(t, n)

	at := n.inbound("in", serve(t, answerLines).address)
	n.configure()
	n.Says(stage.Soon, "cannot reload: what was in force stays in force", "no file matches")
	if err := n.Ready(); err != nil {
		t.Errorf("a listener without rules was put in force: %v", err)
	}
	n.rules(allow("client", client.id))
	n.Says(stage.Soon, "rules and listeners changed")

	out := newNode(t, "client", client, ca)
	to := out.outbound("out", at, own.id)
	out.rules(allow("all", client.id))
	out.start()
	if err := call(to); err != nil {
		t.Errorf("%v\n%s", err, n.Said())
	}
}
