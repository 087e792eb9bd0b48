package endpoint

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The directories of the socket are made so that everybody reaches it,
// whatever the umask, and the socket for everybody.
func TestListenUnix(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	dir := filepath.Join(t.TempDir(), "new", "public")
	path := filepath.Join(dir, "api.sock")
	s, err := listenUnix("unix://" + path)
	must(t, err)
	defer s.Close()
	for name, want := range map[string]fs.FileMode{path: 0o777, dir: 0o755, filepath.Dir(dir): 0o755} {
		info, err := os.Stat(name)
		must(t, err)
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", name, info.Mode().Perm(), want)
		}
	}
	must(t, s.Remove())
}
