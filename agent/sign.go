package agent

import (
	"context"
	"crypto"
	"fmt"
	"slices"
	"time"

	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

// sign has the server sign what is due, most urgent first, a batch at a time
// so that the first callers do not wait for the last. Where a turn takes long,
// it ends between two batches for what is due beside it.
func (l *looper) sign(ctx context.Context) error {
	done := map[string]bool{} // once a pass, whatever the answer
	for ctx.Err() == nil {
		due := slices.DeleteFunc(l.registry.Due(time.Now()), func(e registry.Entry) bool { return done[e.ID] })
		if len(due) == 0 {
			return nil
		}
		if len(done) > 0 && l.otherDue(time.Now()) {
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

// otherDue reports whether the loop has something to do beside signing: a sync,
// whether of the interval or because somebody waits for it, or a renewal.
func (l *looper) otherDue(now time.Time) bool {
	if len(l.wake) > 0 && now.Sub(l.lastSync) >= askPause {
		<-l.wake // the loop alone takes from it
		l.nextSync = now
	}
	return !now.Before(l.nextSync) || registry.Reached(l.self.renewAt, now)
}

// signBatch makes a key and a CSR for each entry and has them signed.
func (l *looper) signBatch(ctx context.Context, due []registry.Entry) (registry.Update, error) {
	signers := make([]crypto.Signer, len(due))
	requests := make([]spire.SignRequest, len(due))
	for i := range due {
		key, err := keys.NewWorkloadKey(l.cfg.WorkloadKeyType)
		if err != nil {
			return registry.Update{}, fmt.Errorf("make a workload's key: %w", err)
		}
		csr, err := newCSR(key, due[i].SPIFFEID)
		if err != nil {
			return registry.Update{}, err
		}
		signers[i] = key
		requests[i] = spire.SignRequest{EntryID: due[i].ID, SPIFFEID: due[i].SPIFFEID, CSR: csr}
	}
	signed, err := l.client.Sign(ctx, requests)
	if err != nil {
		return registry.Update{}, err
	}
	update := registry.Update{SVIDs: map[string]*registry.SVID{}, Failed: map[string]error{}, Retry: retryAt}
	for i := range signed {
		svid, err := (*registry.SVID)(nil), signed[i].Err
		if err == nil {
			svid, err = registry.NewSVID(signed[i].Chain, signers[i])
		}
		if err == nil {
			i := issue{what: "the SVID", notBefore: svid.NotBefore, notAfter: svid.NotAfter}.arrived(time.Now())
			l.hold(i)
			if i.came.Add(shortest).After(i.notAfter) {
				err, l.over = i.apart(i.came), i
			}
		}
		if err != nil {
			l.metrics.notRotated.Inc()
			l.log.Warn("cannot have an SVID signed", "spiffe_id", due[i].SPIFFEID.String(), "entry_id", due[i].ID, "error", err)
			update.Failed[due[i].ID] = err
			continue
		}
		l.metrics.rotated.Inc()
		update.SVIDs[due[i].ID] = svid
	}
	return update, nil
}

// retryAt is when an entry is signed again that the server has refused to
// sign so many times in a row.
func retryAt(failures int) time.Time {
	wait := min(signRetry<<min(failures-1, 10), signRetryMax)
	return time.Now().Add(spread(wait))
}
