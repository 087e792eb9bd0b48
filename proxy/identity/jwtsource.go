package identity

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/grpctext"
)

// jwtSource is the part of WorkloadAPI that knows JWT-SVIDs: it follows the
// JWT bundles, remembers which tokens stood under them, and holds our own.
type jwtSource struct {
	log   hclog.Logger
	ctx   context.Context // ends with the source
	watch func(context.Context, workloadapi.JWTBundleWatcher) error
	fetch func(context.Context, jwtsvid.Params) (*jwtsvid.SVID, error)
	news  func() // tells whoever holds a lease of other bundles

	trust    atomic.Pointer[jwtTrust]
	verdicts verdicts
	grants   atomic.Pointer[map[grantKey]*grant] // immutable: a change makes a new one

	loops     sync.WaitGroup
	mu        sync.Mutex // guards the following, and changes of the above
	ended     bool
	following bool
	said      string // why there is no news of the bundles
}

func newJWTSource(ctx context.Context, client *workloadapi.Client, news func(), c WorkloadAPIConfig) *jwtSource {
	s := &jwtSource{log: c.Log, ctx: ctx, watch: client.WatchJWTBundles, fetch: client.FetchJWTSVID, news: news}
	s.trust.Store(&jwtTrust{problem: fmt.Errorf("no JWT bundles received yet from the Workload API at %s", c.Socket)})
	s.grants.Store(&map[grantKey]*grant{})
	return s
}

// end waits for all that was begun. The context of the source has ended.
func (s *jwtSource) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.loops.Wait()
}

// FollowJWT implements Tokens.
func (s *jwtSource) FollowJWT() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.follow()
}

func (s *jwtSource) follow() { // with s.mu held
	if s.following || s.ended {
		return
	}
	s.following = true
	s.loops.Go(func() {
		wait := reconnect{}.NewBackoff()
		for {
			_ = s.watch(s.ctx, s) // each error comes to OnJWTBundlesWatchError
			select {
			case <-time.After(wait.Next()):
			case <-s.ctx.Done():
				return
			}
		}
	})
}

// JWTProblem implements Tokens.
func (s *jwtSource) JWTProblem() error { return s.trust.Load().problem }

// JWTGeneration implements Tokens.
func (s *jwtSource) JWTGeneration() uint64 { return s.trust.Load().generation }

// ValidateJWT implements Tokens.
func (s *jwtSource) ValidateJWT(token string, audience []string, now time.Time) (JWT, error) {
	if len(token) > maxJWT { // before it is more work than it is worth
		return JWT{}, &JWTError{"malformed", checkJWTBytes(token)}
	}
	t := s.trust.Load()
	sum := sumOfToken(token)
	v, known := s.verdicts.find(sum)
	if !known || !t.holds(v.by) {
		if t.problem != nil {
			s.FollowJWT()
		}
		var err error
		if v, err = t.verify(token, now); err != nil {
			return JWT{}, err
		}
		known = false
	}
	if err := v.judge(audience, now); err != nil {
		return JWT{}, err
	}
	if !known {
		s.verdicts.remember(sum, v)
	}
	return v.JWT, nil
}

// RecheckJWT implements Tokens.
func (s *jwtSource) RecheckJWT(j JWT) error {
	t := s.trust.Load()
	switch {
	case j.by == nil:
		return &JWTError{"untrusted", errors.New("it was never validated")}
	case t.holds(j.by):
		return nil
	case t.problem != nil:
		return &JWTError{"unavailable", t.problem}
	}
	_, err := t.authority(j.by.domain, j.by.keyID)
	if err == nil {
		err = fmt.Errorf("another key has the place of the one that signed it in the JWT bundle of %s", j.by.domain)
	}
	return &JWTError{"untrusted", fmt.Errorf("of %s: it does not stand under the bundles of now: %w", j.Subject, err)}
}

// jwtTrouble tells why tokens cannot be validated, or by old bundles only.
// Where nobody asked for bundles there is no trouble.
func (s *jwtSource) jwtTrouble() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	problem := s.trust.Load().problem
	switch {
	case !s.following:
		return ""
	case problem != nil:
		return problem.Error()
	case s.said != "":
		return "JWT bundles: workload API: " + s.said
	}
	return ""
}

// OnJWTBundlesUpdate takes an update, which is always complete: what it
// leaves out was taken back (SPIFFE Workload API §6.2.2).
func (s *jwtSource) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	was := s.trust.Load()
	now := was.next(set.Bundles())
	s.mu.Lock()
	s.said = ""
	s.mu.Unlock()
	if now == was {
		return
	}
	s.trust.Store(now)
	for _, g := range *s.grants.Load() {
		s.renewRevoked(g, was, now)
	}
	s.log.Debug("JWT bundles changed", "trust_domains", len(now.domains), "generation", now.generation)
	s.news()
}

// OnJWTBundlesWatchError notes why there is no update, and forgets the bundles
// where the API refuses them.
func (s *jwtSource) OnJWTBundlesWatchError(err error) {
	if s.ctx.Err() != nil {
		return // it is us who end
	}
	err = grpctext.Plain(err)
	was := s.trust.Load()
	switch {
	case status.Code(err) == codes.PermissionDenied:
		s.trust.Store(&jwtTrust{generation: was.generation + 1, problem: fmt.Errorf("the Workload API gives this process no JWT bundles: is there an entry whose selectors match it? (%w)", err)})
		if was.problem == nil {
			s.news()
		}
	case was.problem != nil:
		s.trust.Store(&jwtTrust{generation: was.generation, problem: fmt.Errorf("no JWT bundles received yet: workload API: %w", err)})
	}
	s.mu.Lock()
	news := s.said != err.Error()
	s.said = err.Error()
	s.mu.Unlock()
	if news {
		s.log.Warn("no news of JWT bundles from the Workload API", "error", err)
	}
}
