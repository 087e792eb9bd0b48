package endpoint

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/narthex-id/narthex/agent/registry"
)

// envoy is a client of SDS that reads what it is sent as Envoy does.
type envoy struct {
	t      testing.TB
	client secretservice.SecretDiscoveryServiceClient
}

func (f *fixture) envoy() *envoy {
	f.t.Helper()
	return &envoy{f.t, secretservice.NewSecretDiscoveryServiceClient(f.dial())}
}

// secret decodes a Secret and holds it to Envoy's own rules.
func (e *envoy) secret(a *anypb.Any) *tlsv3.Secret {
	e.t.Helper()
	var s tlsv3.Secret
	must(e.t, a.UnmarshalTo(&s))
	must(e.t, s.ValidateAll())
	return &s
}

// describe says what a secret is: the name, and the ID of the SVID or the
// trust domains of the bundles.
func (e *envoy) describe(s *tlsv3.Secret) string {
	e.t.Helper()
	if c := s.GetTlsCertificate(); c != nil {
		pair, err := tls.X509KeyPair(c.CertificateChain.GetInlineBytes(), c.PrivateKey.GetInlineBytes())
		must(e.t, err)
		return s.Name + "=" + pair.Leaf.URIs[0].Path
	}
	context := s.GetValidationContext()
	if roots := context.GetTrustedCa(); roots != nil {
		return s.Name + "=roots:" + strings.Join(e.roots(roots), ",")
	}
	custom := context.GetCustomValidatorConfig()
	if custom.GetName() != "envoy.tls.cert_validator.spiffe" {
		e.t.Fatalf("secret %s: %v", s.Name, s)
	}
	var config tlsv3.SPIFFECertValidatorConfig
	must(e.t, custom.TypedConfig.UnmarshalTo(&config))
	must(e.t, config.ValidateAll())
	var domains []string
	for _, d := range config.TrustDomains {
		if got := e.roots(d.TrustBundle); !slices.Equal(got, []string{d.Name}) {
			e.t.Errorf("the bundle of %s is of %s", d.Name, got)
		}
		domains = append(domains, d.Name)
	}
	return s.Name + "=" + strings.Join(domains, ",")
}

// roots returns the common names in a bundle.
func (e *envoy) roots(source *core.DataSource) (names []string) {
	e.t.Helper()
	for rest := source.GetInlineBytes(); len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			e.t.Fatal("not PEM")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		must(e.t, err)
		names = append(names, cert.Subject.CommonName)
	}
	return names
}

func (e *envoy) describeAll(resources []*anypb.Any) string {
	e.t.Helper()
	all := make([]string, len(resources))
	for i, r := range resources {
		all[i] = e.describe(e.secret(r))
	}
	return strings.Join(all, " ")
}

// world is one StreamSecrets stream.
type world struct {
	*envoy
	stream secretservice.SecretDiscoveryService_StreamSecretsClient
	last   *discovery.DiscoveryResponse
}

func (e *envoy) world(ctx context.Context) *world {
	e.t.Helper()
	stream, err := e.client.StreamSecrets(ctx)
	must(e.t, err)
	return &world{envoy: e, stream: stream, last: &discovery.DiscoveryResponse{}}
}

// ask asks for these names, as the answer to the last response.
func (w *world) ask(names ...string) {
	w.t.Helper()
	w.send(&discovery.DiscoveryRequest{ResourceNames: names, VersionInfo: w.last.VersionInfo, ResponseNonce: w.last.Nonce, TypeUrl: secretType})
}

func (w *world) send(r *discovery.DiscoveryRequest) {
	w.t.Helper()
	must(w.t, w.stream.Send(r))
}

// want receives the next response and says what it must hold.
func (w *world) want(want string) {
	w.t.Helper()
	response, err := w.stream.Recv()
	must(w.t, err)
	if response.TypeUrl != secretType || response.Nonce == w.last.Nonce || response.VersionInfo == w.last.VersionInfo {
		w.t.Errorf("after nonce %q, version %q, got nonce %q, version %q, type %q", w.last.Nonce, w.last.VersionInfo, response.Nonce, response.VersionInfo, response.TypeUrl)
	}
	w.last = response
	if got := w.describeAll(response.Resources); got != want {
		w.t.Errorf("got  %s\nwant %s", got, want)
	}
}

