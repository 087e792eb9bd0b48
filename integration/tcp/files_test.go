//go:build integration

package tcp_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// newNarrow starts a door that may have only so many files open.
func newNarrow(t *testing.T, files int, proxy ...string) *door {
	t.Helper()
	d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "narrow", d.ca.leaf("/server"), d.ca)
	d.proxy = proxy
	d.address = d.inbound("door", d.service.address)
	d.rules(d.clientMay())
	d.configure()
	d.Process = stage.Start(t, "narthex proxy with few files", "prlimit", []string{
		fmt.Sprintf("--nofile=%d:%d", files, files), stage.Narthex, "proxy", "-c", d.file("narthex.yaml"),
	})
	d.ready()
	return d
}

// flood opens n connections that say nothing, as fast as they come, and
// returns how to end it.
func flood(t *testing.T, address string, n int) (leave func()) {
	t.Helper()
	var conns []net.Conn
	for range n {
		c, err := net.DialTimeout("tcp", address, callTime)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	leave = func() {
		for _, c := range conns {
			_ = c.Close()
		}
		conns = nil
	}
	t.Cleanup(leave)
	return leave
}

// TestFloodLeavesFiles floods a proxy that may open few files: the bound on
// connections, which it takes from that limit, keeps enough for its health, its
// rules and its access log.
func TestFloodLeavesFiles(t *testing.T) {
	t.Parallel()
	d := newNarrow(t, 256)
	leave := flood(t, d.address, 600)
	d.Says(stage.Soon, "connection limit of all listeners reached")
	for range 5 {
		if code, body, err := d.Get("/livez"); err != nil || code != http.StatusOK {
			t.Errorf("health in a flood: %d %q, %v", code, body, err)
		}
	}
	d.changeRules(allow("client-may-still", d.client.id)) // fails the test when it cannot
	if strings.Contains(d.Said(), "too many open files") {
		t.Error("files ran out though connections are bounded")
	}
	leave()
	stage.Eventually(t, stage.Soon, "it serves again", func() error { return d.passes("tcp", d.address) })
	d.quiet()
}

// TestFilesRunOut bounds connections by more than there are files for: the
// proxy waits, says so, and goes on once there are some again.
func TestFilesRunOut(t *testing.T) {
	t.Parallel()
	d := newNarrow(t, 128, "max_connections: 5000")
	held, err := d.enter("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := ask(held, "before"); err != nil {
		t.Fatal(err)
	}
	probe, err := net.Dial("unix", d.Figures()) // as a monitor that keeps its connection
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	answers := bufio.NewReader(probe)
	ready := func() (string, error) {
		if _, err := io.WriteString(probe, "GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			return "", err
		}
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	if body, err := ready(); err != nil || body != "ok\n" {
		t.Fatalf("%q, %v", body, err)
	}
	leave := flood(t, d.address, 300)
	d.Says(stage.Soon, "cannot accept connections", "too many open files")
	stage.Eventually(t, stage.Soon, "health says it", func() error {
		body, err := ready()
		if err == nil && !strings.Contains(body, "too many open files") {
			err = fmt.Errorf("%q", body)
		}
		return err
	})
	if err := ask(held, "meanwhile"); err != nil {
		t.Errorf("a connection that was there: %v", err)
	}
	d.rules(allow("client-may-still", d.client.id))
	d.Signal(syscall.SIGHUP)
	stage.Eventually(t, stage.Soon, "the reload works, or says why not", func() error {
		if d.Count("cannot reload: what was in force stays in force")+d.Count("rules changed") == 0 {
			return fmt.Errorf("nothing is said of it")
		}
		return nil
	})
	leave()
	stage.Eventually(t, stage.Soon, "it serves again", func() error { return d.passes("tcp", d.address) })
	if body, err := ready(); err != nil || body != "ok\n" {
		t.Errorf("after the flood: %q, %v", body, err)
	}
	d.reload()
	if err := ask(held, "after"); err != nil {
		t.Errorf("a connection that was there: %v", err)
	}
}

// TestTermDrains: the first SIGTERM says how long it will take at most, the
// second ends it.
func TestTermDrains(t *testing.T) {
	t.Parallel()
	d := newDoor(t, "timeouts: {drain: 77s}")
	held, err := d.enter("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := ask(held, "before"); err != nil {
		t.Fatal(err)
	}
	d.Signal(syscall.SIGUSR2) // which ends a program that knows nothing of it
	d.Says(stage.Soon, "SIGUSR2 upgrades `narthex run`")
	d.Signal(syscall.SIGTERM)
	d.Says(stage.Soon, "draining: connections=1 at_most=1m17s")
	if err := ask(held, "while it drains"); err != nil {
		t.Error(err)
	}
	if c, err := net.DialTimeout("tcp", d.address, callTime); err == nil {
		_ = c.Close()
		t.Error("a new connection was accepted while it drains")
	}
	d.Signal(syscall.SIGTERM)
	waitExit(t, d.Process, "the proxy")
}

// TestReloadsTouchNobodyElse adds, changes and removes listeners while clients
// of the others come and stay.
func TestReloadsTouchNobodyElse(t *testing.T) {
	t.Parallel()
	d, unix := newHeir(t, "timeouts: {drain: 1s}")
	c := &crowd{stop: make(chan struct{})}
	c.comes(d, "tcp", d.address)
	c.comes(d, "unix", unix)
	c.stays(d, "tcp", d.address)
	c.stays(d, "unix", unix)
	kept := len(d.listeners)
	for round := range 5 {
		added := d.inbound(fmt.Sprintf("added-%d", round), d.service.address, "timeouts: {drain: 1s}")
		d.configure()
		d.reload()
		visitor, err := d.enter("tcp", added)
		if err != nil {
			t.Fatal(err)
		}
		if err := ask(visitor, "here"); err != nil {
			t.Fatal(err)
		}
		d.listeners[kept].more = []string{"timeouts: {drain: 1s}", "max_connections: 7"}
		d.configure()
		d.reload()
		if err := ask(visitor, "changed"); err != nil {
			t.Errorf("a connection of a listener that changed: %v", err)
		}
		d.listeners = d.listeners[:kept]
		d.configure()
		d.reload()
		if conn, err := net.DialTimeout("tcp", added, callTime); err == nil {
			_ = conn.Close()
			t.Error("a listener that was removed accepts")
		}
		_ = visitor.Close()
	}
	c.leave()
	if n := c.failed.Load(); n > 0 {
		t.Errorf("%d of %d connections of others failed, the first: %v", n, c.came.Load(), c.first.Load())
	}
}
