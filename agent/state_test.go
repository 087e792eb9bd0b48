package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Whoever owns the data directory, or a link to it, can read and replace the
// agent's keys.
func TestDataDirOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		// An ordinary user cannot give a directory away; root's will do.
		if _, err := ownDir("/"); err == nil || !strings.Contains(err.Error(), "belongs to user 0") {
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
