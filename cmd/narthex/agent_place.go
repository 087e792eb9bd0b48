package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/agent"
	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/handover"
	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/telemetry/expose"
)

// handoverSocketName is where an agent is asked for its place: in data_dir,
// whose lease is what there is to have.
const handoverSocketName = "handover.sock"

// Names under which sockets are handed over; the Workload API's has none.
const (
	adminSocketName  = "admin"
	brokerSocketName = "broker"
	brokerTCPName    = "broker-tcp"
)

// settleWithin bounds how long a new agent, which has the lease, lets the one
// before it hold its streams, so that callers find this one able to answer. What
// is left of BegunTime is for giving the lease back where it is not.
const settleWithin = handover.BegunTime * 4 / 5

// agentPlace is an agent's place in a row of agents with one data_dir: the one
// before it, if any, and the socket on which the one after it will ask.
type agentPlace struct {
	path    string             // of the control socket; empty: half of `narthex run`, which nobody asks
	control *net.UnixListener  // nil: nobody can take our place
	from    *handover.Takeover // nil: there was nobody before us
	settled time.Time          // when the one before us has held its streams for long enough
	log     hclog.Logger
}

func newAgentPlace(c *config.Config, half bool, log hclog.Logger) *agentPlace {
	p := &agentPlace{log: log.Named("handover")}
	if !half {
		p.path = filepath.Join(string(c.DataDir), handoverSocketName)
	}
	return p
}

// agent makes the agent: with the lease, or, where another one runs and back is
// not set, as that one's successor.
func (p *agentPlace) agent(ctx context.Context, c agent.Config, back bool) (*agent.Agent, error) {
	a, err := agent.New(c)
	var held *agent.HeldError
	switch {
	case !errors.As(err, &held) || p.path == "":
		return a, err
	case back:
		return nil, errPlaceHeld
	}
	p.from, err = handover.Ask(ctx, p.path, version)
	switch {
	case errors.Is(err, handover.ErrNobody):
		return p.afterEnd(ctx, c, held)
	case err != nil:
		return nil, err
	}
	p.log.Info("an agent runs: its place is taken once this one could begin", "version", p.from.Version, "pid", held.PID)
	c.Inherit = p.take(handover.Listener, "", c.Socket)
	if c.AdminSocket != "" {
		c.AdminInherit = p.take(handover.Listener, adminSocketName, c.AdminSocket)
	}
	if c.Broker.Socket != "" {
		c.Broker.Inherit = p.take(handover.Listener, brokerSocketName, c.Broker.Socket)
	}
	if c.Broker.Listen != "" {
		c.Broker.InheritTCP = p.take(handover.Listener, brokerTCPName, c.Broker.Listen)
	}
	return agent.Successor(c)
}

// endingTime is how long an agent that is ending may still have the lease.
const endingTime = 5 * time.Second

// afterEnd makes the agent once the one that answers nobody any more, and has
// the lease, has ended.
func (p *agentPlace) afterEnd(ctx context.Context, c agent.Config, held error) (*agent.Agent, error) {
	for until := time.Now().Add(endingTime); time.Now().Before(until) && sleep(ctx, endingTime/20); {
		a, err := agent.New(c)
		if !errors.As(err, new(*agent.HeldError)) {
			return a, err
		}
	}
	return nil, held
}

func (p *agentPlace) take(kind handover.Kind, name, bind string) net.Listener {
	if p.from == nil {
		return nil
	}
	if s := p.from.Take(kind, name, bind); s != nil {
		return s.Listener
	}
	return nil
}

// listen makes the control socket, unless it was handed over.
func (p *agentPlace) listen() {
	if p.path == "" {
		return
	}
	if p.from != nil {
		if p.control = p.from.Control(p.path); p.control != nil {
			return
		}
	}
	var err error
	if p.control, err = handover.Listen(p.path); err != nil {
		p.log.Warn("no other agent can take this one's place without a gap", "error", err)
	}
}

// takeOver waits until a could do what the agent before it does, has that one
// let go, and takes its place.
func (p *agentPlace) takeOver(ctx context.Context, a *agent.Agent) error {
	if p.from == nil {
		return nil
	}
	within, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	if err := a.CouldBegin(within); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if within.Err() == nil {
			return fmt.Errorf("cannot begin, so the agent that runs goes on: %w", err)
		}
		if p.from.Serving(handover.Listener) {
			return fmt.Errorf("could not begin within %s, so the agent that runs goes on: %w", readyWithin, err)
		}
		p.log.Warn("taking over though this one could not serve yet: the agent that runs has nothing to serve either", "error", err)
	}
	if err := p.from.Ready(ctx); err != nil {
		return err
	}
	p.settled = time.Now().Add(settleWithin)
	if err := a.Begin(ctx); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	p.from.CloseUnused()
	p.log.Info("took over", "version", p.from.Version, "sockets", len(p.from.Taken()), "of_another_network", strings.Join(p.from.Elsewhere(), " "))
	return nil
}

// begun tells the agent before this one that it may end, once a can answer its
// callers. Until then that one goes on when this one ends, so that paths are
// still its own. The error says why this one is to end: it cannot answer, as its
// server went away just now, and the other one could.
func (p *agentPlace) begun(ctx context.Context, a *agent.Agent) error {
	if p.from == nil {
		return nil
	}
	within, cancel := context.WithDeadline(ctx, p.settled)
	defer cancel()
	a.WaitReady(within)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := a.NotReady(); err != nil && p.from.Serving(handover.Listener) {
		return fmt.Errorf("took over and cannot serve yet, so the agent before this one goes on: %w", err)
	}
	p.from.Begun()
	if err := a.OwnSockets(); err != nil {
		p.log.Warn("a socket will not be removed at the end", "error", err)
	}
	for _, s := range p.from.Taken() {
		if s.Owned {
			unlinkFigures(s, true)
		}
	}
	p.from.Close()
	return nil
}

