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

// Postgres is PostgreSQL whose files are made and that is to be started. Its user is
// postgres, its database too, and nobody needs a password.
type Postgres struct {
	Dir  string // of its Unix socket, .s.PGSQL.5432 unless Start is told of another port
	Data string // its files

	t        testing.TB
	bin      string
	uid, gid int
}

// NewPostgres makes the files.
func NewPostgres(t testing.TB) *Postgres {
	t.Helper()
	account, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		t.Fatalf("PostgreSQL is not installed: %v", err)
	}
	p := &Postgres{Dir: Folder(t, "postgres"), t: t, bin: slices.Max(bins)}
	p.Data = filepath.Join(p.Dir, "data")
	p.uid, _ = strconv.Atoi(account.Uid)
	p.gid, _ = strconv.Atoi(account.Gid)
	if err := os.Chown(p.Dir, p.uid, p.gid); err != nil {
		t.Fatal(err)
	}
	made := p.run("initdb", "-D", p.Data, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C")
	select {
	case <-made.Done:
	case <-time.After(5 * time.Minute):
		t.Fatal("initdb does not end")
	}
	return p
}

// Start starts it with further arguments. It listens on its Unix socket alone,
// unless they say otherwise.
func (p *Postgres) Start(args ...string) {
	p.t.Helper()
	own := []string{"-D", p.Data, "-k", p.Dir, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=32MB"}
	p.run("postgres", append(own, args...)...).Says(Soon, "ready to accept connections")
}

func (p *Postgres) run(program string, args ...string) *Process {
	p.t.Helper()
	return Start(p.t, program, filepath.Join(p.bin, program), args, As(p.uid, p.gid))
}