// delta is one DeltaSecrets stream.
type delta struct {
	*envoy
	stream   secretservice.SecretDiscoveryService_DeltaSecretsClient
	last     *discovery.DeltaDiscoveryResponse
	versions map[string]string
}

func (e *envoy) delta(ctx context.Context) *delta {
	e.t.Helper()
	stream, err := e.client.DeltaSecrets(ctx)
	must(e.t, err)
	return &delta{envoy: e, stream: stream, last: &discovery.DeltaDiscoveryResponse{}, versions: map[string]string{}}
}

// subscribe asks for names, in a request that answers no response.
func (d *delta) subscribe(names ...string) {
	d.t.Helper()
	d.send(&discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: names})
}

func (d *delta) unsubscribe(names ...string) {
	d.t.Helper()
	d.send(&discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesUnsubscribe: names})
}

func (d *delta) send(r *discovery.DeltaDiscoveryRequest) {
	d.t.Helper()
	must(d.t, d.stream.Send(r))
}

// want receives the next response, says what it must hold and acknowledges it.
// What is removed stands there with a minus sign.
func (d *delta) want(want string) {
	d.t.Helper()
	response, err := d.stream.Recv()
	must(d.t, err)
	var all []string
	for _, r := range response.Resources {
		s := d.secret(r.Resource)
		if s.Name != r.Name || r.Version == "" || r.Version == d.versions[r.Name] {
			d.t.Errorf("resource %q is the secret %q, version %q after %q", r.Name, s.Name, r.Version, d.versions[r.Name])
		}
		d.versions[r.Name] = r.Version
		all = append(all, d.describe(s))
	}
	for _, name := range response.RemovedResources {
		delete(d.versions, name)
		all = append(all, "-"+name)
	}
	if got := strings.Join(all, " "); got != want {
		d.t.Errorf("got  %s\nwant %s", got, want)
	}
	if response.TypeUrl != secretType || response.Nonce == d.last.Nonce || response.SystemVersionInfo == "" {
		d.t.Errorf("got nonce %q, version %q, type %q", response.Nonce, response.SystemVersionInfo, response.TypeUrl)
	}
	d.last = response
	d.send(&discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: response.Nonce})
}

// secretFixture is a server with two entries and a federated trust domain.
func secretFixture(t testing.TB, options ...func(*Config)) *fixture {
	t.Helper()
	f := serve(t, options...)
	a, b := f.entry("a", "/a"), f.entry("b", "/b")
	b.FederatesWith = []spiffeid.TrustDomain{partner}
	f.register(a, b)
	f.federate()
	return f
}

func (f *fixture) federate() {
	f.agent.Apply(registry.Update{HasFederated: true, Federated: map[spiffeid.TrustDomain]*registry.Bundle{
		partner: newAuthority(f.t, partner).bundle(),
	}})
}

