package agent

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/agent/endpoint"
)

// Successor makes an agent that is to take the place of the one that holds the
// lease of the data directory. It holds nothing of that one's:
//
//	a, err := agent.Successor(cfg) // cfg.Inherit is the other's listener
//	err = a.CouldBegin(ctx)        // else the other goes on
//	…                              // the other lets go
//	err = a.Begin(ctx)             // takes the lease
//	err = a.Run(ctx)
func Successor(cfg Config) (*Agent, error) {
	cfg.Inherit = inPlace(cfg.Inherit, cfg.Socket, "Workload API", cfg.Log)
	cfg.AdminInherit = inPlace(cfg.AdminInherit, cfg.AdminSocket, "admin", cfg.Log)
	cfg.Broker.Inherit = inPlace(cfg.Broker.Inherit, cfg.Broker.Socket, "broker", cfg.Log)
	a, err := newAgent(cfg)
	if err != nil {
		return nil, err
	}
	if err := a.open(); err != nil {
		return nil, err
	}
	return a, nil
}

// inPlace returns the socket that was inherited, or nil to have it made anew:
// nobody reaches one whose file was removed.
func inPlace(inherited net.Listener, path, name string, log hclog.Logger) net.Listener {
	if inherited == nil || endpoint.InPlace(path) {
		return inherited
	}
	log.Warn("the "+name+" socket of the agent before this one is gone from its path: it is made anew", "socket", path)
	return nil
}

// reachPause is how often a server that is away is asked again.
const reachPause = time.Second

// CouldBegin returns nil once this agent can do what the one before it does:
// its state can be read, each attestor can attest, and the server answers, which
// is asked as nobody, so that the other's place there is not touched. Until then
// Unready tells the reason, and so does CouldBegin when ctx ends; each new one is
// logged. It changes nothing.
func (a *Agent) CouldBegin(ctx context.Context) error {
	s, err := a.dir.read(a.cfg.TrustDomain.Name())
	if err != nil && !errors.Is(err, errCorruptState) { // that, Begin's run sets aside
		return err
	}
	a.warnOfAnotherNode(s)
	l := &looper{Agent: a, self: self{state: s}}
	tick := time.NewTicker(reachPause)
	defer tick.Stop()
	said, attests := "", false
	for {
		var now error
		if !attests {
			now = a.checkAttestors(ctx)
			attests = now == nil
		}
		if now == nil {
			now = l.reach(ctx)
		}
		if now == nil {
			return nil
		}
		if ctx.Err() == nil || err == nil { // else what was cut off has no better reason than the last
			err = now
		}
		a.update(func(v *view) { v.problem = err })
		if text := err.Error(); ctx.Err() == nil && text != said {
			said = text
			args := []any{"error", err}
			if advice := l.advice(err); advice != "" {
				args = append(args, "advice", advice)
			}
			a.log.Error("cannot take over yet, will try again; the agent that runs goes on", args...)
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// reach asks the server, as nobody, whether it is there.
func (l *looper) reach(ctx context.Context) error {
	trust, err := l.trust(ctx)
	if err != nil {
		return err
	}
	return l.client.Reach(ctx, trust)
}

// Begin takes the lease of the data directory, which the agent before this one
// has given back. After an error nothing is taken.
func (a *Agent) Begin(ctx context.Context) error { return a.dir.await(ctx) }

// OwnSockets takes over the duty to remove the sockets' files at the end, once
// the agent before this one has no more use for them. Those that were not
// inherited are ours from the start.
func (a *Agent) OwnSockets() error {
	var err error
	if a.cfg.Inherit != nil {
		err = a.server.Own()
	}
	if a.cfg.AdminInherit != nil && a.admin != nil {
		err = errors.Join(err, a.admin.Own())
	}
	if s, _ := a.brokerServers(); s != nil && a.cfg.Broker.Inherit != nil {
		err = errors.Join(err, s.Own())
	}
	return err
}

// WaitReady returns once the agent has synced and has signed what can be signed
// ahead, or ctx ends.
func (a *Agent) WaitReady(ctx context.Context) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		now := time.Now()
		if due := a.registry.NextDue(now); a.Unready() == nil && (due.IsZero() || due.After(now)) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Socket returns the listening socket of the Workload API, for an agent that
// takes this one's place, and whether the file at its path is ours to remove.
func (a *Agent) Socket() (_ net.Listener, owned bool) { return a.server.Socket() }

// AdminSocket returns that of the admin socket likewise, or nil where there is
// none.
func (a *Agent) AdminSocket() (_ net.Listener, owned bool) {
	if a.admin == nil {
		return nil, false
	}
	return a.admin.Socket()
}

// Given says which sockets another agent has.
type Given struct{ WorkloadAPI, Admin, Broker, BrokerTCP bool }

// LetGo prepares for another agent: what this one is telling the server is
// ended or, where it must not be cut off (an attestation, a renewal), waited for
// and saved; nobody is accepted any more, and the lease is given back. Streams
// stay until Run ends, or until Resume makes it as it was. After an error nothing
// has changed.
func (a *Agent) LetGo(ctx context.Context, given Given) error {
	if err := a.turn.seize(ctx); err != nil {
		return err
	}
	a.tokens.pause()
	a.server.Pause(given.WorkloadAPI)
	if a.admin != nil {
		a.admin.Pause(given.Admin)
	}
	a.pauseBrokers(given)
	if err := a.dir.close(); err != nil {
		a.log.Warn("cannot close the lease of data_dir", "error", err) // it is given back all the same
	}
	return nil
}

// Resume goes on after LetGo, when the other agent did not begin. It fails
// where that one, or a third, has the lease: then this one's place is taken.
func (a *Agent) Resume(ctx context.Context) error {
	if err := a.dir.await(ctx); err != nil {
		return err
	}
	a.tokens.resume()
	for _, s := range a.servers() {
		s.Resume()
	}
	a.stale = true // the other one may have changed the SVID before it ended
	a.turn.end()
	return nil
}

// begin takes the turn, and looks at what another agent has changed since the
// last one.
func (l *looper) begin(ctx context.Context) bool {
	if !l.turn.begin(ctx) {
		return false
	}
	if !l.stale {
		return true
	}
	l.stale = false
	s, err := l.dir.load(l.cfg.TrustDomain.Name())
	if err == nil && s.KeyID == l.self.state.KeyID && equalCertificates(s.SVID, l.self.state.SVID) {
		return true
	}
	l.self = self{state: l.self.state}
	l.client.SetIdentity(nil)
	if err := l.restore(ctx); err != nil {
		l.log.Error("cannot take up what another agent has saved and will attest anew", "error", err)
	}
	return true
}
