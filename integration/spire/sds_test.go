//go:build integration

package spire_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/narthex-id/narthex/integration/internal/stage"
)

// newEnvoy returns a client of the SDS that an agent serves, with the messages
// of Envoy's API.
func newEnvoy(t *testing.T, socket string) secretservice.SecretDiscoveryServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return secretservice.NewSecretDiscoveryServiceClient(conn)
}

// secretsOf decodes resources, by name.
func secretsOf(t *testing.T, resources ...*anypb.Any) map[string]*tlsv3.Secret {
	t.Helper()
	all := map[string]*tlsv3.Secret{}
	for _, r := range resources {
		var s tlsv3.Secret
		if err := errors.Join(r.UnmarshalTo(&s), s.ValidateAll()); err != nil {
			t.Fatal(err)
		}
		all[s.Name] = &s
	}
	return all
}

// pair is the certificate and key of a secret, which belong together.
func pair(t *testing.T, s *tlsv3.Secret) tls.Certificate {
	t.Helper()
	c := s.GetTlsCertificate()
	p, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatalf("secret %s: %v", s.GetName(), err)
	}
	return p
}

// domains are the trust domains of a validation context.
func domains(t *testing.T, s *tlsv3.Secret) (names []string) {
	t.Helper()
	var config tlsv3.SPIFFECertValidatorConfig
	if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&config); err != nil {
		t.Fatalf("secret %s: %v", s.GetName(), err)
	}
	for _, d := range config.TrustDomains {
		names = append(names, d.Name)
	}
	return names
}

// sdsFixture is an agent of a server that federates, with an SVID that is
// replaced within seconds for whoever is root.
func sdsFixture(t *testing.T) (home *server, n *node, web entry) {
	t.Helper()
	home = newServer(t, serverOptions{trustDomain: "home.example", cacheReload: time.Second})
	partner := newServer(t, serverOptions{trustDomain: "partner.example", cacheReload: time.Second})
	home.trust(partner.bundle())
	n = newNode(t, "envoy", proxyUser)
	web = entry{path: "/web", parent: n.joins(home), selector: "unix:uid:0", ttl: 15 * time.Second, federates: []string{"partner.example"}}
	web.identifier = home.add(web)[0]
	n.start("agent")
	return home, n, web
}