func TestSecretNames(t *testing.T) {
	f := secretFixture(t)
	renamed := secretFixture(t, func(c *Config) {
		c.SDS = SDS{DefaultSVIDName: "mine", DefaultBundleName: "null", DefaultAllBundlesName: "ROOTCA"}
	})
	disabled := secretFixture(t, func(c *Config) { c.SDS.DisableSPIFFECertValidation = true })
	metadata := func(value *structpb.Value) *core.Node {
		return &core.Node{Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": value}}}
	}
	version := func(major, minor uint32) *core.Node {
		return &core.Node{UserAgentVersionType: &core.Node_UserAgentBuildVersion{UserAgentBuildVersion: &core.BuildVersion{
			Version: &envoytype.SemanticVersion{MajorNumber: major, MinorNumber: minor},
		}}}
	}
	const everything = "spiffe://example.org=example.org spiffe://example.org/a=/a spiffe://example.org/b=/b spiffe://partner.example=partner.example"
	for _, test := range []struct {
		why   string
		f     *fixture
		names []string
		node  *core.Node
		want  string
	}{
		{"no names are all that is the caller's", f, nil, nil, everything},
		{"and so is the name of everything", f, []string{"*"}, nil, everything},
		{"an empty name is none", f, []string{""}, nil, everything},
		{"an SVID by its ID", f, []string{"spiffe://example.org/b"}, nil, "spiffe://example.org/b=/b"},
		{"the first SVID", f, []string{"default"}, nil, "default=/a"},
		{"both ways at once", f, []string{"spiffe://example.org/a", "default"}, nil, "default=/a spiffe://example.org/a=/a"},
		{"all names of one bundle at once", f, []string{"spiffe://example.org", "ROOTCA", "ALL"}, nil, "ALL=example.org,partner.example ROOTCA=example.org spiffe://example.org=example.org"},
		{"another's bundle", f, []string{"spiffe://partner.example"}, nil, "spiffe://partner.example=partner.example"},
		{"what is not there is left out", f, []string{"spiffe://example.org/c", "default", "nothing"}, nil, "default=/a"},
		{"a name beside everything", f, []string{"*", "ROOTCA"}, nil, "ROOTCA=example.org " + everything},
		{"other names by configuration", renamed, []string{"mine", "null", "ROOTCA", "ALL", "default"}, nil, "ROOTCA=example.org,partner.example mine=/a null=example.org"},
		{"roots by configuration, which are for no trust domain", disabled, []string{"ROOTCA", "ALL", "spiffe://partner.example"}, nil, "ROOTCA=roots:example.org spiffe://partner.example=roots:partner.example"},
		{"the node says so", f, []string{"ROOTCA", "ALL"}, metadata(structpb.NewBoolValue(true)), "ROOTCA=roots:example.org"},
		{"as text", f, []string{"ROOTCA"}, metadata(structpb.NewStringValue("true")), "ROOTCA=roots:example.org"},
		{"the node says no", disabled, []string{"ALL"}, metadata(structpb.NewStringValue("false")), "ALL=example.org,partner.example"},
		{"the node says nothing", f, []string{"ROOTCA"}, metadata(structpb.NewNumberValue(1)), "ROOTCA=example.org"},
		{"an Envoy without the validator", f, []string{"ROOTCA"}, version(1, 17), "ROOTCA=roots:example.org"},
		{"one with it", f, []string{"ROOTCA"}, version(1, 18), "ROOTCA=example.org"},
	} {
		e := test.f.envoy()
		w := e.world(testContext(t))
		w.send(&discovery.DiscoveryRequest{ResourceNames: test.names, Node: test.node})
		t.Log(test.why)
		w.want(test.want)
		fetched, err := e.client.FetchSecrets(testContext(t), &discovery.DiscoveryRequest{ResourceNames: test.names, Node: test.node})
		must(t, err)
		if got := e.describeAll(fetched.Resources); got != test.want || fetched.VersionInfo != w.last.VersionInfo {
			t.Errorf("fetched %s, version %s\nwant    %s, version %s", got, fetched.VersionInfo, test.want, w.last.VersionInfo)
		}
		d := e.delta(testContext(t))
		d.send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: test.names, Node: test.node})
		d.want(test.want)
	}
}

