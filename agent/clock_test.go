package agent

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
	"github.com/narthex-id/narthex/attestor"
)

// What the server signs tells of a clock that is wrong, for as long as it is.
func TestIssue(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	i := issueOf("it", &x509.Certificate{NotBefore: begin, NotAfter: begin.Add(time.Hour)})
	type at = time.Duration // after begin
	for name, test := range map[string]struct {
		i            issue
		now          at
		wrong, waits bool
	}{
		"good":                        {i.arrived(begin), 10 * time.Second, false, false},
		"over in the course of time":  {i.arrived(begin), 2 * time.Hour, false, false},
		"behind":                      {i.arrived(begin.Add(-time.Minute)), -50 * time.Second, true, false},
		"behind, and set":             {i.arrived(begin.Add(-time.Minute)), 0, false, false},
		"ahead":                       {i.arrived(begin.Add(2 * time.Hour)), 2*time.Hour + time.Minute, true, true},
		"ahead, and set":              {i.arrived(begin.Add(2 * time.Hour)), time.Minute, false, false},
		"ahead, and over by now":      {i.arrived(begin.Add(2 * time.Hour)), 3 * time.Hour, false, false},
		"of an earlier run":           {i, 2 * time.Hour, false, false},
		"of an earlier run, set back": {i, -time.Hour, true, false},
		"nothing":                     {issue{}, 0, false, false},
	} {
		now := begin.Add(test.now)
		if err := test.i.wrong(now); (err != nil) != test.wrong || test.i.waits(now) != test.waits {
			t.Errorf("%s: wrong is %v, waits %t", name, err, test.i.waits(now))
		}
	}
}

// The log is told once of clocks that are apart, and again when they were right
// in between.
func TestClocksApartAreSaidOnce(t *testing.T) {
	t.Parallel()
	var said strings.Builder
	l := newLooper(t, Config{})
	l.log = hclog.New(&hclog.LoggerOptions{Output: &said})
	now := time.Now()
	good, behind := issue{"it", now.Add(-time.Hour), now.Add(time.Hour), now}, issue{"it", now.Add(time.Hour), now.Add(2 * time.Hour), now}
	for _, i := range []issue{good, behind, behind, good, behind} {
		l.hold(i)
	}
	if n := strings.Count(said.String(), "the clocks are apart"); n != 2 || l.Problem() == nil {
		t.Errorf("it says %d times, and for a problem %v:\n%s", n, l.Problem(), &said)
	}
	apart := func(d time.Duration) error {
		return fmt.Errorf("sync: %w", &spire.ClockError{What: "it", Now: now.Add(d), NotBefore: now, NotAfter: now})
	}
	if subject(apart(1)) != subject(apart(time.Hour)) || subject(apart(1)) == subject(errors.New("another")) {
		t.Error("one failure is logged as another for the time in it")
	}
}

// SVIDs and tokens are replaced by the time that has passed, where the clock would
// have them live longer than they do.
func TestRenewalByAClockThatIsBehind(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for name, test := range map[string]struct{ from, to, soonest, latest time.Duration }{
		"right":          {-10 * time.Second, time.Hour, 25 * time.Minute, 34 * time.Minute},
		"behind":         {2 * time.Hour, 3 * time.Hour, 26 * time.Minute, 34 * time.Minute},
		"past half":      {-50 * time.Minute, 10 * time.Minute, time.Minute, time.Minute},
		"a little ahead": {-40 * time.Minute, 20 * time.Minute, 2 * time.Minute, 2 * time.Minute},
	} {
		at := renewAt(&x509.Certificate{NotBefore: now.Add(test.from), NotAfter: now.Add(test.to)}, now).Sub(now)
		if at < test.soonest || at > test.latest {
			t.Errorf("%s: an SVID is renewed after %s, want %s to %s", name, at, test.soonest, test.latest)
		}
	}
	for name, test := range map[string]struct{ issued, expires, want time.Duration }{
		"right":               {-time.Second, 5 * time.Minute, 5 * time.Minute},
		"behind":              {10 * time.Minute, 15 * time.Minute, 5 * time.Minute},
		"ahead":               {-4 * time.Minute, time.Minute, time.Minute},
		"says not since when": {0, time.Hour, time.Hour},
	} {
		token := &registry.Token{ExpiresAt: now.Add(test.expires)}
		if test.issued != 0 {
			token.IssuedAt = now.Add(test.issued)
		}
		if got := lifeOf(token, now); got != test.want {
			t.Errorf("%s: a token is good for %s, want %s", name, got, test.want)
		}
	}
}

// What was refused for this host's clock is asked for again when that is set, and
// not before.
func TestClockIsSet(t *testing.T) {
	t.Parallel()
	l := newLooper(t, Config{})
	now := time.Now()
	l.registry.Apply(registry.Update{HasEntries: true, Entries: []registry.Entry{{
		ID: "one", SPIFFEID: spiffeid.RequireFromString("spiffe://example.test/one"), Selectors: []attestor.Selector{{Type: "unix", Value: "uid:1"}},
	}}})
	due := func() bool { return len(l.registry.Due(now)) == 1 }
	if !due() {
		t.Fatal("the entry is not due")
	}
	l.registry.Apply(registry.Update{
		Failed: map[string]error{"one": errors.New("over")}, Retry: func(int) time.Time { return now.Add(time.Hour) },
	})
	l.over = issue{what: "it", notBefore: now.Add(-2 * time.Hour), notAfter: now.Add(-time.Hour)}.arrived(now)
	l.heed(now.Add(time.Minute))
	if due() {
		t.Error("it is asked for while the clock is wrong")
	}
	l.heed(now.Add(-90 * time.Minute))
	if !due() || l.over != (issue{}) {
		t.Error("it waits though the clock was set")
	}
}
