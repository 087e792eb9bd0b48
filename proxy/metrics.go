package proxy

import (
	"cmp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/proxy/upstream"
)

// maxRules bounds how many ids of rules, and of limits, become values of a
// metric label; those seen later are counted together as "other".
const maxRules = 500

// instruments are the metric families of a proxy.
type instruments struct {
	expiry            *telemetry.Family[telemetry.Gauge]
	handshakes        *telemetry.Family[telemetry.Counter]
	handshakeDuration *telemetry.Family[telemetry.Histogram]
	active            *telemetry.Family[telemetry.Gauge]
	connections       *telemetry.Family[telemetry.Counter]
	closed            *telemetry.Family[telemetry.Counter]
	bytes             *telemetry.Family[telemetry.Counter]
	decisions         *telemetry.Family[telemetry.Counter]
	plaintext         *telemetry.Family[telemetry.Counter]
	exceeded          *telemetry.Family[telemetry.Counter]
	requests          *telemetry.Family[telemetry.Counter]
	requestDuration   *telemetry.Family[telemetry.Histogram]
	generation        *telemetry.Gauge

	endpoints, healthy, idle        *telemetry.Family[telemetry.Gauge]
	connectFailures, lookupFailures *telemetry.Family[telemetry.Counter]
	ejections, retries              *telemetry.Family[telemetry.Counter]

	mu     sync.Mutex // guards the following
	rules  map[string]struct{}
	limits map[string]struct{}
	count  map[decisionKey]*telemetry.Counter
}

type decisionKey struct {
	listener, rule, decision string
}

func newInstruments(m *telemetry.Metrics) *instruments {
	return &instruments{
		expiry:            m.Gauge("narthex_svid_expiry_timestamp_seconds", "When the SVID a listener presents expires.", "listener"),
		handshakes:        m.Counter("narthex_tls_handshakes_total", "TLS handshakes by result.", "listener", "result"),
		handshakeDuration: m.Histogram("narthex_tls_handshake_duration_seconds", "Duration of successful TLS handshakes.", telemetry.DurationBounds, "listener"),
		active:            m.Gauge("narthex_connections_active", "Connections accepted and not yet ended.", "listener"),
		connections:       m.Counter("narthex_connections_total", "Connections by result.", "listener", "result"),
		closed:            m.Counter("narthex_connections_closed_total", "Allowed connections that ended, by reason.", "listener", "reason"),
		bytes:             m.Counter("narthex_bytes_total", "Bytes of payload: in from the client to the target, out the other way.", "listener", "direction"),
		decisions:         m.Counter("narthex_policy_decisions_total", "Decisions on new connections, and later ones that came out otherwise.", "listener", "rule", "decision"),
		plaintext:         m.Counter("narthex_connections_unauthenticated_total", "Connections in plaintext that came to a decision.", "listener"),
		exceeded:          m.Counter("narthex_limited_total", "Connections that a limit of the policy refused.", "listener", "limit"),
		requests:          m.Counter("narthex_http_requests_total", "Requests by the status of their answer (0: none) and what the policy decided (empty: it was not asked).", "listener", "code", "decision"),
		requestDuration:   m.Histogram("narthex_http_request_duration_seconds", "Duration of requests, from the first byte of the head to the last of the response.", telemetry.DurationBounds, "listener"),
		generation:        m.Gauge("narthex_policy_generation", "Generation of the policy in force.").With(),
		endpoints:         m.Gauge("narthex_upstream_endpoints", "Addresses that a listener's targets have.", "listener"),
		healthy:           m.Gauge("narthex_upstream_healthy", "Of narthex_upstream_endpoints, those that are neither ejected nor fail their health checks.", "listener"),
		idle:              m.Gauge("narthex_upstream_idle", "Connections to a listener's targets that are kept for the next request.", "listener"),
		connectFailures:   m.Counter("narthex_upstream_connect_failures_total", "Connections to an endpoint that failed: the connect, or outbound the handshake.", "listener"),
		ejections:         m.Counter("narthex_upstream_ejections_total", "Times that an endpoint was ejected for failures in a row.", "listener"),
		retries:           m.Counter("narthex_upstream_retries_total", "Requests that were sent once more, to another endpoint where there was one.", "listener"),
		lookupFailures:    m.Counter("narthex_upstream_lookup_failures_total", "Failed lookups of a target's name.", "listener"),
		rules:             map[string]struct{}{},
		limits:            map[string]struct{}{},
		count:             map[decisionKey]*telemetry.Counter{},
	}
}

// decided returns the counter of decisions that came out so.
func (i *instruments) decided(listener, rule string, came outcome) *telemetry.Counter {
	key := decisionKey{listener, rule, string(came)}
	i.mu.Lock()
	defer i.mu.Unlock()
	key.rule = bounded(i.rules, rule)
	c := i.count[key]
	if c == nil {
		c = i.decisions.With(key.listener, key.rule, key.decision)
		i.count[key] = c
	}
	return c
}

