package agent

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/narthex-id/narthex/agent/endpoint"
	"github.com/narthex-id/narthex/agent/keys"
	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

const (
	// tokenWorkers is how many tokens are signed at a time. The server admits
	// 500 JWT-SVIDs a second from an IP address, and makes one in a millisecond
	// or two.
	tokenWorkers = 8
	// maxSignings bounds how many tokens of one entry may be waited for.
	maxSignings = 1024
	// refreshRetry is how long a token stays as it is after another one could
	// not be had, and refreshPause how soon to ask for the one that is on its
	// way.
	refreshRetry = 5 * time.Second
	refreshPause = time.Second
	// refreshSaid is the least time between two lines in the log about tokens
	// that could not be refreshed.
	refreshSaid = time.Minute
)

var (
	errTokensOver  = errors.New("the agent is shutting down: call again")
	errTakenBack   = errors.New("the entry was changed or removed while its token was signed: call again")
	errManyTokens  = fmt.Errorf("%d tokens of the entry are being signed, as many as may be at a time: call again later", maxSignings)
	errTokensPause = errors.New("the agent lets go of its place: call again")
)

// JWTSVID implements endpoint.Tokens.
func (a *Agent) JWTSVID(ctx context.Context, entry *registry.Entry, audience []string) (*registry.Token, error) {
	token, _, err := a.tokens.get(ctx, entry, audience)
	return token, err
}

// WITSVID implements endpoint.Tokens.
func (a *Agent) WITSVID(ctx context.Context, entry *registry.Entry) (*registry.Token, time.Time, error) {
	return a.tokens.get(ctx, entry, nil)
}

// tokens has JWT-SVIDs and WIT-SVIDs signed when somebody asks, once for all
// who ask for the same, and keeps them for the next. One that is past half of
// its life is still given out, and another one signed meanwhile. Workers make
// the calls, for as long as run does.
type tokens struct {
	sign    func(context.Context, *signing) (*registry.Token, error)
	log     hclog.Logger
	metrics tokenMetrics

	mu        sync.Mutex // guards the following
	work      *sync.Cond // there may be something to sign
	idle      *sync.Cond // no call is under way
	cache     tokenCache
	signings  map[tokenKey]*signing
	queue     tokenQueue
	refreshes []*signing // nobody waits for these, unless they are in queue as well
	tainted   []string   // key IDs of authorities whose tokens are not kept
	serial    uint64     // of the last token to be given out once
	halted    error      // why no calls are made, nil while they are
	over      bool       // and none will be
	running   int        // calls under way
	calls     context.Context
	cut       context.CancelFunc // ends calls
	said      time.Time          // when the log was told of a refresh that failed
	unsaid    int                // such failures since
}

// signing is one token on its way, for all who wait for it.
type signing struct {
	key      tokenKey
	entry    *registry.Entry
	audience []string // none: a WIT-SVID
	done     chan struct{}

	// tokens.mu guards the following.
	waiting    int
	background bool // it goes on if nobody waits
	begun      bool
	stale      bool // the entry is not any more what it was

	// The following is set when done is closed.
	token   *registry.Token
	refresh time.Time
	until   time.Time // token is good
	err     error
}

func newTokens(size int, log hclog.Logger, m tokenMetrics, sign func(context.Context, *signing) (*registry.Token, error)) *tokens {
	t := &tokens{
		sign: sign, log: log, metrics: m,
		cache: newTokenCache(size), signings: map[tokenKey]*signing{}, queue: tokenQueue{of: map[string][]*signing{}},
	}
	t.work, t.idle = sync.NewCond(&t.mu), sync.NewCond(&t.mu)
	t.calls, t.cut = context.WithCancel(context.Background())
	return t
}

