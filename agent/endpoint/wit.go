package endpoint

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
)

// This file is the WIT-SVID profile of the Workload API (§7). A WIT-SVID is
// bound to a key, as an X.509-SVID is, and signed by keys of its own, which the
// bundle has where the server signs any.

const witBundlesBundles protowire.Number = 1 // WITBundlesResponse

// errNoWIT ends calls where the server signs no WIT-SVIDs. Clients that read
// Unimplemented do not call again.
var errNoWIT = status.Error(codes.Unimplemented, "the SPIRE Server signs no WIT-SVIDs: its bundle has no key for them; "+
	"it does from 1.15 on, with feature_flags = [\"wit-svid\"] in the experimental block of its configuration")

// FetchWITSVID streams a WIT-SVID, with its key, of each of the caller's
// identities, or of the one it names, in the order of their entry IDs. Each is
// replaced at half of its life.
func (a *workloadAPI) FetchWITSVID(req *workload.WITSVIDRequest, stream grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	wanted, err := readSPIFFEID(req.GetSpiffeId())
	if err != nil {
		return err
	}
	return a.server.watch(stream, &encoder{
		method: "FetchWITSVID", early: true, standing: witStanding(entryStanding),
		fetch: func(ctx context.Context, v *registry.View) (*frame, time.Time, error) {
			return a.server.fetchWITSVIDs(ctx, v, wanted)
		},
	})
}

// FetchWITBundles streams the keys with which the caller may verify WIT-SVIDs.
func (a *workloadAPI) FetchWITBundles(_ *workload.WITBundlesRequest, stream grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	return a.server.watch(stream, a.witBundles)
}

// witStanding is where a caller stands who stands there otherwise. Where the
// server signs no WIT-SVIDs that comes before everything else, as §7 of the
// standard has it: who reads PermissionDenied would call again for ever.
func witStanding(otherwise func(*registry.View) standing) func(*registry.View) standing {
	return func(v *registry.View) standing {
		if v.Synced && v.Bundle != nil && len(v.Bundle.WITKeys) == 0 {
			return unoffered
		}
		stands := otherwise(v)
		if stands == entitled && v.Bundle == nil {
			return pending
		}
		return stands
	}
}

// fetchWITSVIDs makes a WITSVIDResponse, and tells when to make another one.
func (s *Server) fetchWITSVIDs(ctx context.Context, view *registry.View, wanted spiffeid.ID) (*frame, time.Time, error) {
	entries, err := entriesOf(view, wanted)
	if err != nil {
		return nil, time.Time{}, err
	}
	tokens, refresh := make([]*registry.Token, len(entries)), make([]time.Time, len(entries))
	err = s.eachEntry(ctx, entries, func(ctx context.Context, i int) (err error) {
		tokens[i], refresh[i], err = s.agent.WITSVID(ctx, entries[i])
		return err
	})
	if err != nil {
		return nil, time.Time{}, err
	}
	resp := &workload.WITSVIDResponse{Svids: make([]*workload.WITSVID, len(tokens))}
	first := refresh[0]
	for i, t := range tokens {
		resp.Svids[i] = &workload.WITSVID{SpiffeId: t.ID.String(), WitSvid: t.Compact, WitSvidKey: t.PrivateKey, Hint: entries[i].Hint}
		if refresh[i].Before(first) {
			first = refresh[i]
		}
	}
	encoded, err := proto.Marshal(resp)
	if err != nil {
		return nil, time.Time{}, status.Error(codes.Internal, "the WIT-SVIDs cannot be encoded")
	}
	return &frame{parts: mem.BufferSlice{mem.SliceBuffer(encoded)}}, first, nil
}

// encodeWITBundles makes a WITBundlesResponse.
func encodeWITBundles(v *registry.View) mem.BufferSlice {
	var w wire
	jwks := func(b *registry.Bundle) []byte {
		if len(b.WITKeys) == 0 {
			return nil
		}
		return b.WITJWKS
	}
	w.bundle(witBundlesBundles, v.Bundle, jwks)
	w.bundles(witBundlesBundles, v.Federated, jwks)
	return w.done()
}
