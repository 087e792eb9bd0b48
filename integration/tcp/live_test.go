//go:build integration

package tcp_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// TestResumption comes back with TLS sessions to a door that has changed its
// rules or its bundle meanwhile. The door hands out no sessions, so those of
// another server with the same certificate have to do.
func TestResumption(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	other, elsewhere := sServer(t, d.ca.leaf("/server"))
	sessions := map[string]string{"-tls1_2": "", "-tls1_3": ""}
	for version := range sessions {
		dir := stage.Folder(t, "session")
		own := filepath.Join(dir, "own.pem")
		if out := sClient(t, d.address, with(d.client, version, "-sess_out", own)...); !strings.Contains(out, answer) {
			t.Fatalf("%s: not answered while it is allowed:\n%s", version, out)
		}
		if _, err := os.Stat(own); err == nil {
			t.Errorf("%s: the door gave out a session", version)
		}
		sessions[version] = filepath.Join(dir, "other.pem")
		if out := sClient(t, elsewhere, version, "-sess_out", sessions[version]); !strings.Contains(out, "olleh") {
			t.Fatalf("%s: openssl was not answered by openssl:\n%s", version, out)
		}
		if _, err := os.Stat(sessions[version]); err != nil {
			t.Fatalf("%s: openssl kept no session: %v", version, err)
		}
	}
	comeBack := func(reason string) {
		t.Helper()
		for version, file := range sessions {
			skip := len(d.Records())
			out := sClient(t, d.address, with(d.client, version, "-sess_in", file)...)
			if strings.Contains(out, "Reused, TLS") {
				t.Errorf("%s: the session was resumed:\n%s", version, out)
			}
			if strings.Contains(out, answer) != (reason == "") {
				t.Errorf("%s: %q, but openssl said:\n%s", version, reason, out)
			}
			if reason != "" {
				d.refused(skip, reason)
			}
		}
	}
	comeBack("")
	d.changeRules(allow("others-may", d.ca.id("/others")))
	comeBack("no rule allows")
	d.changeRules(d.clientMay())
	comeBack("")
	anew := newAuthority(t, "example.org")
	d.trust(anew)
	d.present(anew.leaf("/server"))
	stage.Eventually(t, stage.Soon, "the bundle is another one", func() error {
		if strings.Contains(sClient(t, d.address, with(d.client)...), answer) {
			return errors.New("the old authority is still trusted")
		}
		return nil
	})
	d.Becomes(stage.Soon, "has its new SVID", func(st telemetry.Status) bool { return st.Proxy.Problem == "" })
	comeBack("not signed by an authority")
	if err := other.Alive(); err != nil {
		t.Error(err)
	}
}

// lives is a connection of openssl's that stays open.
type lives struct {
	*stage.Process
	t    *testing.T
	in   io.Writer
	asks int
}

// sClientLive runs `openssl s_client`, whose commands (R, K, k, Q) work.
func sClientLive(t *testing.T, address string, args ...string) *lives {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	t.Cleanup(func() { w.Close() })
	l := &lives{t: t, in: w}
	l.Process = stage.Start(t, "openssl s_client", "openssl", append([]string{"s_client", "-connect", address}, args...), func(cmd *exec.Cmd) { cmd.Stdin = r })
	return l
}

func (l *lives) says(line string) {
	l.t.Helper()
	if _, err := io.WriteString(l.in, line+"\n"); err != nil {
		l.t.Errorf("%s: %v", l.Name, err)
	}
}

// answered sends a line and waits for the answer.
func (l *lives) answered() {
	l.t.Helper()
	l.asks++
	line := fmt.Sprintf("hello %d", l.asks)
	l.says(line)
	l.Says(stage.Soon, answer+line)
}

// ends waits until the connection has ended and returns when.
func (l *lives) ends(within time.Duration) time.Time {
	l.t.Helper()
	select {
	case <-l.Done:
	case <-time.After(within):
		l.t.Errorf("the connection still lives after %s", within)
	}
	return time.Now()
}

// TestExpiredWhileConnected lets certificates end on connections that live.
func TestExpiredWhileConnected(t *testing.T) {
	t.Parallel()
	const ttl, drain = 15 * time.Second, 15 * time.Second // in which a client has to come, and to say something
	for _, action := range []string{"close", "drain", "keep"} {
		for _, version := range []string{"-tls1_2", "-tls1_3"} {
			t.Run(action+version, func(t *testing.T) {
				t.Parallel()
				d := newDoor(t, "on_peer_expiry: "+action, fmt.Sprintf("timeouts: {drain: %s}", drain))
				short := d.ca.leaf("/client", lasting(ttl))
				end := short.chain[0].NotAfter
				l := sClientLive(t, d.address, with(short, version)...)
				l.answered()
				if action == "close" {
					wasClosed(t, l.ends(ttl+stage.Soon), end)
					a := d.Record(0, "expired", func(a telemetry.Access) bool { return a.Closed == "expiry" })
					if !strings.Contains(a.Reason, "the peer's SVID expired at "+end.UTC().Format(time.RFC3339)) {
						t.Errorf("reason: %s", a.Reason)
					}
					return
				}
				// The certificate's own clock. That nothing happens then has no event.
				time.Sleep(time.Until(end.Add(1200 * time.Millisecond)))
				l.answered()
				if out := sClient(t, d.address, with(short, version)...); strings.Contains(out, answer) {
					t.Errorf("a new connection with an expired certificate was answered:\n%s", out)
				}
				if action == "drain" {
					wasClosed(t, l.ends(drain+stage.Soon), end.Add(drain))
					d.Record(0, "expired", func(a telemetry.Access) bool { return a.Closed == "expiry" })
					return
				}
				time.Sleep(time.Until(end.Add(drain + time.Second))) // past when a drain would have ended it
				l.answered()
			})
		}
	}
}

