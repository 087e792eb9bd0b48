package identity

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/grpctext"
)

// This file is our own JWT-SVIDs: each is fetched by one goroutine, however
// many wait for it, and renewed by the same one.

// Bounds on our own tokens.
const (
	maxGrants    = 1024             // at once; their audiences come from the configuration
	grantIdle    = time.Hour        // how long one is renewed that nobody asks for
	grantTimeout = 10 * time.Second // of one call
	minRenewal   = time.Second      // between two calls for one, however short it lives
)

type grantKey struct {
	subject  spiffeid.ID
	audience string
}

// grant is a JWT-SVID of ours as it is renewed.
type grant struct {
	grantKey
	last     atomic.Pointer[granted] // nil until the first answer
	answered chan struct{}           // closed at the first answer
	used     atomic.Bool             // since somebody looked
	due      chan struct{}           // asks to renew it now
	cancel   context.CancelFunc

	gone    bool   // guarded by jwtSource.mu, as is the following
	revoked string // the token whose authority was withdrawn
}

var errRevoked = errors.New("the authority that signed it was withdrawn")

// granted is what the Workload API last said.
type granted struct {
	token    string // the last there was
	notAfter time.Time
	err      error // why there is no newer one
}

// FetchJWT implements Tokens.
func (s *jwtSource) FetchJWT(ctx context.Context, subject spiffeid.ID, audience string) (string, error) {
	key := grantKey{subject, audience}
	g := (*s.grants.Load())[key]
	if g == nil {
		var err error
		if g, err = s.newGrant(key); err != nil {
			return "", fmt.Errorf("JWT-SVID of %s for %q: %w", subject, audience, err)
		}
	}
	if !g.used.Load() { // a write would be for all CPUs to hear
		g.used.Store(true)
	}
	last := g.last.Load()
	if last == nil {
		select {
		case <-g.answered:
			last = g.last.Load()
		case <-ctx.Done():
			return "", fmt.Errorf("JWT-SVID of %s for %q: wait for the Workload API: %w", subject, audience, ctx.Err())
		}
	}
	if time.Now().Before(last.notAfter) {
		return last.token, nil
	}
	if last.err == nil { // the machine slept
		g.renew()
		return "", fmt.Errorf("own JWT-SVID of %s for %q: %w at %s and is being renewed", subject, audience, ErrExpired, last.notAfter.UTC().Format(time.RFC3339))
	}
	return "", fmt.Errorf("JWT-SVID of %s for %q: %w", subject, audience, last.err)
}

// newGrant begins to fetch a token, unless somebody else just did.
func (s *jwtSource) newGrant(key grantKey) (*grant, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := *s.grants.Load()
	switch {
	case all[key] != nil:
		return all[key], nil
	case s.ended:
		return nil, errors.New("the source of identities is closed")
	case key.subject.IsZero() || key.audience == "":
		return nil, errors.New("a JWT-SVID needs a subject and an audience (SPIFFE JWT-SVID §3)")
	case len(all) == maxGrants:
		return nil, fmt.Errorf("there are tokens for %d subjects and audiences, which is the most", maxGrants)
	}
	s.follow() // for renewRevoked
	ctx, cancel := context.WithCancel(s.ctx)
	g := &grant{grantKey: key, answered: make(chan struct{}), due: make(chan struct{}, 1), cancel: cancel}
	all = maps.Clone(all)
	all[key] = g
	s.grants.Store(&all)
	s.loops.Go(func() { s.keep(ctx, g) })
	return g, nil
}

