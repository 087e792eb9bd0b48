package endpoint

import (
	"context"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/agent/registry"
)

// brokerAPI is the SPIFFE Broker API: brokers have what the workloads have that
// they name, for as long as those are there. Its messages have the fields of the
// Workload API's, and its answers the same encoders.
type brokerAPI struct {
	broker.UnimplementedAPIServer
	server *Server

	x509SVIDs   *encoder
	x509Bundles *encoder
	jwtSVIDs    *encoder
	jwtBundles  *encoder
}

func newBrokerAPI(s *Server) *brokerAPI {
	of := func(method string, early bool, stands func(*registry.View) standing, encode func(*registry.View) mem.BufferSlice) *encoder {
		return &encoder{
			method: method, early: early, refuse: noWorkloadIdentity,
			standing: func(v *registry.View) standing { return stands(shown(v)) },
			encode:   func(v *registry.View) mem.BufferSlice { return encode(shown(v)) },
		}
	}
	return &brokerAPI{
		server:      s,
		x509SVIDs:   of("SubscribeToX509SVID", false, standingOf, encodeX509SVIDs),
		x509Bundles: of("SubscribeToX509Bundles", true, bundleStanding(false), encodeX509Bundles),
		jwtSVIDs:    of("FetchJWTSVID", true, entryStanding, nil), // signed when they are asked for
		jwtBundles:  of("SubscribeToJWTBundles", true, keysStanding(false), encodeJWTBundles),
	}
}

// SubscribeToX509SVID streams the X.509-SVIDs of a workload: SPIFFE Broker API
// §5.2.1.
func (b *brokerAPI) SubscribeToX509SVID(req *broker.SubscribeToX509SVIDRequest, stream grpc.ServerStreamingServer[broker.SubscribeToX509SVIDResponse]) error {
	return b.stream(stream, req.GetReference(), b.x509SVIDs)
}

// SubscribeToX509Bundles streams the bundles that a workload may verify peers
// with: §5.2.2.
func (b *brokerAPI) SubscribeToX509Bundles(req *broker.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[broker.SubscribeToX509BundlesResponse]) error {
	return b.stream(stream, req.GetReference(), b.x509Bundles)
}

// SubscribeToJWTBundles streams the keys with which a workload may verify
// JWT-SVIDs: §6.2.2.
func (b *brokerAPI) SubscribeToJWTBundles(req *broker.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[broker.SubscribeToJWTBundlesResponse]) error {
	return b.stream(stream, req.GetReference(), b.jwtBundles)
}

// FetchJWTSVID answers with a JWT-SVID of each of a workload's identities, or of
// the one that is named, in the order of their entry IDs: §6.2.1.
func (b *brokerAPI) FetchJWTSVID(ctx context.Context, req *broker.FetchJWTSVIDRequest) (resp *broker.FetchJWTSVIDResponse, err error) {
	audience, err := readAudience(req.GetAudience())
	if err != nil {
		return nil, err
	}
	wanted, err := readSPIFFEID(req.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	err = b.about(ctx, req.GetReference(), b.jwtSVIDs, func(ctx context.Context, c *caller) (err error) {
		resp, err = b.fetchJWTSVIDs(ctx, c, wanted, audience)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (b *brokerAPI) fetchJWTSVIDs(ctx context.Context, c *caller, wanted spiffeid.ID, audience []string) (*broker.FetchJWTSVIDResponse, error) {
	_, view, err := c.find(ctx)
	if err != nil {
		return nil, err
	}
	defer c.watch.Close()
	svids, err := c.jwtSVIDs(ctx, view, audience, func(v *registry.View) ([]*registry.Entry, error) { return entriesOf(shown(v), wanted) })
	if err != nil {
		return nil, err
	}
	resp := &broker.FetchJWTSVIDResponse{Svids: make([]*broker.JWTSVID, len(svids))}
	for i, s := range svids {
		resp.Svids[i] = &broker.JWTSVID{SpiffeId: s.ID.String(), Svid: s.Compact, Hint: s.entry.Hint}
	}
	return resp, nil
}

// stream streams what e makes of a workload's views.
func (b *brokerAPI) stream(stream grpc.ServerStream, ref *broker.WorkloadReference, e *encoder) error {
	return b.about(stream.Context(), ref, e, func(ctx context.Context, c *caller) error {
		return c.serve(ctx, stream, c.begin)
	})
}

// about runs f for as long as the workload is there that a broker names.
func (b *brokerAPI) about(ctx context.Context, ref *broker.WorkloadReference, e *encoder, f func(context.Context, *caller) error) error {
	by := brokerOf(ctx)
	r, err := by.readReference(ref)
	if err != nil {
		return err
	}
	c := &caller{server: b.server, subject: &subject{object: r.object, user: by.user}, delegate: &by.subject, encoder: e}
	if r.object != nil { // whose end an attestation tells
		return r.explain(f(ctx, c))
	}
	if c.subject.process, err = r.pin(); err != nil {
		return err
	}
	defer c.subject.process.Close()
	return r.explain(during(ctx, c.untilGone, func(ctx context.Context) error { return f(ctx, c) }))
}

// noWorkloadIdentity refuses a workload no entry matches that brokers may know of.
func noWorkloadIdentity(*registry.View) *refusal { return workloadDenied }

var workloadDenied = &refusal{
	status: status.Error(codes.PermissionDenied, "no identity issued: no registration entry matches the workload; the agent's log has the selectors it was found to have"),
	event:  noIdentity.event,
	hint:   noIdentity.hint,
}

// shown is view without the identities that are hidden from brokers.
func shown(view *registry.View) *registry.View {
	if !slices.ContainsFunc(view.Entries(), hidden) {
		return view
	}
	v := *view
	v.Identities = slices.DeleteFunc(slices.Clone(view.Identities), func(i registry.Identity) bool { return hidden(i.Entry) })
	v.Unsigned = slices.DeleteFunc(slices.Clone(view.Unsigned), hidden)
	v.Pending = len(v.Unsigned)
	entries := v.Entries()
	v.Federated = maps.Clone(view.Federated)
	maps.DeleteFunc(v.Federated, func(td spiffeid.TrustDomain, _ *registry.Bundle) bool {
		return !slices.ContainsFunc(entries, func(e *registry.Entry) bool { return slices.Contains(e.FederatesWith, td) })
	})
	return &v
}
