package sandbox_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/sandbox"
)

// afterwards waits until the files have been changed from outside, then tells
// of each path it is given whether it can be opened and whether the sandbox
// says so.
func afterwards(box *sandbox.Sandbox, _ string) error {
	fmt.Println("closed")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		path := in.Text()
		opened := "open"
		if err := open(path); err != nil {
			opened = err.Error()
		}
		says := "admitted"
		if err := box.Admits(sandbox.Config{Read: []string{path}}); err != nil {
			says = err.Error()
		}
		fmt.Printf("%s: %s; %s\n", path, opened, says)
	}
	return nil
}

// tree makes files and links (where the text begins with ->) beneath dir.
func tree(t *testing.T, dir string, files ...string) {
	t.Helper()
	for _, file := range files {
		name, text, _ := strings.Cut(file, " ")
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, link := strings.CutPrefix(text, "->"); link {
			err = os.Symlink(strings.ReplaceAll(to, "DIR", dir), path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func rename(t *testing.T, dir, from, to string) {
	t.Helper()
	if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
		t.Fatal(err)
	}
}

// TestFilesThatMove changes files the way Kubernetes, certbot, deploy scripts
// and editors do while a process is in its sandbox.
func TestFilesThatMove(t *testing.T) {
	dir := t.TempDir()
	tree(t, dir,
		"volume/..1/tls.crt one", "volume/..data ->..1", "volume/tls.crt ->..data/tls.crt",
		"plain/narthex.yaml text",
		"live/chain.pem ->../archive/chain1.pem", "archive/chain1.pem one",
		"certs/current ->DIR/store/releases/v1", "store/releases/v1/tls.crt one", "store/secret text",
		"policies/a.yaml text",
		"single/only text", "elsewhere/file text",
	)
	c := sandbox.Config{Read: []string{
		dir + "/volume/tls.crt", dir + "/plain/narthex.yaml", dir + "/live/chain.pem", dir + "/certs/current/tls.crt",
		dir + "/policies/*.yaml", dir + "/not/there/*.pem",
	}}
	child := startAfterwards(t, dir, c)

	tree(t, dir, "volume/..2/tls.crt two", "volume/..data_tmp ->..2")
	rename(t, dir, "volume/..data_tmp", "volume/..data")
	tree(t, dir, "plain/new text")
	rename(t, dir, "plain/new", "plain/narthex.yaml")
	tree(t, dir, "archive/chain2.pem two", "live/new ->../archive/chain2.pem")
	rename(t, dir, "live/new", "live/chain.pem")
	tree(t, dir, "store/releases/v2/tls.crt two", "certs/new ->DIR/store/releases/v2")
	rename(t, dir, "certs/new", "certs/current")
	tree(t, dir, "policies/b.yaml text")

	for _, name := range []string{"volume/tls.crt", "plain/narthex.yaml", "live/chain.pem", "certs/current/tls.crt", "policies/a.yaml", "policies/b.yaml"} {
		child.wants(name, "open; admitted")
	}
	const how = "restart or upgrade the proxy"
	for _, name := range []string{"single/only", "elsewhere/file", "store/secret"} {
		child.wants(name, "permission denied", dir+"/"+name, how)
	}
	// A directory of the same name is another directory.
	rename(t, dir, "policies", "policies.old")
	tree(t, dir, "policies/a.yaml text")
	child.wants("policies/a.yaml", "permission denied", "read files in "+dir+"/policies", how)
	// A link that leads out of what was open leads nowhere.
	if err := os.Remove(filepath.Join(dir, "plain/narthex.yaml")); err != nil {
		t.Fatal(err)
	}
	tree(t, dir, "plain/narthex.yaml ->../elsewhere/file")
	child.wants("plain/narthex.yaml", "permission denied", "in "+dir+"/elsewhere", how)
	if os.Geteuid() == 0 {
		child.mounted(dir, "volume/sub")
		child.wants("volume/sub/file", "open; admitted")
	}
}

// asked is a child in the sandbox that is asked for paths.
type asked struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
	ask func(path string) string
}

func startAfterwards(t *testing.T, dir string, c sandbox.Config) *asked {
	t.Helper()
	config, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), tryEnv+"=afterwards", "SANDBOX_TEST_CONFIG="+string(config), "SANDBOX_TEST_DIR="+dir)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	line := func() string {
		if !lines.Scan() {
			t.Fatalf("the child ended: %s", stderr.String())
		}
		return lines.Text()
	}
	t.Cleanup(func() {
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			t.Errorf("the child: %v %s", err, stderr.String())
		}
	})
	if first := line(); first != "closed" {
		t.Fatalf("the child says %q", first)
	}
	return &asked{t: t, dir: dir, cmd: cmd, ask: func(path string) string {
		if _, err := fmt.Fprintln(in, path); err != nil {
			t.Fatal(err)
		}
		return line()
	}}
}

func (a *asked) wants(name string, texts ...string) {
	a.t.Helper()
	got := a.ask(filepath.Join(a.dir, name))
	for _, text := range texts {
		if !strings.Contains(got, text) {
			a.t.Errorf("%s, want %q", got, text)
		}
	}
}

// mounted mounts a file system with a file in it where the child sees it.
func (a *asked) mounted(dir, name string) {
	a.t.Helper()
	at := filepath.Join(dir, name)
	if err := os.Mkdir(at, 0o755); err != nil {
		a.t.Fatal(err)
	}
	done := make(chan error)
	go func() { // its thread ends with it
		runtime.LockOSThread()
		done <- func() error {
			spaces, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", a.cmd.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(spaces)
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			if err := unix.Setns(spaces, unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("tmpfs", at, "tmpfs", 0, "mode=755"); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(at, "file"), []byte("text"), 0o644)
		}()
	}()
	if err := <-done; err != nil {
		a.t.Fatal(err)
	}
}

func TestNoSandboxAdmitsAll(t *testing.T) {
	var box *sandbox.Sandbox
	c := sandbox.Config{Read: []string{"/etc/shadow"}, Sockets: []string{"/x/y"}, LowPorts: true}
	if err := box.Admits(c); err != nil || box.Enforced() != nil || box.Missing() != nil || box.Wide() != nil || box.Check(c) != nil {
		t.Errorf("no sandbox: %v, %v", err, box)
	}
}

func TestOutsideIsPermission(t *testing.T) {
	if err := error(&sandbox.OutsideError{Path: "/a/b", Dir: "/a"}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v is no fs.ErrPermission", err)
	}
}