// keep fetches a token and renews it, until nobody asks for it.
func (s *jwtSource) keep(ctx context.Context, g *grant) {
	defer g.cancel()
	wait := reconnect{}.NewBackoff()
	for used, failing := time.Now(), false; ; {
		was := s.trust.Load()
		got := s.ask(ctx, g)
		s.settle(g, got)
		if now := s.trust.Load(); now != was { // and it may be one of before
			s.renewRevoked(g, was, now)
		}
		var next time.Duration
		switch {
		case ctx.Err() != nil:
			return
		case got.err != nil:
			next = wait.Next()
			if !failing {
				s.log.Warn("no JWT-SVID from the Workload API", "spiffe_id", g.subject, "audience", g.audience, "error", got.err)
			}
		default:
			wait.Reset()
			half := max(time.Until(got.notAfter)/2, minRenewal)
			next = half - time.Duration(rand.Int64N(int64(half/10)))
			if failing {
				s.log.Info("the Workload API gives the JWT-SVID again", "spiffe_id", g.subject, "audience", g.audience)
			}
		}
		failing = got.err != nil
		select {
		case <-time.After(next):
		case <-g.due:
		case <-ctx.Done():
			return
		}
		if g.used.Swap(false) {
			used = time.Now()
		} else if time.Since(used) > grantIdle {
			s.drop(g, nil)
			return
		}
	}
}

// ask makes one call. Where it fails the last token stays, unless the API
// refuses it.
func (s *jwtSource) ask(ctx context.Context, g *grant) *granted {
	ctx, cancel := context.WithTimeout(ctx, grantTimeout)
	defer cancel()
	svid, err := s.fetch(ctx, jwtsvid.Params{Subject: g.subject, Audience: g.audience})
	switch {
	case err != nil:
		err = fmt.Errorf("workload API: %w", grpctext.Plain(err))
	case svid.ID != g.subject:
		err = fmt.Errorf("the Workload API gave one of %s instead", svid.ID)
	default:
		err = checkJWTBytes(svid.Marshal())
	}
	if err == nil && s.wasRevoked(g, svid.Marshal()) {
		err = fmt.Errorf("the Workload API gives the same again: %w", errRevoked)
	}
	if err == nil {
		return &granted{token: svid.Marshal(), notAfter: svid.Expiry}
	}
	got := &granted{err: err}
	if last := g.last.Load(); last != nil && status.Code(err) != codes.PermissionDenied {
		got.token, got.notAfter = last.token, last.notAfter
	}
	return got
}

// settle makes an answer the one that is in force, unless the grant is gone.
func (s *jwtSource) settle(g *grant, got *granted) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !g.gone {
		g.settle(got)
	}
}

func (g *grant) settle(got *granted) { // with jwtSource.mu held
	if g.last.Swap(got) == nil {
		close(g.answered)
	}
}

// drop forgets a grant. Where last is not nil, it is all that those who are
// about to use it are given.
func (s *jwtSource) drop(g *grant, last *granted) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g.gone {
		return
	}
	g.gone = true
	g.cancel()
	if last != nil {
		g.settle(last)
	}
	all := maps.Clone(*s.grants.Load())
	delete(all, g.grantKey)
	s.grants.Store(&all)
}

func (s *jwtSource) wasRevoked(g *grant, token string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return token == g.revoked
}

// renewRevoked has a token of ours renewed now, where an authority of the
// bundles before signed it and none of those of now: those who are shown it
// believe it no more, and it would be long until the half of its life.
func (s *jwtSource) renewRevoked(g *grant, was, now *jwtTrust) {
	last := g.last.Load()
	if last == nil || last.token == "" || now.problem != nil || !was.signed(last.token) || now.signed(last.token) {
		return
	}
	s.mu.Lock()
	if !g.gone && g.last.Load() == last {
		g.revoked = last.token
		g.settle(&granted{err: errRevoked})
	}
	s.mu.Unlock()
	g.renew()
}

// renew has the grant's goroutine make a call now.
func (g *grant) renew() {
	select {
	case g.due <- struct{}{}:
	default: // it will
	}
}

// signed reports whether an authority of t signed a token of ours.
func (t *jwtTrust) signed(token string) bool {
	_, err := t.verify(token, time.Now())
	return err == nil
}

// retain forgets the tokens of identities that are not ours any more: what the
// Workload API takes back is not used (SPIFFE Workload API §6.2.1).
func (s *jwtSource) retain(ours []spiffeid.ID) {
	for key, g := range *s.grants.Load() {
		if !slices.Contains(ours, key.subject) {
			s.drop(g, &granted{err: fmt.Errorf("%w: the Workload API has taken %s back", ErrNoIdentity, key.subject)})
		}
	}
}
