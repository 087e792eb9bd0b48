package stage

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
)

// Talk runs a client, writes it one line and returns all it said until one of
// texts came or it ended.
func Talk(t testing.TB, program string, args []string, texts ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := Watch(texts...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", program, err)
	}
	_, _ = io.WriteString(in, "hello\n") // refused clients may be gone already
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-out.Seen:
		_ = cmd.Process.Signal(os.Interrupt)
		<-ended
	case <-ended:
	}
	if ctx.Err() != nil {
		t.Errorf("%s %s did not end within %s:\n%s", program, strings.Join(args, " "), Soon, out.All())
	}
	return out.All()
}

// Watched is output that is waited for.
type Watched struct {
	Seen  chan struct{} // closed once one of texts has come
	texts []string

	mu  sync.Mutex // guards the following
	buf bytes.Buffer
}

// Watch returns output that waits for one of texts.
func Watch(texts ...string) *Watched {
	return &Watched{texts: texts, Seen: make(chan struct{})}
}

// Write implements io.Writer.
func (w *Watched) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.has()
	w.buf.Write(b)
	if !before && w.has() {
		close(w.Seen)
	}
	return len(b), nil
}

func (w *Watched) has() bool {
	return slices.ContainsFunc(w.texts, func(text string) bool { return strings.Contains(w.buf.String(), text) })
}

// All returns what was written so far.
func (w *Watched) All() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}
