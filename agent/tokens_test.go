package agent

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/registry"
)

const tokenLife = 10 * time.Minute

// signer is a server that signs tokens.
type signer struct {
	*tokens
	calls []string      // entry and audience of each
	takes time.Duration // each call
	keyID string
	fails error
	most  int // calls at a time
	now   int
	end   func()
}

// newSigner starts tokens in a synctest bubble.
func newSigner(t *testing.T, size int) *signer {
	s := &signer{takes: 10 * time.Millisecond, keyID: "k1"}
	s.tokens = newTokens(size, hclog.NewNullLogger(), newMetrics(nil).tokens, s.call)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.run(ctx)
	}()
	s.end = func() { cancel(); <-done }
	t.Cleanup(s.end)
	return s
}

func (s *signer) call(ctx context.Context, order *signing) (*registry.Token, error) {
	s.mu.Lock()
	s.calls = append(s.calls, order.entry.ID+strings.Join(order.audience, "+"))
	n, fails, keyID := len(s.calls), s.fails, s.keyID
	s.now++
	s.most = max(s.most, s.now)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.now--
		s.mu.Unlock()
	}()
	select {
	case <-time.After(s.takes):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if fails != nil {
		return nil, fails
	}
	return &registry.Token{
		ID: order.entry.SPIFFEID, Audience: order.audience, Compact: fmt.Sprint(n), KeyID: keyID, ExpiresAt: time.Now().Add(tokenLife),
	}, nil
}

func (s *signer) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls)
}

// must returns the number of the call that a token came by, or the error.
func (s *signer) must(t *testing.T, e *registry.Entry, audience ...string) string {
	t.Helper()
	token, _, err := s.get(t.Context(), e, audience)
	if err != nil {
		t.Error(err)
		return err.Error()
	}
	return token.Compact
}

func tokenEntry(id string, revision int64) *registry.Entry {
	return &registry.Entry{ID: id, SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/" + id), Revision: revision}
}

func tokenBundle(tainted ...string) *registry.Bundle {
	return &registry.Bundle{JWTKeys: map[string]crypto.PublicKey{"k1": nil, "k2": nil}, TaintedKeys: tainted}
}

// inBubble runs a test whose time is its own.
func inBubble(t *testing.T, name string, size int, f func(*testing.T, *signer)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { f(t, newSigner(t, size)) })
	})
}

func TestTokensAreShared(t *testing.T) {
	a := tokenEntry("a", 1)
	inBubble(t, "a burst", 10, func(t *testing.T, s *signer) {
		got := make(chan string, 200)
		for range 200 {
			go func() { got <- s.must(t, a, "db") }()
		}
		for range 200 {
			if n := <-got; n != "1" {
				t.Fatalf("call %s", n)
			}
		}
		if n := s.asked(); n != 1 {
			t.Errorf("%d calls for one token", n)
		}
	})
	inBubble(t, "by entry and audience", 10, func(t *testing.T, s *signer) {
		var got []string
		for _, audience := range [][]string{{"ab", "c"}, {"a", "bc"}, {"abc"}, {"ab", "c"}, nil, nil} {
			got = append(got, s.must(t, a, audience...))
		}
		got = append(got, s.must(t, tokenEntry("b", 1), "abc"))
		if want := []string{"1", "2", "3", "1", "4", "4", "5"}; !slices.Equal(got, want) {
			t.Errorf("calls %v, want %v", got, want)
		}
	})
	inBubble(t, "but not with a jti", 10, func(t *testing.T, s *signer) {
		once := tokenEntry("once", 1)
		once.JTI = true
		got := make(chan string, 20)
		for range 20 {
			go func() { got <- s.must(t, once, "db") }()
		}
		seen := map[string]bool{}
		for range 20 {
			seen[<-got] = true
		}
		if len(seen) != 20 {
			t.Errorf("%d tokens for 20 who asked", len(seen))
		}
		if s.most != tokenWorkers {
			t.Errorf("%d calls at a time, want %d", s.most, tokenWorkers)
		}
		if first := s.must(t, once); first != s.must(t, once) {
			t.Error("a WIT-SVID has no jti and is shared")
		}
	})
}

