package devserver

import (
	"context"
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// bundleService is spire.api.server.bundle.v1.Bundle.
type bundleService struct {
	bundlev1.UnimplementedBundleServer
	s *Server
}

// GetBundle returns the bundle of the server's trust domain to anyone.
func (b *bundleService) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	trust := b.s.ca.bundle()
	out := &types.Bundle{TrustDomain: b.s.td.Name()}
	mask := req.OutputMask
	if mask == nil || mask.SequenceNumber {
		out.SequenceNumber = trust.sequence
	}
	for _, a := range trust.authorities {
		if mask == nil || mask.X509Authorities {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: a.cert.Raw, Tainted: trust.tainted[a]})
		}
		if mask == nil || mask.JwtAuthorities {
			der, err := x509.MarshalPKIXPublicKey(&a.jwt.PublicKey)
			if err != nil {
				return nil, b.s.internal("failed to convert bundle", err)
			}
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{
				PublicKey: der, KeyId: a.kid, ExpiresAt: a.cert.NotAfter.Unix(),
			})
		}
	}
	return out, nil
}

// GetFederatedBundle finds none: the development server federates with nobody.
func (b *bundleService) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(req.TrustDomain)
	switch {
	case err != nil:
		return nil, status.Errorf(codes.InvalidArgument, "trust domain argument is not valid: %v", err)
	case td == b.s.td:
		return nil, status.Error(codes.InvalidArgument, "getting a federated bundle for the server's own trust domain is not allowed")
	}
	return nil, status.Error(codes.NotFound, "bundle not found")
}
