//go:build integration

package tcp_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// No test here starts systemd itself: as process 1, even of namespaces of its
// own, it would set up the machine the tests run on. What is real is
// systemd-analyze, which reads the unit files, and systemd-socket-activate,
// which hands sockets down; systemd's end of sd_notify(3) is played.

// units are the unit files as they are published, with other paths.
func units(t *testing.T, program, config string) (files []string) {
	t.Helper()
	dir := stage.Folder(t, "units")
	published, err := filepath.Glob("../../deploy/systemd/narthex*")
	if err != nil || len(published) == 0 {
		t.Fatalf("no unit files: %v", err)
	}
	for _, file := range published {
		text := strings.NewReplacer("/usr/bin/narthex", program, "/etc/narthex/narthex.yaml", config).Replace(stage.ReadFile(t, file))
		at := filepath.Join(dir, filepath.Base(file))
		stage.WriteFile(t, at, text, 0o644)
		files = append(files, at)
	}
	return files
}

// TestUnitsAreValid has systemd look at what is published, and say how
// exposed it finds it.
func TestUnitsAreValid(t *testing.T) {
	t.Parallel()
	files := units(t, stage.Narthex, "/etc/hostname")
	if out := stage.Must(t, "systemd-analyze", append([]string{"verify", "--man=no"}, files...)...); strings.TrimSpace(out) != "" {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	for _, file := range files {
		if filepath.Ext(file) != ".service" {
			continue
		}
		out := stage.Must(t, "systemd-analyze", "security", "--offline=true", "--no-pager", file)
		m := regexp.MustCompile(`Overall exposure level for (\S+): ([0-9.]+)`).FindStringSubmatch(out)
		var level float64
		if m == nil {
			t.Fatalf("no level in:\n%s", out)
		}
		if _, err := fmt.Sscan(m[2], &level); err != nil || level > 4 {
			t.Errorf("%s: exposure level %s", m[1], m[2])
		}
	}
}

// TestSocketActivation starts the proxy and `narthex run` by
// systemd-socket-activate: sockets are matched by name, and by address where
// the name is no listener's.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	for _, names := range []string{"door:-", "x:y"} {
		d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
		d.client = d.ca.leaf("/client")
		d.node = newNode(t, "activated", d.ca.leaf("/server"), d.ca)
		d.address = d.inbound("door", d.service.address)
		second := d.inbound("second", d.service.address)
		d.rules(d.clientMay())
		d.configure()
		d.Process = stage.Start(t, "systemd-socket-activate", "systemd-socket-activate", []string{
			"-l", d.address, "-l", second, "--fdname=" + names, stage.Narthex, "proxy", "-c", d.file("narthex.yaml"),
		})
		d.Says(stage.Soon, "Listening on "+d.address, "Listening on "+second)
		for _, address := range []string{d.address, second} {
			if err := d.passes("tcp", address); err != nil {
				t.Errorf("%s: %s: %v", names, address, err)
			}
		}
		stage.Eventually(t, stage.Soon, "both sockets are used", func() error {
			if n := d.Count("uses a socket that systemd made"); n != 2 {
				return fmt.Errorf("%d are", n)
			}
			return nil
		})
		d.Stop()
	}
	h := newHost(t)
	h.Process = stage.Start(t, "systemd-socket-activate", "systemd-socket-activate", []string{
		"-l", h.entry, "--fdname=to-inventory", h.program, "run", "-c", h.file("narthex.yaml"),
	})
	h.Says(stage.Soon, "Listening on "+h.entry)
	stage.Eventually(t, stage.Soon, "a call goes through", func() error { return call(h.entry) })
	h.Says(stage.Soon, "uses a socket that systemd made")
}

// TestNotifyOfBothHalves plays systemd's part for `narthex run`.
func TestNotifyOfBothHalves(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	n := newNotified(t)
	h.how = []func(*exec.Cmd){n.attach}
	h.start()
	n.says("READY=1")
	n.says("STATUS=proxy: 2 listeners")
	n.says("WATCHDOG=1")
	h.Signal(syscall.SIGHUP)
	n.says("RELOADING=1\nMONOTONIC_USEC=")
	n.after("RELOADING=1", "READY=1")
	// A half that hangs is ended and started again, and systemd is told all
	// the while that the supervisor is alive.
	stage.Eventually(t, stage.Soon, "the proxy has lived for a while", func() error {
		if s, err := h.Status(); err != nil || time.Since(s.Started) < 4*time.Second {
			return fmt.Errorf("started %v, %w", s.Started, err)
		}
		return nil
	})
	proxy := h.half("proxy")
	_ = syscall.Kill(proxy, syscall.SIGSTOP)
	h.Says(stage.Soon, "a half has stopped to work")
	_ = syscall.Kill(proxy, syscall.SIGCONT) // to print where it is
	stage.Eventually(t, stage.Soon, "a call goes through again", func() error {
		if h.half("proxy") == proxy {
			return errors.New("it is still the proxy that hung")
		}
		return call(h.entry)
	})
	h.Signal(syscall.SIGTERM)
	n.says("STOPPING=1")
	<-h.Done
}

