package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lookupEvery is how often a name in use is looked up, give or take a
	// tenth.
	lookupEvery = 5 * time.Second
	// lookupTimeout bounds one lookup; who waits for it waits no longer than
	// its own connect timeout.
	lookupTimeout = 10 * time.Second
	// lookupAgain is the least time between a lookup that failed and another
	// one that a connection asks for.
	lookupAgain = time.Second
	// goneFor is how long the last addresses of a name are used after DNS
	// began to say that there is no such name.
	goneFor = 5 * time.Minute
	// maxAddresses bounds the addresses of one name.
	maxAddresses = 64
)

// target is one address of the configuration. Who holds it is counted by its
// set.
type target struct {
	set    *Set
	key    key
	meters Meters
	host   string // what is looked up; empty for literal addresses and paths
	port   uint16
	refs   int // guarded by set.mu
	ctx    context.Context
	cancel context.CancelFunc
	kick   chan struct{} // look up now

	endpoints atomic.Pointer[[]*endpoint] // in the order of their addresses
	waiting   atomic.Int32                // borrowers in crowd, for those who only look

	mu        sync.Mutex     // guards the following
	crowd     map[*Group]int // borrowers that wait for room here
	pending   bool           // a lookup is under way or asked for
	ended     time.Time      // when the last lookup did
	problem   error          // of the last lookup
	goneSince time.Time      // when DNS began to say that there is no such name
	crowded   bool           // it was said that there are too many addresses
}

func newTarget(s *Set, k key) *target {
	t := &target{set: s, key: k, meters: s.Meters(k.owner), kick: make(chan struct{}, 1)}
	t.ctx, t.cancel = context.WithCancel(s.ctx)
	var p place
	p, t.host, t.port = parsePlace(k.address)
	var endpoints []*endpoint
	if t.host == "" {
		endpoints = []*endpoint{newEndpoint(t, p)}
	}
	t.pending = t.host != ""
	t.endpoints.Store(&endpoints)
	return t
}

// start begins what a target does by itself; literal addresses without
// active checks do nothing.
func (t *target) start() {
	if t.host != "" {
		t.set.work.Go(func() { t.follow(t.ctx) })
	}
	if t.key.health.Interval > 0 {
		t.set.work.Go(func() { t.check(t.ctx) })
	}
}

// addresses returns the endpoints there are now.
func (t *target) addresses() []*endpoint { return *t.endpoints.Load() }

// follow looks the name up until ctx ends. It is the only one who does, so
// there is never more than one lookup of a name under way.
func (t *target) follow(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-t.kick:
		case <-ctx.Done():
			return
		}
		t.lookup(ctx)
		timer.Reset(around(lookupEvery))
	}
}

// expect asks for a lookup, unless one is under way or just failed, and
// reports whether there is one to wait for.
func (t *target) expect() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.host == "" || t.ctx.Err() != nil:
		return false
	case t.pending:
		return true
	case time.Since(t.ended) < lookupAgain:
		return false
	}
	t.pending = true
	select {
	case t.kick <- struct{}{}:
	default:
	}
	return true
}

// lookup looks the name up once and takes over what came of it.
func (t *target) lookup(ctx context.Context) {
	t.mu.Lock()
	t.pending = true
	t.mu.Unlock()
	limited, cancel := context.WithTimeout(ctx, lookupTimeout)
	found, err := t.set.Resolver.LookupNetIP(limited, "ip", t.host)
	cancel()
	if ctx.Err() == nil {
		if err == nil && len(found) == 0 {
			err = &net.DNSError{Err: "no addresses", Name: t.host, IsNotFound: true}
		}
		if err != nil {
			t.lookupFailed(err)
		} else {
			t.lookedUp(found)
		}
	}
	t.mu.Lock()
	t.pending, t.ended = false, time.Now()
	t.mu.Unlock()
	t.set.news.ring()
}

// lookedUp puts addresses in force. An address that was there keeps its
// health and counts; connections to one that is gone stay.
func (t *target) lookedUp(found []netip.Addr) {
	for i := range found {
		found[i] = found[i].Unmap()
	}
	slices.SortFunc(found, netip.Addr.Compare)
	found = slices.Compact(found)
	all := len(found)
	found = found[:min(all, maxAddresses)]
	had := t.addresses()
	next := make([]*endpoint, 0, len(found))
	for _, ip := range found {
		p := place{ip: netip.AddrPortFrom(ip, t.port)}
		if i := slices.IndexFunc(had, func(e *endpoint) bool { return e.place == p }); i >= 0 {
			next = append(next, had[i])
		} else {
			next = append(next, newEndpoint(t, p))
		}
	}
	changed := !slices.Equal(had, next)
	t.mu.Lock()
	was := t.problem
	t.problem, t.goneSince = nil, time.Time{}
	crowd := all > maxAddresses && !t.crowded
	t.crowded = all > maxAddresses
	t.mu.Unlock()
	pairs := []any{"listener", t.key.owner, "target", t.key.address}
	if crowd {
		t.set.Log.Warn("name has too many addresses: the others are left out", append(pairs, "addresses", all, "used", maxAddresses)...)
	}
	if was != nil {
		t.set.Log.Info("name resolves again", append(pairs, "addresses", len(found))...)
	}
	if changed {
		t.set.Log.Debug("name has other addresses", append(pairs, "addresses", found)...)
		t.replace(next)
	}
}

// replace puts other endpoints in the place of those there are. What lies idle
// at one that is gone is closed.
func (t *target) replace(next []*endpoint) {
	for _, e := range *t.endpoints.Swap(&next) {
		if !slices.Contains(next, e) {
			e.gone.Store(true)
			e.empty()
		}
	}
	t.set.recount(t.key.owner)
	t.wake()
}

// lookupFailed keeps the last good addresses: for as long as DNS fails, and
// for goneFor when it says that there is no such name. Said once.
func (t *target) lookupFailed(err error) {
	t.meters.LookupFailures.Inc()
	var dns *net.DNSError
	gone := errors.As(err, &dns) && dns.IsNotFound
	have := len(t.addresses())
	t.mu.Lock()
	news := t.problem == nil
	t.problem = err
	if gone && t.goneSince.IsZero() {
		t.goneSince = time.Now()
		news = true
	}
	drop := gone && have > 0 && time.Since(t.goneSince) >= goneFor
	t.mu.Unlock()
	pairs := []any{"listener", t.key.owner, "target", t.key.address, "error", err}
	switch {
	case drop:
		t.replace(nil)
		t.set.Log.Warn("name is gone: its last addresses are not used any more", append(pairs, "after", goneFor)...)
	case news && have == 0:
		t.set.Log.Warn("cannot look up a target: it is tried again", pairs...)
	case news && gone:
		t.set.Log.Warn("name is gone: its last addresses are used for a while", append(pairs, "for", goneFor)...)
	case news:
		t.set.Log.Warn("cannot look up a target: its last addresses are used until it resolves again", pairs...)
	}
}

// lookupProblem returns why the last lookup failed, or nil.
func (t *target) lookupProblem() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.problem
}
