package telemetry

import (
	"strings"
	"time"
)

// Status is the document behind /api/v1/status and `narthex status`. Each
// half of Narthex fills its own part; under `narthex run` the two are shown
// as one. It never holds key material or tokens.
type Status struct {
	Version     string       `json:"version"`
	FIPS        string       `json:"fips_module,omitempty"` // version of the FIPS 140-3 module where it is on
	Started     time.Time    `json:"started"`
	TrustDomain string       `json:"trust_domain,omitempty"`
	Agent       *AgentStatus `json:"agent,omitempty"`
	Proxy       *ProxyStatus `json:"proxy,omitempty"`
}

// AgentStatus is what the agent knows of itself, its server and its
// identities.
type AgentStatus struct {
	ID         string     `json:"id,omitempty"`         // the agent's own SPIFFE ID; empty until it is attested
	ExpiresAt  time.Time  `json:"expires_at,omitzero"`  // of the agent's own SVID
	Server     string     `json:"server"`               // host:port
	Reachable  bool       `json:"server_reachable"`     // whether the last call to the server was answered
	Since      time.Time  `json:"since,omitzero"`       // since when Reachable is what it is
	Problem    string     `json:"problem,omitempty"`    // why it cannot serve or sync, empty when it can
	LastSync   time.Time  `json:"last_sync,omitzero"`   // when entries were last synced
	Entries    int        `json:"entries"`              // entries the server authorizes this agent for
	Streams    int        `json:"streams"`              // open Workload API streams
	Identities []Identity `json:"identities,omitempty"` // X.509-SVIDs held, in the order of their entry IDs

	Attestors []AttestorStatus `json:"workload_attestors,omitempty"`
}

// AttestorStatus is one workload attestor.
type AttestorStatus struct {
	Type    string `json:"type"`
	Problem string `json:"problem,omitempty"` // why it can attest nobody just now; empty when it can
}

// Identity is one X.509-SVID without its key.
type Identity struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Hint      string    `json:"hint,omitempty"`
	EntryID   string    `json:"entry_id,omitempty"`
	Serial    string    `json:"serial,omitempty"` // hexadecimal
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

// ProxyStatus is what the proxy knows of its listeners and policy.
type ProxyStatus struct {
	Source     string           `json:"source"` // where identities come from: workload_api or files
	Problem    string           `json:"problem,omitempty"`
	Policy     PolicyStatus     `json:"policy"`
	Sandbox    *SandboxStatus   `json:"sandbox,omitempty"`
	Identities []Identity       `json:"identities,omitempty"`
	CRLs       []CRL            `json:"crls,omitempty"`
	Listeners  []ListenerStatus `json:"listeners"`
	ExtAuthz   []ExtAuthzStatus `json:"ext_authz,omitempty"`

	MaxConnections int `json:"max_connections,omitempty"` // of all listeners together; 0: no limit
}

// SandboxStatus is what the proxy's process has given up.
type SandboxStatus struct {
	On       bool     `json:"on"`
	Enforced []string `json:"enforced,omitempty"`
	Missing  []string `json:"missing,omitempty"` // what this kernel or place does not offer, each with the reason
}

// CRL is a certificate revocation list in force, or, with a Problem, why the
// newest files of a trust domain are not.
type CRL struct {
	TrustDomain string    `json:"trust_domain"`
	Problem     string    `json:"problem,omitempty"`
	Issuer      string    `json:"issuer,omitempty"`
	File        string    `json:"file,omitempty"`
	Number      string    `json:"number,omitempty"`
	Entries     int       `json:"entries"`
	ThisUpdate  time.Time `json:"this_update,omitzero"`
	NextUpdate  time.Time `json:"next_update,omitzero"` // after it, new connections that the CRL speaks of are refused
	Verified    bool      `json:"verified"`             // its signature; false until its authority was seen
}

// PolicyStatus is the policy in force.
type PolicyStatus struct {
	Generation uint64         `json:"generation"`
	LoadedAt   time.Time      `json:"loaded_at,omitzero"`
	Files      []string       `json:"files,omitempty"`
	Rules      int            `json:"rules"`
	Problem    string         `json:"problem,omitempty"`     // why the newest files are not in force; empty when they are
	LastGood   time.Time      `json:"last_good,omitzero"`    // when the copy in force was made, where the files could not be used at the start
	Reload     *ReloadStatus  `json:"last_reload,omitempty"` // nil: none since start
	Decisions  []RuleDecision `json:"decisions,omitempty"`
}

// ReloadStatus is what the last reload of narthex.yaml and rules came to. One
// that failed has changed nothing.
type ReloadStatus struct {
	Time    time.Time `json:"time"`
	Result  string    `json:"result"` // ok or error
	Added   int       `json:"rules_added"`
	Changed int       `json:"rules_changed"`
	Removed int       `json:"rules_removed"`
	Asked   int       `json:"connections_asked"`
	Refused int       `json:"connections_refused"` // of those asked, the ones the new rules refuse
	Closed  int       `json:"connections_closed"`  // at once; others drain or are kept
}

// RuleDecision counts the decisions of one rule on one listener.
type RuleDecision struct {
	Listener string `json:"listener"`
	Rule     string `json:"rule"`     // empty where no rule matched
	Decision string `json:"decision"` // allow, deny, would_deny where a listener only audits, would_deny and would_allow of rules in shadow
	Count    uint64 `json:"count"`
}

