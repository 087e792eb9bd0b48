package spire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/internal/grpctext"
)

// What a call fails with, for errors.Is. A refusal is a *DeniedError.
var (
	// ErrUnreachable: nothing answered at the server's address in time, or
	// the connection broke.
	ErrUnreachable = errors.New("unreachable")
	// ErrWrongServer: what answered is not spiffe://<trust domain>/spire/server.
	ErrWrongServer = errors.New("not the server of this trust domain")
	// ErrUnknownAuthority: a certificate does not chain up to the bundle.
	ErrUnknownAuthority = errors.New("signed by an authority that is not in the trust bundle")
	// ErrIdentityRefused: the server ended the handshake over the agent's
	// certificate, which has expired or is of an authority the server no
	// longer has. Node attestation, which needs none, remains.
	ErrIdentityRefused = errors.New("refused the agent's certificate")
	// ErrNoPQKEM: Config.RequirePQKEM and the server have no key exchange in
	// common.
	ErrNoPQKEM = errors.New("does not offer X25519MLKEM768")
	// ErrJoinToken: the server does not know the join token, or no longer.
	ErrJoinToken = errors.New("join token not accepted")
	// ErrBadAnswer: the server answered what its API does not allow.
	ErrBadAnswer = errors.New("unexpected answer")
	// ErrNotFound: there is no such bundle, or no such entry for this agent.
	ErrNotFound = errors.New("not found")
	// ErrTokensOff: by its configuration the server signs no JWT-SVIDs, or no
	// WIT-SVIDs.
	ErrTokensOff = errors.New("the server does not sign them")
	// ErrNoIdentity: no SetIdentity yet.
	ErrNoIdentity = errors.New("the agent has no SVID yet")
	// ErrClosed: the Client is closed.
	ErrClosed = errors.New("client is closed")
)

// Reason is why a server denies an agent, from the PermissionDeniedDetails of
// spire.api.types.
type Reason int

const (
	// Other is any denial without a reason: of AttestAgent, what the server
	// finds wrong with the node; of the rest, its authorization policy.
	Other Reason = iota
	// AgentExpired means that the SVID's time is over. Attest again.
	AgentExpired
	// AgentNotActive means that the SVID is not the agent's newest. Where
	// Superseded is set, make the call again; otherwise another agent has
	// attested as this one, or an SVID got lost: attest again.
	AgentNotActive
	// AgentNotAttested means that the server does not know the agent, or has
	// evicted it. Attest again.
	AgentNotAttested
	// AgentMustReattest means that Renew is not for this agent: attest again.
	AgentMustReattest
	// AgentBanned means: forget the agent's SVID and stop serving.
	AgentBanned
)

var reasons = map[types.PermissionDeniedDetails_Reason]Reason{
	types.PermissionDeniedDetails_AGENT_EXPIRED:       AgentExpired,
	types.PermissionDeniedDetails_AGENT_NOT_ACTIVE:    AgentNotActive,
	types.PermissionDeniedDetails_AGENT_NOT_ATTESTED:  AgentNotAttested,
	types.PermissionDeniedDetails_AGENT_MUST_REATTEST: AgentMustReattest,
	types.PermissionDeniedDetails_AGENT_BANNED:        AgentBanned,
}

// String is the reason in words.
func (r Reason) String() string {
	switch r {
	case AgentExpired:
		return "the agent's SVID has expired"
	case AgentNotActive:
		return "the agent's SVID is not the active one"
	case AgentNotAttested:
		return "the agent is not attested"
	case AgentMustReattest:
		return "the agent must attest again instead of renewing"
	case AgentBanned:
		return "the agent is banned"
	}
	return "permission denied"
}

// DeniedError is a refusal: the server knows who calls and says no.
type DeniedError struct {
	Step    string // what was being done: "sync entries"
	Address string // the server's, host:port
	Reason  Reason
	Message string // the server's own words
	// Superseded says that the call was made with an SVID that has since
	// been replaced, or is being replaced by an Attest under way or just
	// done. The denial is then of the old SVID: make the call again once
	// the new one is set.
	Superseded bool
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("%s: server %s denied it: %s: %s", e.Step, e.Address, e.Reason, e.Message)
}

// CallError is a call that failed for any other reason. It wraps one of the
// sentinels where one fits.
type CallError struct {
	Step    string // what was being done
	Address string // the server's, host:port
	// Code is the gRPC status, Unavailable also where TLS failed and OK
	// where the answer came and was no good.
	Code    codes.Code
	Message string // the server's or gRPC's own words, where err has none
	err     error
}

func (e *CallError) Error() string {
	text := e.Step + ": server " + e.Address
	if e.err != nil {
		text += ": " + e.err.Error()
	}
	if e.Message != "" {
		text += ": " + e.Message
	}
	return text
}

// Unwrap returns what a caller can decide on.
func (e *CallError) Unwrap() error { return e.err }

// explain turns what a call on cn failed with into the error its caller sees.
// ctx is the caller's, without our own bound.
func (c *Client) explain(ctx context.Context, step string, cn *conn, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: server %s: %w", step, c.address, context.Cause(ctx))
	}
	e := &CallError{Step: step, Address: c.address}
	st, ok := status.FromError(err)
	if !ok {
		e.err = err
		return e
	}
	e.Code, e.Message = st.Code(), st.Message()
	switch st.Code() {
	case codes.PermissionDenied:
		d := &DeniedError{Step: step, Address: c.address, Reason: deniedReason(st), Message: st.Message()}
		d.Superseded = c.superseded(cn)
		return d
	case codes.Unavailable:
		return c.explainUnavailable(ctx, e, cn)
	case codes.DeadlineExceeded:
		e.err = ErrUnreachable
		e.Message = "no answer in time"
	case codes.Canceled:
		e.err, e.Message = ErrClosed, ""
	case codes.NotFound:
		e.err = ErrNotFound
	default:
		e.Message = st.Code().String() + ": " + st.Message()
	}
	return e
}

