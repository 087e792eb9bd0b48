package keys_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/agent/keys"
)

// stores are the stores that make the same promises.
func stores(t *testing.T) map[string]keys.Store {
	disk, err := keys.Disk(filepath.Join(t.TempDir(), "keys"))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]keys.Store{"disk": disk, "memory": keys.Memory()}
}

func TestStore(t *testing.T) {
	for name, store := range stores(t) {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			a, b, c := newKey(t, store), newKey(t, store), newKey(t, store)
			for _, k := range []keys.Key{a, b, c} {
				loaded, err := store.Load(ctx, k.ID())
				if err != nil {
					t.Fatal(err)
				}
				if loaded.ID() != k.ID() || !publicOf(t, loaded).Equal(k.Public()) {
					t.Errorf("loaded key %s is not the one that was made", k.ID())
				}
				verify(t, k, loaded)
			}
			if err := store.Keep(ctx, b.ID(), "never-was"); err != nil {
				t.Fatal(err)
			}
			for _, k := range []keys.Key{a, c} {
				if _, err := store.Load(ctx, k.ID()); !errors.Is(err, keys.ErrNotFound) {
					t.Errorf("after Keep of another: got %v, want ErrNotFound", err)
				}
			}
			if _, err := store.Load(ctx, b.ID()); err != nil {
				t.Errorf("after Keep: %v", err)
			}
			verify(t, a, a) // a key in use outlives its deletion
			if err := store.Keep(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := store.Load(ctx, b.ID()); !errors.Is(err, keys.ErrNotFound) {
				t.Errorf("after Keep of none: got %v, want ErrNotFound", err)
			}
		})
	}
}

func TestLoadRefusesStrangeIDs(t *testing.T) {
	for name, store := range stores(t) {
		k := newKey(t, store)
		for _, id := range []string{
			"", ".", "..", "../" + k.ID(), "../../etc/shadow", k.ID() + "/", k.ID() + ".key", k.ID()[1:],
			"/" + k.ID(), strings.ToUpper(k.ID()[:31]) + "G", k.ID() + "\x00", strings.Repeat("a", 1<<20),
		} {
			_, err := store.Load(t.Context(), id)
			if !errors.Is(err, keys.ErrNotFound) {
				t.Errorf("%s: Load(%.50q): got %v, want ErrNotFound", name, id, err)
			}
			if len(fmt.Sprint(err)) > 300 {
				t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
			}
		}
	}
}

func TestDiskFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "keys")
	store, err := keys.Disk(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := newKey(t, store)
	path := filepath.Join(dir, k.ID()+".key")
	for p, want := range map[string]os.FileMode{dir: 0o700, path: 0o600} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s: mode %04o, want %04o", p, got, want)
		}
	}
	again, err := keys.Disk(dir)
	if err != nil {
		t.Fatal(err)
	}
	if loaded, err := again.Load(t.Context(), k.ID()); err != nil || !publicOf(t, loaded).Equal(k.Public()) {
		t.Errorf("another process's Load: %v", err)
	}

	// Keep clears what a crash left, and leaves alone what is not the store's.
	left, foreign := filepath.Join(dir, ".new-123"), filepath.Join(dir, "README.key")
	for _, p := range []string{left, foreign} {
		if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Keep(t.Context(), k.ID()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the unfinished file: got %v, want it gone", err)
	}
	for _, p := range []string{path, foreign} {
		if _, err := os.Stat(p); err != nil {
			t.Errorf("Keep took away %v", err)
		}
	}
}

func TestDiskBadFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := keys.Disk(dir)
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(filepath.Join(dir, newKey(t, store).ID()+".key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		content string
		mode    os.FileMode
		corrupt bool
		want    string // in the error, beside the path
	}{
		{"empty", "", 0o600, true, "no PEM block"},
		{"cut off", string(good[:len(good)/2]), 0o600, true, "no PEM block"},
		{"zeros", strings.Repeat("\x00", 300), 0o600, true, "no PEM block"},
		{"huge", strings.Repeat("x", 1<<20), 0o600, true, "larger than"},
		{"another block", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", 0o600, true, "want PRIVATE KEY"},
		{"not PKCS#8", "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n", 0o600, true, ""},
		{"two blocks", string(good) + string(good), 0o600, true, "follows"},
		{"group may read", string(good), 0o640, false, "chmod 0600"},
		{"others may write", string(good), 0o602, false, "chmod 0600"},
		{"good", string(good) + "\n", 0o600, false, "<nil>"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id := strings.Repeat("ab", 16)
			path := filepath.Join(dir, id+".key")
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			defer os.Remove(path)
			if err := os.Chmod(path, tt.mode); err != nil {
				t.Fatal(err)
			}
			_, err := store.Load(t.Context(), id)
			text := fmt.Sprint(err)
			if errors.Is(err, keys.ErrCorrupt) != tt.corrupt || !strings.Contains(text, tt.want) || err != nil && !strings.Contains(text, path) {
				t.Errorf("got %v, want %q, corrupt: %v", err, tt.want, tt.corrupt)
			}
			for _, secret := range strings.Split(string(good), "\n")[1:3] {
				if strings.Contains(text, secret) {
					t.Errorf("the error shows the key: %v", err)
				}
			}
		})
	}
}

