package agent

import "github.com/narthex-id/narthex/internal/telemetry"

// metrics are the agent's own; the endpoint counts its streams and requests
// itself.
type metrics struct {
	svidExpiry           *telemetry.Gauge
	rotated, notRotated  *telemetry.Counter
	syncDuration         *telemetry.Histogram
	syncOK, syncFailed   *telemetry.Counter
	entries, reachable   *telemetry.Gauge
	renewed, renewFailed *telemetry.Counter
	tokens               tokenMetrics
}

// tokenMetrics are those of JWT-SVIDs and WIT-SVIDs.
type tokenMetrics struct {
	jwt, notJWT, wit, notWIT *telemetry.Counter
	cached                   *telemetry.Gauge
}

// count counts what came of a signing.
func (m *tokenMetrics) count(s *signing, err error) {
	switch jwt := len(s.audience) > 0; {
	case jwt && err == nil:
		m.jwt.Inc()
	case jwt:
		m.notJWT.Inc()
	case err == nil:
		m.wit.Inc()
	default:
		m.notWIT.Inc()
	}
}

func newMetrics(m *telemetry.Metrics) metrics {
	rotations := m.Counter("narthex_svid_rotations_total", "X.509-SVIDs of workloads signed by the server, or refused.", "result")
	syncs := m.Counter("narthex_sync_total", "Syncs of entries with the server.", "result")
	renewals := m.Counter("narthex_agent_svid_renewals_total", "Attestations and renewals of the agent's own SVID.", "result")
	tokens := m.Counter("narthex_tokens_signed_total", "JWT-SVIDs and WIT-SVIDs signed by the server, or refused.", "type", "result")
	return metrics{
		svidExpiry:   m.Gauge("narthex_agent_svid_expiry_timestamp_seconds", "When the agent's own SVID expires.").With(),
		rotated:      rotations.With("ok"),
		notRotated:   rotations.With("error"),
		syncDuration: m.Histogram("narthex_sync_duration_seconds", "Time one sync of entries and bundles took.", telemetry.DurationBounds).With(),
		syncOK:       syncs.With("ok"),
		syncFailed:   syncs.With("error"),
		entries:      m.Gauge("narthex_entries", "Entries the server authorizes this agent for.").With(),
		reachable:    m.Gauge("narthex_server_reachable", "Whether the last call to the server was answered.").With(),
		renewed:      renewals.With("ok"),
		renewFailed:  renewals.With("error"),
		tokens: tokenMetrics{
			jwt: tokens.With("jwt", "ok"), notJWT: tokens.With("jwt", "error"),
			wit: tokens.With("wit", "ok"), notWIT: tokens.With("wit", "error"),
			cached: m.Gauge("narthex_tokens_cached", "JWT-SVIDs and WIT-SVIDs kept for who asks next.").With(),
		},
	}
}
