package telemetry

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
)

var _ io.WriteCloser = (*ReopenableFile)(nil)

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestReopenableFile(t *testing.T) {
	path := t.TempDir() + "/access.log"
	if err := os.WriteFile(path, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenReopenable(path, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	say := func(line string) {
		t.Helper()
		if n, err := f.Write([]byte(line)); err != nil || n != len(line) {
			t.Fatalf("write %q: %d, %v", line, n, err)
		}
	}
	say("one\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	say("two\n") // still to the file that was moved
	if err := f.Reopen(); err != nil {
		t.Fatal(err)
	}
	say("three\n")
	if old, now := read(t, path+".1"), read(t, path); old != "before\none\ntwo\n" || now != "three\n" {
		t.Errorf("old %q, new %q", old, now)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&^0o640 != 0 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}

	// A path that cannot be opened leaves the file as it is.
	if err := os.Rename(path, path+".2"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := f.Reopen(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a directory was opened: %v", err)
	}
	say("four\n")
	if got := read(t, path+".2"); got != "three\nfour\n" {
		t.Errorf("after a failed reopening: %q", got)
	}

	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = f.Write([]byte("late"))
	for _, err := range []error{err, f.Reopen(), f.Close()} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
	if _, err := OpenReopenable(t.TempDir()+"/none/access.log", 0o640); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

// TestReopenUnderWriters loses no line and tears none.
func TestReopenUnderWriters(t *testing.T) {
	const writers, lines, turns = 4, 200, 20
	path := t.TempDir() + "/access.log"
	f, err := OpenReopenable(path, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := range lines {
				if _, err := fmt.Fprintf(f, "writer %d line %d\n", w, n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var all strings.Builder
	for n := range turns {
		old := fmt.Sprintf("%s.%d", path, n)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if err := f.Reopen(); err != nil {
			t.Fatal(err)
		}
		all.WriteString(read(t, old)) // nobody writes to it any more
	}
	wg.Wait()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	all.WriteString(read(t, path))
	seen := map[string]int{}
	for line := range strings.Lines(all.String()) {
		seen[line]++
	}
	if len(seen) != writers*lines {
		t.Errorf("%d different lines, want %d", len(seen), writers*lines)
	}
}
