package handover

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shop is a Giver with listeners on TCP.
type shop struct {
	sockets []Socket
	ctx     context.Context // of Serve

	mu      sync.Mutex // guards the following
	offers  func()     // called by Offer; may be nil
	holds   error      // of LetGo
	returns bool       // goes on when the new one does not begin
	kept    int
	taken   []Socket
	live    map[string]int
	asked   int
}

func (s *shop) Offer() ([]Socket, error) {
	s.mu.Lock()
	offers := s.offers
	s.mu.Unlock()
	if offers != nil {
		offers()
	}
	return s.sockets, nil
}

func (s *shop) Keep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept++
}

func (s *shop) LetGo(context.Context, []Socket) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holds
}

func (s *shop) Begun(ok bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !ok && s.returns
}

func (s *shop) Give(taken []Socket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken = taken
}

func (s *shop) Live() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked++; s.asked > 2 {
		return nil
	}
	return s.live
}

// open starts a giver of sockets by name.
func open(t *testing.T, names ...string) (s *shop, path string, end func() bool) {
	t.Helper()
	s = &shop{live: map[string]int{"inventory": 3}}
	for _, name := range names {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		s.sockets = append(s.sockets, Socket{Kind: Listener, Name: name, Bind: l.Addr().String(), Serving: true, Listener: l})
	}
	path = filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx = ctx
	result := make(chan bool, 1)
	go func() {
		given, err := Serve(ctx, Config{Listener: l, Path: path, Owned: true, Version: "old", Giver: s})
		if err != nil {
			t.Error(err)
		}
		result <- given
	}()
	end = sync.OnceValue(func() bool { cancel(); return <-result })
	t.Cleanup(func() { end() })
	return s, path, end
}

func TestHandOver(t *testing.T) {
	s, path, _ := open(t, "inventory", "orders")
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if from.Version != "old" {
		t.Errorf("version %q", from.Version)
	}
	bind := s.sockets[0].Bind
	got := from.Take(Listener, "another-name", bind)
	if got == nil || got.Listener.Addr().String() != bind || !got.Serving || got.Name != "inventory" {
		t.Fatalf("took %+v", got)
	}
	defer got.Listener.Close()
	if from.Take(Listener, "inventory", bind) != nil {
		t.Error("taken twice")
	}
	if from.Take(Health, "inventory", s.sockets[1].Bind) != nil {
		t.Error("taken for something else")
	}
	control := from.Control(path)
	if control == nil {
		t.Fatal("the control socket was not offered")
	}
	defer control.Close()
	if err := from.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	if s.asked != 0 {
		t.Error("the old process goes on to its end before the new one has begun")
	}
	s.mu.Unlock()
	from.Begun()
	var heard []map[string]int
	from.Live(t.Context(), func(live map[string]int) { heard = append(heard, live) })
	if len(heard) != 3 || heard[0]["inventory"] != 3 || heard[2] != nil {
		t.Errorf("heard of live connections: %v", heard)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.taken) != 2 || s.taken[0].Name != "inventory" || s.taken[1].Kind != Control || s.kept != 0 {
		t.Errorf("gave %+v, kept %d times", s.taken, s.kept)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the path that was handed over is gone: %v", err)
	}
	conn, err := net.Dial("tcp", bind)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := got.Listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = accepted.Close()
}