func TestTokensAreRefreshed(t *testing.T) {
	a := tokenEntry("a", 1)
	inBubble(t, "past half of their life", 10, func(t *testing.T, s *signer) {
		s.must(t, a, "db")
		time.Sleep(tokenLife * 4 / 10)
		if n := s.must(t, a, "db"); n != "1" {
			t.Errorf("in the first half: call %s", n)
		}
		time.Sleep(tokenLife * 2 / 10)
		if n := s.must(t, a, "db"); n != "1" {
			t.Errorf("past half: call %s; what is there is not waited for", n)
		}
		synctest.Wait()
		if n := s.asked(); n != 2 {
			t.Errorf("past half: %d calls", n)
		}
		time.Sleep(time.Second)
		if n := s.must(t, a, "db"); n != "2" {
			t.Errorf("refreshed: call %s", n)
		}
	})
	inBubble(t, "not while the server is away", 10, func(t *testing.T, s *signer) {
		s.must(t, a, "db")
		s.mu.Lock()
		s.fails = errors.New("unreachable")
		s.mu.Unlock()
		for range 60 { // to the last second but some
			time.Sleep(tokenLife / 61)
			if n := s.must(t, a, "db"); n != "1" {
				t.Fatalf("call %s", n)
			}
		}
		if n := s.asked(); n < 10 || n > 60 {
			t.Errorf("%d calls while the server was away", n)
		}
		time.Sleep(tokenLife / 60)
		if _, _, err := s.get(t.Context(), a, []string{"db"}); err == nil || err.Error() != "unreachable" {
			t.Errorf("past its end: %v", err)
		}
	})
}

func TestTokensAreDropped(t *testing.T) {
	a, b := tokenEntry("a", 1), tokenEntry("b", 1)
	for _, tt := range []struct {
		name string
		drop func(*signer)
		want string // the call that a's next token comes by
	}{
		{"nothing changes", func(s *signer) { s.keep([]registry.Entry{*a, *b}, tokenBundle()) }, "1"},
		{"another entry goes", func(s *signer) { s.keep([]registry.Entry{*a}, nil) }, "1"},
		{"the entry goes", func(s *signer) { s.keep([]registry.Entry{*b}, tokenBundle()) }, "3"},
		{"the entry changes", func(s *signer) { s.keep([]registry.Entry{*tokenEntry("a", 2), *b}, nil) }, "3"},
		{"everything is wiped", func(s *signer) { s.keep(nil, nil) }, "3"},
		{"the authority is tainted", func(s *signer) { s.keep([]registry.Entry{*a, *b}, tokenBundle("k1")) }, "3"},
		{"another one is", func(s *signer) { s.keep([]registry.Entry{*a, *b}, tokenBundle("k2")) }, "1"},
		{"the authority goes", func(s *signer) { s.keep([]registry.Entry{*a, *b}, &registry.Bundle{}) }, "3"},
	} {
		inBubble(t, tt.name, 10, func(t *testing.T, s *signer) {
			s.must(t, a, "db")
			s.must(t, b, "db")
			tt.drop(s)
			if n := s.must(t, a, "db"); n != tt.want {
				t.Errorf("call %s, want %s", n, tt.want)
			}
		})
	}
	inBubble(t, "while it is signed", 10, func(t *testing.T, s *signer) {
		got := make(chan error)
		go func() {
			_, _, err := s.get(t.Context(), a, []string{"db"})
			got <- err
		}()
		synctest.Wait()
		s.keep([]registry.Entry{*tokenEntry("a", 2)}, nil)
		if err := <-got; !errors.Is(err, errTakenBack) {
			t.Errorf("got %v", err)
		}
		if n := s.must(t, tokenEntry("a", 2), "db"); n != "2" {
			t.Errorf("call %s", n)
		}
	})
	inBubble(t, "a tainted authority signs", 10, func(t *testing.T, s *signer) {
		s.keep(nil, tokenBundle("k1"))
		if one, two := s.must(t, a, "db"), s.must(t, a, "db"); one != "1" || two != "2" {
			t.Errorf("calls %s and %s; its tokens are not kept", one, two)
		}
	})
	inBubble(t, "an older entry", 10, func(t *testing.T, s *signer) {
		s.must(t, a, "db")
		if n := s.must(t, tokenEntry("a", 2), "db"); n != "2" {
			t.Errorf("call %s: a token was given for an entry that it was not signed for", n)
		}
	})
}

