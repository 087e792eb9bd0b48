// Package policy is the rule language: who may speak to whom, by SPIFFE ID.
//
// A policy is read from one or more files, compiled once, and asked for every
// connection:
//
//	p, err := policy.Load("rules.yaml")
//	…
//	p.SetGeneration(7)                  // before others see it
//	var d policy.Decision
//	p.Decide(&policy.Request{
//		Listener:  "orders",
//		Direction: policy.Inbound,
//		From:      policy.PeerOf(id, leaf),
//		To:        own,
//	}, &d)
//
// The decision does not depend on the order of rules or files: (1) from, to
// or the subject of a JWT-SVID revoked: deny; (2) one of them outside the ceiling
// of its trust domain: deny; (3) any
// deny that matches: deny; (4) any allow that matches: allow; (5) deny. Where
// several rules match, the smallest id is reported.
//
// The package is pure: a decision depends on the request and the rules, on no
// clock, file or network. It authenticates nobody: that the peer holds the
// identity it is asked about is proven before, by the TLS handshake, and whom a
// request speaks for by a JWT-SVID that was validated. What
// becomes of live connections when a policy changes is the proxy's to do.
package policy

import (
	"crypto/x509"
	"encoding/hex"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Direction is the end of a connection at which the policy is asked.
type Direction uint8

// The two ends. On an inbound listener From is the peer and To the SVID we
// present; on an outbound one From is the SVID we present and To the peer.
const (
	Inbound Direction = iota
	Outbound
)

// String returns the word that rules use.
func (d Direction) String() string {
	if d == Outbound {
		return "outbound"
	}
	return "inbound"
}

// Peer is one side of a connection. The zero Peer is nobody: it matches what
// asks for nothing, such as a deny without from, and no allow.
type Peer struct {
	// Unauthenticated says that the peer came in plaintext, to a listener that
	// takes it, and proved nothing. Of what a rule may name it matches the word
	// unauthenticated alone, whatever the other fields say.
	Unauthenticated bool
	// ID is the SPIFFE ID that the handshake proved.
	ID spiffeid.ID
	// Serial is the serial number of the peer's certificate in hexadecimal, as
	// big.Int.Text(16) writes it. Case, leading zeros and colons do not matter.
	Serial string
	// Issuer is the authority key identifier of the peer's certificate (RFC
	// 5280, section 4.2.1.1) in hexadecimal. It names the key that signed,
	// which the issuer's distinguished name does not: SPIRE gives all its
	// authorities the same one.
	Issuer string
}

// PeerOf returns the peer that proved the ID with this leaf certificate.
func PeerOf(id spiffeid.ID, leaf *x509.Certificate) Peer {
	return Peer{ID: id, Serial: leaf.SerialNumber.Text(16), Issuer: hex.EncodeToString(leaf.AuthorityKeyId)}
}

// Authenticated reports whether the peer proved a SPIFFE ID.
func (p *Peer) Authenticated() bool { return !p.Unauthenticated && !p.ID.IsZero() }

// Unauthenticated is the word that stands in rules, and in what people are
// shown, for a peer that came in plaintext.
const Unauthenticated = "unauthenticated"

// AllowsUnauthenticated reports whether plaintext to an inbound listener of
// that name can be allowed at all, whatever source it comes from and whatever it
// asks for. A zero to is an SVID not known yet: then it is enough that there is
// one to which it could.
func (p *Policy) AllowsUnauthenticated(listener string, to spiffeid.ID) bool {
	if p == nil {
		return false
	}
	q := Request{Listener: listener, From: Peer{Unauthenticated: true}, To: Peer{ID: to}}
	var from, known identity
	if p.index.bars(&q, &from, &known) != NoRule {
		return false
	}
	allowed := false
	for i := range p.rules {
		r := &p.rules[i]
		if r.shadow {
			continue
		}
		switch missed := r.missesEnds(&q); {
		case r.allow:
			allowed = allowed || missed == met || missed == condTo && to.IsZero()
		case missed == met && r.more == nil: // whoever it goes to: only a deny without `to` matches nobody
			return false
		}
	}
	return allowed
}

// Request is what a decision is made on.
type Request struct {
	Listener  string // its name in the configuration
	Direction Direction
	From, To  Peer
	Source    netip.AddrPort // of the client; the zero value for a unix socket
	Port      uint16         // of the mTLS side: accepted on, or outbound dialled; 0 for a unix socket
	SNI       string         // server name of the TLS handshake, in lower case
	Time      time.Time
	HTTP      *HTTP // nil: not visible, as on a tcp listener
}

// HTTP is one request on a connection, in the canonical form that is also
// forwarded: what is decided on is what the service sees.
type HTTP struct {
	Method  string // as it was sent; methods are case-sensitive (RFC 9110, section 9.1)
	Host    string // in lower case, with the port where one was given
	Path    string // without the query; "*" for OPTIONS *
	Headers []Header

	// Subject is whom a valid JWT-SVID on the request speaks for; zero: there is
	// none.
	Subject spiffeid.ID
	// NoProof says that nobody looked for a JWT-SVID, as at a listener that
	// validates none: then whom the request speaks for is not known, and Subject
	// says nothing. At the outbound end it never is: the token is for the far end.
	NoProof bool
}

// Header is one field line. A name that was sent several times is here as
// often.
type Header struct {
	Name  string // in lower case
	Value string // without white space around it
}

// Decision is the answer to a Request.
type Decision struct {
	Allow      bool
	Rule       string // id of the rule that decided; empty where none did
	Reason     Reason
	Shadow     []string // ids of shadow rules that would have decided otherwise, at most 8
	Generation uint64   // of the policy that was asked

	// NeedsSubject says that no rule allows the request, which came without a
	// JWT-SVID, and that with one a rule may: whoever sends it is asked for one,
	// which HTTP says by 401 (RFC 6750, section 3).
	NeedsSubject bool
}

// Reason says which step of the decision gave the answer.
type Reason uint8

// The steps. All but AllowRule deny. NoPolicy is the zero value, so that an
// answer nobody gave is no allow.
const (
	NoPolicy Reason = iota
	RevokedFrom
	RevokedTo
	RevokedSubject
	Ceiling
	DenyRule
	AllowRule
	NoRule
)

// String returns the reason for a person.
func (r Reason) String() string {
	switch r {
	case NoPolicy:
		return "no policy is loaded"
	case RevokedFrom:
		return "the identity it comes from is revoked"
	case RevokedTo:
		return "the identity it goes to is revoked"
	case RevokedSubject:
		return "the identity it speaks for is revoked"
	case Ceiling:
		return "an identity is outside the ceiling of its trust domain"
	case DenyRule:
		return "denied by a rule"
	case AllowRule:
		return "allowed by a rule"
	case NoRule:
		return "no rule allows it"
	}
	return "unknown reason"
}

// Code returns the word of tests and programs for the reason: revoked, ceiling,
// rule, no_rule, or no_policy.
func (r Reason) Code() string {
	for code, reasons := range reasonWords {
		if slices.Contains(reasons, r) {
			return code
		}
	}
	return "no_policy"
}

// Revoked reports whether an identity was revoked: such a connection is closed
// whatever the listener does about other refusals. Of RevokedSubject that holds
// for the request.
func (r Reason) Revoked() bool { return r == RevokedFrom || r == RevokedTo || r == RevokedSubject }

// Admission is the answer to a connection whose requests are still to come.
type Admission uint8

// The admissions.
const (
	Never      Admission = iota // no request on it can be allowed
	PerRequest                  // some requests may be: ask Decide for each
	Always                      // whatever is asked on it is allowed, but for what speaks for another (HTTP.Subject)
)

// String returns the admission in one or two words.
func (a Admission) String() string {
	switch a {
	case PerRequest:
		return "per request"
	case Always:
		return "always"
	}
	return "never"
}

// Policy is a compiled policy. It never changes after SetGeneration, so any
// number of goroutines may ask it at once. A nil Policy denies everything.
type Policy struct {
	files      []string
	rules      []rule  // by id
	limits     []limit // likewise
	revoked    []revocation
	ceilings   map[string]*ceiling // by trust domain
	groups     map[string]*group
	tests      []question
	members    int // patterns, each once
	listeners  []Mention
	index      index
	hash       [32]byte
	generation uint64
}

// SetGeneration stamps the number that Decide puts into its answers. Whoever
// activates the policy calls it once, before others can see the policy.
func (p *Policy) SetGeneration(generation uint64) { p.generation = generation }

// Generation returns the number SetGeneration stamped; 0 for a nil Policy.
func (p *Policy) Generation() uint64 {
	if p == nil {
		return 0
	}
	return p.generation
}

// Rules returns the number of rules.
func (p *Policy) Rules() int {
	if p == nil {
		return 0
	}
	return len(p.rules)
}

// Allowing returns the number of rules that allow, those in shadow apart. A policy without any
// refuses everything.
func (p *Policy) Allowing() int {
	if p == nil {
		return 0
	}
	n := 0
	for i := range p.rules {
		if p.rules[i].allow && !p.rules[i].shadow {
			n++
		}
	}
	return n
}

// Files returns the names of the files the policy was read from, sorted.
func (p *Policy) Files() []string {
	if p == nil {
		return nil
	}
	return append([]string(nil), p.files...)
}

// Mention is the first place at which a rule names a listener.
type Mention struct {
	Listener     string
	Rule         string
	File         string
	Line, Column int // from 1
}

// Listeners returns the listeners that rules name in `on`, sorted by name: one
// that no node has is likely a slip.
func (p *Policy) Listeners() []Mention {
	if p == nil {
		return nil
	}
	return append([]Mention(nil), p.listeners...)
}

// Unauthenticated returns, for each allow that takes plaintext, the listeners
// that it names in `on`, in the order of rule ids, with the rule's place.
func (p *Policy) Unauthenticated() []Mention {
	if p == nil {
		return nil
	}
	var mentions []Mention
	for i := range p.rules {
		r := &p.rules[i]
		if !r.allow || r.shadow || !r.from.unauthenticated {
			continue
		}
		for _, name := range r.on {
			mentions = append(mentions, Mention{name, r.id, r.place.file, r.place.line, r.place.column})
		}
	}
	return mentions
}

// Admit answers for a connection before its requests are known; what the
// request holds of HTTP is not looked at.
func (p *Policy) Admit(r *Request) Admission {
	if p == nil {
		return Never
	}
	var from, to identity
	if p.index.bars(r, &from, &to) != NoRule {
		return Never
	}
	s := search{p: p, q: r, survey: true}
	s.run(&from, &to)
	switch {
	case s.hit.deny != none, s.hit.allow == none && !s.mayAllow:
		return Never
	case s.hit.allow != none && !s.openDeny:
		return Always
	}
	return PerRequest
}

// Decide answers the request into d, all of whose fields it sets. It takes no
// lock and allocates nothing, but for what CEL conditions do, for Shadow, whose
// room is used again, and for identities that more patterns match than the index
// keeps room for. A nil Policy denies.
func (p *Policy) Decide(r *Request, d *Decision) {
	if p == nil {
		*d = Decision{Shadow: d.Shadow[:0], Reason: NoPolicy}
		return
	}
	*d = Decision{Shadow: d.Shadow[:0], Generation: p.generation}
	var from, to identity
	d.Reason = p.index.bars(r, &from, &to)
	s := search{p: p, q: r}
	if r.proof(r.HTTP) == proofOfAnother {
		s.another = true
		d.Reason = p.index.barsSubject(r.HTTP.Subject, d.Reason)
	}
	if d.Reason != NoRule {
		return
	}
	s.run(&from, &to)
	switch {
	case s.hit.deny != none:
		d.Reason, d.Rule = DenyRule, p.index.ids[s.hit.deny]
	case s.hit.allow != none:
		d.Reason, d.Rule, d.Allow = AllowRule, p.index.ids[s.hit.allow], true
	default:
		d.NeedsSubject = s.unproven
	}
	s.name(d)
}