// explainUnavailable tells apart what gRPC calls Unavailable: a handshake we
// refused, one the server refused, and a server that cannot be reached. gRPC
// keeps the text of the error and drops the rest.
func (c *Client) explainUnavailable(ctx context.Context, e *CallError, cn *conn) error {
	if failure := cn.verifier.failure.Load(); failure != nil && strings.Contains(e.Message, "authentication handshake failed") {
		e.err, e.Message = *failure, ""
		return e
	}
	e.Message = grpctext.Message(e.Message)
	switch {
	case cn.identity != nil && containsAny(e.Message, refusedAlerts):
		e.err = ErrIdentityRefused
	case c.requirePQKEM && containsAny(e.Message, noCommonParameters):
		e.err = ErrNoPQKEM
	default:
		e.err = ErrUnreachable
		if strings.Contains(e.Message, noAddress) {
			e.Message = cmp.Or(c.lookup(ctx), e.Message)
		}
	}
	return e
}

// noAddress is what gRPC's round_robin says when the server's name could not
// be resolved. It does not say why.
const noAddress = "no children to pick from"

// lookup says why the server's name does not resolve, "" if it does.
func (c *Client) lookup(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	host, _, err := net.SplitHostPort(c.address)
	if err == nil {
		_, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}
	if err == nil {
		return ""
	}
	return err.Error()
}

// refusedAlerts are the texts crypto/tls has for the alerts a server sends
// over a client's certificate (RFC 8446 §6.2).
var refusedAlerts = []string{
	"remote error: tls: bad certificate",
	"remote error: tls: unsupported certificate",
	"remote error: tls: revoked certificate",
	"remote error: tls: expired certificate",
	"remote error: tls: unknown certificate",
	"remote error: tls: certificate required",
	"remote error: tls: access denied",
}

// noCommonParameters are the texts for a server with another key exchange, or
// with TLS 1.2 at most.
var noCommonParameters = []string{
	"remote error: tls: handshake failure",
	"remote error: tls: protocol version not supported",
	"tls: server selected unsupported",
	"tls: server selected an unsupported",
}

func containsAny(s string, subs []string) bool {
	for _, sub := range subs {
		if strings.Contains(s, sub) {
			return true
		}
	}
	return false
}

func deniedReason(st *status.Status) Reason {
	for _, detail := range st.Details() {
		if d, ok := detail.(*types.PermissionDeniedDetails); ok {
			return reasons[d.GetReason()]
		}
	}
	return Other
}

// badAnswer is an answer the API does not allow.
func badAnswer(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrBadAnswer, fmt.Errorf(format, args...))
}

// Answered reports whether a call failed by the server's answer to it, so that
// another call may succeed: the server was reached and is the one it should be,
// and it has nothing against the agent.
func Answered(err error) bool {
	var failed *CallError
	return errors.As(err, &failed) && failed.Code != codes.Unavailable && failed.Code != codes.DeadlineExceeded && !errors.Is(err, ErrClosed)
}

// Advice says, to a person who sees err, what to do about it; "" where this
// package knows nothing better than the error itself.
func Advice(err error) string {
	var denied *DeniedError
	if errors.As(err, &denied) {
		return denied.advice()
	}
	var apart *ClockError
	switch {
	case errors.Is(err, ErrJoinToken):
		return "a join token works once and for a short time, and the first attempt uses it up: " +
			"make a new one with `spire-server token generate` and put it into agent.node_attestor.join_token"
	case errors.Is(err, ErrWrongServer):
		return "check trust_domain and agent.server.address: they must be of the same SPIRE Server"
	case errors.Is(err, ErrUnknownAuthority):
		return "the trust bundle is not the server's: write the output of `spire-server bundle show`, run on the server, " +
			"into the file that agent.server.bundle names; if the bundle is right, something else answers at agent.server.address"
	case errors.As(err, &apart):
		return "set the clock that is wrong, after which the agent goes on by itself; if both are right, the server could not renew its own certificate: see its log"
	case errors.Is(err, ErrIdentityRefused):
		return "the agent's SVID has expired or its authority was replaced while the agent was away: it has to attest again"
	case errors.Is(err, ErrNoPQKEM):
		return "use a SPIRE Server that offers X25519MLKEM768 over TLS 1.3, or set agent.server.require_pq_kem to false"
	case errors.Is(err, ErrUnreachable):
		return "check agent.server.address, that the SPIRE Server runs and listens there, and what the network between lets through"
	case errors.Is(err, ErrBadAnswer):
		return "check that what answers at agent.server.address is a SPIRE Server of a version this agent knows"
	}
	return ""
}

func (e *DeniedError) advice() string {
	if e.Superseded {
		return "nothing: the call was made with the agent's previous SVID and is made again"
	}
	switch e.Reason {
	case AgentExpired, AgentMustReattest:
		return "the agent has to attest again: with join_token it needs a new token"
	case AgentNotAttested:
		return "the agent was evicted, or the server has lost it, and has to attest again: with join_token it needs a new token"
	case AgentNotActive:
		return "another agent may run with this one's identity (a copied data_dir?): stop one of the two. " +
			"This one has to attest again: with join_token it needs a new token"
	case AgentBanned:
		return "to let the agent back in, lift the ban with `spire-server agent evict`, then let it attest again"
	}
	return "the server's log names what it objects to; a banned agent is let back in with `spire-server agent evict`"
}
