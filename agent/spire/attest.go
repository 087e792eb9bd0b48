package spire

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

const (
	stepAttest = "attest node"
	stepStatus = "post agent status"
	stepRenew  = "renew agent SVID"

	// maxChallenges bounds an attestation. Known node attestors need one.
	maxChallenges = 16

	// agentPath is the part of a trust domain that SPIRE reserves for agents.
	agentPath = "/spire/agent/"
)

// Attestation is what a node gets for proving what it is.
type Attestation struct {
	// Chain is the agent's SVID, DER, leaf first, for the key of the CSR. It
	// has been verified against Bundle. By this host's clock it may not have
	// begun, or be over: to the server it is valid, and what was given for it
	// (a join token) would be lost with it.
	Chain [][]byte
	// Reattestable tells how to renew it: by Attest if set, by Renew if not.
	Reattestable bool
	// Bundle is the trust domain's, fetched on the same connection.
	Bundle *registry.Bundle
}

// Attest proves to the server what node this is (AttestAgent), for which it
// needs no SVID, and fetches the bundle. Of csr (PKCS#10, DER) the server uses
// the key alone.
//
// From the server's answer on, an earlier SVID of this agent is no longer
// accepted: write the key before the call and the SVID right after it, then
// SetRoots and SetIdentity. The server takes one attestation a second from an
// IP address and lets the others wait, so this call lasts up to five minutes;
// ctx ends it earlier.
//
// A join token is used up by AttestAgent even if the answer gets lost; an error
// before that call, unreachable server and wrong bundle included, spares it.
func (c *Client) Attest(ctx context.Context, trust Trust, node attestor.Node, csr []byte) (*Attestation, error) {
	key, err := csrKey(csr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", stepAttest, err)
	}
	if !trust.Insecure && len(trust.Roots) == 0 {
		return nil, fmt.Errorf("%s: there is no trust bundle to verify the server with", stepAttest)
	}
	attempt, err := node.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", stepAttest, err)
	}
	defer attempt.Close() // nothing is read from it afterwards that an error could spoil

	v := &verifier{serverID: c.serverID, insecure: trust.Insecure, roots: func() []*x509.Certificate { return trust.Roots }}
	cn, err := c.acquireAnonymous(stepAttest, v)
	if err != nil {
		return nil, err
	}
	defer c.release(cn)
	if trust.Insecure {
		c.log.Warn("insecure bootstrap: the server's certificate is not verified", "server", c.address)
	}

	// The bundle comes first: if it cannot be had, a join token is still good.
	bundle, err := c.attestBundle(ctx, cn)
	if err != nil {
		return nil, err
	}
	c.beginAttest()
	a, err := c.attest(ctx, cn, node.Type(), attempt, csr)
	c.endAttest(err == nil)
	if err != nil {
		return nil, advise(err, attempt)
	}
	if _, _, err := c.checkAgentSVID(a.Chain, key, bundle.X509); err != nil {
		return nil, c.explain(ctx, stepAttest, cn, badAnswer("the agent's new SVID: %w", err))
	}
	a.Bundle = bundle
	return a, nil
}

// advise adds to a refusal what the attestor knows of its reasons. Of those
// the server says little, on purpose.
func advise(err error, attempt attestor.Attempt) error {
	a, ok := attempt.(attestor.Adviser)
	var denied *DeniedError
	var failed *CallError
	answered := errors.As(err, &denied) ||
		errors.As(err, &failed) && (failed.Code == codes.InvalidArgument || failed.Code == codes.Internal || failed.Code == codes.FailedPrecondition)
	if !ok || !answered {
		return err
	}
	return fmt.Errorf("%w; %s", err, a.Advice())
}

// Reach returns nil when the server answers and is who trust says, which is
// asked without an identity: no agent is noticed by it.
func (c *Client) Reach(ctx context.Context, trust Trust) error {
	const step = "reach the server"
	if !trust.Insecure && len(trust.Roots) == 0 {
		return fmt.Errorf("%s: there is no trust bundle to verify it with", step)
	}
	v := &verifier{serverID: c.serverID, insecure: trust.Insecure, roots: func() []*x509.Certificate { return trust.Roots }}
	cn, err := c.acquireAnonymous(step, v)
	if err != nil {
		return err
	}
	defer c.release(cn)
	bounded, cancel := context.WithTimeout(ctx, c.callTimeout)
	defer cancel()
	if _, err := getBundle(bounded, cn, c.trustDomain); err != nil {
		return c.explain(ctx, step, cn, err)
	}
	return nil
}

func (c *Client) attestBundle(ctx context.Context, cn *conn) (*registry.Bundle, error) {
	const step = stepAttest + ": get bundle"
	bounded, cancel := context.WithTimeout(ctx, c.callTimeout)
	defer cancel()
	bundle, err := getBundle(bounded, cn, c.trustDomain)
	if err != nil {
		return nil, c.explain(ctx, step, cn, err)
	}
	return bundle, nil
}

// beginAttest and endAttest frame the time in which the server may swap one
// SVID of this agent for another, see superseded.
func (c *Client) beginAttest() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attesting++
}

