package attestor

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func attestUnix(t *testing.T, config UnixConfig, p *Process) []string {
	t.Helper()
	found, err := NewUnix(config).Attest(testContext(t), p)
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	for _, s := range found {
		if s.Type != "unix" {
			t.Errorf("selector %s is not of type unix", s)
		}
		values = append(values, s.Value)
	}
	return values
}

// expectedOwn is what spire-agent's plugin gives for this very process.
func expectedOwn(t *testing.T) []string {
	t.Helper()
	values := expectedID("uid", "user", os.Geteuid(), userName)
	values = append(values, expectedID("gid", "group", os.Getegid(), groupName)...)
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, gid := range groups {
		values = append(values, expectedID("supplementary_gid", "supplementary_group", gid, groupName)...)
	}
	return values
}

func expectedID(idKey, nameKey string, id int, nameOf func(string) (string, error)) []string {
	values := []string{fmt.Sprintf("%s:%d", idKey, id)}
	if name, _ := nameOf(strconv.Itoa(id)); name != "" {
		values = append(values, nameKey+":"+name)
	}
	return values
}

func TestUnixSelectors(t *testing.T) {
	_, c := connect(t, self, nil)
	p := mustPin(t, c, PeerOf)
	if got, want := attestUnix(t, UnixConfig{}, p), expectedOwn(t); !slices.Equal(got, want) {
		t.Fatalf("selectors %q, want %q", got, want)
	}
}

func TestUnixSelectorsOfAnotherUser(t *testing.T) {
	if !isRoot() {
		p, err := Pin(1)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if got := attestUnix(t, UnixConfig{}, p); !slices.Contains(got, "uid:0") || !slices.Contains(got, "user:root") {
			t.Fatalf("selectors of init: %q", got)
		}
		// It cannot be known what init executes: an error, not fewer selectors.
		if _, err := NewUnix(UnixConfig{DiscoverPath: true}).Attest(testContext(t), p); !errors.Is(err, os.ErrPermission) {
			t.Fatalf("path of init: %v", err)
		}
		return
	}
	// IDs without a name have no selector for one.
	_, c := connect(t, self, asUser(3_000_000_001, 3_000_000_002, 0, 3_000_000_003))
	want := []string{"uid:3000000001", "gid:3000000002", "supplementary_gid:0", "supplementary_group:root", "supplementary_gid:3000000003"}
	if got := attestUnix(t, UnixConfig{}, mustPin(t, c, PeerOf)); !slices.Equal(got, want) {
		t.Fatalf("selectors %q, want %q", got, want)
	}
}

func TestNames(t *testing.T) {
	u, err := user.Current()
	if err == nil { // the user that runs the tests may have no name
		if name, err := userName(u.Uid); name != u.Username || err != nil {
			t.Errorf("userName: %q, %v", name, err)
		}
	}
	if name, err := groupName("0"); name != "root" || err != nil {
		t.Errorf("groupName(0): %q, %v", name, err)
	}
	if name, err := userName("3000000001"); name != "" || err != nil {
		t.Errorf("userName of nobody: %q, %v", name, err)
	}
	if name, err := groupName("3000000001"); name != "" || err != nil {
		t.Errorf("groupName of no group: %q, %v", name, err)
	}
}

func TestUnixPath(t *testing.T) {
	program := copyOfSelf(t)
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(content))
	sum := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	_, c := connect(t, program, nil)
	p := mustPin(t, c, PeerOf)

	for _, test := range []struct {
		limit int64
		want  []string
	}{
		{0, []string{"path:" + program, sum}},
		{size, []string{"path:" + program, sum}},
		{-1, []string{"path:" + program}},
	} {
		got := attestUnix(t, UnixConfig{DiscoverPath: true, SizeLimit: test.limit}, p)
		if want := append(expectedOwn(t), test.want...); !slices.Equal(got, want) {
			t.Errorf("limit %d: selectors %q, want %q", test.limit, got, want)
		}
	}
	_, err = NewUnix(UnixConfig{DiscoverPath: true, SizeLimit: size - 1}).Attest(testContext(t), p)
	if err == nil || !strings.Contains(err.Error(), "size limit") {
		t.Errorf("above the limit: %v", err)
	}

	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	got := attestUnix(t, UnixConfig{DiscoverPath: true}, p)
	if want := append(expectedOwn(t), sum); !slices.Equal(got, want) {
		t.Errorf("deleted program: %q, want %q", got, want)
	}
	wantAlive(t, p)
}

// A user who mounts a program of theirs over a registered one, in a mount
// namespace of their own, does not get its path.
func TestUnixPathInAnotherMountNamespace(t *testing.T) {
	registered, own := copyOfSelf(t), copyOfSelf(t)
	content, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	for _, program := range []string{registered, own} {
		// An ordinary user has to come there; directories of tests are private.
		for dir := filepath.Dir(program); dir != os.TempDir(); dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		from string // mounted over the directory of the registered program
		want []string
	}{
		"nothing mounted":        {"", []string{"path:" + registered, sum}},
		"another one in its way": {filepath.Dir(own), []string{sum}},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			child := start(t, self, roleDisguise, l.Addr().String(), func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, childFrom+"="+test.from, childOver+"="+filepath.Dir(registered))
				if isRoot() {
					asUser(4001, 4002)(cmd)
				}
			})
			line, err := child.out.ReadString('\n')
			if strings.HasPrefix(line, "denied") {
				t.Logf("mount namespaces may not be made here: %s", line)
				return
			}
			if line != "ok\n" {
				t.Fatalf("child said %q (%v), want ok", line, err)
			}
			c, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			p := mustPin(t, c, PeerOf)
			if link, err := os.Readlink(p.ProcPath("exe")); err != nil || link != registered {
				t.Fatalf("the kernel names the program %q (%v), want %q", link, err, registered)
			}
			got := slices.DeleteFunc(attestUnix(t, UnixConfig{DiscoverPath: true}, p), func(s string) bool {
				return !strings.HasPrefix(s, "path:") && !strings.HasPrefix(s, "sha256:")
			})
			if !slices.Equal(got, test.want) {
				t.Errorf("selectors %q, want %q", got, test.want)
			}
		})
	}
}

