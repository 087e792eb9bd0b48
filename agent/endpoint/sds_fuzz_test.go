package endpoint

import (
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/narthex-id/narthex/agent/registry"
	"github.com/narthex-id/narthex/attestor"
)

// FuzzSecretRequests has a client send whatever it likes while what it may have
// changes: what is kept of it has bounds, what it is told is whole and told once.
func FuzzSecretRequests(f *testing.F) {
	for _, r := range []proto.Message{
		&discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA", "*"}, ResponseNonce: "1", TypeUrl: secretType},
		&discovery.DiscoveryRequest{ErrorDetail: &rpc.Status{Message: "no"}, ResponseNonce: "1"},
		&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "spiffe://example.org/b"}, ResourceNamesUnsubscribe: []string{"*", "default"}},
		&discovery.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"ALL": strings.Repeat("0", 32), "spiffe://example.org/c": "1"}},
	} {
		message, err := proto.Marshal(r)
		must(f, err)
		f.Add(message, message, false)
		f.Add([]byte{}, message, true)
	}
	ca := newAuthority(f, td)
	identity := func(path string) registry.Identity {
		return registry.Identity{Entry: &registry.Entry{}, SVID: ca.svid(spiffeid.RequireFromPath(td, path), time.Hour)}
	}
	views := []*registry.View{
		{Synced: true, Bundle: ca.bundle()},
		{
			Synced: true, Bundle: ca.bundle(), Identities: []registry.Identity{identity("/a"), identity("/b")},
			Federated: map[spiffeid.TrustDomain]*registry.Bundle{partner: newAuthority(f, partner).bundle()},
		},
		{Synced: true, Bundle: ca.bundle(), Identities: []registry.Identity{identity("/a")}, Pending: 1},
		{Synced: true, Bundle: ca.bundle(), Identities: []registry.Identity{identity("/c"), identity("/b")}},
	}
	f.Fuzz(func(t *testing.T, first, second []byte, incrementally bool) {
		var d dialect = stateOfTheWorld{}
		if incrementally {
			d = incremental{}
		}
		s := &Server{log: hclog.NewNullLogger(), limits: newLimiter(Limits{}, false), secrets: newSecrets(SDS{}.withDefaults(), false)}
		c := &secretCall{caller: &caller{server: s, subject: &subject{process: &attestor.Process{}, user: &user{}}, encoder: &encoder{}}, dialect: d}
		for i, message := range [][]byte{first, second, first, second} {
			r := d.newRequest()
			if proto.Unmarshal(message, r) != nil {
				return
			}
			if err := c.heed(r); err != nil {
				return // which ends the stream
			}
			c.bounded(t)
			for _, view := range []*registry.View{views[i], views[(i+1)%len(views)]} {
				c.hears(t, view)
			}
		}
		s.secrets.release(c.set)
		if n := len(s.secrets.sets.live) + len(s.secrets.texts.live); n != 0 {
			t.Errorf("%d are held for nobody", n)
		}
	})
}

// bounded checks what is kept of the client's words.
func (c *secretCall) bounded(t *testing.T) {
	t.Helper()
	known := c.subscription.known
	size := 0
	for i, k := range known {
		size += len(k.name)
		if k.name == "" || i > 0 && known[i-1].name >= k.name {
			t.Fatalf("%q after %q", k.name, known[max(0, i-1)].name)
		}
	}
	// The few that a wildcard told of are the agent's own words.
	if len(known) > maxSecretNames+8 || size > maxSecretNamesBytes+8*64 {
		t.Errorf("%d names of %d bytes are kept", len(known), size)
	}
}

// hears tells the client of a view, and checks what it is told.
func (c *secretCall) hears(t *testing.T, view *registry.View) {
	t.Helper()
	answer := c.news(view)
	if answer == nil {
		return
	}
	if again := c.news(view); again != nil {
		t.Error("the same is told twice")
	}
	var names []string
	switch c.dialect.(type) {
	case stateOfTheWorld:
		var r discovery.DiscoveryResponse
		must(t, proto.Unmarshal(answer.parts.Materialize(), &r))
		for _, resource := range r.Resources {
			names = append(names, (&envoy{t: t}).secret(resource).Name)
		}
	default:
		var r discovery.DeltaDiscoveryResponse
		must(t, proto.Unmarshal(answer.parts.Materialize(), &r))
		for _, resource := range r.Resources {
			names = append(names, (&envoy{t: t}).secret(resource.Resource).Name)
		}
		names = slices.Concat(names, r.RemovedResources)
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("%q are told of in one answer", names)
	}
}
