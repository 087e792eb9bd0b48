//go:build integration

package spire_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// door is an inbound listener that strangers knock at.
type door struct {
	*shop
	address string
}

func newDoor(t *testing.T) *door {
	t.Helper()
	s := newShop(t, shopOptions{})
	s.inventory.rules(nil, s.testerReads())
	s.inventory.start("run")
	s.inventory.ready()
	return &door{s, s.inventory.bind(inventoryIn)}
}

func (s *shop) testerReads() rule {
	return rule{id: "tester-reads", from: s.id("tester"), to: s.id("inventory"), at: "inbound"}
}

// sClient runs `openssl s_client` against the door, sends one line and
// returns all that openssl said until the answer came or the connection
// ended.
func (d *door) sClient(t *testing.T, args ...string) string {
	t.Helper()
	return stage.Talk(t, "openssl", append([]string{"s_client", "-connect", d.address, "-ign_eof"}, args...), answer, "olleh")
}

const answer = "inventory: hello"

// TestStrangersAtTheDoor knocks with openssl and curl.
func TestStrangersAtTheDoor(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	minted := func(path string, ttl time.Duration) []string {
		cert, key, _ := d.server.mint(path, ttl)
		return []string{"-cert", cert, "-key", key}
	}
	issued := func(name, id string) []string {
		cert, key, _ := newAuthority(t, "stranger").issue(name, id)
		return []string{"-cert", cert, "-key", key}
	}
	expired := minted("/tester", time.Second)
	// The clock of the certificate, which is good for the whole of its last second.
	time.Sleep(time.Until(certificatesIn(t, expired[1])[0].NotAfter) + 1100*time.Millisecond)

	for _, c := range []struct {
		name   string
		args   []string
		record string // the reason in the access record
		told   string // what openssl is told, where the reason says little
	}{
		{"no-certificate", nil, "the client sent no certificate", "certificate required"},
		{"no-certificate-tls12", []string{"-tls1_2"}, "the client sent no certificate", "alert"},
		{"another-ca", issued("impostor", d.id("tester")), "not signed by an authority in the bundle of example.org", "alert"},
		{"another-ca-tls12", append(issued("impostor", d.id("tester")), "-tls1_2"), "not signed by an authority in the bundle of example.org", "alert"},
		{"another-domain", issued("foreigner", "spiffe://elsewhere.example/tester"), "no bundle for trust domain elsewhere.example", "alert"},
		{"no-spiffe-id", issued("nobody", ""), "certificate contains no URI SAN", "alert"},
		{"expired", expired, "expired at", "alert"},
		{"not-allowed", minted("/visitor", time.Hour), "no rule allows", ""},
		{"old-tls", append(minted("/tester", time.Hour), "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"), "unsupported versions", "alert"},
	} {
		t.Run(c.name, func(t *testing.T) {
			skip, dialled := len(d.inventory.Records()), d.service.dialled.Load()
			out := d.sClient(t, c.args...)
			if strings.Contains(out, answer) {
				t.Fatalf("it was answered:\n%s", out)
			}
			if !strings.Contains(out, c.told) {
				t.Errorf("openssl was not told %q:\n%s", c.told, out)
			}
			d.refusedRecord(t, skip, c.record)
			if d.service.dialled.Load() != dialled {
				t.Error("the service was dialled")
			}
		})
	}

	t.Run("plain-http", func(t *testing.T) {
		skip := len(d.inventory.Records())
		if out, err := stage.Tell(t, "curl", "-sS", "--max-time", "10", "http://"+d.address+"/"); err == nil {
			t.Errorf("curl got an answer: %s", out)
		}
		d.refusedRecord(t, skip, "plain HTTP")
	})
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		t.Run("welcome"+version, func(t *testing.T) {
			skip := len(d.inventory.Records())
			args := append(minted("/tester", time.Hour), version, "-CAfile", filepath.Join(d.inventory.dir, "bundle.pem"), "-verify_return_error")
			if out := d.sClient(t, args...); !strings.Contains(out, answer) {
				t.Errorf("a client with an SVID that a rule allows was not answered:\n%s", out)
			}
			d.inventory.Record(skip, "allowed", func(a telemetry.Access) bool {
				return a.Decision == "allow" && a.Rule == "tester-reads" && "-tls"+strings.ReplaceAll(a.TLSVersion, ".", "_") == version
			})
		})
	}
}

