package upstream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// A check is a connection that is closed as soon as it stands, unless a path or
// a gRPC service is to be asked for. It is no TLS handshake, to peers that speak mTLS neither:
// that would show our identity to whoever answers every few seconds, fill the
// peer's access log and cost it a signature each time. Peers that take
// connections and fail at the handshake are found by the connections that fail
// (Chosen.Failed). Who asks for a path has chosen to pay that.

// check checks the endpoints of a target until ctx ends.
func (t *target) check(ctx context.Context) {
	every := t.key.health.Interval
	timer := time.NewTimer(rand.N(min(every, time.Second))) // so that not all of a fleet check at once
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		var round sync.WaitGroup
		for _, e := range t.addresses() {
			round.Go(func() { e.check(ctx) })
		}
		round.Wait()
		timer.Reset(around(every))
	}
}

// check connects once, asks what is to be asked, and notes the outcome.
func (e *endpoint) check(ctx context.Context) {
	limit := e.target.key.health.Timeout
	attempt, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := e.dial(attempt, time.Now().Add(limit))
	if err == nil {
		if h := &e.target.key.health; h.Path != "" || h.GRPC {
			err = e.probe(attempt, c)
		}
		_ = c.Close()
	}
	if ctx.Err() != nil || err != nil && (ours(err) || errors.Is(err, context.Canceled)) {
		return
	}
	if err != nil && timedOut(err) {
		err = fmt.Errorf("no answer within %s", limit)
	}
	e.checked(err)
}

// checked counts the outcome of a check, nil for a good one, and changes the
// endpoint's state after enough of them in a row.
func (e *endpoint) checked(err error) {
	t, good := e.target, err == nil
	e.mu.Lock()
	if e.lastGood != good {
		e.lastGood, e.inARow = good, 0
	}
	e.inARow++
	if err != nil {
		e.downWhy = err.Error()
	}
	was := e.down.Load()
	now := was
	switch {
	case good && e.inARow >= t.key.health.HealthyAfter:
		now = false
	case !good && e.inARow >= t.key.health.UnhealthyAfter:
		now = true
	}
	e.down.Store(now)
	e.mu.Unlock()
	if was == now {
		return
	}
	if now {
		e.empty()
		t.set.Log.Warn("endpoint fails its health checks: it is left out while another one is healthy",
			"listener", t.key.owner, "target", t.key.address, "endpoint", e.name, "error", err)
	} else {
		t.set.Log.Info("endpoint passes its health checks again", "listener", t.key.owner, "target", t.key.address, "endpoint", e.name)
	}
	t.set.recount(t.key.owner)
	t.wake()
}

// around returns d give or take a tenth, so that what many proxies do at an
// interval spreads.
func around(d time.Duration) time.Duration {
	return d - d/10 + rand.N(max(d/5, 1))
}

// later returns d and up to a tenth more.
func later(d time.Duration) time.Duration {
	return d + rand.N(max(d/10, 1))
}
