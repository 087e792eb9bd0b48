package devserver

import (
	"context"
	"crypto/x509"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxCSR bounds a certificate request, in bytes: checking the signature
	// of a huge one costs the server, not the caller. RSA 16384 fits.
	maxCSR = 16 << 10

	maxVersion = 255 // characters of an agent's version, as the real server's
)

// agentService is spire.api.server.agent.v1.Agent.
type agentService struct {
	agentv1.UnimplementedAgentServer
	s *Server
}

// AttestAgent admits an agent by join token. The token is used up as soon as
// it is shown, also when what follows fails.
func (a *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "failed to receive request from stream: %v", err)
	}
	params := req.GetParams()
	if err := checkAttestParams(params); err != nil {
		return status.Errorf(codes.InvalidArgument, "malformed param: %v", err)
	}
	if kind := params.Data.Type; kind != "join_token" {
		return status.Errorf(codes.FailedPrecondition, "error getting node attestor: could not find node attestor type %q; the development server knows join_token only", kind)
	}
	token := string(params.Data.Payload)
	if !a.s.nodes.redeem(token) {
		return status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
	}
	id, err := a.s.nodes.tokenID(token)
	if err != nil {
		return a.s.internal("failed to create join token ID", err)
	}
	if a.s.nodes.isBanned(id.String()) {
		return status.Error(codes.PermissionDenied, "failed to attest: agent is banned")
	}
	cert, err := a.signAgent(id, params.Params.Csr)
	if err != nil {
		return err
	}
	if err := a.s.nodes.attested(id.String(), cert.SerialNumber.String()); err != nil {
		return a.s.internal("failed to create attested agent", err)
	}
	a.s.log.Info("agent attested", "agent", id.String(), "kind", params.Data.Type, "expires_at", cert.NotAfter)
	return stream.Send(&agentv1.AttestAgentResponse{
		Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{Svid: x509SVID(id, cert)}},
	})
}

func checkAttestParams(p *agentv1.AttestAgentRequest_Params) error {
	switch {
	case p == nil:
		return errors.New("missing params")
	case p.Data == nil:
		return errors.New("missing attestation data")
	case p.Params == nil:
		return errors.New("missing X509-SVID parameters")
	case len(p.Params.Csr) == 0:
		return errors.New("missing CSR")
	case p.Data.Type == "":
		return errors.New("missing attestation data type")
	case len(p.Data.Payload) == 0:
		return errors.New("missing attestation data payload")
	}
	return nil
}

// signAgent uses nothing of the request but its key: the name comes from
// attestation.
func (a *agentService) signAgent(id spiffeid.ID, der []byte) (*x509.Certificate, error) {
	if len(der) > maxCSR {
		return nil, status.Errorf(codes.InvalidArgument, "failed to parse CSR: longer than %d bytes", maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "failed to parse CSR: %v", err)
	}
	cert, err := a.s.ca.signAgent(id, csr.PublicKey)
	if err != nil {
		return nil, a.s.internal("failed to sign X509 SVID", err)
	}
	return cert, nil
}

// RenewAgent gives the calling agent another SVID. The one it calls with stays
// good until the new one is first used.
func (a *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	switch {
	case req.Params == nil:
		return nil, status.Error(codes.InvalidArgument, "params cannot be nil")
	case len(req.Params.Csr) == 0:
		return nil, status.Error(codes.InvalidArgument, "missing CSR")
	}
	id := callerOf(ctx)
	cert, err := a.signAgent(id, req.Params.Csr)
	if err != nil {
		return nil, err
	}
	if err := a.update(id, func(n *node) { n.NewSerial = cert.SerialNumber.String() }); err != nil {
		return nil, err
	}
	a.s.log.Info("agent SVID renewed", "agent", id.String(), "expires_at", cert.NotAfter)
	return &agentv1.RenewAgentResponse{Svid: x509SVID(id, cert)}, nil
}

// PostStatus notes the agent's version.
func (a *agentService) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	if len(req.AgentVersion) > maxVersion {
		return nil, status.Errorf(codes.InvalidArgument, "agent version is too long (max %d characters)", maxVersion)
	}
	if req.AgentVersion != "" {
		if err := a.update(callerOf(ctx), func(n *node) { n.Version = req.AgentVersion }); err != nil {
			return nil, err
		}
	}
	return &agentv1.PostStatusResponse{}, nil
}

// update changes what is known of an agent that was there a moment ago, unless
// it has been banned meanwhile.
func (a *agentService) update(id spiffeid.ID, change func(*node)) error {
	found, err := a.s.nodes.update(id.String(), func(n *node) {
		if !n.banned() {
			change(n)
		}
	})
	switch {
	case err != nil:
		return a.s.internal("failed to update agent", err)
	case !found:
		return status.Error(codes.NotFound, "agent not found")
	}
	return nil
}

func x509SVID(id spiffeid.ID, cert *x509.Certificate) *types.X509SVID {
	return &types.X509SVID{Id: protoID(id), CertChain: [][]byte{cert.Raw}, ExpiresAt: cert.NotAfter.Unix()}
}