func (c *Client) endAttest(ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attesting--
	c.unset = c.unset || ok
}

func (c *Client) attest(ctx context.Context, cn *conn, kind string, attempt attestor.Attempt, csr []byte) (*Attestation, error) {
	bounded, cancel := context.WithTimeout(ctx, c.attestTimeout)
	defer cancel()
	result, err := attestAgent(bounded, cn, kind, attempt, csr)
	if err != nil {
		if status.Code(err) == codes.InvalidArgument && kind == "join_token" {
			err = fmt.Errorf("%w: %s", ErrJoinToken, status.Convert(err).Message())
			return nil, &CallError{Step: stepAttest, Address: c.address, Code: codes.InvalidArgument, err: err}
		}
		return nil, banned(c.explain(ctx, stepAttest, cn, err))
	}
	return &Attestation{Chain: result.GetSvid().GetCertChain(), Reattestable: result.GetReattestable()}, nil
}

// banned gives the refusal of a banned agent its reason, which SPIRE Server tells
// AttestAgent by words alone.
func banned(err error) error {
	var d *DeniedError
	if errors.As(err, &d) && d.Reason == Other && strings.Contains(d.Message, "agent is banned") {
		d.Reason = AgentBanned
	}
	return err
}

// attestAgent runs the stream of challenges and answers.
func attestAgent(ctx context.Context, cn *conn, kind string, attempt attestor.Attempt, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream
	stream, err := agentv1.NewAgentClient(cn.cc).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	request := &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{
		Params: &agentv1.AttestAgentRequest_Params{
			Data:   &types.AttestationData{Type: kind, Payload: attempt.Payload()},
			Params: &agentv1.AgentX509SVIDParams{Csr: csr},
		},
	}}
	for range maxChallenges {
		// A Send that fails with EOF leaves the reason to Recv.
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, badAnswer("the stream ended without a result")
		}
		if err != nil {
			return nil, err
		}
		switch step := response.GetStep().(type) {
		case *agentv1.AttestAgentResponse_Result_:
			_ = stream.CloseSend() // always nil
			return step.Result, nil
		case *agentv1.AttestAgentResponse_Challenge:
			answer, err := attempt.Answer(ctx, step.Challenge)
			if err != nil {
				return nil, fmt.Errorf("%s: answer the server's challenge: %w", kind, err)
			}
			request = &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}}
		default:
			return nil, badAnswer("neither a challenge nor a result")
		}
	}
	return nil, badAnswer("more than %d challenges", maxChallenges)
}

// checkAgentSVID fails unless chain is an agent's SVID of this trust domain,
// for key, signed by roots just now.
func (c *Client) checkAgentSVID(chain [][]byte, key crypto.PublicKey, roots []*x509.Certificate) (spiffeid.ID, *x509.Certificate, error) {
	id, certs, err := parseSVID(chain, key)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	if !id.MemberOf(c.trustDomain) || !strings.HasPrefix(id.Path(), agentPath) {
		return spiffeid.ID{}, nil, fmt.Errorf("%s is not an agent's SPIFFE ID: want spiffe://%s%s…", id, c.trustDomain, agentPath)
	}
	return id, certs[0], verifyChain(certs, c.trustDomain, roots, id.String(), signedAt(certs[0], time.Now()))
}

// PostStatus tells the server the agent's version. Callers go on when it
// fails: servers show the version and do nothing else with it.
func (c *Client) PostStatus(ctx context.Context, version string) error {
	return c.call(ctx, stepStatus, func(ctx context.Context, cn *conn) error {
		_, err := agentv1.NewAgentClient(cn.cc).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: version})
		return err
	})
}

// Renew returns a new SVID for an agent that cannot attest again, DER, leaf
// first, for the key of csr. The server accepts the old one until the new one
// is first used: write key and SVID to disk before SetIdentity. The chain is
// for the same SPIFFE ID, and verified against the roots of SetRoots. One that is
// over by this host's clock is a *ClockError: the old SVID is the better one.
func (c *Client) Renew(ctx context.Context, csr []byte) ([][]byte, error) {
	key, err := csrKey(csr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", stepRenew, err)
	}
	var chain [][]byte
	err = c.call(ctx, stepRenew, func(ctx context.Context, cn *conn) error {
		answer, err := agentv1.NewAgentClient(cn.cc).RenewAgent(ctx, &agentv1.RenewAgentRequest{
			Params: &agentv1.AgentX509SVIDParams{Csr: csr},
		})
		if err != nil {
			return err
		}
		chain = answer.GetSvid().GetCertChain()
		id, leaf, err := c.checkAgentSVID(chain, key, cn.verifier.roots())
		switch now := time.Now(); {
		case err != nil:
		case id != cn.id:
			err = fmt.Errorf("it is for %s, want %s", id, cn.id)
		case !now.Before(leaf.NotAfter):
			err = &ClockError{What: "the certificate", Now: now, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}
		}
		if err != nil {
			return badAnswer("the agent's new SVID: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return chain, nil
}