func TestStreamSecretsFollows(t *testing.T) {
	f := secretFixture(t)
	w := f.envoy().world(testContext(t))
	w.ask("default", "spiffe://example.org/c", "spiffe://partner.example")
	w.want("default=/a spiffe://partner.example=partner.example")
	w.ask("default", "spiffe://example.org/c", "spiffe://partner.example") // ACK: no answer

	f.sign(2 * time.Hour)
	w.want("default=/a spiffe://partner.example=partner.example")
	f.register(f.entry("c", "/c")) // signs all anew
	w.want("default=/a spiffe://example.org/c=/c spiffe://partner.example=partner.example")

	f.federate() // another authority
	w.want("default=/a spiffe://example.org/c=/c spiffe://partner.example=partner.example")
	w.ask("default") // less: nothing to tell
	w.ask("default", "ROOTCA")
	w.want("ROOTCA=example.org default=/a")
	w.ask("default", "ROOTCA", "spiffe://example.org/c")
	w.want("ROOTCA=example.org default=/a spiffe://example.org/c=/c")

	f.entries = f.entries[:2] // without c
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	w.want("ROOTCA=example.org default=/a")
	f.agent.Apply(registry.Update{HasEntries: true}) // without any
	w.want("")
	if n := strings.Count(f.log.String(), "no identity issued"); n != 1 {
		t.Errorf("the loss is %d times in the log:\n%s", n, f.log)
	}
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	f.sign(time.Hour)
	w.want("ROOTCA=example.org default=/a")
}

func TestDeltaSecretsFollows(t *testing.T) {
	f := secretFixture(t)
	d := f.envoy().delta(testContext(t))
	d.subscribe("default", "spiffe://example.org/c")
	d.want("default=/a")
	f.sign(2 * time.Hour)
	d.want("default=/a")
	d.subscribe("ROOTCA")
	d.want("ROOTCA=example.org")
	d.unsubscribe("default")
	d.subscribe("ALL")
	d.want("ALL=example.org,partner.example")
	d.unsubscribe("ALL")
	f.register(f.entry("c", "/c")) // signs all anew
	d.want("spiffe://example.org/c=/c")

	delete(d.versions, "ROOTCA") // thrown away, and wanted again
	d.subscribe("ROOTCA")
	d.want("ROOTCA=example.org")

	f.entries = f.entries[:2] // without c
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	d.want("-spiffe://example.org/c")
	f.agent.Apply(registry.Update{HasEntries: true}) // without any
	d.want("-ROOTCA")
	f.agent.Apply(registry.Update{HasEntries: true, Entries: f.entries})
	f.sign(time.Hour)
	d.want("ROOTCA=example.org")
}

func TestDeltaWildcard(t *testing.T) {
	f := secretFixture(t)
	d := f.envoy().delta(testContext(t))
	d.subscribe()
	d.want("spiffe://example.org=example.org spiffe://example.org/a=/a spiffe://example.org/b=/b spiffe://partner.example=partner.example")
	d.subscribe("default")
	d.want("default=/a")
	d.unsubscribe("default")
	d.want("-default") // which the wildcard does not cover
	delete(d.versions, "spiffe://example.org/a")
	d.subscribe("spiffe://example.org/a")
	d.want("spiffe://example.org/a=/a")
	delete(d.versions, "spiffe://example.org/a")
	d.unsubscribe("spiffe://example.org/a")
	d.want("spiffe://example.org/a=/a") // which it does
	d.unsubscribe("*")
	d.subscribe("spiffe://example.org/b") // was told of, but not by name
	d.versions = map[string]string{}
	d.want("spiffe://example.org/b=/b")
}

// A client that connects again is sent what it does not have.
func TestDeltaResumes(t *testing.T) {
	f := secretFixture(t)
	first := f.envoy().delta(testContext(t))
	first.subscribe("*", "default", "ROOTCA")
	first.want("ROOTCA=example.org default=/a spiffe://example.org=example.org spiffe://example.org/a=/a spiffe://example.org/b=/b spiffe://partner.example=partner.example")
	versions := first.versions
	versions["spiffe://example.org/a"] = strings.Repeat("0", 32)
	versions["spiffe://example.org/b"] = "7"
	versions["spiffe://example.org/c"] = versions["default"]

	again := f.envoy().delta(testContext(t))
	again.send(&discovery.DeltaDiscoveryRequest{
		ResourceNamesSubscribe: []string{"*", "default", "ROOTCA"}, InitialResourceVersions: versions,
	})
	again.want("spiffe://example.org/a=/a spiffe://example.org/b=/b -spiffe://example.org/c")
}