// TestDeltaSecrets follows what an Envoy is given by a real server: an SVID
// and its rotation, an entry that comes later, and one that goes.
func TestDeltaSecrets(t *testing.T) {
	t.Parallel()
	home, n, web := sdsFixture(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	stream, err := newEnvoy(t, n.api).DeltaSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	later := home.id("/later")
	send := func(r *discovery.DeltaDiscoveryRequest) {
		t.Helper()
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ALL", "ROOTCA", home.td.IDString(), later}})
	have := map[string]*tlsv3.Secret{}
	// until receives until the client has what it waits for.
	until := func(what string, is func() bool) {
		t.Helper()
		for !is() {
			r, err := stream.Recv()
			if err != nil {
				t.Fatalf("waiting for %s: %v\n%s", what, err, n.Said())
			}
			for _, resource := range r.Resources {
				for name, s := range secretsOf(t, resource.Resource) {
					have[name] = s
				}
			}
			for _, name := range r.RemovedResources {
				delete(have, name)
			}
			send(&discovery.DeltaDiscoveryRequest{ResponseNonce: r.Nonce})
		}
	}

	until("what there is", func() bool { return have["default"] != nil && have["ALL"] != nil && len(domains(t, have["ALL"])) == 2 })
	first := pair(t, have["default"])
	home.verify(certificatesOf(t, "the SVID", string(have["default"].GetTlsCertificate().CertificateChain.GetInlineBytes())), home.id("/web"))
	for name, want := range map[string]string{"ALL": "home.example partner.example", "ROOTCA": "home.example", home.td.IDString(): "home.example"} {
		if got := strings.Join(domains(t, have[name]), " "); got != want {
			t.Errorf("%s is for %s, want %s", name, got, want)
		}
	}
	until("a renewed SVID", func() bool {
		return pair(t, have["default"]).Leaf.SerialNumber.Cmp(first.Leaf.SerialNumber) != 0
	})
	id := home.add(entry{path: "/later", parent: web.parent, selector: "unix:uid:0"})[0]
	until("the SVID of the entry that came", func() bool { return have[later] != nil })
	home.verify(certificatesOf(t, "the SVID", string(have[later].GetTlsCertificate().CertificateChain.GetInlineBytes())), later)
	home.remove(id)
	until("the end of the entry that went", func() bool { return have[later] == nil })
	home.remove(web.identifier)
	until("the end of all", func() bool { return len(have) == 0 })
}

// TestStreamSecrets is the same by the state of the world.
func TestStreamSecrets(t *testing.T) {
	t.Parallel()
	home, n, web := sdsFixture(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	stream, err := newEnvoy(t, n.api).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	later := home.id("/later")
	last := &discovery.DiscoveryResponse{}
	ask := func() {
		t.Helper()
		if err := stream.Send(&discovery.DiscoveryRequest{
			ResourceNames: []string{home.id("/web"), later, "ALL"}, VersionInfo: last.VersionInfo, ResponseNonce: last.Nonce,
		}); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	until := func(what string, is func(map[string]*tlsv3.Secret) bool) (have map[string]*tlsv3.Secret) {
		t.Helper()
		for {
			r, err := stream.Recv()
			if err != nil {
				t.Fatalf("waiting for %s: %v\n%s", what, err, n.Said())
			}
			if r.VersionInfo == last.VersionInfo {
				t.Errorf("version %s was sent twice in a row", r.VersionInfo)
			}
			last = r
			ask()
			if have = secretsOf(t, r.Resources...); is(have) {
				return have
			}
		}
	}

	have := until("what there is", func(have map[string]*tlsv3.Secret) bool { return have["ALL"] != nil && have[home.id("/web")] != nil })
	first := pair(t, have[home.id("/web")])
	until("a renewed SVID", func(have map[string]*tlsv3.Secret) bool {
		return pair(t, have[home.id("/web")]).Leaf.SerialNumber.Cmp(first.Leaf.SerialNumber) != 0
	})
	id := home.add(entry{path: "/later", parent: web.parent, selector: "unix:uid:0"})[0]
	until("the SVID of the entry that came", func(have map[string]*tlsv3.Secret) bool { return have[later] != nil })
	home.remove(id, web.identifier)
	until("the end of all", func(have map[string]*tlsv3.Secret) bool { return len(have) == 0 })
}

// TestSecretsAsStock asks SPIRE's own agent and ours for the same, and is given
// the same.
func TestSecretsAsStock(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "envoy", proxyUser)
	server.add(entry{path: "/web", parent: n.joins(server), selector: "unix:uid:0"})
	n.start("agent")
	stock := startStockAgent(t, server, entry{path: "/web", selector: "unix:uid:0"})
	for _, names := range [][]string{nil, {"default"}, {"ROOTCA"}, {"ALL"}, {server.td.IDString(), server.id("/web")}} {
		ask := func(socket string) (answer map[string]*tlsv3.Secret) {
			t.Helper()
			stage.Eventually(t, stage.Soon, fmt.Sprintf("%q are there", names), func() error {
				ctx, cancel := context.WithTimeout(t.Context(), stage.Soon)
				defer cancel()
				stream, err := newEnvoy(t, socket).StreamSecrets(ctx, grpc.WaitForReady(true))
				if err != nil {
					return err
				}
				if err := stream.Send(&discovery.DiscoveryRequest{ResourceNames: names, TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"}); err != nil {
					return err
				}
				r, err := stream.Recv()
				if err != nil {
					return err
				}
				answer = secretsOf(t, r.Resources...)
				return nil
			})
			return answer
		}
		theirs, ours := ask(stock), ask(n.api)
		for name, want := range theirs {
			got := ours[name]
			if got.GetTlsCertificate() != nil && want.GetTlsCertificate() != nil {
				// Each agent has a key and a certificate of its own.
				if a, b := pair(t, got).Leaf.URIs, pair(t, want).Leaf.URIs; !slices.EqualFunc(a, b, func(a, b *url.URL) bool { return *a == *b }) {
					t.Errorf("%q: %s is for %s, and for %s of the stock agent", names, name, a, b)
				}
				continue
			}
			if !proto.Equal(got, want) {
				t.Errorf("%q: %s is %v, and %v of the stock agent", names, name, got, want)
			}
		}
		if len(ours) != len(theirs) {
			t.Errorf("%q: %d secrets, and %d of the stock agent", names, len(ours), len(theirs))
		}
	}
}

// TestSecretsBeyondStock is what docs/envoy.md says of the two agents where they
// differ: what SPIRE's own does, and that ours does better.
func TestSecretsBeyondStock(t *testing.T) {
	t.Parallel()
	server := newServer(t, serverOptions{cacheReload: time.Second})
	n := newNode(t, "envoy", proxyUser)
	own := n.joins(server)
	server.add(entry{path: "/other", parent: own, selector: "unix:uid:4242"})
	n.start("agent")
	entries := []entry{{path: "/other", selector: "unix:uid:4242"}}
	socket := startStockAgent(t, server, entries...)
	ours, stock := newEnvoy(t, n.api), newEnvoy(t, socket)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	fetch := func(c secretservice.SecretDiscoveryServiceClient, typeURL string, names ...string) string {
		r, err := c.FetchSecrets(ctx, &discovery.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: names}, grpc.WaitForReady(true))
		if err != nil {
			return status.Code(err).String()
		}
		return strings.Join(slices.Sorted(maps.Keys(secretsOf(t, r.Resources...))), " ")
	}
	td, web := server.td.IDString(), server.id("/web")
	for _, test := range []struct {
		why                string
		typeURL            string
		names              []string
		wantStock, wantOur string
	}{
		{"before there is an entry", "", nil, td, "PermissionDenied"},
		{"a name that is not there", "", []string{"default", server.id("/none")}, "InvalidArgument", "default"},
		{"all names of a bundle", "", []string{td, "ROOTCA", "ALL"}, "InvalidArgument", "ALL ROOTCA " + td},
		{"another type", "type.googleapis.com/envoy.config.cluster.v3.Cluster", []string{"default"}, "default", "InvalidArgument"},
	} {
		if got := fetch(stock, test.typeURL, test.names...); got != test.wantStock {
			t.Errorf("%s: the stock agent says %s, not %s", test.why, got, test.wantStock)
		}
		if got := fetch(ours, test.typeURL, test.names...); got != test.wantOur {
			t.Errorf("%s: ours says %s, want %s", test.why, got, test.wantOur)
		}
		if test.names == nil { // from now on there is one
			server.add(entry{path: "/web", parent: own, selector: "unix:uid:0"}, entry{path: "/web", parent: entries[0].parent, selector: "unix:uid:0"})
			for _, c := range []secretservice.SecretDiscoveryServiceClient{ours, stock} {
				stage.Eventually(t, stage.Soon, "the SVID is there", func() error {
					if got := fetch(c, "", web); got != web {
						return errors.New(got)
					}
					return nil
				})
			}
		}
	}
	delta, err := stock.DeltaSecrets(ctx)
	if err == nil {
		_, err = delta.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("the stock agent says %v of DeltaSecrets", err)
	}
	for _, test := range []struct {
		client secretservice.SecretDiscoveryServiceClient
		want   string
	}{{stock, td + " " + web}, {ours, "ROOTCA"}} {
		if got := askAgain(t, ctx, test.client); got != test.want {
			t.Errorf("a later request without names is answered by %s, want %s", got, test.want)
		}
	}
}

// askAgain asks for a name, then for none, then for another where the second was
// not answered, and returns what the second answer holds.
func askAgain(t *testing.T, ctx context.Context, c secretservice.SecretDiscoveryServiceClient) string {
	t.Helper()
	stream, err := c.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	last := &discovery.DiscoveryResponse{}
	for _, names := range [][]string{{"default"}, nil, {"ROOTCA"}} {
		if err := stream.Send(&discovery.DiscoveryRequest{ResourceNames: names, VersionInfo: last.VersionInfo, ResponseNonce: last.Nonce}); err != nil {
			t.Fatal(err)
		}
		if names == nil {
			continue
		}
		if last, err = stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(secretsOf(t, last.Resources...))), " ")
}
