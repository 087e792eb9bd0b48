package watch_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/narthex-id/narthex/internal/watch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start watches and returns a channel that receives the content of path after
// each change.
func start(t *testing.T, path string, poll time.Duration) <-chan string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	contents := make(chan string, 100)
	done := make(chan struct{})
	ready := make(chan struct{})
	asked := false
	go func() {
		defer close(done)
		watch.Files(ctx, watch.Config{
			Paths: func() []string {
				if !asked {
					asked = true
					defer close(ready)
				}
				return []string{path}
			},
			Changed: func() {
				data, _ := os.ReadFile(path)
				contents <- string(data)
			},
			Poll: poll,
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
	<-ready
	return contents
}

func await(t *testing.T, contents <-chan string, want string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case got := <-contents:
			if got == want {
				return
			}
		case <-deadline:
			t.Fatalf("%q was not told of", want)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRenameOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "one")
	contents := start(t, path, 100*time.Millisecond) // the watch may be set only after the first write
	for _, text := range []string{"two", "three"} {
		write(t, path+".new", text)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		await(t, contents, text)
	}
}

func TestKubernetesSymlinkSwap(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"..1", "..2"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, version, "file"), version)
	}
	swap := func(to string) {
		tmp := filepath.Join(dir, "..data_tmp")
		if err := os.Symlink(to, tmp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap("..1")
	path := filepath.Join(dir, "file")
	if err := os.Symlink("..data/file", path); err != nil {
		t.Fatal(err)
	}
	contents := start(t, path, 100*time.Millisecond)
	swap("..2")
	await(t, contents, "..2")
}

func TestPollFindsWhatIsNotAnnounced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	path := filepath.Join(dir, "file")
	contents := start(t, path, 50*time.Millisecond)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, path, "there")
	await(t, contents, "there")
}