// TestNotifyOfAnUpgrade plays systemd's part for a proxy alone, whose place
// another one takes: from then on that one does the talking.
func TestNotifyOfAnUpgrade(t *testing.T) {
	t.Parallel()
	d, _ := newHeir(t)
	d.Stop()
	n := newNotified(t)
	d.how = []func(*exec.Cmd){n.attach}
	d.start()
	n.says("READY=1")
	n.says("WATCHDOG=1")
	before := d.Process
	d.Process = d.beside(n.attach)
	n.says(fmt.Sprintf("MAINPID=%d", d.PID()))
	waitExit(t, before, "the process before")
	if strings.Contains(n.all(), "STOPPING=1") {
		t.Error("the process whose place was taken says that the service stops")
	}
	d.Stop()
	n.says("STOPPING=1")
}

// TestBeside does what `systemctl reload` of the proxy alone does: it returns
// once the new process serves, or with the reason why it does not.
func TestBeside(t *testing.T) {
	t.Parallel()
	d, unix := newHeir(t)
	good := stage.ReadFile(t, d.file("narthex.yaml"))
	bad := d.file("bad.yaml")
	stage.WriteFile(t, bad, strings.Replace(good, "[rules.yaml]", "[nothing.yaml]", 1), 0o644)
	if out, err := stage.Tell(t, stage.Narthex, "proxy", "-c", bad, "--beside"); err == nil {
		t.Errorf("a configuration that cannot be: exit status 0\n%s", out)
	}
	if err := d.Alive(); err != nil {
		t.Fatal(err)
	}
	c := &crowd{stop: make(chan struct{})}
	c.comes(d, "tcp", d.address)
	c.stays(d, "unix", unix)
	before := d.Process
	starter := stage.Start(t, "narthex proxy --beside", stage.Narthex, []string{"proxy", "-c", d.file("narthex.yaml"), "--beside"})
	waitExit(t, starter, "who started it")
	m := regexp.MustCompile(`the new process serves: pid=(\d+)`).FindStringSubmatch(starter.Said())
	if m == nil {
		t.Fatalf("it does not say which process serves:\n%s", starter.Said())
	}
	var pid int
	if _, err := fmt.Sscan(m[1], &pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) }) // it outlives who started it
	c.leave()
	waitExit(t, before, "the process before")
	if n := c.failed.Load(); n > 0 {
		t.Errorf("%d connections failed, the first: %v", n, c.first.Load())
	}
	if err := d.passes("tcp", d.address); err != nil {
		t.Error(err)
	}
	_ = syscall.Kill(pid, syscall.SIGTERM)
	stage.Eventually(t, stage.Soon, "the new process has ended", func() error {
		if _, err := os.Lstat(unix); err == nil {
			return errors.New("its socket is there")
		}
		return nil
	})
}

// notified is what systemd would be told.
type notified struct {
	t    *testing.T
	path string
	out  *stage.Watched
}

func newNotified(t *testing.T) *notified {
	t.Helper()
	n := &notified{t: t, path: filepath.Join(stage.Folder(t, "notify"), "n"), out: stage.Watch()}
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: n.path})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 8192); ; {
			k, err := l.Read(buf)
			if err != nil {
				return
			}
			_, _ = n.out.Write(append(buf[:k:k], '\n', '\n'))
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return n
}

// attach has a process tell us, and asks to hear that it is alive.
func (n *notified) attach(cmd *exec.Cmd) {
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+n.path, "WATCHDOG_USEC=1000000")
}

func (n *notified) all() string { return n.out.All() }

func (n *notified) says(text string) {
	n.t.Helper()
	stage.Eventually(n.t, stage.Soon, "told: "+text, func() error {
		if !strings.Contains(n.all(), text) {
			return fmt.Errorf("so far: %q", n.all())
		}
		return nil
	})
}

// after waits for text that comes after another.
func (n *notified) after(first, text string) {
	n.t.Helper()
	stage.Eventually(n.t, stage.Soon, "told after "+first+": "+text, func() error {
		_, rest, _ := strings.Cut(n.all(), first)
		if !strings.Contains(rest, text) {
			return fmt.Errorf("so far: %q", rest)
		}
		return nil
	})
}
