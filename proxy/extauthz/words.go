package extauthz

import (
	"time"

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

// logRefusal logs what others can cause at will: a few lines, then one a second
// with the number of those left out. The access log has them all.
func (v *service) logRefusal(what string, pairs ...any) {
	ok, missed := v.refusals.Allow(time.Now())
	if !ok {
		return
	}
	pairs = append([]any{"listener", v.settings.Load().Name}, pairs...)
	if missed > 0 {
		pairs = append(pairs, "lines_left_out", missed)
	}
	v.set.config.Log.Warn(what, pairs...)
}
