package endpoint

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
)

// workloadAPI is the SPIFFE Workload API. This file is its X.509-SVID profile.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	server      *Server
	x509SVIDs   *encoder
	x509Bundles *encoder
	jwtSVIDs    *encoder
	jwtBundles  *encoder
	witBundles  *encoder
	// foreignClaims are told of tokens of other trust domains.
	foreignClaims []string
}

func newWorkloadAPI(s *Server, cfg *Config) *workloadAPI {
	open := cfg.AllowUnauthenticatedVerifiers
	return &workloadAPI{
		server:        s,
		x509SVIDs:     &encoder{method: "FetchX509SVID", standing: standingOf, encode: encodeX509SVIDs},
		x509Bundles:   &encoder{method: "FetchX509Bundles", early: true, standing: bundleStanding(open), encode: encodeX509Bundles},
		jwtSVIDs:      &encoder{method: "FetchJWTSVID", early: true, standing: entryStanding},
		jwtBundles:    &encoder{method: "FetchJWTBundles", early: true, standing: keysStanding(open), encode: encodeJWTBundles},
		witBundles:    &encoder{method: "FetchWITBundles", early: true, standing: witStanding(keysStanding(open)), encode: encodeWITBundles},
		foreignClaims: cfg.ForeignJWTClaims,
	}
}

// FetchX509SVID streams the caller's X.509-SVIDs: SPIFFE Workload API §5.2.1.
func (a *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return a.server.watch(stream, a.x509SVIDs)
}

// FetchX509Bundles streams the bundles the caller may verify peers with: §5.2.2.
func (a *workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return a.server.watch(stream, a.x509Bundles)
}

// bundleStanding is where a caller stands who wants bundles: it needs an
// entry, unless anybody may have them, and no SVID.
func bundleStanding(allowUnauthenticated bool) func(*registry.View) standing {
	return func(v *registry.View) standing {
		stands := standingOf(v)
		switch {
		case stands == unsynced, stands == denied && !allowUnauthenticated:
			return stands
		case !hasBundle(v):
			return pending
		}
		return entitled
	}
}

// Field numbers of workload.proto.
const (
	responseSVIDs     protowire.Number = 1 // X509SVIDResponse
	responseFederated protowire.Number = 3

	svidID     protowire.Number = 1 // X509SVID
	svidChain  protowire.Number = 2
	svidKey    protowire.Number = 3
	svidBundle protowire.Number = 4
	svidHint   protowire.Number = 5

	bundlesBundles protowire.Number = 2 // X509BundlesResponse

	mapKey   protowire.Number = 1 // any map's entry
	mapValue protowire.Number = 2
)

// encodeX509SVIDs makes an X509SVIDResponse.
func encodeX509SVIDs(v *registry.View) mem.BufferSlice {
	var w wire
	for _, id := range v.Identities {
		name, hint := id.SVID.ID.String(), id.Entry.Hint
		w.open(responseSVIDs, fieldSize(svidID, len(name))+fieldSize(svidChain, len(id.SVID.Chain))+
			fieldSize(svidKey, len(id.SVID.Key))+fieldSize(svidBundle, len(v.Bundle.DER))+fieldSize(svidHint, len(hint)))
		w.text(svidID, name)
		w.shared(svidChain, id.SVID.Chain)
		w.shared(svidKey, id.SVID.Key)
		w.shared(svidBundle, v.Bundle.DER)
		w.text(svidHint, hint)
	}
	w.bundles(responseFederated, v.Federated, certificates)
	return w.done()
}

// encodeX509Bundles makes an X509BundlesResponse.
func encodeX509Bundles(v *registry.View) mem.BufferSlice {
	var w wire
	w.bundle(bundlesBundles, v.Bundle, certificates)
	w.bundles(bundlesBundles, v.Federated, certificates)
	return w.done()
}

func certificates(b *registry.Bundle) []byte { return b.DER }

// bundles appends a map from trust domain ID to what content makes of the
// bundle, in order, so that equal maps are equal bytes.
func (w *wire) bundles(field protowire.Number, bundles map[spiffeid.TrustDomain]*registry.Bundle, content func(*registry.Bundle) []byte) {
	sorted := make([]*registry.Bundle, 0, len(bundles))
	for _, b := range bundles {
		if len(content(b)) > 0 { // one without authorities is no bundle to clients
			sorted = append(sorted, b)
		}
	}
	slices.SortFunc(sorted, func(a, b *registry.Bundle) int {
		return strings.Compare(a.TrustDomain.Name(), b.TrustDomain.Name())
	})
	for _, b := range sorted {
		w.bundle(field, b, content)
	}
}

func (w *wire) bundle(field protowire.Number, b *registry.Bundle, content func(*registry.Bundle) []byte) {
	name, value := b.TrustDomain.IDString(), content(b)
	w.open(field, fieldSize(mapKey, len(name))+fieldSize(mapValue, len(value)))
	w.text(mapKey, name)
	w.shared(mapValue, value)
}
