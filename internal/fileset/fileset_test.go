package fileset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func open(t *testing.T, dir string) *Dir {
	t.Helper()
	d, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// pair is a set whose two files say which set they are of.
func pair(n int) []File {
	return []File{
		{Name: "svid.pem", Data: fmt.Appendf(nil, "%d", n), Mode: 0o644},
		{Name: "svid_key.pem", Data: fmt.Appendf(nil, "%d", n), Mode: 0o600},
	}
}

func read(t *testing.T, parts ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, setPrefix) {
			name = setPrefix
		}
		names = append(names, name)
	}
	return names
}

func TestPut(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "deep", "certs")
	d := open(t, dir)
	files := append(pair(1), File{Name: "bundle.other.example.pem", Data: []byte("other"), Mode: 0o640}, File{Name: "web/blue/svid.pem", Data: []byte("blue"), Mode: 0o644})
	if err := d.Put(files); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := os.Stat(filepath.Join(dir, f.Name))
		if err != nil {
			t.Fatal(err)
		}
		if got := read(t, dir, f.Name); got != string(f.Data) || info.Mode() != f.Mode {
			t.Errorf("%s holds %q with mode %v, want %q with %v", f.Name, got, info.Mode(), f.Data, f.Mode)
		}
	}
	resolved, err := filepath.EvalSymlinks(filepath.Join(dir, current))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Put(pair(2)); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir, "svid.pem") + read(t, dir, "svid_key.pem"); got != "22" {
		t.Errorf("after the second set: %s", got)
	}
	if got := read(t, resolved, "svid.pem") + read(t, resolved, "svid_key.pem"); got != "11" {
		t.Errorf("who has resolved the first set reads %s", got)
	}
	if want := []string{current, setPrefix, setPrefix, "svid.pem", "svid_key.pem"}; !slices.Equal(list(t, dir), want) {
		t.Errorf("the directory holds %v, want %v", list(t, dir), want)
	}
	if err := d.Sweep(); err != nil {
		t.Fatal(err)
	}
	if want := []string{current, setPrefix, "svid.pem", "svid_key.pem"}; !slices.Equal(list(t, dir), want) {
		t.Errorf("swept, the directory holds %v, want %v", list(t, dir), want)
	}
}

// TestPutWhateverTheUmask needs a process-wide umask, so it is not parallel.
func TestPutWhateverTheUmask(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := t.TempDir()
	if err := open(t, dir).Put(pair(1)); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, "svid.pem"))
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// TestCrash stops between any two steps and finds a complete set, the old or the
// new one, and the next Put goes on from there.
func TestCrash(t *testing.T) {
	t.Parallel()
	crash := errors.New("crash")
	for at := 0; ; at++ {
		dir := t.TempDir()
		d := open(t, dir)
		if err := d.Put(pair(1)); err != nil {
			t.Fatal(err)
		}
		steps, last := 0, ""
		d.step = func(step string) error {
			if last = step; steps == at {
				return crash
			}
			steps++
			return nil
		}
		err := d.Put(append(pair(2), File{Name: "bundle.pem", Mode: 0o644}))
		if err == nil {
			if at < 5 {
				t.Errorf("there are only %d steps", at)
			}
			return
		}
		if !errors.Is(err, crash) {
			t.Fatal(err)
		}
		if got := read(t, dir, "svid.pem") + read(t, dir, "svid_key.pem"); got != "11" && got != "22" {
			t.Errorf("after a crash when it had %s, readers have %s", last, got)
		}
		d.Close()
		again := open(t, dir)
		if err := again.Put(pair(3)); err != nil {
			t.Errorf("after a crash when it had %s: %v", last, err)
		}
		if err := again.Sweep(); err != nil {
			t.Error(err)
		}
		if want := []string{current, setPrefix, "svid.pem", "svid_key.pem"}; !slices.Equal(list(t, dir), want) {
			t.Errorf("after a crash when it had %s, %v is left", last, list(t, dir))
		}
	}
}

// TestReaders reads both files again and again while sets come. Who resolves
// ..data first never has a mixed pair, and nobody ever finds a file missing.
func TestReaders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := open(t, dir)
	if err := d.Put(pair(0)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				if _, err := os.ReadFile(filepath.Join(dir, "svid_key.pem")); err != nil {
					t.Error(err)
					return
				}
				// What an open directory holds stays together.
				set, err := os.OpenRoot(filepath.Join(dir, current))
				if err != nil {
					t.Error(err)
					return
				}
				cert, certErr := set.ReadFile("svid.pem")
				key, keyErr := set.ReadFile("svid_key.pem")
				set.Close()
				if certErr == nil && keyErr == nil && string(cert) != string(key) {
					t.Errorf("certificate of %s, key of %s", cert, key)
				}
			}
		})
	}
	for n := range 40 {
		if err := d.Put(pair(n + 1)); err != nil {
			t.Error(err)
			break
		}
		// Who is told now reads this set: nothing changes until the next Put.
		want := fmt.Sprint(n + 1)
		if cert, key := read(t, dir, "svid.pem"), read(t, dir, "svid_key.pem"); cert != want || key != want {
			t.Errorf("after set %s: certificate of %s, key of %s", want, cert, key)
		}
	}
	close(ended)
	g.Wait()
}

// TestTakesOver has the plain files of another program replaced.
func TestTakesOver(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"svid.pem", "svid_key.pem", "others.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("0"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := open(t, dir).Put(pair(1)); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir, "svid.pem") + read(t, dir, "svid_key.pem") + read(t, dir, "others.txt"); got != "110" {
		t.Error(got)
	}
}

