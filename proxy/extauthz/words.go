package extauthz

import (
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// meters are the metric families of all services.
type meters struct {
	checks     *telemetry.Family[telemetry.Counter]
	handshakes *telemetry.Family[telemetry.Counter]
}

func newMeters(m *telemetry.Metrics) meters {
	return meters{
		checks:     m.Counter("narthex_ext_authz_checks_total", "Questions of Envoy by what came of them.", "listener", "result"),
		handshakes: m.Counter("narthex_tls_handshakes_total", "TLS handshakes by result.", "listener", "result"),
	}
}

const maxReason = 512 // bytes of a reason in the access log and in the log

// tidy makes a reason out of text that strangers may have a part in: bounded,
// on one line, and without what a terminal would obey.
func tidy(reason string) string {
	if len(reason) > maxReason {
		end := maxReason
		for !utf8.RuneStart(reason[end]) {
			end--
		}
		reason = reason[:end] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, reason)
}

// logLimit lets a burst of lines through, then one a second.
type logLimit struct {
	mu     sync.Mutex // guards the following
	spent  int
	last   time.Time
	missed int
}

const logBurst = 10

func (m *logLimit) allow(now time.Time) (ok bool, missed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if back := int(now.Sub(m.last) / time.Second); back > 0 {
		m.spent, m.last = max(0, m.spent-back), now
	}
	if m.spent >= logBurst {
		m.missed++
		return false, 0
	}
	m.spent++
	missed, m.missed = m.missed, 0
	return true, missed
}

// logRefusal logs what others can cause at will: a few lines, then one a second
// with the number of those left out. The access log has them all.
func (v *service) logRefusal(what string, pairs ...any) {
	ok, missed := v.refusals.allow(time.Now())
	if !ok {
		return
	}
	pairs = append([]any{"listener", v.settings.Load().Name}, pairs...)
	if missed > 0 {
		pairs = append(pairs, "lines_left_out", missed)
	}
	v.set.config.Log.Warn(what, pairs...)
}
