package agent

import (
	"bufio"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/keys"
)

// asWriter tells the test binary to be the process that is killed. It writes where
// it is.
const asWriter = "NARTHEX_TEST_WRITER"

// TestKilledWhileItWrites kills a process that does nothing but renew an SVID on
// disk, in the middle of whatever it does. What is left is one SVID with its own
// key, old or new, each time.
func TestKilledWhileItWrites(t *testing.T) {
	if os.Getenv(asWriter) != "" {
		renewWithoutEnd(t, ".")
	}
	t.Parallel()
	dir := t.TempDir()
	left := map[string]int{}
	for range 60 {
		killWriter(t, dir)
		for what, pattern := range map[string]string{
			"a state file half written": stateTemp + "*", "a key file half written": "keys/.new-*", "keys": "keys/*.key",
		} {
			found, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			if what == "keys" && len(found) < 2 {
				continue // the one in force
			}
			left[what] += len(found)
		}
		l, s := reopen(t, dir)
		if len(s.SVID) == 0 || l.self.leaf == nil {
			t.Fatalf("no SVID is left: %+v", s)
		}
	}
	t.Logf("left behind by 60 kills: %v", left)
	if found, _ := filepath.Glob(filepath.Join(dir, stateTemp+"*")); len(found) > 0 {
		t.Errorf("left for good: %v", found)
	}
}

// killWriter runs the process for a moment and kills it.
func killWriter(t *testing.T, dir string) {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^TestKilledWhileItWrites$")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), asWriter+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it writes for ever
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "writing" {
		t.Log(lines.Text())
	}
	<-time.After(mathrand.N(20 * time.Millisecond))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the writer has ended by itself: %v", err)
	}
}

// reopen takes up what is in dir, as an agent that starts.
func reopen(t *testing.T, dir string) (*looper, state) {
	t.Helper()
	l := newLooper(t, Config{})
	var err error
	if l.dir, err = openDataDir(dir); err != nil {
		t.Fatal(err)
	}
	if l.cfg.Keys, err = keys.Disk(filepath.Join(dir, "keys")); err != nil {
		t.Fatal(err)
	}
	if err := l.restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l, l.self.state
}

func renewWithoutEnd(t *testing.T, dir string) {
	l, s := reopen(t, dir)
	s.TrustDomain = l.cfg.TrustDomain.Name()
	for first := true; ; first = false {
		key, _, err := l.newKey(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
			URIs: []*url.URL{spiffeid.RequireFromString("spiffe://example.test/spire/agent/a").URL()},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		s.KeyID, s.SVID = key.ID(), [][]byte{der}
		if err := l.keep(t.Context(), s, key); err != nil {
			t.Fatal(err)
		}
		if first {
			_, _ = os.Stdout.WriteString("writing\n")
		}
	}
}