func TestSecretsRejected(t *testing.T) {
	f := secretFixture(t)
	w := f.envoy().world(testContext(t))
	w.ask("default")
	w.want("default=/a")
	problem := &rpc.Status{Code: int32(codes.Internal), Message: "bad\nkey " + strings.Repeat("x", 4000)}
	for range 3 {
		w.send(&discovery.DiscoveryRequest{ResourceNames: []string{"default"}, ResponseNonce: w.last.Nonce, ErrorDetail: problem})
	}
	rejections := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d rejections are in the log", n), func() bool {
			return strings.Count(f.log.String(), "rejects its secrets") == n
		})
	}
	rejections(1)
	f.sign(2 * time.Hour) // what it rejected is not sent again, what changed is
	w.want("default=/a")
	line := f.log.String()
	if strings.Count(line, "rejects its secrets") != 1 || strings.Contains(line, "bad\nkey") || len(line) > 1000 || !strings.Contains(line, "version=") {
		t.Errorf("the log says %s", line)
	}
	w.send(&discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}, ResponseNonce: w.last.Nonce, ErrorDetail: problem})
	w.want("ROOTCA=example.org") // it may want something else at once

	d := f.envoy().delta(testContext(t))
	d.subscribe("default")
	d.want("default=/a")
	d.send(&discovery.DeltaDiscoveryRequest{ResponseNonce: d.last.Nonce, ErrorDetail: problem})
	rejections(3)
	f.sign(time.Hour)
	d.want("default=/a")
}

// A request that answers an answer before the last is not heeded.
func TestStaleNonce(t *testing.T) {
	f := secretFixture(t)
	w := f.envoy().world(testContext(t))
	w.ask("default")
	w.want("default=/a")
	old := w.last.Nonce
	f.sign(2 * time.Hour)
	w.want("default=/a")
	w.send(&discovery.DiscoveryRequest{ResourceNames: []string{"default", "ALL"}, ResponseNonce: old})
	w.ask("default", "ROOTCA")
	w.want("ROOTCA=example.org default=/a")
}

func TestWorldWildcardEnds(t *testing.T) {
	f := secretFixture(t)
	w := f.envoy().world(testContext(t))
	w.ask()
	w.want("spiffe://example.org=example.org spiffe://example.org/a=/a spiffe://example.org/b=/b spiffe://partner.example=partner.example")
	w.ask() // still everything
	w.ask("ROOTCA")
	w.want("ROOTCA=example.org")
	w.ask() // nothing: it named something before
	f.sign(2 * time.Hour)
	w.ask("default")
	w.want("default=/a")
}

// Equal secrets have equal versions, on whatever stream and from whatever
// agent.
func TestSecretVersions(t *testing.T) {
	f, other := secretFixture(t), serve(t)
	svid := f.ca.svid(spiffeid.RequireFromPath(td, "/a"), time.Hour)
	version := func(f *fixture) string {
		f.agent.Apply(registry.Update{SVIDs: map[string]*registry.SVID{"a": svid}})
		response, err := f.envoy().client.FetchSecrets(testContext(t), &discovery.DiscoveryRequest{ResourceNames: []string{"default"}})
		must(t, err)
		return response.VersionInfo
	}
	other.register(other.entry("a", "/a"))
	if a, b := version(f), version(other); a != b {
		t.Errorf("two agents say %s and %s", a, b)
	}
}

