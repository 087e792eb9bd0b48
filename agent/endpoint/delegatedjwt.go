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
	entries := slices.DeleteFunc(view.Entries(), hidden)
	if len(entries) == 0 {
		return nil, errNoIdentity
	}
	tokens := make([]*registry.Token, len(entries))
	err = d.server.eachEntry(ctx, entries, func(ctx context.Context, i int) (err error) {
		tokens[i], err = d.agent.JWTSVID(ctx, entries[i], audience)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := c.alive(); err != nil {
		return nil, err
	}
	resp := &delegatedidentityv1.FetchJWTSVIDsResponse{Svids: make([]*types.JWTSVID, len(tokens))}
	for i, t := range tokens {
		resp.Svids[i] = &types.JWTSVID{
			Token: t.Compact, Id: &types.SPIFFEID{TrustDomain: t.ID.TrustDomain().Name(), Path: t.ID.Path()},
			ExpiresAt: t.ExpiresAt.Unix(), Hint: entries[i].Hint,
		}
		if !t.IssuedAt.IsZero() {
			resp.Svids[i].IssuedAt = t.IssuedAt.Unix()
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
