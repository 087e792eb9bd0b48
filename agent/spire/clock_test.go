package spire

import (
	"errors"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
)

// What the server has signed just now is good for it, whatever this host's clock
// says; only a renewal has something better to fall back on.
func TestSVIDsByAnotherClock(t *testing.T) {
	key := newKey(t)
	for name, test := range map[string]struct {
		from, to time.Duration // from now
		of       func(*server) *authority
		attests  bool
		renews   bool
		clock    bool // is named in the error
	}{
		"now":                     {-10 * time.Second, time.Hour, nil, true, true, false},
		"behind":                  {10 * time.Minute, 70 * time.Minute, nil, true, true, false},
		"behind, for a second":    {10 * time.Minute, 10*time.Minute + time.Second, nil, true, true, false},
		"ahead":                   {-30 * time.Minute, -10 * time.Minute, nil, true, false, true},
		"behind, by a stranger":   {10 * time.Minute, 70 * time.Minute, func(*server) *authority { return newAuthority(t) }, false, false, false},
		"ahead, by a stranger":    {-30 * time.Minute, -10 * time.Minute, func(*server) *authority { return newAuthority(t) }, false, false, false},
		"before there was a root": {-3 * time.Hour, -2 * time.Hour, nil, false, false, true},
	} {
		s := newServer(t)
		ca := s.ca
		if test.of != nil {
			ca = test.of(s)
		}
		now := time.Now()
		svid := ca.signFor(key.Public(), now.Add(test.from), now.Add(test.to), agentID)
		s.attest = func(stream agentv1.Agent_AttestAgentServer) error {
			if _, err := stream.Recv(); err != nil {
				return err
			}
			return stream.Send(attestResult(svid))
		}
		s.renew = func([]byte) ([][]byte, error) { return [][]byte{svid}, nil }
		s.start(t)
		c := s.client(t)
		_, attested := c.Attest(t.Context(), Trust{Roots: s.ca.roots()}, token{}, newCSR(t, key))
		_, renewed := c.Renew(t.Context(), newCSR(t, key))
		if (attested == nil) != test.attests || (renewed == nil) != test.renews {
			t.Errorf("%s: attest %v, renew %v", name, attested, renewed)
		}
		var apart *ClockError
		if errors.As(renewed, &apart) != test.clock {
			t.Errorf("%s: it is told of as %v", name, renewed)
		}
	}
}

func TestClockErrors(t *testing.T) {
	begin := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	end := begin.Add(time.Hour)
	for now, want := range map[time.Time]string{
		begin.Add(-2 * time.Hour): "it is not valid before 2026-01-02T03:00:00Z, and this host's clock says 2026-01-02T01:00:00Z, 2h0m0s less: compare",
		end.Add(time.Minute):      "it is valid until 2026-01-02T04:00:00Z, and this host's clock says 2026-01-02T04:01:00Z, 1m0s more: compare",
	} {
		err := &ClockError{What: "it", Now: now, NotBefore: begin, NotAfter: end}
		if !strings.HasPrefix(err.Error(), want) || Advice(err) == "" {
			t.Errorf("got %q, want %q; advice %q", err, want, Advice(err))
		}
	}
}