// Who has no entry is held until it has one, and given nothing.
func TestSecretsWait(t *testing.T) {
	f := serve(t)
	e := f.envoy()
	_, err := e.client.FetchSecrets(testContext(t), &discovery.DiscoveryRequest{})
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	w, d := e.world(testContext(t)), e.delta(testContext(t))
	w.ask()
	d.subscribe("default", "ROOTCA")
	eventually(t, "both are held", func() bool {
		return strings.Count(f.log.String(), "method=StreamSecrets")+strings.Count(f.log.String(), "method=DeltaSecrets") == 2
	})
	if f.agent.syncs != 3 {
		t.Errorf("the server was asked %d times, want 3", f.agent.syncs)
	}
	f.register(f.entry("a", "/a"))
	w.want("spiffe://example.org=example.org spiffe://example.org/a=/a")
	d.want("ROOTCA=example.org default=/a")
	if n := f.counter("narthex_workload_api_streams", "StreamSecrets"); n != 1 {
		t.Errorf("%v streams are counted, want 1", n)
	}
	_, err = e.client.FetchSecrets(testContext(t), &discovery.DiscoveryRequest{ResourceNames: []string{"spiffe://example.org/b"}})
	wantCode(t, err, codes.NotFound, "none of the 1 resources")
	if n := f.counter("narthex_workload_api_requests_total", "FetchSecrets", "NotFound"); n != 1 {
		t.Errorf("counted %v calls, want 1", n)
	}
}

func TestAnonymousSecrets(t *testing.T) {
	f := serve(t, func(c *Config) { c.AllowUnauthenticatedVerifiers = true })
	w := f.envoy().world(testContext(t))
	w.ask()
	w.want("spiffe://example.org=example.org")
}

// An SVID that is being replaced is not sent and not taken back either: an
// entry still matches.
func TestSecretsPending(t *testing.T) {
	ca := newAuthority(t, td)
	bundle := ca.bundle()
	a := registry.Identity{Entry: &registry.Entry{}, SVID: ca.svid(spiffeid.RequireFromPath(td, "/a"), time.Hour)}
	held := newSecrets(SDS{}.withDefaults(), false)
	var s subscription
	must(t, s.add([]string{"default", "ROOTCA", "spiffe://example.org/b"}))
	for i, step := range []struct {
		view registry.View
		want string
	}{
		{registry.View{Synced: true, Pending: 1, Bundle: bundle}, "ROOTCA"},
		{registry.View{Synced: true, Identities: []registry.Identity{a}, Bundle: bundle}, "default"},
		{registry.View{Synced: true, Pending: 1, Bundle: bundle}, ""},
		{registry.View{Synced: true, Pending: 1, Bundle: newAuthority(t, td).bundle()}, "ROOTCA"},
		{registry.View{Synced: true, Identities: []registry.Identity{a}, Bundle: bundle}, "ROOTCA"},
		{registry.View{Synced: true, Bundle: bundle}, "-ROOTCA -default"},
	} {
		set := held.acquire(secretKey{view: &step.view})
		news, gone := s.changes(set)
		var got []string
		for _, x := range news {
			got = append(got, x.name)
		}
		for _, name := range gone {
			got = append(got, "-"+name)
		}
		if got := strings.Join(got, " "); got != step.want {
			t.Errorf("step %d: got %q, want %q", i, got, step.want)
		}
		s.tell(set)
		held.release(set)
	}
}

func TestSecretsEnd(t *testing.T) {
	tooMany := make([]string, maxSecretNames+1)
	tooLong := make([]string, 9)
	for i := range tooMany {
		tooMany[i] = fmt.Sprint(i)
	}
	for i := range tooLong {
		tooLong[i] = fmt.Sprint(i) + strings.Repeat("x", maxSecretName-1)
	}
	f := secretFixture(t)
	for _, test := range []struct {
		why  string
		req  *discovery.DiscoveryRequest
		code codes.Code
		say  string
	}{
		{"another type", &discovery.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, codes.InvalidArgument, "envoy.config.cluster.v3.Cluster"},
		{"too many names", &discovery.DiscoveryRequest{ResourceNames: tooMany}, codes.InvalidArgument, "more resources than the 256"},
		{"too many bytes", &discovery.DiscoveryRequest{ResourceNames: tooLong}, codes.InvalidArgument, "of 16384 bytes together"},
		{"a long name", &discovery.DiscoveryRequest{ResourceNames: []string{tooLong[0] + "x"}}, codes.InvalidArgument, "2049 bytes"},
		{"locators", &discovery.DiscoveryRequest{ResourceLocators: []*discovery.ResourceLocator{{Name: "xdstp:///x"}}}, codes.InvalidArgument, "name the resources"},
		{"too large a request", &discovery.DiscoveryRequest{VersionInfo: strings.Repeat("x", 64<<10)}, codes.ResourceExhausted, ""},
	} {
		w := f.envoy().world(testContext(t))
		w.send(test.req)
		_, err := w.stream.Recv()
		t.Log(test.why)
		wantCode(t, err, test.code, test.say)
		// And of a stream that is answered already.
		d := f.envoy().delta(testContext(t))
		d.subscribe("default")
		d.want("default=/a")
		again := &discovery.DeltaDiscoveryRequest{TypeUrl: test.req.TypeUrl, ResourceNamesSubscribe: test.req.ResourceNames, ResourceLocatorsSubscribe: test.req.ResourceLocators}
		if test.req.VersionInfo != "" {
			again.ResponseNonce = test.req.VersionInfo
		}
		d.send(again)
		_, err = d.stream.Recv()
		wantCode(t, err, test.code, test.say)
	}
	eventually(t, "nothing is held", func() bool { return f.server.Streams() == 0 })
}

