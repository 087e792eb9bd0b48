package stage

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"testing"
)

// Ports come in blocks. They are below those that the kernel gives to outgoing
// connections, so that what is free here stays free while a process restarts.
const (
	firstPort = 12000
	lastPort  = 32000
	blockSize = 100
)

// ports are those of this process. Packages are tested at the same time, each
// by a process of its own: a block is the process's that has bound an abstract
// Unix socket of its name, for as long as it lives.
var ports struct {
	mu        sync.Mutex
	claims    []net.Listener
	next, end int // of the block that was claimed last
	untried   int // the first port of the blocks that may be free
}

// FreeAddress returns a loopback address nobody listens on, and never the
// same twice.
func FreeAddress(t testing.TB) string {
	t.Helper()
	ports.mu.Lock()
	defer ports.mu.Unlock()
	for {
		if ports.next == ports.end {
			if err := claimPorts(); err != nil {
				t.Fatal(err)
			}
		}
		addr := fmt.Sprintf("127.0.0.1:%d", ports.next)
		ports.next++
		if l, err := net.Listen("tcp", addr); err == nil {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			return addr
		}
	}
}

// claimPorts makes the next free block this process's.
func claimPorts() error { // with ports.mu held
	for first := max(ports.untried, firstPort); first < lastPort; first += blockSize {
		l, err := net.Listen("unix", fmt.Sprintf("@narthex-stage-ports-%d", first))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return fmt.Errorf("claim ports from %d: %w", first, err)
		}
		ports.claims = append(ports.claims, l)
		ports.next, ports.end, ports.untried = first, first+blockSize, first+blockSize
		return nil
	}
	return errors.New("no ports are left on loopback: too many tests run at the same time")
}
