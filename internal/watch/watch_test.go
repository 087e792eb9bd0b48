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
	deadline := time.After(time.Minute)
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

// announced is a poll that no test lives to see.
const announced = time.Hour

// TestLinksOnTheWay: a link anywhere on the way to the file may come to lead
// elsewhere.
func TestLinksOnTheWay(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"one", "two", "three"} {
		if err := os.MkdirAll(filepath.Join(dir, "store", version), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "store", version, "file"), version)
	}
	point := func(name, to string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, "tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "tmp"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "etc", "app"), 0o700); err != nil {
		t.Fatal(err)
	}
	point("current", "store/one")
	point("etc/app/tls", "../../current")
	path := filepath.Join(dir, "etc/app/tls/file")
	contents := start(t, path, announced)
	await(t, contents, "one")
	point("current", filepath.Join(dir, "store/two"))
	await(t, contents, "two")
	write(t, filepath.Join(dir, "store/two/file"), "two again")
	await(t, contents, "two again")
	point("etc/app/tls", "../../store/three")
	await(t, contents, "three")
}

// TestDirectoryReplaced: by rename, and by removal.
func TestDirectoryReplaced(t *testing.T) {
	dir := t.TempDir()
	tls := filepath.Join(dir, "tls")
	fill := func(name, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "file"), text)
	}
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	fill("tls", "one")
	contents := start(t, filepath.Join(tls, "file"), announced)
	await(t, contents, "one")
	fill("new", "two")
	rename("tls", "old")
	rename("new", "tls")
	await(t, contents, "two")
	write(t, filepath.Join(tls, "file"), "two again")
	await(t, contents, "two again")
	if err := os.RemoveAll(tls); err != nil {
		t.Fatal(err)
	}
	await(t, contents, "")
	fill("tls", "three")
	await(t, contents, "three")
	write(t, filepath.Join(tls, "file"), "three again")
	await(t, contents, "three again")
}

// TestRestlessNeighbour: something else that writes beside the file all the
// time does not keep a change from being told.
func TestRestlessNeighbour(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write(t, path, "one")
	contents := start(t, path, announced)
	await(t, contents, "one")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				_ = os.WriteFile(filepath.Join(dir, "log"), []byte("x"), 0o600)
			}
		}
	}()
	write(t, path, "two")
	await(t, contents, "two")
	close(stop)
	<-stopped
}
