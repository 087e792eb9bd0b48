package devserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// access lists who may call what, as the real server's default policy has it
// for callers on TCP that are neither admins nor downstream servers. A method
// that is not here is for those, and refused.
var access = map[string]who{
	agentv1.Agent_AttestAgent_FullMethodName:           anyone,
	agentv1.Agent_RenewAgent_FullMethodName:            agents,
	agentv1.Agent_PostStatus_FullMethodName:            agents,
	bundlev1.Bundle_GetBundle_FullMethodName:           anyone,
	bundlev1.Bundle_GetFederatedBundle_FullMethodName:  agents,
	entryv1.Entry_GetAuthorizedEntries_FullMethodName:  agents,
	entryv1.Entry_SyncAuthorizedEntries_FullMethodName: agents,
	svidv1.SVID_BatchNewX509SVID_FullMethodName:        agents,
	svidv1.SVID_NewJWTSVID_FullMethodName:              agents,
	svidv1.SVID_BatchNewWITSVID_FullMethodName:         agents,
}

type who int

const (
	nobody who = iota
	anyone
	agents
)

// tlsConfig asks for a client certificate and, if there is one, verifies it
// against today's bundle on every connection: VerifyConnection, unlike
// VerifyPeerCertificate, would also run on a resumed session, and there are no
// tickets to resume with.
func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		Time:                   s.now,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.ca.serverCertificate() },
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil // an agent that is about to attest
			}
			return s.verifyClient(state.PeerCertificates)
		},
	}
}

func (s *Server) verifyClient(chain []*x509.Certificate) error {
	roots := x509bundle.FromX509Authorities(s.td, s.ca.bundle().roots())
	_, _, err := x509svid.Verify(chain, roots, x509svid.WithTime(s.now()))
	if err != nil {
		return fmt.Errorf("verify client certificate: %w", err)
	}
	return nil
}

// callerKey is the context key of the authorized agent's spiffeid.ID.
type callerKey struct{}

// callerOf is the agent that calls; only methods for agents may ask.
func callerOf(ctx context.Context) spiffeid.ID {
	id, _ := ctx.Value(callerKey{}).(spiffeid.ID)
	return id
}

// authorize admits a call or refuses it with PermissionDenied and, where an
// agent can act on it, the reason as PermissionDeniedDetails.
func (s *Server) authorize(ctx context.Context, method string) (context.Context, error) {
	allowed := access[method]
	if allowed == anyone {
		return ctx, nil
	}
	denied := status.New(codes.PermissionDenied, "authorization denied for method "+method)
	id, cert, err := clientOf(ctx)
	if err != nil || allowed == nobody || cert == nil {
		s.log.Warn("call refused", "method", method, "caller", id.String(), "error", err)
		return nil, denied.Err()
	}
	err = s.nodes.authorize(id.String(), cert)
	if refused, ok := errors.AsType[*refusedError](err); ok {
		s.log.Warn("call refused", "method", method, "caller", id.String(), "error", err)
		if denied, err = denied.WithDetails(&types.PermissionDeniedDetails{Reason: refused.reason}); err != nil {
			return nil, status.Errorf(codes.Internal, "attach details to a refusal: %v", err)
		}
		return nil, denied.Err()
	}
	if err != nil {
		return nil, s.internal("unable to activate the new agent SVID", err)
	}
	return context.WithValue(ctx, callerKey{}, id), nil
}

// clientOf is the verified client certificate of a call, nil when there is
// none.
func clientOf(ctx context.Context) (spiffeid.ID, *x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return spiffeid.ID{}, nil, errors.New("the call has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return spiffeid.ID{}, nil, nil
	}
	cert := info.State.PeerCertificates[0]
	id, err := x509svid.IDFromCert(cert)
	return id, cert, err
}

func (s *Server) authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := s.authorize(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (s *Server) authorizeStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := s.authorize(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return handler(srv, &callerStream{ServerStream: stream, ctx: ctx})
}

// callerStream is a stream whose context knows the caller.
type callerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *callerStream) Context() context.Context { return s.ctx }

// internal logs what went wrong inside and returns it as a status.
func (s *Server) internal(doing string, err error) error {
	s.log.Error(doing, "error", err)
	return status.Errorf(codes.Internal, "%s: %v", doing, err)
}