// get returns a token of the entry, and when to ask for the next.
func (t *tokens) get(ctx context.Context, entry *registry.Entry, audience []string) (*registry.Token, time.Time, error) {
	now := time.Now()
	key := keyOf(entry, audience)
	t.mu.Lock()
	if found := t.cache.get(key, entry, now); found != nil {
		if registry.Reached(found.refresh, now) && t.signings[key] == nil && t.halted == nil {
			s := t.begin(key, entry, audience)
			s.background = true
			t.refreshes = append(t.refreshes, s)
			t.work.Signal()
		}
		refresh := later(found.refresh, now.Add(refreshPause))
		t.mu.Unlock()
		return found.token, refresh, nil
	}
	s, err := t.await(key, entry, audience)
	t.mu.Unlock()
	if err != nil {
		return nil, time.Time{}, err
	}
	select {
	case <-s.done:
		return s.token, s.refresh, s.err
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.waiting--; s.waiting == 0 && !s.begun && !s.background {
		t.queue.remove(s)
		t.forget(s)
	}
	return nil, time.Time{}, fmt.Errorf("wait for the server to sign: %w", ctx.Err())
}

// await counts one more who waits for a signing, which is begun if there is
// none. The mutex is held.
func (t *tokens) await(key tokenKey, entry *registry.Entry, audience []string) (*signing, error) {
	if t.halted != nil {
		return nil, t.halted
	}
	if entry.JTI && len(audience) > 0 {
		t.serial++
		key.serial = t.serial // nobody else is given it
	}
	s := t.signings[key]
	switch {
	case s == nil, s.stale, !s.entry.SameIssue(entry):
		if len(t.queue.of[entry.ID]) >= maxSignings {
			return nil, errManyTokens
		}
		s = t.begin(key, entry, audience)
		t.queue.push(s)
	case s.background && s.waiting == 0 && !s.begun:
		t.queue.push(s) // it has become urgent
	}
	s.waiting++
	t.work.Signal()
	return s, nil
}

func (t *tokens) begin(key tokenKey, entry *registry.Entry, audience []string) *signing {
	s := &signing{key: key, entry: entry, audience: audience, done: make(chan struct{})}
	t.signings[key] = s
	return s
}

// forget lets another signing take the place of s.
func (t *tokens) forget(s *signing) {
	if t.signings[s.key] == s {
		delete(t.signings, s.key)
	}
}

// run makes the calls until ctx ends.
func (t *tokens) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, t.end)
	defer stop()
	var g errgroup.Group
	for range tokenWorkers {
		g.Go(func() error { t.worker(); return nil })
	}
	return g.Wait()
}

// halt ends the calls under way and makes no others; whoever waits is told why.
// The mutex is held.
func (t *tokens) halt(why error) {
	t.halted = why
	t.cut()
	for _, s := range t.signings {
		if !s.begun {
			s.begun = true
			t.queue.remove(s)
			t.conclude(s, nil, why)
		}
	}
	t.refreshes = nil
}

// end is the end of run.
func (t *tokens) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	t.halt(errTokensOver)
	t.work.Broadcast()
}

// pause returns when no call is under way any more. None is made until resume;
// what is kept is given out.
func (t *tokens) pause() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.halt(errTokensPause)
	for t.running > 0 {
		t.idle.Wait()
	}
}

func (t *tokens) resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.over {
		t.halted = nil
		t.calls, t.cut = context.WithCancel(context.Background())
	}
}

// worker makes one call after the other.
func (t *tokens) worker() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		s := t.next()
		if s == nil {
			return
		}
		s.begun = true
		t.running++
		ctx := t.calls
		t.mu.Unlock()
		token, err := t.sign(ctx, s)
		t.mu.Lock()
		if err != nil && ctx.Err() != nil {
			err = t.halted
		}
		t.conclude(s, token, err)
		if t.running--; t.running == 0 {
			t.idle.Broadcast()
		}
	}
}

// next waits for something to sign; nil is the end. The mutex is held.
func (t *tokens) next() *signing {
	for !t.over {
		if s := t.queue.pop(); s != nil {
			return s
		}
		for len(t.refreshes) > 0 {
			s := t.refreshes[0]
			t.refreshes = t.refreshes[1:]
			if !s.begun { // else somebody waited for it
				return s
			}
		}
		t.work.Wait()
	}
	return nil
}

// conclude tells all who wait what came of a signing, and keeps it. The mutex
// is held.
func (t *tokens) conclude(s *signing, token *registry.Token, err error) {
	t.forget(s)
	now := time.Now()
	if err == nil && s.stale {
		token, err = nil, errTakenBack
	}
	s.token, s.err = token, err
	if err == nil {
		life := lifeOf(token, now)
		s.refresh, s.until = now.Add(spread(life/2)), now.Add(life)
	}
	close(s.done)
	t.metrics.count(s, err)
	switch {
	case err != nil:
		t.notRefreshed(s, err, now)
	case s.key.serial == 0 && !slices.Contains(t.tainted, token.KeyID):
		t.cache.put(&cachedToken{key: s.key, entry: s.entry, token: token, refresh: s.refresh, until: s.until})
		t.metrics.cached.Set(float64(len(t.cache.all)))
	}
}