// wasClosed wants a connection ended when it was due, and not much later.
func wasClosed(t *testing.T, at, due time.Time) {
	t.Helper()
	// A certificate is good for the whole of its last second.
	if late := at.Sub(due); late < -50*time.Millisecond || late > stage.Soon {
		t.Errorf("it ended %s after it was due", late)
	}
}

// TestTakenBackWhileConnected takes back what a live connection stands on:
// the rule, the authority, the identity.
func TestTakenBackWhileConnected(t *testing.T) {
	t.Parallel()
	other := newAuthority(t, "example.org")
	for _, c := range []struct {
		name, more, closed string
		take               func(*door)
	}{
		{"rule", "on_policy_change: close", "policy", func(d *door) { d.changeRules(allow("others-may", d.ca.id("/others"))) }},
		{"revoked", "on_policy_change: keep", "revoked", func(d *door) {
			d.policy(fmt.Sprintf("revoked: [%q]\nrules: [%s]", d.client.id, d.clientMay()))
			d.reload()
		}},
		{"authority", "on_policy_change: keep", "revoked", func(d *door) { d.trust(other) }},
	} {
		for _, version := range []string{"-tls1_2", "-tls1_3"} {
			t.Run(c.name+version, func(t *testing.T) {
				t.Parallel()
				d := newDoor(t, c.more)
				l := sClientLive(t, d.address, with(d.client, version)...)
				l.answered()
				c.take(d)
				l.ends(stage.Soon)
				d.Record(0, c.closed, func(a telemetry.Access) bool { return a.Closed == c.closed && a.Outcome == "failure" })
			})
		}
	}
}

// TestRenegotiation asks for what TLS 1.2 has for changing who one is in the
// midst of a connection. It is refused, and costs only who asks.
func TestRenegotiation(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	l := sClientLive(t, d.address, with(d.client, "-tls1_2")...)
	l.answered()
	other := sClientLive(t, d.address, with(d.client, "-tls1_2")...)
	other.answered()
	l.says("R")
	l.ends(stage.Soon)
	if !strings.Contains(l.Said(), "RENEGOTIATING") {
		t.Errorf("openssl did not ask:\n%s", l.Said())
	}
	other.answered()
}

// TestKeyUpdate changes the keys of TLS 1.3 connections that live: on its own
// side (k), and on both (K).
func TestKeyUpdate(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	l := sClientLive(t, d.address, with(d.client, "-tls1_3")...)
	l.answered()
	for n := 1; n <= 6; n += 2 {
		l.changesKeys("k", n)
		l.changesKeys("K", n+1)
	}
}

// changesKeys does it for the nth time. openssl takes a command only where it
// begins what it reads.
func (l *lives) changesKeys(command string, n int) {
	l.t.Helper()
	l.says(command)
	stage.Eventually(l.t, stage.Soon, "openssl changes keys", func() error {
		if got := l.Count("KEYUPDATE"); got != n {
			return fmt.Errorf("%d times so far, want %d", got, n)
		}
		return nil
	})
	l.answered()
}

// TestSlowHandshakes begins a handshake and does not go on.
func TestSlowHandshakes(t *testing.T) {
	t.Parallel()
	const handshake = 2 * time.Second
	d := newDoor(t, fmt.Sprintf("timeouts: {handshake: %s}", handshake))
	// One that never answers the server's hello.
	raw := dial(t, d.address)
	began := time.Now()
	if _, err := raw.Write(clientHello()); err != nil {
		t.Fatal(err)
	}
	if err := raw.SetDeadline(began.Add(handshake + stage.Soon)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(raw); err != nil && !isReset(err) {
		t.Errorf("it ended with %v", err)
	}
	if took := time.Since(began); took < handshake/2 || took > handshake+stage.Soon/2 {
		t.Errorf("it took %s, want %s", took, handshake)
	}
	d.refused(0, "the handshake took longer than 2s")
	if err := askTLS(d.address, d.client); err != nil {
		t.Error(err)
	}
}

// askTLS makes one request on a connection of its own.
func askTLS(address string, own *svid) error {
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: callTime}, "tcp", address, own.client())
	if err != nil {
		return err
	}
	defer c.Close()
	return ask(c, "hello")
}
