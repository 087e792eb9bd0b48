//go:build integration

package tcp_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestSandbox has a proxy in its sandbox do all that it does in a long life:
// the sandbox must take nothing from it.
func TestSandbox(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	own, client := ca.leaf("/service"), ca.leaf("/client")
	s := serve(t, answerLines)
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}

	n := newNode(t, "inbound", own, ca)
	at := n.inbound("in", net.JoinHostPort("localhost", port)) // a name, so that it has to be resolved
	n.rules(allow("client", client.id))
	swaps := &volume{t: t, dir: n.file("policies")}
	swaps.turn("1", stage.ReadFile(t, n.file("rules.yaml")))
	if err := os.Remove(n.file("rules.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("policies/..data/rules.yaml", n.file("rules.yaml")); err != nil {
		t.Fatal(err)
	}
	n.start()

	out := newNode(t, "outbound", client, ca)
	caller := out.outbound("out", at, own.id)
	out.rules(allow("all", client.id))
	out.start()
	checkSandboxed(t, n)

	works := func(when string) {
		t.Helper()
		if err := call(caller); err != nil {
			t.Errorf("%s: %v\n%s", when, err, n.Said())
		}
	}
	works("at the start")

	swaps.turn("2", "version: 1\nrules: ["+allow("another", ca.id("/another"))+"]\n")
	stage.Eventually(t, stage.Soon, "the second policy is in force", func() error {
		if call(caller) == nil {
			return fmt.Errorf("the call is allowed")
		}
		return nil
	})
	swaps.turn("3", "version: 1\nrules: ["+allow("client", client.id)+"]\n")
	stage.Eventually(t, stage.Soon, "the third policy is in force", func() error { return call(caller) })

	next := ca.leaf("/service")
	n.present(next)
	n.Says(stage.Soon, "files in force", next.chain[0].NotAfter.UTC().Format("2006"))
	works("after the SVID was replaced")

	moved := n.AccessFile() + ".1"
	if err := os.Rename(n.AccessFile(), moved); err != nil {
		t.Fatal(err)
	}
	n.reload()
	works("after the access log was opened anew")
	n.Record(0, "the record after the log was opened anew", func(a telemetry.Access) bool { return a.Decision == "allow" })

	n.listen(&listener{name: "socket", bind: "unix:" + n.file("new.sock"), target: s.address})
	n.configure()
	n.reload()
	if c, err := net.Dial("unix", n.file("new.sock")); err != nil {
		t.Errorf("a listener that was added: %v", err)
	} else {
		_ = c.Close()
	}

	refusedOutside(t, n)
	works("after a reload that was refused")
	n.Signal(syscall.SIGTERM)
	n.Says(stage.Soon, "proxy has ended")
}

// checkSandboxed looks at the process from outside, and at what it says.
func checkSandboxed(t *testing.T, n *node) {
	t.Helper()
	status := stage.ReadFile(t, fmt.Sprintf("/proc/%d/status", n.PID()))
	for _, line := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t0000000000000000", "CapEff:\t0000000000000000"} {
		if !strings.Contains(status, line+"\n") {
			t.Errorf("%s is not so of the proxy's process:\n%s", line, status)
		}
	}
	st, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	enforced := strings.Join(st.Proxy.Sandbox.Enforced, " ")
	for _, part := range []string{"no_new_privs", "undumpable", "no capabilities", "landlock ABI", "seccomp"} {
		if !st.Proxy.Sandbox.On || !strings.Contains(enforced, part) {
			t.Errorf("the status does not name %s: %+v", part, st.Proxy.Sandbox)
		}
	}
	if told := stage.Must(t, stage.Narthex, "status", "--address", "unix:"+n.Figures()); !strings.Contains(told, "landlock ABI") {
		t.Errorf("narthex status does not tell of the sandbox:\n%s", told)
	}
}

// refusedOutside reloads with a policy that is outside the sandbox.
func refusedOutside(t *testing.T, n *node) {
	t.Helper()
	outside := filepath.Join(t.TempDir(), "rules.yaml")
	stage.WriteFile(t, outside, stage.ReadFile(t, n.file("rules.yaml")), 0o644)
	before := stage.ReadFile(t, n.file("narthex.yaml"))
	stage.WriteFile(t, n.file("narthex.yaml"), strings.Replace(before, "policies: [rules.yaml]", "policies: ["+outside+"]", 1), 0o644)
	n.Says(stage.Soon, "cannot reload", outside, "restart or upgrade the proxy")
	stage.WriteFile(t, n.file("narthex.yaml"), before, 0o644)
}

// volume is a folder in which files change as in a Kubernetes volume.
type volume struct {
	t   *testing.T
	dir string
}

func (v *volume) turn(version, rules string) {
	v.t.Helper()
	folder := filepath.Join(v.dir, ".."+version)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		v.t.Fatal(err)
	}
	stage.WriteFile(v.t, filepath.Join(folder, "rules.yaml"), rules, 0o644)
	tmp := filepath.Join(v.dir, "..data_tmp")
	if err := os.Symlink(".."+version, tmp); err != nil {
		v.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(v.dir, "..data")); err != nil {
		v.t.Fatal(err)
	}
}

// TestSandboxOff warns, and shows it.
func TestSandboxOff(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	n := newNode(t, "open", ca.leaf("/service"), ca)
	n.inbound("in", stage.FreeAddress(t))
	n.rules(allow("client", ca.id("/client")))
	n.proxy = append(n.proxy, "sandbox: off")
	n.start()
	n.Says(stage.Soon, "proxy.sandbox is off")
	if told := stage.Must(t, stage.Narthex, "status", "--address", "unix:"+n.Figures()); !strings.Contains(told, "sandbox  off") {
		t.Errorf("narthex status does not tell that the sandbox is off:\n%s", told)
	}
	if status := stage.ReadFile(t, fmt.Sprintf("/proc/%d/status", n.PID())); !strings.Contains(status, "Seccomp:\t0\n") {
		t.Errorf("sandboxed all the same:\n%s", status)
	}
}

// TestSandboxOfNobody is the same proxy started by a user without rights, as
// in a container.
func TestSandboxOfNobody(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	own, client := ca.leaf("/service"), ca.leaf("/client")
	s := serve(t, answerLines)
	n := newNode(t, "nobody", own, ca)
	at := n.inbound("in", s.address)
	n.rules(allow("client", client.id))
	for _, path := range []string{n.dir, n.file("svid.key")} {
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	n.how = append(n.how, stage.As(65534, 65534))
	n.start()
	out := newNode(t, "outbound", client, ca)
	caller := out.outbound("out", at, own.id)
	out.rules(allow("all", client.id))
	out.start()
	if err := call(caller); err != nil {
		t.Error(err)
	}
	n.rules(allow("another", ca.id("/another")))
	n.reload()
	if err := call(caller); err == nil {
		t.Error("the new policy is not in force")
	}
}
