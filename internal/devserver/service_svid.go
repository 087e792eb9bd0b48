package devserver

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// signBurst is how many certificates one call may ask for. In the real server
// it is the burst of a limit on signatures per second.
const signBurst = 500

// svidService is spire.api.server.svid.v1.SVID.
type svidService struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

// BatchNewX509SVID signs one certificate for each parameter, in their order,
// each with its own status.
func (v *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	switch n := len(req.Params); {
	case n == 0:
		return nil, status.Error(codes.InvalidArgument, "missing parameters")
	case n > signBurst:
		return nil, status.Errorf(codes.ResourceExhausted, "rejecting request due to certificate signing rate limiting: rate (%d) exceeds burst size (%d)", n, signBurst)
	}
	entries := v.authorized(ctx)
	resp := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range req.Params {
		if err := ctx.Err(); err != nil {
			return nil, status.FromContextError(err).Err()
		}
		result := &svidv1.BatchNewX509SVIDResponse_Result{}
		svid, err := v.newX509SVID(p, entries)
		if err != nil {
			st := status.Convert(err)
			result.Status = &types.Status{Code: int32(st.Code()), Message: st.Message()}
		} else {
			result.Svid, result.Status = svid, &types.Status{Code: int32(codes.OK), Message: codes.OK.String()}
		}
		resp.Results = append(resp.Results, result)
	}
	return resp, nil
}

func (v *svidService) authorized(ctx context.Context) map[string]*registration {
	entries := make(map[string]*registration)
	for _, r := range v.s.entries.authorized(callerOf(ctx)) {
		entries[r.entry.Id] = r
	}
	return entries
}

// newX509SVID takes the key from the request and everything else from the
// entry.
func (v *svidService) newX509SVID(p *svidv1.NewX509SVIDParams, entries map[string]*registration) (*types.X509SVID, error) {
	switch {
	case p.EntryId == "":
		return nil, status.Error(codes.InvalidArgument, "missing entry ID")
	case len(p.Csr) == 0:
		return nil, status.Error(codes.InvalidArgument, "missing CSR")
	}
	r, ok := entries[p.EntryId]
	if !ok {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	if len(p.Csr) > maxCSR {
		return nil, status.Errorf(codes.InvalidArgument, "malformed CSR: longer than %d bytes", maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(p.Csr)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed CSR: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "invalid CSR signature: %v", err)
	}
	cert, err := v.s.ca.signWorkload(r.id, csr.PublicKey, r.entry.DnsNames, time.Duration(r.entry.X509SvidTtl)*time.Second)
	if err != nil {
		return nil, v.s.internal("failed to sign X509-SVID", err)
	}
	return x509SVID(r.id, cert), nil
}

// NewJWTSVID signs a token for an entry and the audience asked for.
func (v *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	r, ok := v.authorized(ctx)[req.EntryId]
	if !ok {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	if len(req.Audience) == 0 {
		return nil, status.Error(codes.InvalidArgument, "at least one audience is required")
	}
	token, err := v.newJWT(r.id, req.Audience)
	if err != nil {
		return nil, v.s.internal("failed to sign JWT-SVID", err)
	}
	return &svidv1.NewJWTSVIDResponse{Svid: token}, nil
}

func (v *svidService) newJWT(id spiffeid.ID, audience []string) (*types.JWTSVID, error) {
	by := v.s.ca.signer()
	claims, err := newClaims(id, audience, v.s.now(), by.cert.NotAfter)
	if err != nil {
		return nil, err
	}
	token, err := signJWT(by.jwt, by.kid, claims)
	if err != nil {
		return nil, fmt.Errorf("sign token: %w", err)
	}
	return &types.JWTSVID{Token: token, Id: protoID(id), IssuedAt: claims.IssuedAt, ExpiresAt: claims.Expires}, nil
}

// BatchNewWITSVID answers as a real server without the feature does.
func (v *svidService) BatchNewWITSVID(context.Context, *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	return nil, status.Error(codes.Unimplemented, "WIT functionality is disabled")
}
