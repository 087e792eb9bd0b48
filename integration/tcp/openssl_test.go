//go:build integration

package tcp_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// door is an inbound listener with a service that answers lines, a client
// that may come in and one that may not.
type door struct {
	*node
	ca      *authority
	client  *svid
	service *service
	address string
}

// newDoor starts one; more is further YAML of its listener.
func newDoor(t *testing.T, more ...string) *door {
	t.Helper()
	d := &door{ca: newAuthority(t, "example.org"), service: serve(t, answerLines)}
	d.client = d.ca.leaf("/client")
	d.node = newNode(t, "door", d.ca.leaf("/server"), d.ca)
	d.address = d.inbound("door", d.service.address, more...)
	d.rules(d.clientMay())
	d.start()
	return d
}

func (d *door) clientMay() string { return allow("client-may", d.client.id) }

// with are the arguments that make openssl present s.
func with(s *svid, more ...string) []string {
	return append([]string{"-cert", s.certFile, "-key", s.keyFile, "-cert_chain", s.certFile}, more...)
}

// sClient runs `openssl s_client`, sends one line and returns all that openssl
// said until an answer came or the connection ended.
func sClient(t *testing.T, address string, args ...string) string {
	t.Helper()
	return talk(t, "openssl", append([]string{"s_client", "-connect", address, "-ign_eof"}, args...), answer, "olleh")
}

// talk runs a client, writes it one line and returns all it said until one of
// texts came or it ended.
func talk(t *testing.T, program string, args []string, texts ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := &watched{texts: texts, seen: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", program, err)
	}
	_, _ = io.WriteString(in, "hello\n") // refused clients may be gone already
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-out.seen:
		_ = cmd.Process.Signal(os.Interrupt)
		<-ended
	case <-ended:
	}
	if ctx.Err() != nil {
		t.Errorf("%s %s did not end within %s:\n%s", program, strings.Join(args, " "), stage.Soon, out.all())
	}
	return out.all()
}

// watched is output that is waited for.
type watched struct {
	texts []string
	seen  chan struct{} // closed once one of texts has come

	mu  sync.Mutex // guards the following
	buf bytes.Buffer
}

func (w *watched) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.has()
	w.buf.Write(b)
	if !before && w.has() {
		close(w.seen)
	}
	return len(b), nil
}

func (w *watched) has() bool {
	return slices.ContainsFunc(w.texts, func(text string) bool { return strings.Contains(w.buf.String(), text) })
}

func (w *watched) all() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

// sServer runs `openssl s_server -rev`, which answers each line with the same
// line backwards, and returns its address.
func sServer(t *testing.T, own *svid, args ...string) (*stage.Process, string) {
	t.Helper()
	address := stage.FreeAddress(t)
	p := stage.Start(t, "openssl s_server", "openssl", append(append([]string{"s_server", "-accept", address, "-rev"}, with(own)...), args...))
	p.Says(stage.Soon, "ACCEPT")
	return p, address
}
