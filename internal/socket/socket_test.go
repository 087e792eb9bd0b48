package socket

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPath(t *testing.T) {
	long := "/" + strings.Repeat("x", 107)
	for _, test := range []struct{ addr, path, err string }{
		{"/run/api.sock", "/run/api.sock", ""},
		{"unix:/run/api.sock", "/run/api.sock", ""},
		{"unix:///run/api.sock", "/run/api.sock", ""},
		{"unix:api.sock", "api.sock", ""},
		{"/run//x/../api.sock", "/run/api.sock", ""},
		{long[:107], long[:107], ""},
		{long, "", "has 108 bytes, the system allows 107"},
		{"unix:" + long[:107], long[:107], ""},
		{"", "", "no path"},
		{"unix:", "", "no path"},
		{"@abstract", "", "abstract"},
		{"unix:@abstract", "", "abstract"},
		{"/a\x00b", "", "abstract"},
	} {
		path, err := Path(test.addr)
		if path != test.path || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%q: got %q, %v; want %q, %q", test.addr, path, err, test.path, test.err)
		}
	}
}

func TestListen(t *testing.T) {
	// Whatever the umask, and with a path as long as there may be.
	defer unix.Umask(unix.Umask(0o077))
	dir := t.TempDir()
	dir = filepath.Join(dir, strings.Repeat("d", 90-len(dir)))
	must(t, os.Mkdir(dir, 0o700))
	path := filepath.Join(dir, strings.Repeat("s", MaxPath-len(dir)-1))
	s, err := Listen(path, 0o777)
	must(t, err)
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o777 || !s.Stands() || !s.Owned() {
		t.Errorf("mode %o, stands %t, owned %t", info.Mode().Perm(), s.Stands(), s.Owned())
	}
	if s.Addr().String() != path {
		t.Errorf("the address is %q", s.Addr())
	}
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 1 {
		t.Errorf("the directory holds %v, want the socket alone", left)
	}
	c, err := net.Dial("unix", path)
	must(t, err)
	must(t, c.Close())
	must(t, s.Remove())
	must(t, s.Close())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	must(t, s.Remove())
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	must(t, stale.Close())
	s, err := Listen(path, 0o777)
	must(t, err)
	defer s.Close()
	c, err := net.Dial("unix", path)
	must(t, err)
	must(t, c.Close())
	left, err := os.ReadDir(filepath.Dir(path))
	must(t, err)
	if len(left) != 1 {
		t.Errorf("the directory holds %v, want the socket alone", left)
	}
}

func TestOccupiedPath(t *testing.T) {
	dir := t.TempDir()
	live := filepath.Join(dir, "live")
	l, err := net.Listen("unix", live)
	must(t, err)
	defer l.Close()
	datagram := filepath.Join(dir, "datagram")
	d, err := net.ListenPacket("unixgram", datagram)
	must(t, err)
	defer d.Close()
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	link := filepath.Join(dir, "link")
	must(t, os.Symlink(file, link))
	for path, want := range map[string]string{
		live:                        "a live process serves this socket",
		datagram:                    "not clear whether it is served",
		file:                        "a file that is not a socket",
		link:                        "a file that is not a socket",
		dir:                         "a file that is not a socket",
		filepath.Join(file, "sock"): "not a directory",
	} {
		before, _ := os.Lstat(path)
		s, err := Listen(path, 0o777)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want it to say %q", path, err, want)
		}
		if after, _ := os.Lstat(path); before != nil && !os.SameFile(before, after) {
			t.Errorf("%s was replaced", path)
		}
	}
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 4 {
		t.Errorf("the directory holds %v", left)
	}
}

// Of several agents that start at once on one stale socket, one serves it.
func TestConcurrentListeners(t *testing.T) {
	for range 10 {
		path := filepath.Join(t.TempDir(), "api.sock")
		stale, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
		must(t, err)
		stale.SetUnlinkOnClose(false)
		must(t, stale.Close())
		var mu sync.Mutex // guards the following
		var won []*Listener
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				s, err := Listen(path, 0o777)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won = append(won, s)
				} else if !errors.Is(err, ErrServed) {
					t.Errorf("got %v, want that it is served", err)
				}
			})
		}
		all.Wait()
		if len(won) != 1 {
			t.Fatalf("%d listeners took the socket", len(won))
		}
		if !won[0].Stands() {
			t.Error("the socket in place is not the winner's")
		}
		must(t, won[0].Remove())
		must(t, won[0].Close())
	}
}

func TestRemoveLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	s, err := Listen(path, 0o777)
	must(t, err)
	must(t, os.Remove(path))
	other, err := Listen(path, 0o777)
	must(t, err)
	defer other.Close()
	must(t, s.Remove())
	must(t, s.Close())
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another server's socket was removed: %v", err)
	}
}

// One that is inherited has no file of its own until it owns the one there.
func TestInherit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	made, err := Listen(path, 0o600)
	must(t, err)
	defer made.Close()
	heir, err := Inherit(made.UnixListener, "unix:"+path)
	must(t, err)
	must(t, heir.Remove())
	if heir.Owned() || heir.Stands() || !made.Stands() || heir.Addr().String() != path {
		t.Errorf("owned %t, stands %t, the maker's %t, at %s", heir.Owned(), heir.Stands(), made.Stands(), heir.Addr())
	}
	must(t, heir.Own())
	must(t, heir.Remove())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := heir.Own(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("owns what is not there: %v", err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestReplacedSocket: whatever others put in the place of a new socket keeps
// its mode.
func TestReplacedSocket(t *testing.T) {
	const name = "s"
	bind := func(path string) error {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		return errors.Join(l.Close(), os.Chmod(path, 0o600))
	}
	for what, put := range map[string]func(precious, at string) error{
		"a link to a file": func(precious, at string) error {
			return errors.Join(os.WriteFile(precious, nil, 0o600), os.Symlink(precious, at))
		},
		"a file": func(precious, at string) error {
			return errors.Join(os.WriteFile(precious, nil, 0o600), os.Link(precious, at))
		},
		"a link to a socket":           func(precious, at string) error { return errors.Join(bind(precious), os.Symlink(precious, at)) },
		"another name of a socket":     func(precious, at string) error { return errors.Join(bind(precious), os.Link(precious, at)) },
		"nothing, it was just removed": func(precious, _ string) error { return os.WriteFile(precious, nil, 0o600) },
	} {
		t.Run(what, func(t *testing.T) {
			dir, err := os.Open(t.TempDir())
			must(t, err)
			defer dir.Close()
			precious := filepath.Join(t.TempDir(), "precious")
			must(t, put(precious, filepath.Join(dir.Name(), name)))
			if _, err := setMode(dir, name, 0o777); err == nil {
				t.Error("it was taken for the socket")
			}
			info, err := os.Stat(precious)
			must(t, err)
			if info.Mode().Perm() != 0o600 {
				t.Errorf("it has mode %o now", info.Mode().Perm())
			}
		})
	}
}
