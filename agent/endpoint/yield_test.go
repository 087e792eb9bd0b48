package endpoint

import (
	"errors"
	"net"
	"testing"
	"time"
)

// TestGate accepts nobody while the server is paused: who connects waits.
func TestGate(t *testing.T) {
	inner, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{}
	s.listener = &listener{Listener: inner, server: s}
	accepted := make(chan error)
	go func() {
		for {
			c, err := s.listener.Accept()
			if err == nil {
				_ = c.Close()
			}
			accepted <- err
			if errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
	connect := func() {
		t.Helper()
		c, err := net.Dial("unix", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	connect()
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	s.Pause(true)
	connect()
	connect()
	came := 0
	for waiting := true; waiting; {
		select {
		case err := <-accepted:
			if came++; err != nil || came > 1 { // one may have been on its way in
				t.Fatalf("accepted while paused: %v", err)
			}
		case <-time.After(50 * time.Millisecond):
			waiting = false
		}
	}
	s.Resume()
	for came < 2 {
		if err := <-accepted; err == nil { // a deadline that passed is told as such, and tried again
			came++
		}
	}
	s.Pause(false)
	if err := s.listener.Close(); err != nil {
		t.Fatal(err)
	}
	for err := range accepted {
		if errors.Is(err, net.ErrClosed) {
			return
		}
	}
}
