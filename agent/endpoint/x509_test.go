package endpoint

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
)

// What the encoders write is what protobuf's own encoder writes.
func TestEncoding(t *testing.T) {
	ca, other, third := newAuthority(t, td), newAuthority(t, partner), newAuthority(t, spiffeid.RequireTrustDomainFromString("a.example"))
	a, b := ca.svid(spiffeid.RequireFromPath(td, "/a"), time.Hour), ca.svid(spiffeid.RequireFromPath(td, "/b"), time.Hour)
	own, federated := ca.bundle(), map[spiffeid.TrustDomain]*registry.Bundle{other.td: other.bundle(), third.td: third.bundle()}
	nobody := spiffeid.RequireTrustDomainFromString("nobody.example") // clients cannot read a bundle without authorities
	federated[nobody] = &registry.Bundle{TrustDomain: nobody}
	one := &workload.X509SVID{SpiffeId: a.ID.String(), X509Svid: a.Chain, X509SvidKey: a.Key, Bundle: own.DER, Hint: "external"}
	two := &workload.X509SVID{SpiffeId: b.ID.String(), X509Svid: b.Chain, X509SvidKey: b.Key, Bundle: own.DER}
	identities := []registry.Identity{{Entry: &registry.Entry{Hint: "external"}, SVID: a}, {Entry: &registry.Entry{}, SVID: b}}
	foreign := map[string][]byte{other.td.IDString(): other.cert.Raw, third.td.IDString(): third.cert.Raw}
	empty := &registry.Bundle{TrustDomain: td}

	for _, test := range []struct {
		name    string
		view    *registry.View
		svids   *workload.X509SVIDResponse
		bundles *workload.X509BundlesResponse
	}{
		{
			"one", &registry.View{Identities: identities[:1], Bundle: own},
			&workload.X509SVIDResponse{Svids: []*workload.X509SVID{one}},
			&workload.X509BundlesResponse{Bundles: map[string][]byte{td.IDString(): own.DER}},
		},
		{
			"two, federated", &registry.View{Identities: identities, Bundle: own, Federated: federated},
			&workload.X509SVIDResponse{Svids: []*workload.X509SVID{one, two}, FederatedBundles: foreign},
			&workload.X509BundlesResponse{Bundles: map[string][]byte{td.IDString(): own.DER, other.td.IDString(): other.cert.Raw, third.td.IDString(): third.cert.Raw}},
		},
		{
			"empty bundle", &registry.View{Bundle: empty},
			&workload.X509SVIDResponse{},
			&workload.X509BundlesResponse{Bundles: map[string][]byte{td.IDString(): nil}},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			var svids workload.X509SVIDResponse
			must(t, proto.Unmarshal(encodeX509SVIDs(test.view).Materialize(), &svids))
			if !proto.Equal(&svids, test.svids) {
				t.Errorf("got %v\nwant %v", &svids, test.svids)
			}
			var bundles workload.X509BundlesResponse
			must(t, proto.Unmarshal(encodeX509Bundles(test.view).Materialize(), &bundles))
			if len(bundles.Bundles) != len(test.bundles.Bundles) {
				t.Errorf("got %v\nwant %v", &bundles, test.bundles)
			}
			for name, der := range test.bundles.Bundles {
				if got, ok := bundles.Bundles[name]; !ok || string(got) != string(der) {
					t.Errorf("%s: got %d bytes (%t), want %d", name, len(got), ok, len(der))
				}
			}
		})
	}
}

func TestFramesAreSharedAndDropped(t *testing.T) {
	s := newFrames()
	made := 0
	e := &encoder{encode: func(v *registry.View) mem.BufferSlice {
		made++
		var w wire
		w.shared(1, v.Bundle.DER)
		return w.done()
	}}
	view := &registry.View{Bundle: &registry.Bundle{DER: []byte("der")}}
	equal := &registry.View{Bundle: &registry.Bundle{DER: []byte("der")}}
	a, b, c := s.acquire(e, view), s.acquire(e, view), s.acquire(e, equal)
	if a != b || made != 2 {
		t.Errorf("two callers of one view: %d frames made", made)
	}
	if !a.same(c) || a.same(nil) {
		t.Error("equal answers are not the same")
	}
	if &a.parts[1].ReadOnlyData()[0] != &view.Bundle.DER[0] {
		t.Error("the bundle was copied")
	}
	s.release(nil)
	for _, f := range []*frame{a, b, c} {
		s.release(f)
	}
	if len(s.live) != 0 {
		t.Errorf("%d frames are left", len(s.live))
	}
}
