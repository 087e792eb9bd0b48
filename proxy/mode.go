package proxy

import "fmt"

// Mode is what an inbound listener takes.
type Mode int

// The modes. A client that speaks TLS is held to all that TLS asks in either:
// one that fails there is refused, and never falls back to plaintext.
const (
	ModeStrict     Mode = iota // mTLS alone
	ModePermissive             // plaintext too, decided as policy.Unauthenticated
)

var modeWords = [...]string{ModeStrict: "strict", ModePermissive: "permissive"}

// String returns the word configuration files use.
func (m Mode) String() string { return modeWords[m] }

// UnmarshalText reads strict or permissive.
func (m *Mode) UnmarshalText(text []byte) error {
	for n, word := range modeWords {
		if word == string(text) {
			*m = Mode(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want strict or permissive", text)
}

// Enforcement is what becomes of a connection that the policy refuses.
type Enforcement int

// The enforcements.
const (
	Enforce Enforcement = iota // it is refused
	// Audit lets it pass, and logs and counts that it would be refused. It
	// lifts what rules and ceilings say and nothing else: not the handshake,
	// the verification of the peer's chain and trust domain, `expect`, the
	// limits, nor `revoked`. Where no policy is loaded there is nothing to
	// audit, and nothing passes.
	Audit
)

var enforcementWords = [...]string{Enforce: "enforce", Audit: "audit"}

// String returns the word configuration files use.
func (e Enforcement) String() string { return enforcementWords[e] }

// UnmarshalText reads enforce or audit.
func (e *Enforcement) UnmarshalText(text []byte) error {
	for n, word := range enforcementWords {
		if word == string(text) {
			*e = Enforcement(n)
			return nil
		}
	}
	return fmt.Errorf("%q: want enforce or audit", text)
}

// outcome is what came of asking the policy, as metrics and the access log
// name it.
type outcome string

const (
	allowed outcome = "allow"
	denied  outcome = "deny"
	audited outcome = "would_deny"  // it passes, because its listener only audits, or the rule is in shadow
	missed  outcome = "would_allow" // of rules in shadow alone
)

// warnOpen says of the listeners that come into force, or change, which of
// them let more through than the others do.
func (p *Proxy) warnOpen(was, next *world, listeners []*listener) {
	for _, l := range listeners {
		s, old := next.listeners[l], was.listeners[l]
		if s.Mode == ModePermissive && (old == nil || old.Mode != s.Mode) {
			p.log.Warn("listener is permissive: it takes plaintext too, from clients that prove nothing, where rules allow `unauthenticated`", "listener", l.name)
		}
		if s.Enforcement == Audit && (old == nil || old.Enforcement != s.Enforcement) {
			p.log.Warn("listener only audits: what the rules refuse passes, and is logged and counted as would_deny", "listener", l.name)
		}
	}
}
