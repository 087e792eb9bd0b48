package handover

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLetGoFails has the old process find that it cannot let go.
func TestLetGoFails(t *testing.T) {
	s, path, end := open(t, "inventory")
	s.mu.Lock()
	s.holds = errors.New("busy")
	s.mu.Unlock()
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Abandon()
	if err := from.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("ready: %v", err)
	}
	if given := end(); given || s.kept != 1 || s.taken != nil {
		t.Errorf("given %t, kept %d times, gave %v", given, s.kept, s.taken)
	}
}

// TestNotBegun has the new process end between `yours` and `begun`.
func TestNotBegun(t *testing.T) {
	for _, returns := range []bool{true, false} {
		s, path, end := open(t, "inventory")
		s.mu.Lock()
		s.returns = returns
		s.mu.Unlock()
		from, err := Ask(t.Context(), path, "new")
		if err != nil {
			t.Fatal(err)
		}
		if err := from.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		from.Abandon()
		if returns { // it answers the next one
			next, err := Ask(t.Context(), path, "newer")
			if err != nil {
				t.Fatal(err)
			}
			next.Abandon()
		}
		if given := end(); given == returns {
			t.Errorf("goes on %t: given %t", returns, given)
		}
	}
}

// TestServed looks whether anybody is there, which nobody is told of.
func TestServed(t *testing.T) {
	s, path, end := open(t)
	if !Served(path) {
		t.Error("not served")
	}
	end()
	if Served(path) || s.kept != 0 {
		t.Errorf("served after the end, or asked (%d)", s.kept)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made", "lock")
	mine, err := OpenLock(path)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	other, err := OpenLock(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info, err)
	}
	if !other.Free() {
		t.Error("not free at the start")
	}
	for range 2 { // twice is as good as once
		if err := mine.Take(); err != nil {
			t.Fatal(err)
		}
	}
	if other.Free() {
		t.Error("free while it is taken")
	}
	took := make(chan error)
	go func() { took <- other.Take() }()
	if err := mine.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-took; err != nil {
		t.Errorf("a lock on its way: %v", err)
	}
	if err := mine.Take(); !errors.Is(err, ErrLocked) {
		t.Errorf("a lock that another has: %v", err)
	}
	if err := other.Close(); err != nil || !mine.Free() {
		t.Errorf("not free after the end of who had it: %v", err)
	}
}

// TestOfThisNetwork asks both ways about sockets of our own network. Those of
// another one need root: integration/tcp.
func TestOfThisNetwork(t *testing.T) {
	for network, at := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s")} {
		l, err := net.Listen(network, at)
		if err != nil {
			t.Fatal(err)
		}
		if here, err := ofThisNetwork(l); !here || err != nil {
			t.Errorf("%s: %t, %v", network, here, err)
		}
		if network == "tcp" {
			if here, err := taken(l.Addr()); !here || err != nil {
				t.Errorf("by the address: %t, %v", here, err)
			}
		}
		addr := l.Addr()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if here, err := taken(addr); network == "tcp" && (here || err != nil) {
			t.Errorf("an address where nobody listens: %t, %v", here, err)
		}
	}
	if here, err := taken(&net.TCPAddr{IP: net.ParseIP("192.0.2.1"), Port: 1}); here || err != nil {
		t.Errorf("an address of another machine: %t, %v", here, err)
	}
}

// TestElsewhere keeps the places of sockets of another network, by which
// `ready` names those that are taken.
func TestElsewhere(t *testing.T) {
	s, path, _ := open(t, "far", "near")
	from, err := Ask(t.Context(), path, "new")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Abandon()
	_ = from.sockets[0].Listener.Close()
	from.sockets[0].Listener = nil
	far, near := s.sockets[0].Bind, s.sockets[1].Bind
	if from.Take(Listener, "far", far) != nil || from.Take(Listener, "near", near) == nil {
		t.Error("took the wrong one")
	}
	if got := from.Elsewhere(); len(got) != 1 || got[0] != far {
		t.Errorf("elsewhere: %v", got)
	}
	if !from.Serving(Listener) || from.Serving(Health) {
		t.Error("serving what it does not, or not what it does")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := from.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	from.Begun()
	from.Live(ctx, func(map[string]int) {}) // until it has given
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.taken) != 1 || s.taken[0].Name != "near" {
		t.Errorf("gave %v", s.taken)
	}
}