func TestTokensAreBounded(t *testing.T) {
	inBubble(t, "the oldest go", 8, func(t *testing.T, s *signer) {
		for i := range 8 {
			s.must(t, tokenEntry(fmt.Sprint("e", i), 1), "db")
		}
		s.must(t, tokenEntry("e0", 1), "db") // is now the newest
		s.must(t, tokenEntry("e8", 1), "db")
		if n := s.must(t, tokenEntry("e0", 1), "db"); n != "1" {
			t.Errorf("call %s: what was asked for last is gone", n)
		}
		if n := s.must(t, tokenEntry("e1", 1), "db"); n != "10" {
			t.Errorf("call %s: what was not asked for longest is there", n)
		}
	})
	inBubble(t, "one entry pushes out its own", 8, func(t *testing.T, s *signer) {
		others := []string{"a", "b", "c"}
		for _, id := range others {
			s.must(t, tokenEntry(id, 1), "db")
		}
		for i := range 100 {
			s.must(t, tokenEntry("greedy", 1), fmt.Sprint(i))
		}
		for i, id := range others {
			if n := s.must(t, tokenEntry(id, 1), "db"); n != fmt.Sprint(i+1) {
				t.Errorf("%s: call %s", id, n)
			}
		}
		if n := len(s.cache.all); n != 8 || s.cache.recent.Len() != n || s.cache.held["greedy"] != 5 {
			t.Errorf("%d are kept, %v", n, s.cache.held)
		}
	})
	inBubble(t, "one entry holds up no other", 10, func(t *testing.T, s *signer) {
		greedy := tokenEntry("greedy", 1)
		ctx, cancel := context.WithCancel(t.Context())
		refused := make(chan error, 2*maxSignings)
		for i := range maxSignings + tokenWorkers + 1 {
			go func() {
				_, _, err := s.get(ctx, greedy, []string{fmt.Sprint(i)})
				refused <- err
			}()
			synctest.Wait()
		}
		if err := <-refused; !errors.Is(err, errManyTokens) {
			t.Errorf("got %v", err)
		}
		started := time.Now()
		s.must(t, tokenEntry("a", 1), "db")
		if took := time.Since(started); took > 3*s.takes {
			t.Errorf("another one waited %s", took)
		}
		cancel()
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := len(s.queue.of) + len(s.queue.entries) + len(s.signings) - s.running; n != 0 {
			t.Errorf("%d are waited for by nobody", n)
		}
	})
}

func TestTokensPauseAndEnd(t *testing.T) {
	a, b := tokenEntry("a", 1), tokenEntry("b", 1)
	inBubble(t, "pause", 10, func(t *testing.T, s *signer) {
		s.must(t, a, "db")
		s.takes = time.Hour
		got := make(chan error, 2*tokenWorkers)
		for i := range cap(got) { // more than are signed at a time
			go func() {
				_, _, err := s.get(t.Context(), b, []string{fmt.Sprint(i)})
				got <- err
			}()
		}
		synctest.Wait()
		s.pause()
		if n := s.now; n != 0 {
			t.Errorf("%d calls are under way", n)
		}
		for range cap(got) {
			if err := <-got; !errors.Is(err, errTokensPause) {
				t.Errorf("got %v", err)
			}
		}
		if n := s.must(t, a, "db"); n != "1" {
			t.Errorf("call %s: what is kept is given out", n)
		}
		s.takes = time.Millisecond
		if _, _, err := s.get(t.Context(), b, []string{"db"}); !errors.Is(err, errTokensPause) {
			t.Errorf("paused: %v", err)
		}
		s.resume()
		s.must(t, b, "db")
	})
	inBubble(t, "end", 10, func(t *testing.T, s *signer) {
		s.takes = time.Hour
		got := make(chan error, 2*tokenWorkers)
		for i := range cap(got) {
			go func() {
				_, _, err := s.get(t.Context(), b, []string{fmt.Sprint(i)})
				got <- err
			}()
		}
		synctest.Wait()
		s.end()
		for range cap(got) {
			if err := <-got; !errors.Is(err, errTokensOver) {
				t.Errorf("got %v", err)
			}
		}
		s.resume() // as a hand-over that failed too late does
		if _, _, err := s.get(t.Context(), a, []string{"db"}); !errors.Is(err, errTokensOver) {
			t.Errorf("after the end: %v", err)
		}
	})
}
