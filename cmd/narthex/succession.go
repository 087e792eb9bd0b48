package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/internal/telemetry/expose"
	"github.com/narthex-id/narthex/proxy"
)

// Names of inherited files: where a proxy under `narthex run` is asked for its
// sockets, and how the one that is to take its place reaches it.
const (
	controlSocketName = "@handover"
	controlPeerName   = "@handover-peer"
)

// readyWithin bounds how long a process that takes another's place waits until
// each of its listeners can serve. It is less than handover.ReadyTime, after
// which the other goes on without it.
const readyWithin = 60 * time.Second

// errTakenOver is why a proxy drains whose place was taken.
var errTakenOver = errors.New("a newer process took over")

// succession is a proxy's place in a row of processes that serve the same
// sockets: the one before it, if any, and the socket on which the one after it
// will ask.
type succession struct {
	path    string                // of the control socket; empty: it has no name
	owned   bool                  // path is ours to remove
	control *net.UnixListener     // nil: nobody can take our place
	from    *handover.Takeover    // nil: there was nobody before us
	sockets map[string]*activated // what systemd made
	lock    *handover.Lock        // had by the proxy that serves; nil: nobody can take our place
	log     hclog.Logger

	mu  sync.Mutex // guards from's sockets while they are taken, and the following
	has bool       // the lock
}

// succeed asks the process that runs, if there is one, for its sockets. The
// one under `narthex run` is reached by an inherited socket, another by the
// path in the configuration.
func (r *proxyRunner) succeed(ctx context.Context, files inherited) (_ *succession, err error) {
	s := &succession{log: r.log.Named("handover"), lock: r.lock}
	if h := r.config.Proxy.Handover; h != nil {
		s.path, s.owned = string(h.Socket), true
	}
	s.sockets = takeActivated(files, s.log)
	at := s.path
	control, err := files.listener(controlSocketName)
	if err != nil {
		return nil, err
	}
	if control != nil {
		s.path, s.owned, s.lock = "", false, nil
		s.control = control.(*net.UnixListener) // made by narthex run
		at = files.path(controlPeerName)
	}
	if at == "" {
		return s, nil
	}
	if r.stint.back {
		return s, s.first(true)
	}
	s.from, err = handover.Ask(ctx, at, version)
	nobody := errors.Is(err, handover.ErrNobody)
	if nobody {
		err = nil
	}
	if err == nil && control == nil {
		err = r.lockErr // whoever is asked knows the reason better
	}
	if err != nil {
		if s.from != nil {
			s.from.Abandon()
		}
		return nil, errors.Join(err, s.closeControl())
	}
	if nobody {
		return s, s.first(false)
	}
	s.log.Info("a proxy runs: its sockets are taken over once this one is ready", "version", s.from.Version)
	return s, nil
}

// first takes the lock where no process is to be asked for it. One that takes
// its place back leaves it to who has it; for any other, a process that has the
// lock and does not answer is none that keeps it from serving.
func (s *succession) first(back bool) error {
	err := s.takeLock()
	switch {
	case back && errors.Is(err, handover.ErrLocked):
		return errPlaceHeld
	case err != nil:
		s.log.Warn("a process in standby will not notice when this one is gone", "error", err)
	}
	return nil
}

func (s *succession) takeLock() error {
	if s.lock == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.lock.Take()
	s.has = err == nil
	return err
}

// releaseLock gives the lock back, if this proxy has it: another of this
// process may have it by now.
func (s *succession) releaseLock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.has {
		s.has = false
		if err := s.lock.Release(); err != nil {
			s.log.Warn("a process in standby will not notice that this one is gone", "error", err)
		}
	}
}

func (s *succession) closeControl() error {
	if s.control == nil {
		return nil
	}
	return s.control.Close()
}

// socket returns what was handed over, or made by systemd, for a listener.
func (s *succession) socket(name, bind string) net.Listener {
	if l := s.take(handover.Listener, name, bind); l != nil {
		return l
	}
	return activatedFor(s.sockets, name, bind, s.log)
}

func (s *succession) take(kind handover.Kind, name, bind string) net.Listener {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.from == nil {
		return nil
	}
	if taken := s.from.Take(kind, name, bind); taken != nil {
		return taken.Listener
	}
	return nil
}

// listen makes the control socket, unless it was handed over.
func (s *succession) listen() (err error) {
	if s.control != nil || s.path == "" {
		return nil
	}
	if s.from != nil {
		if s.control = s.from.Control(s.path); s.control != nil {
			return nil
		}
	}
	s.control, err = handover.Listen(s.path)
	return err
}