// directory is one of somebody's.
type directory struct {
	fs.FileInfo
	mode  fs.FileMode
	owner int
}

func (d directory) Mode() fs.FileMode { return d.mode }
func (d directory) Sys() any          { return &syscall.Stat_t{Uid: uint32(d.owner)} }

func TestWhoMayWrite(t *testing.T) {
	t.Parallel()
	us, other := os.Geteuid(), os.Geteuid()+1
	for _, c := range []struct {
		mode  fs.FileMode
		owner int
		good  bool
	}{
		{0o700, us, true},
		{0o755, us, true},
		{0o755, other, true}, // its owner is who is given the files
		{0o775, us, false},
		{0o757, us, false},
		{0o777, 0, false},
		{fs.ModeSetgid | 0o775, us, false},
		{fs.ModeSticky | 0o777, us, true},
		{fs.ModeSticky | 0o777, 0, true},
		{fs.ModeSticky | 0o770, us, true},
		{fs.ModeSticky | 0o777, other, false},
	} {
		if err := checkWriters("d", directory{mode: c.mode, owner: c.owner}); (err == nil) != c.good {
			t.Errorf("mode %v of user %d: %v", c.mode, c.owner, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	mode := func(t *testing.T, dir string, m fs.FileMode) {
		if err := os.Chmod(dir, m); err != nil {
			t.Fatal(err)
		}
	}
	link := func(t *testing.T, to, name string) {
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		files   []File
		want    string // empty: it is good
	}{
		{name: "world-writable", prepare: func(t *testing.T, dir string) { mode(t, dir, 0o777) }, want: "everybody may write to it (mode 0777)"},
		{name: "group-writable", prepare: func(t *testing.T, dir string) { mode(t, dir, 0o770) }, want: "its group may write to it (mode 0770), and replace keys: chmod go-w /"},
		{name: "sticky", prepare: func(t *testing.T, dir string) { mode(t, dir, 0o777|fs.ModeSticky) }},
		{name: "planted name", prepare: func(t *testing.T, dir string) { link(t, "/etc/passwd", filepath.Join(dir, "svid.pem")) }, want: `svid.pem is a symbolic link to "/etc/passwd"`},
		{name: "planted data", prepare: func(t *testing.T, dir string) { link(t, "/etc", filepath.Join(dir, current)) }, want: `..data is a symbolic link to "/etc"`},
		{name: "a volume of Kubernetes", prepare: func(t *testing.T, dir string) { link(t, "..2026_01_02", filepath.Join(dir, current)) }, want: "was not made here"},
		{name: "data is a file", prepare: func(t *testing.T, dir string) { os.WriteFile(filepath.Join(dir, current), nil, 0o600) }, want: "..data is there"},
		{name: "a directory in the way", prepare: func(t *testing.T, dir string) { os.Mkdir(filepath.Join(dir, "svid.pem"), 0o700) }, want: "svid.pem is there"},
		{name: "a pipe in the way", prepare: func(t *testing.T, dir string) { syscall.Mkfifo(filepath.Join(dir, "svid.pem"), 0o600) }, want: "svid.pem is there"},
		{name: "out of the directory", files: []File{{Name: "../svid.pem"}}, want: `file name "../svid.pem"`},
		{name: "absolute", files: []File{{Name: "/etc/svid.pem"}}, want: `file name "/etc/svid.pem"`},
		{name: "our own name", files: []File{{Name: "..data/svid.pem"}}, want: `file name "..data/svid.pem"`},
		{name: "no name", files: []File{{Name: ""}}, want: `file name ""`},
		{name: "a long name", files: []File{{Name: strings.Repeat("x", 256)}}, want: "256 bytes, of 255"},
		{name: "twice", files: append(pair(1), pair(1)...), want: "two files have the name svid.pem"},
		{name: "file and directory", files: append(pair(1), File{Name: "svid.pem/x"}), want: "svid.pem is to be a file, and a directory"},
		{name: "nothing", files: []File{}, want: "no files"},
		{name: "too many", files: make([]File, MaxFiles+1), want: "10001 files"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if c.prepare != nil {
				c.prepare(t, dir)
			}
			if c.files == nil {
				c.files = pair(1)
			}
			d, err := Open(dir, nil)
			if err == nil {
				defer d.Close()
				err = d.Put(c.files)
			}
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			}
			for _, name := range list(t, dir) {
				if c.want != "" && name == setPrefix {
					t.Error("it has written all the same")
				}
			}
		})
	}
}

func TestDirectoryIsALink(t *testing.T) {
	t.Parallel()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(link, nil); err == nil || !strings.Contains(err.Error(), "name the directory itself") {
		t.Error(err)
	}
}

func TestOneWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := open(t, dir)
	if _, err := Open(dir, nil); err == nil || !strings.Contains(err.Error(), "give each a directory of its own") {
		t.Error(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
}

// TestOwner gives the files away, which only root can.
func TestOwner(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d, err := Open(dir, &Owner{UID: 1, GID: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	err = d.Put(pair(1))
	if os.Geteuid() != 0 {
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "only root gives files to others") {
			t.Error(err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, "svid_key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 1 || st.Gid != 2 {
		t.Errorf("it belongs to %d:%d", st.Uid, st.Gid)
	}
}

// FuzzCheckName accepts no name that leads out of the directory.
func FuzzCheckName(f *testing.F) {
	for _, name := range []string{"svid.pem", "a/b", "..", "a/../../b", "/x", "..data", "a//b", "\x00"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if checkName(name) != nil {
			return
		}
		if !filepath.IsLocal(name) || filepath.Clean(name) != name || strings.HasPrefix(name, current) {
			t.Errorf("%q is accepted", name)
		}
	})
}
