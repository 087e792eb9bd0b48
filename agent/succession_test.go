package agent_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/internal/devserver"
	"github.com/narthex-id/narthex/internal/telemetry"
)

// handed is a listener as another process would get it.
func handed(t *testing.T, a *agent.Agent) net.Listener {
	t.Helper()
	l, owned := a.Socket()
	if !owned {
		t.Error("the socket's file is not the agent's own")
	}
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	copied, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	return copied
}

// succeeds makes the stage's next agent a successor of a.
func (s *stage) succeeds(a *agent.Agent) *agent.Agent {
	s.t.Helper()
	s.cfg.Inherit, s.cfg.Metrics = handed(s.t, a), telemetry.NewMetrics()
	next, err := agent.Successor(s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return next
}

// runs runs an agent until the returned function is called.
func (s *stage) runs(a *agent.Agent) (stop func()) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("Run: %v", err)
		}
	})
	s.t.Cleanup(stop)
	return stop
}

// watcher counts what a go-spiffe client that holds a stream hears.
type watcher struct {
	updates chan *workloadapi.X509Context
	errors  chan error
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.updates <- c }

func (w *watcher) OnX509ContextWatchError(err error) {
	select {
	case w.errors <- err:
	default:
	}
}

func (s *stage) watches() *watcher {
	w := &watcher{updates: make(chan *workloadapi.X509Context, 100), errors: make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = workloadapi.WatchX509Context(ctx, w, workloadapi.WithAddr("unix://"+s.cfg.Socket))
	}()
	s.t.Cleanup(func() { cancel(); <-done })
	return w
}

func TestSuccession(t *testing.T) {
	s := newStage(t, entry("/web", time.Hour))
	a := s.mustNew()
	stopOld := s.runs(a)
	s.mustFetch()
	w := s.watches()
	<-w.updates
	before := a.Status()

	next := s.succeeds(a)
	if _, err := agent.New(s.cfg); !errors.As(err, new(*agent.HeldError)) || !strings.Contains(err.Error(), "in use by another agent (pid") {
		t.Errorf("a third agent: %v", err)
	}
	if err := next.CouldBegin(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.mustFetch() // nothing has changed yet
	if err := a.LetGo(t.Context(), agent.Given{WorkloadAPI: true}); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() { // in the listen queue, as nobody accepts
		_, err := s.fetch()
		waiting <- err
	}()
	if err := next.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	stopNext := s.runs(next)
	next.WaitReady(t.Context())
	if err := next.OwnSockets(); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err != nil {
		t.Errorf("who connected meanwhile: %v", err)
	}
	if got := next.Status(); got.ID != before.ID || !got.ExpiresAt.Equal(before.ExpiresAt) {
		t.Errorf("the next agent is %s until %s, the one before it %s until %s", got.ID, got.ExpiresAt, before.ID, before.ExpiresAt)
	}
	stopOld()
	if err := <-w.errors; !strings.Contains(err.Error(), "Unavailable") {
		t.Errorf("a held stream ended with %v", err)
	}
	<-w.updates // of the next agent
	s.mustFetch()
	stopNext()
	if _, err := os.Lstat(s.cfg.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func (s *stage) mustNew() *agent.Agent {
	s.t.Helper()
	a, err := agent.New(s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// TestResume has the next agent fail before and after it took the lease.
func TestResume(t *testing.T) {
	for name, began := range map[string]bool{"before it has the lease": false, "with the lease": true} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, entry("/web", time.Hour))
			a := s.mustNew()
			stop := s.runs(a)
			s.mustFetch()
			w := s.watches()
			<-w.updates
			next := s.succeeds(a)
			if err := a.LetGo(t.Context(), agent.Given{WorkloadAPI: true}); err != nil {
				t.Fatal(err)
			}
			if began {
				if err := next.Begin(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := a.Resume(t.Context()); !errors.As(err, new(*agent.HeldError)) {
					t.Errorf("resumes beside the next agent: %v", err)
				}
			}
			if err := next.Close(); err != nil {
				t.Fatal(err)
			}
			if err := a.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.mustFetch()
			if err := s.server.SetEntries([]devserver.Entry{entry("/web", time.Hour), entry("/api", time.Hour)}); err != nil {
				t.Fatal(err)
			}
			if got := <-w.updates; len(got.SVIDs) != 2 {
				t.Errorf("the held stream has %d SVIDs, want 2: the loop does not go on", len(got.SVIDs))
			}
			stop()
			if _, err := os.Lstat(s.cfg.Socket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left behind: %v", err)
			}
		})
	}
}

// lines is what a log was told.
type lines struct {
	mu   sync.Mutex // guards the following
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) { return l.text.Write(p) } // hclog holds mu

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// TestSuccessorWithoutServer asks for a reason why the agent that runs should
// go on.
func TestSuccessorWithoutServer(t *testing.T) {
	s := newStage(t, entry("/web", time.Hour))
	a := s.mustNew()
	s.runs(a)
	s.mustFetch()
	s.stop()
	var said lines
	s.cfg.Log = hclog.New(&hclog.LoggerOptions{Output: &said, Mutex: &said.mu})
	next := s.succeeds(a)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	could := make(chan error, 1)
	go func() { could <- next.CouldBegin(ctx) }()
	eventually(t, "it says why it cannot", func() bool { return strings.Contains(said.String(), "cannot take over yet, will try again") })
	cancel()
	if err := <-could; err == nil || !strings.Contains(err.Error(), "reach the server") {
		t.Errorf("could begin without a server: %v", err)
	}
	if text := said.String(); !strings.Contains(text, "advice=\"check agent.server.address") {
		t.Errorf("it says\n%s", text)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.fetch(); err != nil {
		t.Errorf("the agent that runs: %v", err)
	}
}

// TestSuccessorOfAnotherPath leaves a socket that the configuration does not
// name any more to the one that made it.
func TestSuccessorOfAnotherPath(t *testing.T) {
	s := newStage(t, entry("/web", time.Hour))
	a := s.mustNew()
	stop := s.runs(a)
	s.mustFetch()
	before := s.cfg.Socket
	s.cfg.Socket, s.cfg.Metrics = filepath.Join(s.dir, "other.sock"), telemetry.NewMetrics()
	next, err := agent.Successor(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.LetGo(t.Context(), agent.Given{}); err != nil {
		t.Fatal(err)
	}
	if err := next.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.runs(next)
	stop()
	s.mustFetch()
	if _, err := os.Lstat(before); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket that nobody serves is left behind: %v", err)
	}
}
