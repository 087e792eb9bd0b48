package identity

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/testca"
)

// issuer gives tokens that live for an hour, or fails as a test says.
type issuer struct {
	by *testca.JWTAuthority

	mu    sync.Mutex // guards the following
	calls int
	err   error
	token string // instead of a new one
}

func (i *issuer) fetch(_ context.Context, p jwtsvid.Params) (*jwtsvid.SVID, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.calls++
	if i.err != nil {
		return nil, i.err
	}
	if i.token != "" {
		return jwtsvid.ParseInsecure(i.token, []string{p.Audience})
	}
	return jwtsvid.ParseInsecure(i.by.SVID(p.Subject.Path(), time.Now(), time.Hour, p.Audience), []string{p.Audience})
}

func (i *issuer) fails(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err = err
}

func (i *issuer) gives(token string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.token = token
}

func (i *issuer) called() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.calls
}

// inTime runs a test in a bubble, whose clock goes on when all wait.
func inTime(t *testing.T, test func(t *testing.T, s *jwtSource, i *issuer, log *lines)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		i, log := &issuer{by: testca.NewJWT(t, "example.org", "a1")}, &lines{}
		s, end := newTokens(t, i.fetch)
		s.log = hclog.New(&hclog.LoggerOptions{Output: log, Level: hclog.Debug})
		defer end()
		test(t, s, i, log)
	})
}

var ordersID = spiffeid.RequireFromString("spiffe://example.org/orders")

// pass lets time pass, and whatever falls into it happen.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestJWTRenewedAtHalfLife(t *testing.T) {
	inTime(t, func(t *testing.T, s *jwtSource, i *issuer, _ *lines) {
		first, err := s.FetchJWT(t.Context(), ordersID, "inventory")
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if again, err := s.FetchJWT(t.Context(), ordersID, "inventory"); again != first || err != nil {
				t.Fatal(err)
			}
		}
		pass(26 * time.Minute) // the half, less a tenth
		if n := i.called(); n != 1 {
			t.Errorf("%d calls before the half of its life", n)
		}
		pass(5 * time.Minute)
		if again, err := s.FetchJWT(t.Context(), ordersID, "inventory"); again == first || err != nil || i.called() != 2 {
			t.Errorf("after the half of its life, in %d calls: %v", i.called(), err)
		}
		if _, err := s.FetchJWT(t.Context(), ordersID, "billing"); err != nil || i.called() != 3 {
			t.Errorf("another audience, in %d calls: %v", i.called(), err)
		}
	})
}

// TestJWTNotRenewed: the last one serves until it expires, the API is asked
// with patience, and the log hears of it once.
func TestJWTNotRenewed(t *testing.T) {
	inTime(t, func(t *testing.T, s *jwtSource, i *issuer, log *lines) {
		first, err := s.FetchJWT(t.Context(), ordersID, "inventory")
		if err != nil {
			t.Fatal(err)
		}
		i.fails(status.Error(codes.Unavailable, "the agent restarts"))
		pass(59 * time.Minute)
		if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token != first || err != nil {
			t.Errorf("before it expires: %v", err)
		}
		if n := i.called(); n < 100 || n > 1500 {
			t.Errorf("%d calls in half an hour", n)
		}
		pass(2 * time.Minute)
		if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token != "" || status.Code(err) != codes.Unavailable {
			t.Errorf("after it expired: %q, %v", token, err)
		}
		i.fails(nil)
		pass(maxReconnect)
		if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token == first || err != nil {
			t.Errorf("once the API is back: %v", err)
		}
		if a, b := log.count("no JWT-SVID from the Workload API"), log.count("gives the JWT-SVID again"); a != 1 || b != 1 {
			t.Errorf("the log says %d times that it failed and %d times that it goes on", a, b)
		}
		if log.count(first) != 0 {
			t.Error("the log holds a token")
		}
	})
}

// TestJWTRefused: a token that the API no longer gives is not used, however
// long it has to live.
func TestJWTRefused(t *testing.T) {
	inTime(t, func(t *testing.T, s *jwtSource, i *issuer, _ *lines) {
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil {
			t.Fatal(err)
		}
		i.fails(status.Error(codes.PermissionDenied, "no identity issued"))
		pass(31 * time.Minute)
		if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token != "" || status.Code(err) != codes.PermissionDenied {
			t.Errorf("refused: %q, %v", token, err)
		}
		i.fails(nil)
		pass(maxReconnect)
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil {
			t.Errorf("given again: %v", err)
		}
		s.retain([]spiffeid.ID{ordersID})
		calls := i.called()
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil || i.called() != calls {
			t.Errorf("of an identity that stays: %v", err)
		}
		held := (*s.grants.Load())[grantKey{ordersID, "inventory"}]
		s.retain(nil)
		if last := held.last.Load(); last.token != "" || !errors.Is(last.err, ErrNoIdentity) {
			t.Errorf("those that are about to use one that was taken back have %+v", last)
		}
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil || i.called() != calls+1 {
			t.Errorf("asked for anew, in %d calls: %v", i.called()-calls, err)
		}
	})
}