// ListenerStatus is one listener.
type ListenerStatus struct {
	Name        string             `json:"name"`
	Direction   string             `json:"direction"`
	Bind        string             `json:"bind"`
	Targets     []string           `json:"targets"`
	SPIFFEID    string             `json:"spiffe_id,omitempty"`        // the identity presented
	ExpiresAt   time.Time          `json:"svid_expires_at,omitzero"`   // of the SVID presented
	Active      int                `json:"connections_active"`         //
	Accepted    uint64             `json:"connections_total"`          // accepted since start
	Refused     uint64             `json:"connections_refused"`        // by handshake or policy, since start
	Failed      uint64             `json:"connections_failed"`         // for a target or an identity of ours, since start
	Problem     string             `json:"problem,omitempty"`          // why it cannot serve; empty when it can
	Mode        string             `json:"mode,omitempty"`             // strict or permissive; inbound only
	Enforcement string             `json:"enforcement,omitempty"`      // enforce or audit
	WouldDeny   uint64             `json:"would_deny,omitempty"`       // decisions since start that only an audit let pass
	Connections []ConnectionStatus `json:"connections,omitempty"`      // the oldest 100
	Truncated   bool               `json:"connections_more,omitempty"` // more are live than Connections holds

	// Who speaks plaintext to a permissive listener: how many connections, since
	// start, and the sources of most of them.
	Unauthenticated uint64         `json:"connections_unauthenticated,omitempty"`
	Sources         []SourceStatus `json:"unauthenticated_sources,omitempty"`

	// Routes are asked in their order, and the first that takes a connection
	// leads it. The last one may have neither names nor protocols: it is the
	// listener's own target, which takes the rest. Empty where there are none.
	Routes []RouteStatus `json:"routes,omitempty"`

	// The addresses of its targets, the first 100, and whether there are more.
	Endpoints     []EndpointStatus `json:"endpoints,omitempty"`
	EndpointsMore bool             `json:"endpoints_more,omitempty"`
}

// ExtAuthzStatus is one place at which Envoy asks about requests.
type ExtAuthzStatus struct {
	Name        string    `json:"name"`
	Bind        string    `json:"bind"`
	Clients     []string  `json:"clients,omitempty"`        // who may ask over mTLS
	SPIFFEID    string    `json:"spiffe_id,omitempty"`      // the identity presented over mTLS
	ExpiresAt   time.Time `json:"svid_expires_at,omitzero"` // of the SVID presented
	Active      int       `json:"connections_active"`
	Checks      uint64    `json:"checks"` // questions answered, since start
	Denied      uint64    `json:"denied"` // of Checks
	Enforcement string    `json:"enforcement"`
	Problem     string    `json:"problem,omitempty"` // why it cannot serve; empty when it can
}

// RouteStatus is where connections are led, by what the client asks for.
type RouteStatus struct {
	SNI     []string `json:"sni,omitempty"`
	ALPN    []string `json:"alpn,omitempty"`
	Hosts   []string `json:"hosts,omitempty"`
	Paths   []string `json:"paths,omitempty"`
	Targets []string `json:"targets"`
}

// Takes says for a person which connections the route takes.
func (r *RouteStatus) Takes() string {
	var parts []string
	if len(r.SNI) > 0 {
		parts = append(parts, "sni "+strings.Join(r.SNI, ", "))
	}
	if len(r.ALPN) > 0 {
		parts = append(parts, "alpn "+strings.Join(r.ALPN, ", "))
	}
	if len(r.Hosts) > 0 {
		parts = append(parts, "hosts "+strings.Join(r.Hosts, ", "))
	}
	if len(r.Paths) > 0 {
		parts = append(parts, "paths "+strings.Join(r.Paths, ", "))
	}
	if len(parts) == 0 {
		return "the rest"
	}
	return strings.Join(parts, ", ")
}

// SourceStatus is one address that plaintext comes from. The count is bounded
// in space and so may be too high, by AtMostOver at the most; it is never too
// low.
type SourceStatus struct {
	Source      string    `json:"source"` // an IP address, or unix
	Connections uint64    `json:"connections"`
	AtMostOver  uint64    `json:"at_most_over,omitempty"`
	Last        time.Time `json:"last"`
}

// EndpointStatus is one address of a target. A name that has none is one
// without an address.
type EndpointStatus struct {
	Target       string    `json:"target"`
	Address      string    `json:"address,omitempty"`
	Healthy      bool      `json:"healthy"`
	Problem      string    `json:"problem,omitempty"` // why it is not healthy, or what may be wrong with it
	EjectedUntil time.Time `json:"ejected_until,omitzero"`
	Active       int       `json:"connections_active"`
	Idle         int       `json:"connections_idle"`   // kept for the next request
	Failed       uint64    `json:"connections_failed"` // since it is known
}

// Where names the endpoint for a person.
func (e *EndpointStatus) Where() string {
	switch e.Address {
	case "":
		return e.Target + " (no address)"
	case e.Target:
		return e.Target
	}
	return e.Target + " (" + e.Address + ")"
}

// ConnectionStatus is one live connection.
type ConnectionStatus struct {
	From      string    `json:"from"` // a SPIFFE ID, or unauthenticated
	To        string    `json:"to"`
	Source    string    `json:"source"`
	Rule      string    `json:"rule"`
	Since     time.Time `json:"since"`
	WouldDeny string    `json:"would_deny,omitempty"` // why the policy refuses it, where its listener only audits, keeps it or lets it drain
	Shadow    []string  `json:"shadow,omitempty"`     // rules in shadow that would have decided otherwise
}
