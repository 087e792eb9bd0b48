package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/narthex-id/narthex/agent/bootstrap"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

// Rebootstrap says when the agent believes the bootstrap bundle again instead
// of the saved one. The zero value is never. Modes and delay are spire-agent's.
type Rebootstrap struct {
	Mode  string        // never, auto (where the node can attest again), always (and Run fails where it cannot)
	Delay time.Duration // for how long the server must have been strange to the saved bundle
}

func (r Rebootstrap) wanted() bool { return r.Mode == "auto" || r.Mode == "always" }

// errAttestsOnce ends an agent that is to bootstrap again always and never can.
var errAttestsOnce = errors.New("agent.server.rebootstrap.mode is always, and this node cannot attest again, by its attestor or by the server's configuration of it: set it to auto or never")

// bootstrap returns what a server is verified against that is not known yet,
// or not any more.
func (l *looper) bootstrap(ctx context.Context) (spire.Trust, error) {
	if l.firstTry.IsZero() {
		l.firstTry = time.Now()
	}
	l.tries++
	since := l.firstTry
	again := !l.self.state.Strange.IsZero()
	if again {
		since = l.self.state.Strange
	}
	roots, err := l.cfg.Bootstrap.Bundle(ctx, bootstrap.Attempt{Again: again, Number: l.tries, Since: since})
	if err != nil {
		return spire.Trust{}, fmt.Errorf("read the bootstrap bundle: %w", err)
	}
	return spire.Trust{Roots: roots}, nil
}

// recognised looks at how a turn went. A server that the saved bundle does not
// authenticate is strange, and after the configured delay the agent begins
// anew with the bootstrap bundle; one that it does is not, whatever it said.
// The error is the turn's, or that of the new beginning.
func (l *looper) recognised(ctx context.Context, err error) error {
	state := &l.self.state
	strange := errors.Is(err, spire.ErrUnknownAuthority) && !errors.Is(err, spire.ErrBadAnswer) && len(state.Bundle) > 0
	if !strange {
		if !state.Strange.IsZero() && authenticated(err) {
			return errors.Join(err, l.setStrange(time.Time{}))
		}
		return err
	}
	if !l.cfg.Rebootstrap.wanted() || l.once(state) {
		return err
	}
	now := time.Now()
	if state.Strange.IsZero() || state.Strange.After(now) { // after: somebody has set the clock
		if failed := l.setStrange(now); failed != nil {
			return errors.Join(err, failed)
		}
		l.log.Warn("the server is not one of the saved trust bundle", "bootstrap_again_at", now.Add(l.cfg.Rebootstrap.Delay), "error", err)
	}
	if now.Before(l.strangeUntil()) {
		return fmt.Errorf("%w (the agent bootstraps again at %s)", err, l.strangeUntil().Format(time.DateTime))
	}
	if again := l.startOver(ctx); again != nil {
		return fmt.Errorf("bootstrap again, since the server is not one of the saved trust bundle: %w", again)
	}
	return nil
}

// authenticated reports whether the server was, in a turn that ended so.
func authenticated(err error) bool {
	var denied *spire.DeniedError
	return err == nil || errors.As(err, &denied) || errors.Is(err, spire.ErrIdentityRefused) || errors.Is(err, spire.ErrJoinToken)
}

// once reports whether a node that has attested is known to be unable to do so
// again.
func (l *looper) once(s *state) bool { return len(s.SVID) > 0 && !s.Reattestable }

func (l *looper) setStrange(since time.Time) error {
	l.self.state.Strange = since
	l.tries = 0
	return l.dir.store(l.self.state)
}

// strangeUntil is when the delay is over.
func (l *looper) strangeUntil() time.Time { return l.self.state.Strange.Add(l.cfg.Rebootstrap.Delay) }

// notBefore moves the next attempt to the moment from which the agent may
// bootstrap again, where that is sooner.
func (l *looper) notBefore(next time.Time) time.Time {
	if l.self.state.Strange.IsZero() {
		return next
	}
	if at := l.strangeUntil(); at.After(time.Now()) && at.Before(next) {
		return at
	}
	return next
}

// startOver attests to a server that the bootstrap bundle authenticates. Until
// that has succeeded everything stays as it was: the server of before may come
// back. What it signed counts as signed by a tainted authority afterwards.
func (l *looper) startOver(ctx context.Context) error {
	trust, err := l.bootstrap(ctx)
	if err != nil {
		return err
	}
	before := l.self.state.Bundle
	if err := l.attestTo(ctx, trust); err != nil {
		return err
	}
	l.abandon(before)
	l.doubt = doubt{} // the entries are another server's, too
	l.log.Warn("bootstrapped again: the server is another one than before", "server", l.cfg.Server, "spiffe_id", l.self.leaf.URIs[0].String())
	return nil
}

// abandon remembers the authorities that the trust domain no longer has since
// the agent bootstrapped again.
func (l *looper) abandon(before [][]byte) {
	old, err := parseCertificates(before)
	if err != nil {
		return // they authenticated no server either
	}
	l.abandoned = nil
	for _, c := range old {
		if !containsCertificate(l.self.state.Bundle, c.Raw) {
			l.abandoned = append(l.abandoned, hex.EncodeToString(c.SubjectKeyId))
		}
	}
}

// withAbandoned returns b with the authorities of a server that is gone among
// the tainted ones, so that what they signed is signed anew before all else.
func (l *looper) withAbandoned(b *registry.Bundle) *registry.Bundle {
	if len(l.abandoned) == 0 {
		return b
	}
	marked := *b
	marked.Tainted = append(append([]string{}, b.Tainted...), l.abandoned...)
	return &marked
}

// checkReattestable holds what the server said of the node against the
// configuration: an agent that could not bootstrap again says so when there is
// time to mend it.
func (l *looper) checkReattestable() error {
	if !l.cfg.Rebootstrap.wanted() || !l.once(&l.self.state) {
		return nil
	}
	if l.cfg.Rebootstrap.Mode == "always" {
		return errAttestsOnce
	}
	if !l.saidOnce {
		l.saidOnce = true
		l.log.Warn("agent.server.rebootstrap is off: this node cannot attest again, by its attestor or by the server's configuration of it", "attestor", l.cfg.Node.Type())
	}
	return nil
}