func TestDiskNotAFile(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := keys.Disk(dir)
	if err != nil {
		t.Fatal(err)
	}
	real := filepath.Join(dir, newKey(t, store).ID()+".key")
	id := strings.Repeat("cd", 16)
	if err := os.Symlink(real, filepath.Join(dir, id+".key")); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Load(t.Context(), id); err == nil {
		t.Error("followed a symbolic link")
	}
	id = strings.Repeat("ef", 16)
	if err := os.Mkdir(filepath.Join(dir, id+".key"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Load(t.Context(), id); !errors.Is(err, keys.ErrCorrupt) {
		t.Errorf("a directory: got %v, want ErrCorrupt", err)
	}
}

func TestDiskRefusesOpenDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Disk(dir); err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "0750") {
		t.Errorf("got %v, want an error that names the directory and its mode", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Disk(file); err == nil {
		t.Error("took a file for a directory")
	}
}

func TestStoreSideBySide(t *testing.T) {
	for name, store := range stores(t) {
		t.Run(name, func(t *testing.T) {
			kept := newKey(t, store)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					if _, err := store.New(t.Context()); err != nil {
						t.Error(err)
					}
					if err := store.Keep(t.Context(), kept.ID()); err != nil {
						t.Error(err)
					}
					if _, err := store.Load(t.Context(), kept.ID()); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestPrintingAKeyShowsItsIDOnly(t *testing.T) {
	for name, store := range stores(t) {
		k := newKey(t, store)
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
			if got, want := fmt.Sprintf(verb, k), "key "+k.ID(); got != want {
				t.Errorf("%s: %s prints %q, want %q", name, verb, got, want)
			}
		}
	}
}

func TestNewWorkloadKey(t *testing.T) {
	for _, tt := range []struct {
		kind string
		want func(crypto.PublicKey) bool
	}{
		{"ec-p256", onCurve(elliptic.P256())},
		{"ec-p384", onCurve(elliptic.P384())},
		{"rsa-2048", func(k crypto.PublicKey) bool { r, ok := k.(*rsa.PublicKey); return ok && r.N.BitLen() == 2048 }},
	} {
		k, err := keys.NewWorkloadKey(tt.kind)
		if err != nil {
			t.Fatal(err)
		}
		if !tt.want(k.Public()) {
			t.Errorf("%s: got a %T", tt.kind, k.Public())
		}
	}
	for _, kind := range []string{"", "rsa-1024", "EC-P256"} {
		if k, err := keys.NewWorkloadKey(kind); k != nil || err == nil || !strings.Contains(err.Error(), "ec-p256") {
			t.Errorf("%q: got %v, %v; want an error that names the kinds", kind, k, err)
		}
	}
}

func FuzzDiskLoad(f *testing.F) {
	dir := f.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		f.Fatal(err)
	}
	store, err := keys.Disk(dir)
	if err != nil {
		f.Fatal(err)
	}
	signer, err := keys.NewWorkloadKey("ec-p256")
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der[:40]}))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----"))
	id := strings.Repeat("0f", 16)
	f.Fuzz(func(t *testing.T, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, id+".key"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := store.Load(t.Context(), id)
		if (k == nil) != (err != nil) || err != nil && !errors.Is(err, keys.ErrCorrupt) {
			t.Errorf("got %v, %v; want a key or ErrCorrupt", k, err)
		}
	})
}

func newKey(t *testing.T, s keys.Store) keys.Key {
	t.Helper()
	k, err := s.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func publicOf(t *testing.T, k keys.Key) *ecdsa.PublicKey {
	t.Helper()
	p, ok := k.Public().(*ecdsa.PublicKey)
	if !ok || p.Curve != elliptic.P256() {
		t.Fatalf("key %s is a %T, want EC P-256", k.ID(), k.Public())
	}
	return p
}

// verify checks that what signer signs, key verifies.
func verify(t *testing.T, key, signer keys.Key) {
	t.Helper()
	digest := sha256.Sum256([]byte("something"))
	sig, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(publicOf(t, key), digest[:], sig) {
		t.Error("the signature does not verify")
	}
}

func onCurve(c elliptic.Curve) func(crypto.PublicKey) bool {
	return func(k crypto.PublicKey) bool { e, ok := k.(*ecdsa.PublicKey); return ok && e.Curve == c }
}
