package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

const (
	// minPause is the first wait of the back-off while the server is away.
	minPause = time.Second
	// askPause is the least time between two syncs that callers ask for: the
	// Workload API is open to every local user. A caller is held for a second
	// (endpoint), which leaves half of it for the sync.
	askPause = 500 * time.Millisecond
	// maxPause bounds the back-off while the server is away.
	maxPause = 30 * time.Second
	// bannedPause is how often a banned agent asks whether it still is.
	bannedPause = 5 * time.Minute
	// signRetry is how long an entry waits whose CSR the server refused,
	// doubled for each time in a row, up to signRetryMax.
	signRetry    = 5 * time.Second
	signRetryMax = 5 * time.Minute
	// taintedPause is the least time between two renewals of the agent's own
	// SVID over a tainted authority, with which the server may sign for a
	// while yet.
	taintedPause = time.Minute
	// signAtOnce is how many SVIDs are asked for before the first of them are
	// given to those who wait, and the agent looks what is more urgent by now.
	// SPIRE Server signs 500 a second and holds back what is more, so that a
	// turn of many takes half a second for each of these.
	signAtOnce = 250
)

// jitter returns a number in [-1,1).
func jitter() float64 { return 2*rand.Float64() - 1 }

// spread moves d by up to ±10 %, so that a fleet started at one moment does
// not stay in step.
func spread(d time.Duration) time.Duration { return d + time.Duration(jitter()*float64(d)/10) }

// self is the agent's own identity: what the loop presents to the server.
type self struct {
	state   state
	key     keys.Key
	leaf    *x509.Certificate
	issue   issue // of leaf
	renewAt time.Time
}

// valid reports whether the SVID can still be presented.
func (s *self) valid(now time.Time) bool { return s.leaf != nil && now.Before(s.leaf.NotAfter) }

// loop is the one goroutine in which the agent's state changes.
func (a *Agent) loop(ctx context.Context) error {
	l := &looper{Agent: a}
	if err := l.restore(ctx); err != nil {
		return err
	}
	if err := l.checkReattestable(); err != nil {
		return err
	}
	pause := a.cfg.minPause
	for l.begin(ctx) {
		started := time.Now()
		err := l.recognised(ctx, l.advance(ctx))
		until := l.nextDue(time.Now())
		switch {
		case ctx.Err() != nil, errors.Is(err, errInterrupted):
			l.land(err)
			l.turn.end()
			continue // what failed, failed because it is over
		case errors.Is(err, errAttestsOnce):
			l.land(err)
			l.turn.end()
			return err
		case err == nil:
			pause = a.cfg.minPause
		default:
			wait := pause + time.Duration(rand.Int64N(int64(pause)/2))
			if l.isBanned() {
				wait = spread(bannedPause)
			}
			l.failed(err, wait.Round(time.Millisecond))
			until = l.notBefore(time.Now().Add(wait))
			pause = min(2*pause, maxPause)
		}
		l.turn.end()
		l.sleep(ctx, started, until)
	}
	l.land(ctx.Err())
	return nil
}

// looper is the state that only the loop touches.
type looper struct {
	*Agent
	self      self
	nextSync  time.Time                                 // of entries
	lastSync  time.Time                                 // began then
	bundlesAt time.Time                                 // from when the bundles are fetched with the entries
	left      time.Time                                 // when an SVID of a tainted authority was last renewed for that
	wanted    map[spiffeid.TrustDomain]bool             // that bundles were last fetched of
	federated map[spiffeid.TrustDomain]*registry.Bundle // as last applied
	empty     map[spiffeid.TrustDomain]bool             // federated bundles without authorities, which the log was told of
	problem   string                                    // subject of the failure last logged, so that it is logged once
	repeats   int

	aboard     *flight // what the sync under way was begun for
	mustAttest bool    // before anything else, though the SVID has not ended
	inactive   bool    // the server called the SVID superseded when it last refused
	lost       error   // why there is no SVID any more, nil if there is one or there never was
	over       issue   // the SVID that was refused last for this host's clock
	doubt      doubt   // about what one of several servers says
	posted     bool    // the server knows the agent's version

	firstTry  time.Time // to read the bootstrap bundle
	tries     int       // likewise, since then or since the server is strange
	abandoned []string  // subject key IDs, hexadecimal, of authorities given up by bootstrapping again
	saidOnce  bool      // that the node cannot attest again
}

// sleep waits until the given time, or until somebody asks for a sync that
// can be made: the agent is attested, and its last attempt is askPause ago.
func (l *looper) sleep(ctx context.Context, last, until time.Time) {
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return
	case <-timer.C:
		return
	case <-l.due:
		return
	case <-l.renewed: // a server that is strange may be known by it
		return
	case <-l.wake:
	}
	if early := last.Add(askPause); early.Before(until) {
		timer.Reset(time.Until(early))
	}
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	l.nextSync = time.Time{}
}

