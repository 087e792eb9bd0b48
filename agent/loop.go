package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
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
	// given to those who wait.
	signAtOnce = 500
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
	pause := a.cfg.minPause
	for l.begin(ctx) {
		started := time.Now()
		err := l.advance(ctx)
		until := l.nextDue(time.Now())
		switch {
		case ctx.Err() != nil, errors.Is(err, errInterrupted):
			l.turn.end()
			continue // what failed, failed because it is over
		case err == nil:
			pause = a.cfg.minPause
		default:
			wait := pause + time.Duration(rand.Int64N(int64(pause)/2))
			if errors.Is(err, errBanned) {
				wait = spread(bannedPause)
			}
			l.failed(err, wait.Round(time.Millisecond))
			until = time.Now().Add(wait)
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
	nextSync  time.Time
	left      time.Time                                 // when an SVID of a tainted authority was last renewed for that
	federated map[spiffeid.TrustDomain]*registry.Bundle // as last applied
	empty     map[spiffeid.TrustDomain]bool             // federated bundles without authorities, which the log was told of
	problem   string                                    // the failure last logged, so that it is logged once
	repeats   int
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
	switch {
	case !l.self.valid(now):
		if err := l.attest(ctx); err != nil {
			return err
		}
	case !now.Before(l.self.renewAt):
		if err := l.renew(ctx); err != nil {
			return err
		}
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
	if soft.Err() != nil && ctx.Err() == nil {
		return errInterrupted
	}
	return err
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
	l.land(err)
	l.repeats++
	what := "cannot go on yet, will try again"
	if l.Unready() == nil {
		what = "cannot sync or sign now, will try again; what workloads have is served on"
	}
	if text := err.Error(); text != l.problem {
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

// advice says what a person can do about a failure.
func (l *looper) advice(err error) string {
	if errors.Is(err, spire.ErrUnknownAuthority) && len(l.self.state.Bundle) > 0 {
		return fmt.Sprintf("the bundle saved in %s is not the server's any more, and the file that agent.server.bundle names is read on first contact only: "+
			"if the server was set up anew, stop the agent, remove %s and give it a new join token or certificate; if not, something else answers at %s",
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
	l.metrics.reachable.Set(1)
	l.update(func(v *view) {
		if !v.reachable {
			v.reachable, v.since = true, time.Now()
		}
		v.problem, v.banned = nil, false
	})
}

// land ends the flight that callers of Sync wait for, if there is one.
func (l *looper) land(err error) { l.landFlight(l.boarded(), err) }

// boarded takes the current flight: whoever asks from now on waits for the
// next one.
func (l *looper) boarded() *flight {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.flight
	l.flight = nil
	return f
}

func (l *looper) landFlight(f *flight, err error) {
	if f != nil {
		f.err = err
		close(f.done)
	}
}

// sync brings entries, then bundles, in step with the server. They are two
// transactions: a bundle that cannot be had holds no entry back.
func (l *looper) sync(ctx context.Context) error {
	f := l.boarded()
	start := time.Now()
	entries, stats, err := l.client.Sync(ctx, l.registry.Entries())
	if err != nil {
		l.metrics.syncFailed.Inc()
		err = l.denied(err)
		l.landFlight(f, err)
		return err
	}
	changes := l.registry.Apply(registry.Update{Entries: entries, HasEntries: true})
	l.metrics.entries.Set(float64(len(entries)))
	if changes != (registry.Changes{}) {
		l.log.Info("entries changed", "added", changes.Added, "changed", changes.Changed, "removed", changes.Removed, "entries", len(entries))
	}
	for _, problem := range stats.Malformed {
		l.log.Warn("an entry cannot be used and is passed over", "problem", problem)
	}
	l.tokens.keep(l.registry.Entries(), nil)
	err = l.syncBundles(ctx, entries)
	l.nextSync = time.Now().Add(spread(l.cfg.SyncInterval))
	l.worked()
	l.update(func(v *view) { v.synced, v.lastSync = true, time.Now() })
	l.metrics.syncDuration.Since(start)
	l.metrics.syncOK.Inc()
	if err != nil {
		l.log.Warn("cannot refresh every bundle, will try again", "error", err)
	}
	l.landFlight(f, nil)
	return nil
}

// syncBundles refreshes the own bundle and those of the trust domains the
// entries federate with. One that cannot be had just now stays as it was.
func (l *looper) syncBundles(ctx context.Context, entries []registry.Entry) error {
	own, err := l.client.Bundle(ctx)
	if err != nil {
		return l.denied(err)
	}
	wanted := map[spiffeid.TrustDomain]bool{}
	for i := range entries {
		for _, td := range entries[i].FederatesWith {
			wanted[td] = true
		}
	}
	federated := make(map[spiffeid.TrustDomain]*registry.Bundle, len(wanted))
	empty := map[spiffeid.TrustDomain]bool{}
	var problems error
	for td := range wanted {
		b, err := l.client.FederatedBundle(ctx, td)
		switch {
		case err == nil && len(b.X509)+len(b.JWTKeys) > 0:
			federated[td] = b
		case err == nil: // clients cannot read a bundle without authorities
			if !l.empty[td] {
				l.log.Warn("a federated bundle has no authority in it and is left out", "trust_domain", td.Name())
			}
			empty[td] = true
		case errors.Is(err, spire.ErrNotFound): // the server has no bundle of it (any more)
		default:
			problems = errors.Join(problems, err)
			if old := l.federated[td]; old != nil {
				federated[td] = old
			}
		}
	}
	l.federated, l.empty = federated, empty
	l.registry.Apply(registry.Update{Bundle: own, Federated: federated, HasFederated: true})
	l.tokens.keep(l.registry.Entries(), own)
	l.leaveTainted(own)
	return errors.Join(problems, l.keepBundle(own))
}

// sign has the server sign what is due, most urgent first, a batch at a time
// so that the first callers do not wait for the last.
func (l *looper) sign(ctx context.Context) error {
	done := map[string]bool{} // once a pass, whatever the answer
	for ctx.Err() == nil {
		due := slices.DeleteFunc(l.registry.Due(time.Now()), func(e registry.Entry) bool { return done[e.ID] })
		if len(due) == 0 {
			return nil
		}
		due = due[:min(len(due), signAtOnce)]
		for i := range due {
			done[due[i].ID] = true
		}
		update, err := l.signBatch(ctx, due)
		if err != nil {
			return l.denied(err)
		}
		l.registry.Apply(update)
	}
	return ctx.Err()
}