// takeOver waits until every listener that the process before us could serve
// can be served by us too, and has it let go. Only after that is anything
// accepted here.
func (s *succession) takeOver(ctx context.Context, r *proxyRunner) error {
	if s.from == nil {
		return nil
	}
	within, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	if err := r.waitReady(within); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := s.worse(r.proxy); err != nil {
			return fmt.Errorf("not ready within %s, so the process that runs goes on: %w", readyWithin, err)
		}
		s.log.Warn("taking over though some listeners cannot serve: they could not before either", "error", err)
	}
	if err := s.from.Ready(ctx); err != nil {
		return err
	}
	var names []string
	for _, t := range s.from.Taken() {
		u, isUnix := t.Listener.(*net.UnixListener)
		switch {
		case !t.Owned:
		case t.Kind == handover.Listener:
			names = append(names, s.nameOf(r.proxy, t))
		case isUnix && t.Kind != handover.Control:
			u.SetUnlinkOnClose(true)
		}
	}
	r.ownPaths(names)
	s.from.CloseUnused()
	s.log.Info("took over", "version", s.from.Version, "sockets", len(s.from.Taken()), "of_another_network", strings.Join(s.from.Elsewhere(), " "))
	return s.first(false)
}

// nameOf returns the listener that has a socket now: the configuration may
// call it by another name than the process before us did.
func (s *succession) nameOf(p *proxy.Proxy, t handover.Socket) string {
	for _, have := range p.Sockets() {
		if have.Listener == t.Listener {
			return have.Name
		}
	}
	return t.Name
}

// worse names the listeners that the process before us could serve and we
// cannot.
func (s *succession) worse(p *proxy.Proxy) error {
	var errs []error
	for _, have := range p.Sockets() {
		at := slices.IndexFunc(s.from.Taken(), func(t handover.Socket) bool { return t.Listener == have.Listener && t.Serving })
		if at >= 0 && !have.Serving {
			errs = append(errs, fmt.Errorf("listener %s has no identity", have.Name))
		}
	}
	return errors.Join(errs...)
}

// abandon leaves everything with the process before us.
func (s *succession) abandon() {
	if s.from != nil {
		s.from.Abandon()
	}
	if s.control != nil {
		_ = s.control.Close()
	}
	s.releaseLock()
	closeActivated(s.sockets)
}

// end ends what is left of the talk with the process before us.
func (s *succession) end() {
	if s.from != nil {
		s.from.Close()
	}
	s.releaseLock()
	closeActivated(s.sockets)
}

// countLive counts the connections that the process before us still has
// against our limits, until it has none.
func (s *succession) countLive(ctx context.Context, p *proxy.Proxy) {
	if s.from != nil {
		s.from.Live(ctx, p.Reserve)
	}
}

// giver is a proxyRunner that may be asked for its sockets.
type giver struct {
	*proxyRunner
	figures *expose.Server
	leave   context.CancelCauseFunc // drains the proxy
	hide    func()                  // ends the figures
}

// Offer implements handover.Giver. Until Keep or Give nothing is reloaded.
func (g *giver) Offer() ([]handover.Socket, error) {
	if g.proxy.Draining() {
		return nil, errors.New("it is shutting down")
	}
	g.reloading.Lock()
	return append(g.offered(), figuresSockets(g.figures, g.config.Telemetry)...), nil
}

// figuresSockets are the sockets that show a half's figures, where it has them.
func figuresSockets(figures *expose.Server, c config.Telemetry) (out []handover.Socket) {
	listen, health := figures.Sockets()
	if listen != nil {
		out = append(out, figuresSocket(handover.Telemetry, string(c.Listen), listen))
	}
	if health != nil {
		out = append(out, figuresSocket(handover.Health, string(c.Health), health))
	}
	return out
}

// figuresLeft is where another process, which has taken these sockets, does not
// show its own figures.
func figuresLeft(c config.Telemetry, taken []handover.Socket) config.Telemetry {
	for _, s := range taken {
		switch s.Kind {
		case handover.Telemetry:
			c.Listen = ""
		case handover.Health:
			c.Health = ""
		}
	}
	return c
}

func figuresSocket(kind handover.Kind, bind string, l net.Listener) handover.Socket {
	_, isUnix := l.(*net.UnixListener)
	return handover.Socket{Kind: kind, Bind: bind, Owned: isUnix, Serving: true, Listener: l}
}

// Keep implements handover.Giver.
func (g *giver) Keep() {
	defer g.reloading.Unlock()
	handovers(g.metrics).With("kept").Inc()
	_ = g.place.first(false) // which says what is wrong
}

// LetGo implements handover.Giver. Of what a proxy has, only the lock cannot be
// another one's at the same time.
func (g *giver) LetGo(context.Context, []handover.Socket) error {
	g.place.releaseLock()
	return nil
}

// Begun implements handover.Giver: a proxy that has given drains.
func (g *giver) Begun(bool) bool { return false }

// Give implements handover.Giver: this process drains and ends.
func (g *giver) Give(taken []handover.Socket) {
	defer g.reloading.Unlock()
	g.tell.mute.Store(true) // the other one does the talking
	var names []string
	for _, s := range taken {
		u, isUnix := s.Listener.(*net.UnixListener)
		switch {
		case s.Kind == handover.Listener:
			names = append(names, s.Name)
		case isUnix && s.Kind != handover.Control:
			u.SetUnlinkOnClose(false)
		}
	}
	g.leavePaths(names)
	g.leave(errTakenOver)
	g.hide()
	g.stint.taken(figuresLeft(g.inForce().Telemetry, taken))
}

// Live implements handover.Giver.
func (g *giver) Live() map[string]int { return g.proxy.Live() }