// nextDue is when the loop has something to do again.
func (l *looper) nextDue(now time.Time) time.Time {
	next := l.nextSync
	if l.self.renewAt.Before(next) {
		next = l.self.renewAt
	}
	if due := l.registry.NextDue(now); !due.IsZero() && due.Before(next) {
		next = due
	}
	return next
}

// advance does whatever is due, in the order in which the one needs the
// other.
func (l *looper) advance(ctx context.Context) error {
	now := time.Now()
	l.heed(now)
	switch {
	case l.mustAttest, !l.self.valid(now) && !l.self.issue.waits(now):
		l.mustAttest = false
		if err := l.attest(ctx); err != nil {
			return err
		}
	case l.self.valid(now) && registry.Reached(l.self.renewAt, now):
		if err := l.renew(ctx); err != nil {
			return err
		}
	}
	if now := time.Now(); !l.self.valid(now) {
		return l.self.issue.apart(now)
	}
	// From here on nothing is lost by a call that is cut off.
	soft, done := l.turn.interruptible(ctx)
	defer done()
	var err error
	if !time.Now().Before(l.nextSync) {
		err = l.sync(soft)
	}
	if err == nil {
		err = l.sign(soft)
	}
	if err == nil {
		l.postStatus(soft) // last: nobody waits for it
	}
	if soft.Err() != nil && ctx.Err() == nil {
		return errInterrupted
	}
	return err
}

// postStatus tells the server the agent's version, once after each attestation
// and each start, and hence after each upgrade. The server does nothing else
// with it, and older ones have no such call: a failure changes nothing.
func (l *looper) postStatus(ctx context.Context) {
	if l.posted {
		return
	}
	l.posted = true
	if err := l.client.PostStatus(ctx, l.cfg.Version); err != nil {
		l.log.Debug("the server does not take the agent's version", "error", err)
	}
}

// told is the failure in the words that callers are told it by.
func (l *looper) told() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.view.problem
}

// isBanned reports whether the server has last said so, in words or by refusing
// an attestation since.
func (l *looper) isBanned() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.view.banned
}

// failed tells callers and the log why the loop cannot go on. One failure is
// one line, however often it repeats; each tenth repetition says so.
func (l *looper) failed(err error, pause time.Duration) {
	answered := !errors.Is(err, spire.ErrUnreachable)
	l.update(func(v *view) {
		if v.reachable != answered {
			v.reachable, v.since = answered, time.Now()
		}
		v.problem = err
		if !answered {
			v.problem = fmt.Errorf("%w (unreachable since %s)", err, v.since.Format(time.TimeOnly))
		}
	})
	if answered {
		l.metrics.reachable.Set(1)
	} else {
		l.metrics.reachable.Set(0)
	}
	l.land(l.told())
	l.repeats++
	what := "cannot go on yet, will try again"
	if l.Unready() == nil {
		what = "cannot sync or sign now, will try again; what workloads have is served on"
	}
	if text := subject(err); text != l.problem {
		l.problem, l.repeats = text, 0
		args := []any{"error", err, "next_try_in", pause}
		if advice := l.advice(err); advice != "" {
			args = append(args, "advice", advice)
		}
		l.log.Error(what, args...)
	} else if l.repeats%10 == 0 {
		l.log.Error("still: "+what, "error", err, "tries", l.repeats+1)
	}
}

// subject is what one failure is told apart from another by: its text, unless that
// has the time in it.
func subject(err error) string {
	var apart *spire.ClockError
	if errors.As(err, &apart) {
		return "the clock, by " + apart.What
	}
	return err.Error()
}

// advice says what a person can do about a failure.
func (l *looper) advice(err error) string {
	if errors.Is(err, spire.ErrUnknownAuthority) && len(l.self.state.Bundle) > 0 && l.self.state.Strange.IsZero() {
		return fmt.Sprintf("the bundle saved in %s is not the server's any more, and the file that agent.server.bundle names is read on first contact only: "+
			"if the server was set up anew, stop the agent, remove %s and give it a new join token or certificate (agent.server.rebootstrap has a node that can attest again do the like by itself); if not, something else answers at %s",
			l.dir.path, l.dir.path, l.cfg.Server)
	}
	return spire.Advice(err)
}

// worked is failed's opposite: the server answered and all is well.
func (l *looper) worked() {
	if l.problem != "" {
		l.log.Info("the server answers again", "server", l.cfg.Server)
		l.problem = ""
	}
	l.inactive = false
	l.metrics.reachable.Set(1)
	l.update(func(v *view) {
		if !v.reachable {
			v.reachable, v.since = true, time.Now()
		}
		v.problem, v.banned = nil, false
	})
}
