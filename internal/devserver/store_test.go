package devserver

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
)

func TestRestart(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "a", "state"), JoinTokens: []string{"tok"}}
	srv, end := serve(t, cfg)
	cert := attest(t, srv, "tok")
	bad := attest(t, srv, srv.JoinToken())
	gone := attest(t, srv, srv.JoinToken())
	if err := ping(t, dial(t, srv, cert)); err != nil {
		t.Fatal(err)
	}
	if err := srv.RotateCA(); err != nil {
		t.Fatal(err)
	}
	if err := srv.TaintCA(); err != nil {
		t.Fatal(err)
	}
	if err := srv.Ban(agentID(bad)); err != nil {
		t.Fatal(err)
	}
	if err := srv.Evict(agentID(gone)); err != nil {
		t.Fatal(err)
	}
	pem, sequence := srv.BundlePEM(), srv.ca.bundle().sequence
	signer := srv.ca.signer().cert
	end()

	srv, _ = serve(t, cfg)
	if !bytes.Equal(srv.BundlePEM(), pem) || srv.ca.bundle().sequence != sequence || !srv.ca.signer().cert.Equal(signer) {
		t.Error("the authorities are not what they were")
	}
	if b := getBundle(t, dial(t, srv, nil)); !b.X509Authorities[0].Tainted || b.X509Authorities[1].Tainted {
		t.Error("the taint was forgotten")
	}
	if err := ping(t, dial(t, srv, cert)); err != nil {
		t.Errorf("the agent after a restart: %v", err)
	}
	wantDenied(t, ping(t, dial(t, srv, bad)), banned)
	wantDenied(t, ping(t, dial(t, srv, gone)), notAttested)
	_, err := sendAttest(t, dial(t, srv, nil), tokenParams("tok", newCSR(t, newKey(t))))
	wantCode(t, err, codes.InvalidArgument, "already been used")
}

func TestStateIsPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	srv, end := serve(t, Config{Dir: dir})
	attest(t, srv, srv.JoinToken())
	if other, err := New(Config{TrustDomain: testTD, Dir: dir}); err == nil || !strings.Contains(err.Error(), "in use by another development server") {
		other.Close()
		t.Errorf("a second server on the directory: %v", err)
	}
	end()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		} else {
			files++
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %#o", path, info.Mode().Perm())
		}
		return nil
	})
	if err != nil || files != 3 {
		t.Errorf("%d files, %v", files, err)
	}
}

func TestStateRefused(t *testing.T) {
	start := func(cfg Config) error {
		cfg.TrustDomain = testTD
		srv, err := New(cfg)
		if err == nil {
			srv.Close()
		}
		return err
	}
	fresh := func(t *testing.T) string {
		dir := filepath.Join(t.TempDir(), "state")
		if err := start(Config{Dir: dir}); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	wantErr := func(t *testing.T, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for _, damage := range []string{"", "{", "{}x", `{"unknown":1}`, `{"authorities":[{}]}`, `{"authorities":[{"key":"AAAA"}]}`} {
		t.Run("damaged "+damage, func(t *testing.T) {
			dir := fresh(t)
			if err := os.WriteFile(filepath.Join(dir, authoritiesFile), []byte(damage), 0o600); err != nil {
				t.Fatal(err)
			}
			err := start(Config{Dir: dir})
			wantErr(t, err, filepath.Join(dir, authoritiesFile)+" is damaged")
		})
	}
	t.Run("agents damaged", func(t *testing.T) {
		dir := fresh(t)
		if err := os.WriteFile(filepath.Join(dir, nodesFile), []byte("["), 0o600); err != nil {
			t.Fatal(err)
		}
		wantErr(t, start(Config{Dir: dir}), nodesFile+" is damaged")
	})
	t.Run("open to others", func(t *testing.T) {
		dir := fresh(t)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		wantErr(t, start(Config{Dir: dir}), "open to others")
	})
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		wantErr(t, start(Config{Dir: path}), "not a directory")
	})
	t.Run("another trust domain", func(t *testing.T) {
		srv, err := New(Config{TrustDomain: spiffeid.RequireTrustDomainFromString("other.test"), Dir: fresh(t)})
		if err == nil {
			srv.Close()
		}
		wantErr(t, err, "another trust domain")
	})
}

// TestUnwritableState removes the directory under a running server.
func TestUnwritableState(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	srv, _ := serve(t, Config{Dir: dir})
	_, cert := agent(t, srv)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	_, err := sendAttest(t, dial(t, srv, nil), tokenParams(srv.JoinToken(), newCSR(t, newKey(t))))
	wantCode(t, err, codes.Internal, "failed to create attested agent")
	if err := srv.Ban(agentID(cert)); err == nil {
		t.Error("a ban that could not be kept was accepted")
	}
	if err := srv.Evict(agentID(cert)); err == nil {
		t.Error("an eviction that could not be kept was accepted")
	}
	syncWhole(t, dial(t, srv, cert), nil) // neither banned nor evicted
	if err := srv.RotateCA(); err == nil {
		t.Error("a rotation that could not be kept was reported as done")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := srv.ca.turn(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, authoritiesFile)); err != nil {
		t.Errorf("the authorities were not written later: %v", err)
	}
}