// TestJWTOfAWithdrawnAuthority: it is renewed at once, and not used even where
// the API gives it again.
func TestJWTOfAWithdrawnAuthority(t *testing.T) {
	inTime(t, func(t *testing.T, s *jwtSource, i *issuer, _ *lines) {
		old, next := i.by, testca.NewJWT(t, "example.org", "a2")
		trusts(t, s, old)
		first, err := s.FetchJWT(t.Context(), ordersID, "inventory")
		if err != nil {
			t.Fatal(err)
		}
		trusts(t, s, old, next)
		synctest.Wait()
		if n := i.called(); n != 1 {
			t.Errorf("%d calls while its authority is one", n)
		}
		i.gives(first)
		trusts(t, s, next)
		synctest.Wait()
		if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token != "" || !errors.Is(err, errRevoked) || i.called() != 2 {
			t.Errorf("given again: %v, after %d calls", err, i.called())
		}
		i.gives(next.SVID("/orders", time.Now(), time.Hour, "inventory"))
		pass(maxReconnect)
		if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token == first || err != nil {
			t.Errorf("renewed: %v", err)
		}

		// That there are no bundles any more says nothing of our own.
		s.OnJWTBundlesWatchError(status.Error(codes.PermissionDenied, "no identity issued"))
		synctest.Wait()
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil {
			t.Errorf("without bundles: %v", err)
		}
		trusts(t, s, next)

		// One whose authority the bundles do not have yet is left alone.
		i.gives(old.SVID("/orders", time.Now(), time.Hour, "billing"))
		early, err := s.FetchJWT(t.Context(), ordersID, "billing")
		if err != nil {
			t.Fatal(err)
		}
		trusts(t, s, next, testca.NewJWT(t, "example.org", "a3"))
		synctest.Wait()
		if token, err := s.FetchJWT(t.Context(), ordersID, "billing"); token != early || err != nil {
			t.Errorf("of an authority to come: %v", err)
		}
	})
}

// TestIdleJWT: one that nobody asks for is not renewed for ever.
func TestIdleJWT(t *testing.T) {
	inTime(t, func(t *testing.T, s *jwtSource, i *issuer, _ *lines) {
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil {
			t.Fatal(err)
		}
		pass(4 * time.Hour)
		if n := len(*s.grants.Load()); n != 0 {
			t.Errorf("%d are held", n)
		}
		calls := i.called()
		if _, err := s.FetchJWT(t.Context(), ordersID, "inventory"); err != nil || i.called() != calls+1 {
			t.Errorf("asked for again: %v", err)
		}
	})
}

func TestJWTsAreBounded(t *testing.T) {
	inTime(t, func(t *testing.T, s *jwtSource, _ *issuer, _ *lines) {
		for n := range maxGrants {
			if _, err := s.FetchJWT(t.Context(), ordersID, fmt.Sprint(n)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.FetchJWT(t.Context(), ordersID, "one more"); err == nil || !strings.Contains(err.Error(), "which is the most") {
			t.Errorf("one more: %v", err)
		}
		for key, ok := range map[grantKey]bool{{ordersID, "0"}: true, {ordersID, ""}: false, {spiffeid.ID{}, "0"}: false} {
			if _, err := s.FetchJWT(t.Context(), key.subject, key.audience); (err == nil) != ok {
				t.Errorf("%+v: %v", key, err)
			}
		}
	})
}

// TestJWTsOfAClosedSource: what was held stays, and nobody waits for more.
func TestJWTsOfAClosedSource(t *testing.T) {
	t.Parallel()
	i := &issuer{by: testca.NewJWT(t, "example.org", "a1")}
	s, end := newTokens(t, i.fetch)
	first, err := s.FetchJWT(t.Context(), ordersID, "inventory")
	if err != nil {
		t.Fatal(err)
	}
	end()
	if token, err := s.FetchJWT(t.Context(), ordersID, "inventory"); token != first || err != nil {
		t.Errorf("what was held: %v", err)
	}
	if _, err := s.FetchJWT(t.Context(), ordersID, "billing"); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("what was not: %v", err)
	}
	s.FollowJWT()
}
