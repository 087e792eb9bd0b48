package stage

import (
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

// Postgres starts PostgreSQL on a Unix socket alone, .s.PGSQL.5432 in the folder it
// returns. Its user is postgres, its database too, and nobody needs a password.
func Postgres(t testing.TB) (dir string) {
	t.Helper()
	account, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(account.Uid)
	gid, _ := strconv.Atoi(account.Gid)
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		t.Fatalf("PostgreSQL is not installed: %v", err)
	}
	slices.Sort(bins)
	bin := bins[len(bins)-1]
	dir = Folder(t, "postgres")
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	made := Start(t, "initdb", filepath.Join(bin, "initdb"), []string{"-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C"}, As(uid, gid))
	select {
	case <-made.Done:
	case <-time.After(5 * time.Minute):
		t.Fatal("initdb does not end")
	}
	p := Start(t, "postgres", filepath.Join(bin, "postgres"), []string{"-D", data, "-k", dir, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=32MB"}, As(uid, gid))
	p.Says(Soon, "ready to accept connections")
	return dir
}