// With HOST_PROC, what counts is what init sees, too.
func TestPathInTheNamespaceOfInit(t *testing.T) {
	own, err := os.Readlink(self)
	if err != nil {
		t.Fatal(err)
	}
	file, err := statProgram(self)
	if err != nil {
		t.Fatal(err)
	}
	proc := t.TempDir()
	if err := os.MkdirAll(filepath.Join(proc, "1", "root", "host"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(own, filepath.Join(proc, "1", "root", "host", "program")); err != nil {
		t.Fatal(err)
	}
	if isHere("/host/program", file) {
		t.Error("without HOST_PROC init's namespace was asked")
	}
	t.Setenv(hostProc, proc)
	for path, want := range map[string]bool{"/host/program": true, own: true, "/host/other": false, "host/program": false, "": false} {
		if got := isHere(path, file); got != want {
			t.Errorf("%q: %t, want %t", path, got, want)
		}
	}
}

func TestUnixDefaultSizeLimit(t *testing.T) {
	program := copyOfSelf(t)
	// A sparse file: it takes no space, and would take minutes to hash.
	if err := os.Truncate(program, 1<<40); err != nil {
		t.Logf("no large files here: %v", err)
		return
	}
	_, c := connect(t, program, nil)
	_, err := NewUnix(UnixConfig{DiscoverPath: true}).Attest(testContext(t), mustPin(t, c, PeerOf))
	if err == nil || !strings.Contains(err.Error(), "size limit") {
		t.Errorf("a program of 1 TiB: %v", err)
	}
}

func TestUnixHonoursContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := NewUnix(UnixConfig{DiscoverPath: true}).Attest(ctx, pinSelf(t))
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

// opened is a file to be hashed.
func opened(t *testing.T, content string) (*os.File, version) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, versionOfFile(t, f)
}

func versionOfFile(t *testing.T, f *os.File) version {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return versionOf(&st)
}

func later() time.Time { return time.Now().Add(time.Minute) }

func TestDigestIsRemembered(t *testing.T) {
	d := newDigests()
	f, v := opened(t, "program")
	want := fmt.Sprintf("%x", sha256.Sum256([]byte("program")))

	// A file changed just now may change again without a trace.
	if sum, err := d.of(t.Context(), f, v, 0); sum != want || err != nil {
		t.Fatalf("digest %s, %v", sum, err)
	}
	if len(d.known) != 0 {
		t.Fatal("the digest of a fresh file was remembered")
	}
	d.now = later
	for range 2 {
		if sum, err := d.of(t.Context(), f, v, 0); sum != want || err != nil {
			t.Fatalf("digest %s, %v", sum, err)
		}
	}
	// The second time nothing is read: a closed file would not do.
	f.Close()
	if sum, err := d.of(t.Context(), f, v, 0); sum != want || err != nil {
		t.Fatalf("digest %s, %v", sum, err)
	}
}

func TestDigestOfAChangedFile(t *testing.T) {
	d := newDigests()
	d.now = later
	f, v := opened(t, "program")
	if err := os.Truncate(f.Name(), 3); err != nil {
		t.Fatal(err)
	}
	if sum, err := d.of(t.Context(), f, v, 0); err == nil || sum != "" {
		t.Fatalf("digest %s of a file that changed", sum)
	}
	if len(d.known) != 0 || len(d.order) != 0 {
		t.Fatal("a failed reading was remembered")
	}
	v = versionOfFile(t, f)
	if sum, err := d.of(t.Context(), f, v, 0); sum != fmt.Sprintf("%x", sha256.Sum256([]byte("pro"))) || err != nil {
		t.Fatalf("digest %s, %v", sum, err)
	}
}

// Who shares the reading of a caller that gives up reads anew.
func TestDigestOutlivesTheCallerThatGaveUp(t *testing.T) {
	d := newDigests()
	d.now = later
	f, v := opened(t, "program")
	gaveUp, mine := d.claim(v)
	if !mine {
		t.Fatal("not the first")
	}
	expired, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.of(expired, f, v, 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("a caller without time: %v", err)
	}
	var waiting sync.WaitGroup
	for range 4 {
		waiting.Go(func() {
			if sum, err := d.of(t.Context(), f, v, 0); sum == "" || err != nil {
				t.Errorf("digest %q, %v", sum, err)
			}
		})
	}
	gaveUp.err = context.Canceled
	d.forget(v, gaveUp)
	close(gaveUp.done)
	waiting.Wait()
	if len(d.known) != 1 || len(d.order) != 1 {
		t.Fatalf("%d digests remembered, want 1", len(d.known))
	}
}

func TestDigestsAreBounded(t *testing.T) {
	d := newDigests()
	d.now = later
	f, v := opened(t, "program")
	oldest := v
	for range maxDigests + 10 {
		if _, mine := d.claim(v); !mine {
			t.Fatal("the same version twice")
		}
		v.ino++
	}
	if len(d.known) != maxDigests || len(d.order) != maxDigests {
		t.Fatalf("%d digests remembered, want %d", len(d.known), maxDigests)
	}
	if _, err := d.of(t.Context(), f, oldest, 0); err != nil {
		t.Fatal(err)
	}
}