func TestSecretsTakenBack(t *testing.T) {
	f := secretFixture(t)
	w := f.envoy().world(testContext(t))
	w.ask("default")
	w.want("default=/a")
	f.agent.setUnready(errDown)
	f.agent.Apply(registry.Update{Wipe: true})
	_, err := w.stream.Recv()
	wantCode(t, err, codes.PermissionDenied, "taken back", errDown.Error())
}

func TestSecretsHangUp(t *testing.T) {
	f := secretFixture(t)
	w := f.envoy().world(testContext(t))
	w.ask("default")
	must(t, w.stream.CloseSend())
	w.want("default=/a")
	if _, err := w.stream.Recv(); err == nil || err.Error() != "EOF" {
		t.Errorf("got %v, want the end of the stream", err)
	}
	w = f.envoy().world(testContext(t))
	w.ask("default")
	w.want("default=/a")
	must(t, f.stop())
	_, err := w.stream.Recv()
	wantCode(t, err, codes.Unavailable)
}

// Who sends requests all the time is told what is taken back all the same, and
// held to the limits.
func TestSecretsFlood(t *testing.T) {
	f := secretFixture(t, func(c *Config) { c.Limits = Limits{RequestsPerSecond: 1, Burst: 1000} })
	d := f.envoy().delta(testContext(t))
	d.subscribe("default")
	d.want("default=/a")
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for d.stream.Send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}}) == nil {
		}
	}()
	f.agent.Apply(registry.Update{HasEntries: true})
	removed := false
	for {
		response, err := d.stream.Recv()
		if err != nil {
			wantCode(t, err, codes.ResourceExhausted, "times a second")
			break
		}
		if removed && len(response.Resources) > 0 {
			t.Fatal("a secret was sent after it was taken back")
		}
		removed = removed || len(response.RemovedResources) > 0
	}
	<-flooded
	if !removed {
		t.Error("what was taken back was not told")
	}
}

func TestSecretsAreShared(t *testing.T) {
	f := secretFixture(t)
	var streams []*world
	for range 3 {
		w := f.envoy().world(testContext(t))
		w.ask("default", "ALL", "ROOTCA")
		w.want("ALL=example.org,partner.example ROOTCA=example.org default=/a")
		streams = append(streams, w)
	}
	s := &f.server.secrets
	s.sets.mu.Lock()
	sets := len(s.sets.live)
	s.sets.mu.Unlock()
	s.texts.mu.Lock()
	texts := len(s.texts.live)
	s.texts.mu.Unlock()
	if sets != 1 || texts != 3 {
		t.Errorf("%d sets and %d texts are held, want 1 and 3", sets, texts)
	}
	for _, w := range streams {
		must(t, w.stream.CloseSend())
	}
	eventually(t, "nothing is held", func() bool {
		s.sets.mu.Lock()
		defer s.sets.mu.Unlock()
		s.texts.mu.Lock()
		defer s.texts.mu.Unlock()
		return len(s.sets.live)+len(s.texts.live) == 0
	})
}
