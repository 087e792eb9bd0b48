package endpoint

import (
	"context"
	"math"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// debugInfo tells how the agent is: spire.agent.debug.v1. It holds no keys.
type debugInfo struct {
	debugv1.UnimplementedDebugServer
	agent   AdminAgent
	td      spiffeid.TrustDomain
	started time.Time
}

func newDebugInfo(cfg *AdminConfig) *debugInfo {
	return &debugInfo{agent: cfg.Agent, td: cfg.TrustDomain, started: time.Now()}
}

// GetInfo returns the agent's own certificates up to an authority of the bundle,
// how many SVIDs it holds, and when it last synced.
func (d *debugInfo) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	chain, err := d.chain()
	if err != nil {
		return nil, err
	}
	s := d.agent.Status()
	svids := clampInt32(len(s.Identities))
	info := &debugv1.GetInfoResponse{
		SvidChain:            chain,
		Uptime:               clampInt32(int(time.Since(d.started).Seconds())),
		SvidsCount:           svids, //nolint:staticcheck // what older clients print
		CachedX509SvidsCount: svids,
		CachedJwtSvidsCount:  clampInt32(d.agent.JWTSVIDs()),
	}
	if !s.LastSync.IsZero() {
		info.LastSyncSuccess = s.LastSync.Unix()
	}
	return info, nil
}

// chain verifies the agent's SVID, as a server would.
func (d *debugInfo) chain() ([]*debugv1.GetInfoResponse_Cert, error) {
	svid := d.agent.SVID()
	if len(svid) == 0 {
		return nil, status.Errorf(codes.Unavailable, "the agent has no SVID of its own: %v", d.agent.Unready())
	}
	bundles := d.agent.WatchBundles()
	defer bundles.Close()
	view, err := bundles.Next(context.Background()) // which never waits for the first
	if err != nil {
		return nil, err
	}
	if !hasBundle(view) {
		return nil, status.Error(codes.Unavailable, "the agent has no bundle of its trust domain yet")
	}
	_, chains, err := x509svid.Verify(svid, x509bundle.FromX509Authorities(d.td, view.Bundle.X509))
	if err != nil {
		return nil, status.Errorf(codes.Internal, "the agent's SVID does not verify against its bundle: %v", err)
	}
	var certs []*debugv1.GetInfoResponse_Cert
	for _, c := range chains[0] {
		cert := &debugv1.GetInfoResponse_Cert{ExpiresAt: c.NotAfter.Unix(), Subject: c.Subject.String()}
		if id, err := x509svid.IDFromCert(c); err == nil { // authorities may have none
			cert.Id = &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

func clampInt32(n int) int32 { return int32(min(n, math.MaxInt32)) }
