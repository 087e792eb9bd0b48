package endpoint

import (
	"context"
	"slices"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
)

const delegatedJWTBundles protowire.Number = 1 // SubscribeToJWTBundlesResponse

// FetchJWTSVIDs answers with a JWT-SVID of each identity of a process, in the
// order of their entry IDs. One that has none is PermissionDenied.
func (d *delegatedIdentity) FetchJWTSVIDs(ctx context.Context, req *delegatedidentityv1.FetchJWTSVIDsRequest) (resp *delegatedidentityv1.FetchJWTSVIDsResponse, err error) {
	audience, err := readAudience(req.GetAudience())
	if err != nil {
		return nil, err
	}
	err = d.asDelegate(ctx, d.jwtSVIDs.method, func(ctx context.Context) error {
		return d.about(ctx, req, d.jwtSVIDs, func(ctx context.Context, c *caller, begin beginning) (err error) {
			resp, err = d.fetchJWTSVIDs(ctx, c, begin, audience)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (d *delegatedIdentity) fetchJWTSVIDs(ctx context.Context, c *caller, begin beginning, audience []string) (*delegatedidentityv1.FetchJWTSVIDsResponse, error) {
	view, err := begin(ctx)
	if err != nil {
		return nil, err
	}
	defer c.end()
	svids, err := c.jwtSVIDs(ctx, view, audience, func(v *registry.View) ([]*registry.Entry, error) {
		entries := slices.DeleteFunc(v.Entries(), hidden)
		if len(entries) == 0 {
			return nil, errNoIdentity
		}
		return entries, nil
	})
	if err != nil {
		return nil, err
	}
	resp := &delegatedidentityv1.FetchJWTSVIDsResponse{Svids: make([]*types.JWTSVID, len(svids))}
	for i, s := range svids {
		resp.Svids[i] = &types.JWTSVID{
			Token: s.Compact, Id: &types.SPIFFEID{TrustDomain: s.ID.TrustDomain().Name(), Path: s.ID.Path()},
			ExpiresAt: s.ExpiresAt.Unix(), Hint: s.entry.Hint,
		}
		if !s.IssuedAt.IsZero() {
			resp.Svids[i].IssuedAt = s.IssuedAt.Unix()
		}
	}
	return resp, nil
}

// SubscribeToJWTBundles streams the keys that verify JWT-SVIDs, of all trust
// domains that the agent knows.
func (d *delegatedIdentity) SubscribeToJWTBundles(_ *delegatedidentityv1.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToJWTBundlesResponse]) error {
	return d.bundles(stream, d.jwtBundles)
}

// encodeDelegatedJWTBundles makes a SubscribeToJWTBundlesResponse.
func encodeDelegatedJWTBundles(v *registry.View) mem.BufferSlice {
	var w wire
	jwks := func(b *registry.Bundle) []byte { return b.JWKS }
	w.bundle(delegatedJWTBundles, v.Bundle, jwks)
	w.bundles(delegatedJWTBundles, v.Federated, jwks)
	return w.done()
}
