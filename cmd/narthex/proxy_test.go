package main

import (
	"slices"
	"testing"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/proxy"
)

// TestHTTP2Settings: what narthex.yaml says of HTTP/2 reaches the proxy, and the
// longest name of a service that one takes the other takes too.
func TestHTTP2Settings(t *testing.T) {
	t.Parallel()
	service := string(slices.Repeat([]byte("s"), 255))
	c, err := config.Parse("narthex.yaml", []byte(`proxy:
  policies: [rules.yaml]
  listeners:
    - name: orders
      direction: inbound
      bind: 127.0.0.1:1
      target: 127.0.0.1:2
      protocol: http
      http: {versions: [http/1.1, h2], max_streams: 7}
      upstream: {protocol: h2c, health: {grpc: {service: `+service+`}}}
    - name: bytes
      direction: inbound
      bind: 127.0.0.1:3
      target: 127.0.0.1:4
    - name: out
      direction: outbound
      bind: 127.0.0.1:5
      target: 127.0.0.1:6
      expect: ["spiffe://example.org/a"]
      protocol: http
      upstream: {protocol: http1}
`))
	if err != nil {
		t.Fatal(err)
	}
	got := (&proxyRunner{}).proxyConfig(c, nil).Listeners
	in, bytes, out := got[0], got[1], got[2]
	if !slices.Equal(in.HTTP.Versions, []string{"http/1.1", "h2"}) || in.HTTP.MaxStreams != 7 || in.UpstreamProtocol != proxy.ProtocolHTTP2 {
		t.Errorf("%+v, %s", in.HTTP, in.UpstreamProtocol)
	}
	if h := in.Upstream.Health; !h.GRPC || h.Service != service || h.Path != "" || in.Upstream.Check() != nil {
		t.Errorf("%+v: %v", h, in.Upstream.Check())
	}
	if bytes.HTTP != nil || bytes.UpstreamProtocol != proxy.ProtocolAuto || bytes.Upstream.Health.GRPC {
		t.Errorf("%+v", bytes)
	}
	if !slices.Equal(out.HTTP.Versions, []string{"h2", "http/1.1"}) || out.HTTP.MaxStreams != 250 || out.UpstreamProtocol != proxy.ProtocolHTTP1 {
		t.Errorf("%+v, %s", out.HTTP, out.UpstreamProtocol)
	}
}