func TestNobodyToTakeOverFrom(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	if _, err := Ask(t.Context(), path, "new"); !errors.Is(err, ErrNobody) {
		t.Errorf("no socket: %v", err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	_ = l.Close() // as one that was killed leaves it
	if _, err := Ask(t.Context(), path, "new"); !errors.Is(err, ErrNobody) {
		t.Errorf("a dead process's socket: %v", err)
	}
	if l, err = Listen(path); err != nil {
		t.Fatalf("a dead process's socket is not replaced: %v", err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("a socket that is served was replaced")
	}
	_ = l.Close()
	if err := os.WriteFile(path+"x", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path + "x"); err == nil {
		t.Error("a file that is no socket was replaced")
	}
}

// TestGivenUp has the new process go away at each step: the old one goes on.
func TestGivenUp(t *testing.T) {
	s, path, end := open(t, "inventory")
	for range 3 {
		from, err := Ask(t.Context(), path, "new")
		if err != nil {
			t.Fatal(err)
		}
		from.Take(Listener, "inventory", s.sockets[0].Bind)
		from.Abandon()
	}
	raw, err := net.Dial("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Close() // not even a hello
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	from.Abandon()
	if end() {
		t.Error("it thinks that it has given its sockets away")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept != 4 || s.taken != nil {
		t.Errorf("kept %d times, gave %v", s.kept, s.taken)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its own path is left behind: %v", err)
	}
}

// TestOneAfterTheOther has two new processes ask at one time.
func TestOneAfterTheOther(t *testing.T) {
	_, path, _ := open(t, "inventory")
	first, err := Ask(t.Context(), path, "first")
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() {
		from, err := Ask(context.Background(), path, "second")
		if err == nil {
			from.Abandon()
		}
		second <- err
	}()
	select {
	case err := <-second:
		t.Fatalf("the second was served beside the first: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	first.Abandon()
	if err := <-second; err != nil {
		t.Errorf("the second was not served after the first: %v", err)
	}
}

// TestShuttingDown refuses one that has asked.
func TestShuttingDown(t *testing.T) {
	_, path, end := open(t, "inventory")
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if end() {
		t.Error("given")
	}
	if err := from.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("Ready: %v", err)
	}
}

// TestShuttingDownBetweenSteps: a process that is told to end while it has the
// word, and waits for nothing, does not begin to wait afterwards.
func TestShuttingDownBetweenSteps(t *testing.T) {
	s, path, end := open(t, "inventory")
	ended := make(chan bool, 1)
	s.mu.Lock()
	s.offers = func() {
		go func() { ended <- end() }()
		<-s.ctx.Done()
	}
	s.mu.Unlock()
	began := time.Now()
	from, err := Ask(t.Context(), path, "new")
	if err == nil {
		defer from.Close()
		err = from.Ready(t.Context())
	}
	if err == nil || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("got %v", err)
	}
	if <-ended {
		t.Error("it has given")
	}
	if took := time.Since(began); took > stepTime {
		t.Errorf("it took %s to end", took)
	}
}

// TestAskerEndsBetweenSteps: the same at the other end.
func TestAskerEndsBetweenSteps(t *testing.T) {
	s, path, end := open(t, "inventory")
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := from.Ready(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	from.Abandon()
	if end() || len(s.taken) > 0 {
		t.Error("it has given")
	}
}

// peer plays the other side of a connection by hand.
func peer(t *testing.T, play func(line)) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "p.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	g.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			play(line{conn})
			_ = conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); g.Wait() })
	return path
}

func TestOldProcessThatIsOther(t *testing.T) {
	hello := func(l line) {
		if _, _, err := l.receive(context.Background(), time.Now().Add(stepTime), false); err != nil {
			t.Error(err)
		}
	}
	for name, c := range map[string]struct {
		play func(line)
		want string
	}{
		"another protocol": {func(l line) { hello(l); l.conn.Write([]byte(`{"narthex_handover":2,"step":"offered"}`)) }, "speaks version 2"},
		"a refusal":        {func(l line) { hello(l); l.send(message{Step: stepRefused, Reason: "not now"}, nil) }, "not now"},
		"no descriptor": {func(l line) {
			hello(l)
			l.send(message{Step: stepSocket, Socket: &Socket{Kind: Listener, Bind: "x"}}, nil)
		}, "wrong number of descriptors"},
		"another step": {func(l line) { hello(l); l.send(message{Step: stepYours}, nil) }, "in place of its sockets"},
	} {
		_, err := Ask(t.Context(), peer(t, c.play), "new")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestOldProcessDies after it has offered: what it offered is ours.
func TestOldProcessDies(t *testing.T) {
	path := peer(t, func(l line) {
		_, _, _ = l.receive(context.Background(), time.Now().Add(stepTime), false)
		_ = l.send(message{Step: stepOffered, Version: "old"}, nil)
	})
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if err := from.Ready(t.Context()); err != nil {
		t.Errorf("Ready: %v", err)
	}
	// Before it has offered there is nothing of it to take.
	path = peer(t, func(l line) { _, _, _ = l.receive(context.Background(), time.Now().Add(stepTime), false) })
	if _, err := Ask(t.Context(), path, "new"); !errors.Is(err, ErrNobody) {
		t.Errorf("Ask: %v", err)
	}
}

// TestGoneIsNoRefusal holds the two apart: only one of them means that the
// sockets are ours.
func TestGoneIsNoRefusal(t *testing.T) {
	if gone(&refusedError{"x"}) || gone(os.ErrDeadlineExceeded) || !gone(io.EOF) {
		t.Error("gone")
	}
}

func FuzzMessage(f *testing.F) {
	for _, m := range []message{
		{Protocol: 1, Step: stepHello, Version: "v1"},
		{Protocol: 1, Step: stepSocket, Socket: &Socket{Kind: Listener, Name: "a", Bind: "127.0.0.1:1", Owned: true}},
		{Protocol: 1, Step: stepReady, Taken: []int{0, 2}},
		{Protocol: 1, Step: stepLive, Live: map[string]int{"a": 1}},
		{Protocol: 2, Step: stepRefused, Reason: "no"},
	} {
		data, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parse(data)
		if err != nil {
			return
		}
		if m.Protocol != Protocol {
			t.Errorf("accepted protocol %d", m.Protocol)
		}
		for _, i := range m.Taken {
			if i < 0 || i >= maxSockets {
				t.Errorf("accepted place %d", i)
			}
		}
		if m.Step == stepSocket && m.Socket.Bind == "" {
			t.Error("accepted a socket without an address")
		}
	})
}