// lifeOf is for how long a token is good that was signed just now. By a clock that
// is behind the server's it would be for longer than it was signed for.
func lifeOf(token *registry.Token, now time.Time) time.Duration {
	life := token.ExpiresAt.Sub(now)
	if !token.IssuedAt.IsZero() {
		life = min(life, token.ExpiresAt.Sub(token.IssuedAt))
	}
	return life
}

// notRefreshed has a token that is there serve a while longer.
func (t *tokens) notRefreshed(s *signing, err error, now time.Time) {
	old := t.cache.get(s.key, s.entry, now)
	if old == nil {
		return
	}
	old.refresh = now.Add(refreshRetry)
	if t.halted != nil {
		return
	}
	if now.Sub(t.said) < refreshSaid {
		t.unsaid++
		return
	}
	t.log.Warn("cannot have a token signed again; the old one is served for as long as it is good",
		"spiffe_id", s.entry.SPIFFEID.String(), "entry_id", s.entry.ID, "good_until", old.token.ExpiresAt, "error", err, "more", t.unsaid)
	t.said, t.unsaid = now, 0
}

// keep drops what is not to be given out any more: tokens of entries that are
// not among these, in the order of their IDs, or not as they were, and tokens
// of authorities that are tainted or not in the bundle.
func (t *tokens) keep(entries []registry.Entry, bundle *registry.Bundle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if bundle != nil {
		t.tainted = bundle.TaintedKeys
	}
	t.cache.dropFunc(func(c *cachedToken) bool {
		return bundle != nil && !bundle.Vouches(c.token.KeyID) || !holds(entries, c.entry)
	})
	for _, s := range t.signings {
		s.stale = s.stale || !holds(entries, s.entry)
	}
	t.metrics.cached.Set(float64(len(t.cache.all)))
}

// signToken makes the call for one signing.
func (a *Agent) signToken(ctx context.Context, s *signing) (*registry.Token, error) {
	token, err := a.callForToken(ctx, s)
	var denied *spire.DeniedError
	if errors.As(err, &denied) && denied.Superseded {
		token, err = a.callForToken(ctx, s) // the agent's SVID was being replaced
	}
	switch {
	case errors.Is(err, spire.ErrTokensOff):
		return nil, fmt.Errorf("%w: %w", endpoint.ErrNoTokens, err)
	case errors.Is(err, spire.ErrNotFound), errors.As(err, &denied), errors.Is(err, spire.ErrIdentityRefused):
		poke(a.wake) // the loop will see what has changed, and draw the consequences
	}
	return token, err
}

func (a *Agent) callForToken(ctx context.Context, s *signing) (*registry.Token, error) {
	if len(s.audience) == 0 {
		return a.signWIT(ctx, s.entry)
	}
	return a.client.NewJWTSVID(ctx, spire.JWTRequest{EntryID: s.entry.ID, SPIFFEID: s.entry.SPIFFEID, Audience: s.audience})
}

// witAlgorithms is what a WIT-SVID's key signs with (RFC 7518 §3.1), by the
// type of workloads' keys.
var witAlgorithms = map[string]jose.SignatureAlgorithm{"ec-p256": jose.ES256, "ec-p384": jose.ES384, "rsa-2048": jose.RS256}

// signWIT makes a key and has a WIT-SVID signed for it.
func (a *Agent) signWIT(ctx context.Context, entry *registry.Entry) (*registry.Token, error) {
	key, err := keys.NewWorkloadKey(a.cfg.WorkloadKeyType)
	if err != nil {
		return nil, fmt.Errorf("make a workload's key: %w", err)
	}
	algorithm := witAlgorithms[a.cfg.WorkloadKeyType]
	signed, err := a.client.NewWITSVIDs(ctx, []spire.WITRequest{
		{EntryID: entry.ID, SPIFFEID: entry.SPIFFEID, Key: key.Public(), Algorithm: string(algorithm)},
	})
	if err != nil {
		return nil, err
	}
	if signed[0].Err != nil {
		return nil, signed[0].Err
	}
	token := *signed[0].Token
	token.PrivateKey, err = encodeJWK(key, algorithm)
	return &token, err
}

func encodeJWK(key crypto.Signer, algorithm jose.SignatureAlgorithm) (string, error) {
	jwk, err := jose.JSONWebKey{Key: key, Algorithm: string(algorithm)}.MarshalJSON()
	if err != nil {
		return "", fmt.Errorf("encode a workload's key: %w", err)
	}
	return string(jwk), nil
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}