// decisionCounter is the counter of a connection's last decision: the requests of
// one client mostly come to the same, and what all listeners count is behind one
// lock.
type decisionCounter struct {
	rule string
	came outcome
	*telemetry.Counter
}

// count counts a decision of the connection, with c.mu held.
func (c *conn) count(rule string, came outcome) {
	if last := &c.counter; last.Counter == nil || last.rule != rule || last.came != came {
		*last = decisionCounter{rule, came, c.l.proxy.instruments.decided(c.l.name, rule, came)}
	}
	c.counter.Inc()
}

// limited counts a connection that a limit refused.
func (i *instruments) limited(listener, limit string) {
	i.mu.Lock()
	limit = bounded(i.limits, limit)
	i.mu.Unlock()
	i.exceeded.With(listener, limit).Inc()
}

// bounded returns the label under which an id is counted. Ids come from files,
// which change, and labels stay.
func bounded(seen map[string]struct{}, id string) string {
	if _, ok := seen[id]; ok {
		return id
	}
	if len(seen) >= maxRules {
		return "other"
	}
	seen[id] = struct{}{}
	return id
}

// decisionCounts returns what was decided so far, in a stable order.
func (i *instruments) decisionCounts() []telemetry.RuleDecision {
	i.mu.Lock()
	defer i.mu.Unlock()
	counts := make([]telemetry.RuleDecision, 0, len(i.count))
	for key, c := range i.count {
		counts = append(counts, telemetry.RuleDecision{Listener: key.listener, Rule: key.rule, Decision: key.decision, Count: c.Value()})
	}
	slices.SortFunc(counts, func(a, b telemetry.RuleDecision) int {
		return cmp.Or(cmp.Compare(a.Listener, b.Listener), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Decision, b.Decision))
	})
	return counts
}

// meters are the metrics of one listener that the hot path needs, resolved
// once.
type meters struct {
	expiry, active    *telemetry.Gauge
	bytesIn, bytesOut *telemetry.Counter
	handshake         *telemetry.Histogram
	handshakeOK       *telemetry.Counter
	allowed           *telemetry.Counter
	plaintext         *telemetry.Counter
	closed            map[string]*telemetry.Counter // by reason
	requests          *requestCounts
	duration          *telemetry.Histogram
}

// requestCounts are the counters of a listener's requests, each found once.
type requestCounts struct {
	family   *telemetry.Family[telemetry.Counter]
	listener string
	known    [len(decisions)][maxStatus + 1]atomic.Pointer[telemetry.Counter]
}

const maxStatus = 599

// decisions are the outcomes that requests are counted by.
var decisions = [...]outcome{"", allowed, denied, audited}

// of returns the counter for a status, 0 where there was no answer, and what was
// decided.
func (r *requestCounts) of(status int, came outcome) *telemetry.Counter {
	if status < 0 || status > maxStatus {
		status = 0
	}
	n := max(0, slices.Index(decisions[:], came))
	if c := r.known[n][status].Load(); c != nil {
		return c
	}
	c := r.family.With(r.listener, strconv.Itoa(status), string(came))
	r.known[n][status].Store(c)
	return c
}

// resultAllowed is the result of a connection that came to copying.
const resultAllowed = "allowed"

func (i *instruments) of(listener string) meters {
	closed := make(map[string]*telemetry.Counter, len(telemetry.CloseReasons))
	for _, reason := range telemetry.CloseReasons {
		closed[reason] = i.closed.With(listener, reason)
	}
	return meters{
		expiry:    i.expiry.With(listener),
		active:    i.active.With(listener),
		bytesIn:   i.bytes.With(listener, "in"),
		bytesOut:  i.bytes.With(listener, "out"),
		handshake: i.handshakeDuration.With(listener),

		handshakeOK: i.handshakes.With(listener, "ok"),
		allowed:     i.connections.With(listener, resultAllowed),
		plaintext:   i.plaintext.With(listener),
		closed:      closed,
		requests:    &requestCounts{family: i.requests, listener: listener},
		duration:    i.requestDuration.With(listener),
	}
}

// upstream returns the meters of a listener's targets.
func (i *instruments) upstream(listener string) upstream.Meters {
	return upstream.Meters{
		Endpoints: i.endpoints.With(listener), Healthy: i.healthy.With(listener), Idle: i.idle.With(listener),
		ConnectFailures: i.connectFailures.With(listener), LookupFailures: i.lookupFailures.With(listener),
		Ejections: i.ejections.With(listener), Retries: i.retries.With(listener),
	}
}

// forget drops the meters of a listener that was removed. Counters stay, as
// the history of the process.
func (i *instruments) forget(listener string) {
	i.expiry.Delete(listener)
	i.active.Delete(listener)
	i.endpoints.Delete(listener)
	i.healthy.Delete(listener)
	i.idle.Delete(listener)
}