// end ends the talk with the agent before us, once we hold nothing any more: if
// it still waits for our word, it goes on now.
func (p *agentPlace) end() {
	if p.from != nil {
		p.from.Close()
	}
}

// unlinkFigures says whether the path of a socket that shows figures is ours to
// remove.
func unlinkFigures(s handover.Socket, ours bool) {
	u, ok := s.Listener.(*net.UnixListener)
	if ok && (s.Kind == handover.Telemetry || s.Kind == handover.Health) {
		u.SetUnlinkOnClose(ours)
	}
}

// abandon leaves everything with the agent before us.
func (p *agentPlace) abandon() {
	if p.from != nil {
		p.from.Abandon()
	}
	if p.control != nil {
		_ = p.control.Close()
		if p.from == nil {
			_ = os.Remove(p.path)
		}
	}
}

// answer answers agents that ask for a's place, until ctx ends or one has it.
func (p *agentPlace) answer(ctx context.Context, g *agentGiver) error {
	if err := p.begun(ctx, g.agent); err != nil {
		if p.control != nil {
			_ = p.control.Close()
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // that this one is to end is no error
		}
		return err
	}
	if p.control == nil {
		return nil
	}
	_, err := handover.Serve(ctx, handover.Config{
		Listener: p.control, Path: p.path, Owned: true, Version: version, Giver: g, Log: p.log,
	})
	return err
}

// agentGiver is an agent that may be asked for its place.
type agentGiver struct {
	agent   *agent.Agent
	config  *config.Config
	figures *expose.Server
	shown   *shownFigures
	tell    *teller
	stint   stint
	ctx     context.Context         // ends when the agent is to end
	leave   context.CancelCauseFunc // ends it
	count   *telemetry.Family[telemetry.Counter]
	log     hclog.Logger

	taken []handover.Socket
	gone  bool // let go, and not resumed
}

// Offer implements handover.Giver.
func (g *agentGiver) Offer() ([]handover.Socket, error) {
	if g.ctx.Err() != nil {
		return nil, errors.New("it is shutting down")
	}
	l, owned := g.agent.Socket()
	out := []handover.Socket{{
		Kind: handover.Listener, Bind: string(g.config.Agent.WorkloadAPI.Socket), Owned: owned,
		Serving: g.agent.NotReady() == nil, Listener: l,
	}}
	if l, owned := g.agent.AdminSocket(); l != nil {
		out = append(out, handover.Socket{
			Kind: handover.Listener, Name: adminSocketName, Bind: string(g.config.Agent.Admin.Socket), Owned: owned, Listener: l,
		})
	}
	if l, owned := g.agent.BrokerSocket(); l != nil {
		out = append(out, handover.Socket{
			Kind: handover.Listener, Name: brokerSocketName, Bind: string(g.config.Agent.Broker.Socket), Owned: owned, Listener: l,
		})
	}
	if l := g.agent.BrokerListener(); l != nil {
		out = append(out, handover.Socket{
			Kind: handover.Listener, Name: brokerTCPName, Bind: string(g.config.Agent.Broker.Listen), Listener: l,
		})
	}
	return append(out, figuresSockets(g.figures, g.config.Telemetry)...), nil
}

// LetGo implements handover.Giver.
func (g *agentGiver) LetGo(ctx context.Context, taken []handover.Socket) error {
	var given agent.Given
	for _, s := range taken {
		if s.Kind == handover.Listener {
			given.WorkloadAPI = given.WorkloadAPI || s.Name == ""
			given.Admin = given.Admin || s.Name == adminSocketName
			given.Broker = given.Broker || s.Name == brokerSocketName
			given.BrokerTCP = given.BrokerTCP || s.Name == brokerTCPName
		}
	}
	if err := g.agent.LetGo(ctx, given); err != nil {
		return err
	}
	g.taken, g.gone = taken, true
	return nil
}

// Keep implements handover.Giver.
func (g *agentGiver) Keep() {
	g.count.With("kept").Inc()
	if g.gone && !g.resume() {
		g.end()
	}
}

// Give implements handover.Giver: everything stays where it is until the other
// one has begun.
func (g *agentGiver) Give(taken []handover.Socket) {
	g.tell.mute.Store(true) // the other one does the talking
	for _, s := range taken {
		unlinkFigures(s, false)
	}
}

// Begun implements handover.Giver: without the other one's word, this one goes
// on if nobody else has the lease by then.
func (g *agentGiver) Begun(ok bool) (goesOn bool) {
	if !ok && g.ctx.Err() == nil && g.resume() {
		for _, s := range g.taken {
			if s.Owned {
				unlinkFigures(s, true)
			}
		}
		g.tell.mute.Store(false)
		g.count.With("resumed").Inc()
		return true
	}
	g.end()
	return false
}

func (g *agentGiver) resume() bool {
	if err := g.agent.Resume(g.ctx); err != nil {
		g.log.Warn("cannot go on: the place of this agent is taken", "error", err)
		return false
	}
	g.gone = false
	return true
}

// end ends the agent: held streams are told to call again.
func (g *agentGiver) end() {
	g.leave(errTakenOver)
	g.stint.taken(figuresLeft(g.config.Telemetry, g.taken))
}

// Live implements handover.Giver: streams end at once, and count nowhere.
func (g *agentGiver) Live() map[string]int { return nil }
