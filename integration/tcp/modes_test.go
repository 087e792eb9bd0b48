//go:build integration

package tcp_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// plain lets plaintext through, where a listener takes it.
const plain = "{id: plain, effect: allow, at: inbound, from: [unauthenticated]}"

// change replaces what else stands at the one listener there is.
func (d *door) change(more ...string) {
	d.t.Helper()
	d.listeners[0].more = more
	d.configure()
	d.reload()
}

// enters opens a connection over TLS that works.
func (d *door) enters(who *svid) *tls.Conn {
	d.t.Helper()
	c := tls.Client(dial(d.t, d.address), who.client())
	if err := ask(c, "hello"); err != nil {
		d.t.Fatal(err)
	}
	return c
}

// over waits until the far end has ended c.
func over(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(callTime))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection lives: %v", err)
	}
}

// TestMovingOver walks a service from plaintext to mTLS, as docs/moving-over.md
// tells: permissive and audited, rules enforced, strict.
func TestMovingOver(t *testing.T) {
	t.Parallel()
	d := newDoor(t, "mode: permissive", "enforcement: audit")
	other := d.ca.leaf("/other")

	// Everybody who proves an identity passes, and plaintext does.
	if out := sClient(t, d.address, with(d.client)...); !strings.Contains(out, answer+"hello") {
		t.Errorf("openssl with the client's SVID:\n%s", out)
	}
	if out := sClient(t, d.address, with(other)...); !strings.Contains(out, answer+"hello") {
		t.Errorf("openssl with another SVID:\n%s", out)
	}
	host, port, err := net.SplitHostPort(d.address)
	if err != nil {
		t.Fatal(err)
	}
	if out := stage.Talk(t, "nc", []string{host, port}, answer); !strings.Contains(out, answer+"hello") {
		t.Errorf("nc: %s", out)
	}
	// TLS without an SVID of ours is nothing that an audit or plaintext helps.
	for name, args := range map[string][]string{"without": nil, "with a stranger's": with(newAuthority(t, "example.org").leaf("/client"))} {
		if out := sClient(t, d.address, args...); strings.Contains(out, answer) {
			t.Errorf("openssl %s SVID came through:\n%s", name, out)
		}
	}
	if n := d.service.dialled.Load(); n != 3 {
		t.Errorf("%d connections reached the service, want 3", n)
	}
	d.quiet()
	for series, want := range map[string]float64{
		`narthex_connections_unauthenticated_total{listener="door"}`:                         1,
		`narthex_policy_decisions_total{decision="would_deny",listener="door",rule=""}`:      2,
		`narthex_policy_decisions_total{decision="allow",listener="door",rule="client-may"}`: 1,
		`narthex_tls_handshakes_total{listener="door",result="no_certificate"}`:              1,
		`narthex_tls_handshakes_total{listener="door",result="untrusted"}`:                   1,
		`narthex_connections_total{listener="door",result="allowed"}`:                        3,
	} {
		if got := d.Metric(series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
	d.Becomes(stage.Soon, "the status names who speaks plaintext", func(s telemetry.Status) bool {
		l := s.Proxy.Listeners[0]
		return l.Mode == "permissive" && l.Enforcement == "audit" && l.WouldDeny == 2 && l.Unauthenticated == 1 && len(l.Sources) == 1 && l.Sources[0].Source == host
	})
	a := d.Record(0, "plaintext", func(a telemetry.Access) bool { return a.Plaintext })
	if a.From != "unauthenticated" || a.To != "spiffe://example.org/server" || a.Decision != "would_deny" || a.WouldDeny != "policy: no rule allows it" || a.TLSVersion != "" {
		t.Errorf("the record of plaintext: %+v", a)
	}
	d.Says(stage.Soon, "listener is permissive", "listener only audits", "passes in an audit only")

	// Rules in force: those they refuse end, the others live on.
	allowed, refused, plaintext := d.enters(d.client), d.enters(other), dial(t, d.address)
	if err := ask(plaintext, "hello"); err != nil {
		t.Fatal(err)
	}
	d.rules(d.clientMay(), plain)
	d.change("mode: permissive")
	over(t, refused)
	d.refused(0, "policy: no rule allows it")
	for name, c := range map[string]net.Conn{"the client": allowed, "plaintext": plaintext} {
		if err := ask(c, "hello"); err != nil {
			t.Errorf("%s, whom rules allow: %v", name, err)
		}
	}

	// Strict: plaintext ends, what proved an identity lives on.
	d.change()
	over(t, plaintext)
	d.Record(0, "the end of plaintext", func(a telemetry.Access) bool {
		return a.Plaintext && a.Closed == "policy" && a.Reason == "plaintext: the listener's mode is strict by now"
	})
	if err := ask(allowed, "hello"); err != nil {
		t.Errorf("a client with an SVID: %v", err)
	}
	if got, err := say(d.address, "hello"); err == nil {
		t.Errorf("plaintext on a strict listener was answered %q", got)
	}
}

// TestPlainHTTP: curl in plaintext and through mTLS on one port.
func TestPlainHTTP(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	n := newNode(t, "web", ca.leaf("/server"), ca)
	page := serve(t, func(c net.Conn) {
		_, _ = c.Read(make([]byte, 4096))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
	})
	address := n.inbound("web", page.address, "mode: permissive")
	client := ca.leaf("/client")
	n.rules(plain, allow("client", client.id))
	n.start()
	if got := stage.Must(t, "curl", "-sS", "http://"+address); got != "hello" {
		t.Errorf("in plaintext: %q", got)
	}
	if got := stage.Must(t, "curl", "-sS", "-k", "--cert", client.certFile, "--key", client.keyFile, "https://"+address); got != "hello" {
		t.Errorf("through mTLS: %q", got)
	}
}

// TestServerFirst: OpenSSH, whose key scanner waits for the server to speak,
// and a login, in plaintext and through mTLS to one port.
func TestServerFirst(t *testing.T) {
	t.Parallel()
	ssh := newSSH(t)
	ca := newAuthority(t, "example.org")
	door := newNode(t, "door", ca.leaf("/ssh"), ca)
	in := door.inbound("ssh", ssh.address, "mode: permissive")
	door.rules(plain, allow("admin", ca.id("/admin")))
	door.start()
	caller := newNode(t, "caller", ca.leaf("/admin"), ca)
	out := caller.outbound("to-ssh", in, ca.id("/ssh"))
	caller.rules(allow("admin", ca.id("/admin")))
	caller.start()
	for name, address := range map[string]string{"plaintext": in, "mTLS": out} {
		if got := ssh.scan(t, address); !strings.Contains(got, ssh.hostKey) {
			t.Errorf("ssh-keyscan in %s:\n%s\nwant the key %s", name, got, ssh.hostKey)
		}
		if got := ssh.login(t, address, "echo logged in"); got != "logged in\n" {
			t.Errorf("ssh in %s: %q", name, got)
		}
	}
	door.Record(0, "ssh in plaintext", func(a telemetry.Access) bool { return a.Plaintext && a.Rule == "plain" && a.BytesOut > 0 })
	door.Record(0, "ssh through mTLS", func(a telemetry.Access) bool { return !a.Plaintext && a.Rule == "admin" && a.BytesOut > 0 })
}

// sshd is a real one, with a key that may log in.
type sshd struct {
	address, hostKey, dir string
}

func newSSH(t *testing.T) *sshd {
	t.Helper()
	s := &sshd{address: stage.FreeAddress(t), dir: stage.Folder(t, "sshd")}
	for _, key := range []string{"host", "user"} {
		stage.Must(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", s.dir+"/"+key)
	}
	s.hostKey = strings.Fields(stage.ReadFile(t, s.dir+"/host.pub"))[1]
	stage.WriteFile(t, s.dir+"/authorized", stage.ReadFile(t, s.dir+"/user.pub"), 0o600)
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	stage.WriteFile(t, s.dir+"/sshd_config", fmt.Sprintf(`ListenAddress %s:%s
HostKey %[3]s/host
AuthorizedKeysFile %[3]s/authorized
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
`, host, port, s.dir), 0o600)
	// Where root's sshd shuts its unprivileged half in: a /run of its own.
	run := stage.InNamespaces("mount -t tmpfs tmpfs /run\nmkdir -m 755 /run/sshd", "--mount")
	p := stage.Start(t, "sshd", "/usr/sbin/sshd", []string{"-D", "-e", "-f", s.dir + "/sshd_config"}, run)
	p.Says(stage.Soon, "Server listening")
	return s
}

func (s *sshd) scan(t *testing.T, address string) string {
	t.Helper()
	host, port, _ := net.SplitHostPort(address)
	out, _ := stage.Tell(t, "ssh-keyscan", "-T", "60", "-t", "ed25519", "-p", port, host)
	return out
}

func (s *sshd) login(t *testing.T, address, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	host, port, _ := net.SplitHostPort(address)
	cmd := exec.CommandContext(ctx, "ssh", "-F", "none", "-p", port, "-i", s.dir+"/user", "-o", "BatchMode=yes",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", host, command)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("ssh: %v", err)
	}
	return string(out)
}

// TestLimits: so many connections of one identity, so many of all listeners,
// and both lowered by a reload without ending any.
func TestLimits(t *testing.T) {
	t.Parallel()
	d := newDoor(t, "max_connections_per_identity: 2")
	other := d.ca.leaf("/other")
	d.changeRules(d.clientMay(), allow("other", other.id))
	first, second := d.enters(d.client), d.enters(d.client)
	if out := sClient(t, d.address, with(d.client)...); strings.Contains(out, answer) {
		t.Errorf("a third connection came through:\n%s", out)
	}
	d.refused(0, d.client.id+" has as many live connections here as max_connections_per_identity allows, 2")
	if got := d.Metric(`narthex_connections_total{listener="door",result="limited"}`); got != 1 {
		t.Errorf("%v connections were limited, want 1", got)
	}
	d.enters(other)
	d.proxy = append(d.proxy, "max_connections: 1")
	d.change("max_connections_per_identity: 1")
	for _, c := range []net.Conn{first, second} {
		if err := ask(c, "hello"); err != nil {
			t.Errorf("a connection from before the limit: %v", err)
		}
	}
	waits := tls.Client(dial(t, d.address), d.client.client())
	d.Says(stage.Soon, "connection limit of all listeners reached")
	d.proxy = d.proxy[:len(d.proxy)-1]
	d.change()
	if err := ask(waits, "hello"); err != nil {
		t.Errorf("who waited for a place: %v", err)
	}
}

// TestOpenFiles: the soft limit of files is raised to the hard one, and the
// limit of connections follows from it.
func TestOpenFiles(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "example.org")
	n := newNode(t, "few", ca.leaf("/server"), ca)
	n.inbound("in", "127.0.0.1:1")
	n.rules(plain)
	n.how = append(n.how, func(cmd *exec.Cmd) {
		cmd.Args = slices.Concat([]string{"sh", "-c", `ulimit -Sn 200 && ulimit -Hn 400 && exec "$0" "$@"`, cmd.Path}, cmd.Args[1:])
		cmd.Path = "/bin/sh"
	})
	n.start()
	n.Says(stage.Soon, "max_connections=167", "open_files=399") // the Go runtime leaves one
}