// refusedRecord looks for the record of a connection that was refused.
func (d *door) refusedRecord(t *testing.T, skip int, reason string) {
	t.Helper()
	a := d.inventory.Record(skip, reason, func(a telemetry.Access) bool { return strings.Contains(a.Reason, reason) })
	if a.Outcome != "failure" || a.Decision == "allow" || a.Listener != inventoryIn || a.Source == "" {
		t.Errorf("the record of a refused connection: %+v", a)
	}
	t.Logf("the reason: %s", a.Reason)
}

// TestResumption comes back with a TLS session to a door that has changed its
// rules. We hand out no sessions, so one of another server has to do; TLS
// 1.3's is a ticket, that of TLS 1.2 one too.
func TestResumption(t *testing.T) {
	t.Parallel()
	d := newDoor(t)
	cert, key, _ := d.server.mint("/tester", time.Hour)
	elsewhere := stage.FreeAddress(t)
	other := stage.Start(t, "openssl s_server", "openssl", []string{"s_server", "-accept", elsewhere, "-cert", cert, "-key", key, "-rev"})
	other.Says(stage.Soon, "ACCEPT")
	sessions := map[string]string{"-tls1_2": "", "-tls1_3": ""}
	for version := range sessions {
		dir := stage.Folder(t, "session")
		own := filepath.Join(dir, "own.pem")
		out := d.sClient(t, version, "-cert", cert, "-key", key, "-sess_out", own)
		if !strings.Contains(out, answer) {
			t.Fatalf("%s: not answered while it is allowed:\n%s", version, out)
		}
		if _, err := os.Stat(own); err == nil {
			t.Errorf("%s: the proxy gave out a session", version)
		}
		sessions[version] = filepath.Join(dir, "other.pem")
		d.session(t, elsewhere, version, sessions[version])
	}
	d.comeBack(t, sessions, func(version, out string, skip int) {
		if !strings.Contains(out, answer) {
			t.Errorf("%s: not answered while it is allowed:\n%s", version, out)
		}
	}, cert, key)

	d.inventory.rules(nil, rule{id: "orders-reads", from: d.id("orders"), to: d.id("inventory"), at: "inbound"})
	d.inventory.Becomes(stage.Soon, "new policy in force", func(st telemetry.Status) bool { return st.Proxy.Policy.Generation > 1 })
	d.comeBack(t, sessions, func(version, out string, skip int) {
		if strings.Contains(out, answer) {
			t.Errorf("%s: let in, though no rule allows it:\n%s", version, out)
		}
		d.refusedRecord(t, skip, "no rule allows")
	}, cert, key)
}

// session has openssl keep a session of the server at address.
func (d *door) session(t *testing.T, address, version, file string) {
	t.Helper()
	there := &door{d.shop, address}
	// s_server -rev answers a line with the same line backwards.
	there.sClient(t, version, "-sess_out", file)
	if _, err := os.Stat(file); err != nil {
		t.Fatalf("openssl kept no session of %s %s: %v", address, version, err)
	}
}

// comeBack offers each session to the door. It is never taken up.
func (d *door) comeBack(t *testing.T, sessions map[string]string, check func(version, out string, skip int), cert, key string) {
	t.Helper()
	for version, file := range sessions {
		skip := len(d.inventory.Records())
		out := d.sClient(t, version, "-cert", cert, "-key", key, "-sess_in", file)
		if strings.Contains(out, "Reused, TLS") {
			t.Errorf("%s: the session was resumed:\n%s", version, out)
		}
		check(version, out, skip)
	}
}
