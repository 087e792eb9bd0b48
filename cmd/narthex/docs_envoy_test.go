package main

import (
	"strings"
	"testing"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authz "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	manager "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// TestEnvoyExamples reads what docs/ext-authz.md says of Envoy's side as Envoy
// does: an unknown key is an error, and so is a value out of its bounds.
func TestEnvoyExamples(t *testing.T) {
	read := 0
	for _, block := range yamlBlocks(t, "docs/ext-authz.md") {
		if !strings.HasPrefix(block, "# envoy.yaml") {
			continue
		}
		read++
		if strings.HasPrefix(block, "# envoy.yaml: the cluster") {
			var c cluster.Cluster
			readEnvoy(t, block, &c)
			if err := c.ValidateAll(); err != nil {
				t.Error(err)
			}
			continue
		}
		var b bootstrap.Bootstrap
		readEnvoy(t, block, &b)
		if err := b.ValidateAll(); err != nil {
			t.Error(err)
		}
		checkFilter(t, &b)
	}
	if read != 2 {
		t.Errorf("%d examples were read, want 2", read)
	}
}

// TestEnvoySecretsExample holds that the Envoy of docs/envoy.md asks for its
// certificates, and says who its peers must be.
func TestEnvoySecretsExample(t *testing.T) {
	blocks := yamlBlocks(t, "docs/envoy.md")
	if len(blocks) != 1 {
		t.Fatalf("%d examples were read, want 1", len(blocks))
	}
	var b bootstrap.Bootstrap
	readEnvoy(t, blocks[0], &b)
	if err := b.ValidateAll(); err != nil {
		t.Error(err)
	}
	var c tls.DownstreamTlsContext
	if err := b.StaticResources.Listeners[0].FilterChains[0].TransportSocket.GetTypedConfig().UnmarshalTo(&c); err != nil {
		t.Fatal(err)
	}
	if err := c.ValidateAll(); err != nil {
		t.Error(err)
	}
	combined := c.CommonTlsContext.GetCombinedValidationContext()
	if !c.RequireClientCertificate.GetValue() || len(combined.GetDefaultValidationContext().GetMatchTypedSubjectAltNames()) == 0 {
		t.Errorf("anybody may connect: %v", &c)
	}
	source := c.CommonTlsContext.TlsCertificateSdsSecretConfigs[0].SdsConfig
	for _, s := range []*core.ConfigSource{source, combined.ValidationContextSdsSecretConfig.SdsConfig} {
		asks := s.GetApiConfigSource().GetGrpcServices()[0].GetEnvoyGrpc().GetClusterName()
		if first := b.StaticResources.Clusters[0]; asks != first.Name || first.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetPipe() == nil {
			t.Errorf("secrets are asked of %q", asks)
		}
	}
}

func readEnvoy(t *testing.T, block string, into proto.Message) {
	t.Helper()
	text, err := yaml.YAMLToJSON([]byte(block))
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(text, into); err != nil {
		t.Fatalf("%s\n%v", block, err)
	}
}

// checkFilter holds that the example's filter fails closed.
func checkFilter(t *testing.T, b *bootstrap.Bootstrap) {
	t.Helper()
	var m manager.HttpConnectionManager
	if err := b.StaticResources.Listeners[0].FilterChains[0].Filters[0].GetTypedConfig().UnmarshalTo(&m); err != nil {
		t.Fatal(err)
	}
	var f authz.ExtAuthz
	if err := m.HttpFilters[0].GetTypedConfig().UnmarshalTo(&f); err != nil {
		t.Fatal(err)
	}
	if err := f.ValidateAll(); err != nil {
		t.Error(err)
	}
	if f.FailureModeAllow || !f.EncodeRawHeaders || f.AllowedHeaders != nil {
		t.Errorf("the filter is %v", &f)
	}
}
