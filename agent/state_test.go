package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Whoever owns the data directory, or a link to it, can read and replace the
// agent's keys.
func TestDataDirOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		// An ordinary user cannot give a directory away; root's will do.
		if err := narrow("/"); err == nil || !strings.Contains(err.Error(), "belongs to user 0") {
			t.Errorf("root's directory: %v", err)
		}
		return
	}
	const other = 4001
	dir := t.TempDir()
	ours, theirs, link := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs"), filepath.Join(dir, "link")
	for _, path := range []string{ours, theirs} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(theirs, other, other); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(ours, link); err != nil {
		t.Fatal(err)
	}
	open := func(path string) error {
		d, err := openDataDir(path)
		if err != nil {
			return err
		}
		return d.close()
	}
	for _, path := range []string{ours, link} {
		if err := open(path); err != nil {
			t.Errorf("%s is ours: %v", path, err)
		}
	}
	if err := os.Lchown(link, other, other); err != nil {
		t.Fatal(err)
	}
	for path, say := range map[string]string{
		theirs:     "belongs to user 4001",
		link:       "symbolic link that belongs to user 4001",
		link + "/": "symbolic link that belongs to user 4001",
	} {
		if err := open(path); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v, want %q", path, err, say)
		}
	}
}

// A directory that is not the agent's alone is left as it is.
func TestDataDirMode(t *testing.T) {
	for name, test := range map[string]struct {
		mode  os.FileMode
		files []string
		want  string // "": it is taken, and has mode 0700 then
	}{
		"new":                                  {0o755, nil, ""},
		"empty volume":                         {0o777 | os.ModeSetgid, []string{"lost+found"}, ""},
		"the agent's":                          {0o755, []string{leaseFile, "keys"}, ""},
		"the agent's, 0700, beside a token":    {0o700, []string{"token"}, ""},
		"somebody else's":                      {0o755, []string{"index.html"}, "holds other things and nothing of an agent"},
		"others could write the agent's state": {0o777, []string{leaseFile, stateFile}, "others can write to"},
		"a group could":                        {0o770, []string{stateFile}, "others can write to"},
		"another /tmp":                         {0o777 | os.ModeSticky, nil, "a directory for everybody"},
	} {
		dir := filepath.Join(t.TempDir(), "data")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range test.files {
			if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(dir, test.mode); err != nil {
			t.Fatal(err)
		}
		_, err := openDataDir(dir)
		if (err == nil) != (test.want == "") || err != nil && (!strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), dir)) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
		want := os.FileMode(0o700)
		if test.want != "" {
			want = test.mode.Perm()
		}
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
}

// What another user could have written is not believed, and stays where it is.
func TestStateOfAnotherUser(t *testing.T) {
	write := func(path string) error {
		return os.WriteFile(path, []byte(`{"version":1,"trust_domain":"example.test"}`), 0o600)
	}
	for name, test := range map[string]struct {
		make func(path string) error
		want string // "": it is read
	}{
		"ours":       {write, ""},
		"not there":  {func(string) error { return nil }, ""},
		"a link":     {func(path string) error { return errors.Join(write(path+".real"), os.Symlink(path+".real", path)) }, "is a symbolic link"},
		"a pipe":     {func(path string) error { return unix.Mkfifo(path, 0o600) }, "is no regular file"},
		"writable":   {func(path string) error { return errors.Join(write(path), os.Chmod(path, 0o620)) }, "can be written by others"},
		"another's":  {func(path string) error { return errors.Join(write(path), os.Chown(path, 4001, 4001)) }, "belongs to user 4001"},
		"far longer": {func(path string) error { return errors.Join(write(path), os.Truncate(path, stateLimit+1)) }, errCorruptState.Error()},
	} {
		if name == "another's" && os.Geteuid() != 0 {
			continue // only root can give a file away
		}
		d := &dataDir{path: t.TempDir()}
		path := filepath.Join(d.path, stateFile)
		if err := test.make(path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(path)
		_, err := d.read("example.test")
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
		if after, _ := os.Lstat(path); before != nil && (after == nil || !os.SameFile(before, after)) {
			t.Errorf("%s: it was moved", name)
		}
	}
}
