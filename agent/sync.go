package agent

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

// land ends the flights that callers of Sync wait for: the one that a sync was
// begun for, and the one that has gathered since.
func (l *looper) land(err error) {
	for _, f := range []*flight{l.aboard, l.boarded()} {
		if f != nil {
			f.err = err
			close(f.done)
		}
	}
	l.aboard = nil
}

// boarded takes the current flight: whoever asks from now on waits for the
// next one.
func (l *looper) boarded() *flight {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.flight
	l.flight = nil
	return f
}

// arrive ends the flight of a sync that was applied. Callers that it brought no
// entry have the server asked again soon.
func (l *looper) arrive() {
	f := l.aboard
	l.aboard = nil
	if f == nil {
		return
	}
	for _, q := range f.asked {
		if l.registry.Matches(q.selectors) {
			continue
		}
		l.mu.Lock()
		if now := time.Now(); l.view.settled(now) {
			l.chase.deny(q.user, selectorsKey(q.selectors), now, l.cfg.SyncInterval)
		} else {
			l.chase.pursue(q.user, now, l.cfg.SyncInterval)
		}
		l.mu.Unlock()
	}
	close(f.done)
}

// afterSync is when the next sync is due.
func (l *looper) afterSync(now time.Time) time.Time {
	next := now.Add(spread(l.cfg.SyncInterval))
	soon := now.Add(spread(chasePause))
	l.mu.Lock()
	defer l.mu.Unlock()
	if soon.Before(next) && l.chase.goOn(soon, now, l.cfg.SyncInterval) {
		return soon
	}
	return next
}

// sync brings entries, then bundles, in step with the server. They are two
// transactions: a bundle that cannot be had holds no entry back.
func (l *looper) sync(ctx context.Context) error {
	l.aboard = l.boarded()
	start := time.Now()
	known := l.registry.Entries()
	l.lastSync = start
	entries, stats, err := l.client.Sync(ctx, known)
	if err != nil {
		l.metrics.syncFailed.Inc()
		if spire.Answered(err) { // the bundles may be had all the same
			err = errors.Join(err, l.syncBundles(ctx, known))
		}
		return l.denied(err)
	}
	entries = l.doubt.settle(known, entries, stats.Server, l.cfg.SyncInterval, time.Now())
	changes := l.registry.Apply(registry.Update{Entries: entries, HasEntries: true})
	l.metrics.entries.Set(float64(len(entries)))
	if changes != (registry.Changes{}) {
		l.log.Info("entries changed", "added", changes.Added, "changed", changes.Changed, "removed", changes.Removed, "entries", len(entries))
	}
	for _, problem := range stats.Malformed {
		l.log.Warn("an entry cannot be used and is passed over", "problem", problem)
	}
	l.tokens.keep(l.registry.Entries(), nil)
	// Before the bundles, which may take a while: whoever is shown that no entry
	// matches is to find the server ready to be asked.
	l.worked()
	l.update(func(v *view) { v.synced, v.lastSync, v.entries = true, time.Now(), len(entries) })
	if err := l.syncBundles(ctx, entries); err != nil {
		l.log.Warn("cannot refresh every bundle, will try again", "error", err)
	}
	l.metrics.syncDuration.Since(start)
	l.metrics.syncOK.Inc()
	l.arrive()
	l.nextSync = l.afterSync(time.Now())
	return nil
}

// syncBundles refreshes the own bundle and those of the trust domains the
// entries federate with, each by itself: one that cannot be had just now stays
// as it was. Syncs that callers asked for leave it out, unless an entry
// federates with a domain that none did before.
func (l *looper) syncBundles(ctx context.Context, entries []registry.Entry) error {
	wanted := map[spiffeid.TrustDomain]bool{}
	for i := range entries {
		for _, td := range entries[i].FederatesWith {
			wanted[td] = true
		}
	}
	now := time.Now()
	if now.Before(l.bundlesAt) && !lacks(l.wanted, wanted) {
		return nil
	}
	l.bundlesAt, l.wanted = now.Add(l.cfg.SyncInterval*8/10), wanted // before the next sync of the interval, early as it may be
	own, err := l.client.Bundle(ctx)
	if err != nil {
		if err = l.denied(err); !spire.Answered(err) {
			return err // nor will it answer for the others
		}
	}
	federated, problem := l.federatedBundles(ctx, wanted)
	l.federated = federated
	update := registry.Update{Federated: federated, HasFederated: true}
	if own != nil {
		update.Bundle = l.withAbandoned(own)
	}
	l.registry.Apply(update)
	if own != nil {
		l.tokens.keep(l.registry.Entries(), update.Bundle)
		l.leaveTainted(own)
		problem = errors.Join(problem, l.keepBundle(own))
	}
	return errors.Join(err, problem)
}

// lacks reports whether some of wanted are not among had.
func lacks(had, wanted map[spiffeid.TrustDomain]bool) bool {
	for td := range wanted {
		if !had[td] {
			return true
		}
	}
	return false
}

// federatedBundles fetches the bundles of other trust domains, and keeps those
// it had where it cannot. After the first call that the server does not answer
// it makes no other.
func (l *looper) federatedBundles(ctx context.Context, wanted map[spiffeid.TrustDomain]bool) (map[spiffeid.TrustDomain]*registry.Bundle, error) {
	federated := make(map[spiffeid.TrustDomain]*registry.Bundle, len(wanted))
	empty := map[spiffeid.TrustDomain]bool{}
	var problems error
	away := false
	for td := range wanted {
		var b *registry.Bundle
		var err error
		if !away {
			b, err = l.client.FederatedBundle(ctx, td)
		}
		switch {
		case b != nil && len(b.X509)+len(b.JWTKeys) > 0:
			federated[td] = b
		case b != nil: // clients cannot read a bundle without authorities
			if !l.empty[td] {
				l.log.Warn("a federated bundle has no authority in it and is left out", "trust_domain", td.Name())
			}
			empty[td] = true
		case errors.Is(err, spire.ErrNotFound): // the server has no bundle of it (any more)
		default:
			problems = errors.Join(problems, err)
			away = away || !spire.Answered(err)
			if old := l.federated[td]; old != nil {
				federated[td] = old
			}
		}
	}
	l.empty = empty
	return federated, problems
}
