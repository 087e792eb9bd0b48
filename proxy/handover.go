package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
)

// Socket is the listening socket of a listener, for the process that takes
// this one's place.
type Socket struct {
	Name, Bind string
	Listener   net.Listener
	Owned      bool // a Unix socket whose path we would remove at the end
	Serving    bool // the listener has an identity to present
}

// Sockets returns those of the listeners in force, by name. They stay ours.
func (p *Proxy) Sockets() []Socket {
	p.applying.Lock()
	defer p.applying.Unlock()
	w := p.world.Load()
	var out []Socket
	for _, l := range w.sorted() {
		s := w.listeners[l]
		_, err := s.lease.Current()
		out = append(out, Socket{Name: l.name, Bind: s.Bind, Listener: l.socket, Owned: l.ownsPath(), Serving: err == nil})
	}
	return out
}

// OwnPaths makes the paths of the Unix sockets of the given listeners ours to
// remove at the end: of those that Config.Sockets gave, once the process they
// came from has let go.
func (p *Proxy) OwnPaths(names []string) { p.setPaths(names, true) }

// LeavePaths leaves the paths of the Unix sockets of the given listeners where
// they are when the listeners end: another process serves them.
func (p *Proxy) LeavePaths(names []string) { p.setPaths(names, false) }

func (p *Proxy) setPaths(names []string, own bool) {
	p.applying.Lock()
	defer p.applying.Unlock()
	for l := range p.world.Load().listeners {
		path, isUnix := strings.CutPrefix(l.bind, unixPrefix)
		if !isUnix || !slices.Contains(names, l.name) {
			continue
		}
		l.unlink = nil
		if own {
			l.unlink, _ = os.Lstat(path) // one that is gone is nobody's to remove
		}
	}
}

// ownsPath reports whether the Unix socket at the listener's path is still the
// one we are to remove.
func (l *listener) ownsPath() bool {
	if l.unlink == nil {
		return false
	}
	now, err := os.Lstat(strings.TrimPrefix(l.bind, unixPrefix))
	return err == nil && os.SameFile(now, l.unlink)
}

// WaitReady waits until every listener in force has an identity to present,
// or ctx ends; then the error names those that have none.
func (p *Proxy) WaitReady(ctx context.Context) error {
	w := p.world.Load()
	for _, s := range w.listeners {
		for {
			changed := s.lease.Changed() // before Current, or a change between the two would be missed
			if _, err := s.lease.Current(); err == nil {
				break
			}
			select {
			case <-changed:
				continue
			case <-ctx.Done():
			}
			return w.unready()
		}
	}
	return nil
}

// unready says which listeners have no identity, and why.
func (w *world) unready() error {
	var errs []error
	for _, l := range w.sorted() {
		if _, err := w.listeners[l].lease.Current(); err != nil {
			errs = append(errs, fmt.Errorf("listener %s: %w", l.name, err))
		}
	}
	return errors.Join(errs...)
}

// Reserve counts connections that another process still has, of listeners
// that are ours by now, against their limits: by name, in place of what was
// counted before. Nil counts none.
func (p *Proxy) Reserve(live map[string]int) {
	p.applying.Lock()
	defer p.applying.Unlock()
	all := 0
	for l := range p.world.Load().listeners {
		l.slots.reserve(live[l.name])
	}
	for _, n := range live { // also of listeners that are no more
		all += n
	}
	p.slots.reserve(all)
}

// Live returns the number of live connections by listener, those of listeners
// that drain among them.
func (p *Proxy) Live() map[string]int {
	live := map[string]int{}
	for _, c := range p.table.of(nil) {
		live[c.l.name]++
	}
	return live
}

// Alive returns once the locks that every connection needs were had and the
// loop that looks after deadlines has come round: a proxy for which it does
// not return has stopped working. It is for watchdogs.
func (p *Proxy) Alive(ctx context.Context) error {
	p.mu.Lock()
	running := p.running && !p.stopped
	p.mu.Unlock()
	p.table.mu.Lock()
	p.table.mu.Unlock() //nolint:staticcheck // that it can be had is all we ask
	if !running {
		return nil // nobody runs the table
	}
	round := make(chan struct{})
	select {
	case p.table.asked <- round:
	case <-ctx.Done():
		return fmt.Errorf("the table of connections does not answer: %w", ctx.Err())
	}
	return nil
}
