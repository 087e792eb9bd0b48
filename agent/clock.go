package agent

import (
	"crypto/x509"
	"time"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/agent/spire"
)

// issue is the time of something the server has signed. As it is valid at once
// by the server's clock, it tells when this host's clock is another one.
type issue struct {
	what                string
	notBefore, notAfter time.Time
	came                time.Time // with the monotonic clock; zero: it was signed some time ago
}

func issueOf(what string, cert *x509.Certificate) issue {
	return issue{what: what, notBefore: cert.NotBefore, notAfter: cert.NotAfter}
}

// arrived is i as something that has come just now.
func (i issue) arrived(now time.Time) issue {
	i.came = now
	return i
}

// over reports whether it was, by this host's clock, when it came.
func (i issue) over() bool { return !i.came.IsZero() && !i.came.Before(i.notAfter) }

// waits reports whether it is valid to the server and over by this host's
// clock: the clock has to be set, and nothing else helps.
func (i issue) waits(now time.Time) bool {
	return i.over() && !now.Before(i.notAfter) && now.Sub(i.came) < i.notAfter.Sub(i.notBefore)
}

// wrong is what is to be said of this host's clock, nil where it may be right.
func (i issue) wrong(now time.Time) error {
	if !i.waits(now) && !now.Before(i.notBefore) {
		return nil
	}
	return i.apart(now)
}

func (i issue) apart(now time.Time) error {
	return &spire.ClockError{What: i.what, Now: now, NotBefore: i.notBefore, NotAfter: i.notAfter}
}

// hold holds this host's clock against what the server has signed just now. The
// log is told when they begin to disagree, the status for as long as they do.
func (l *looper) hold(i issue) {
	var before issue
	l.update(func(v *view) { before, v.signed = v.signed, i })
	now := time.Now()
	if err := i.wrong(now); err != nil && before.wrong(now) == nil {
		l.log.Warn("the clocks are apart", "error", err, "advice", spire.Advice(err))
	}
}

// heed has signed at once what this host's clock has made fail, when it is set.
func (l *looper) heed(now time.Time) {
	if l.over.over() && !l.over.waits(now) {
		l.over = issue{}
		l.registry.Apply(registry.Update{Again: true})
	}
}
