//go:build integration

package extauthz_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	auth "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/testca"
)

const (
	web    = "spiffe://example.org/ns/shop/sa/web"
	batch  = "spiffe://example.org/ns/shop/sa/batch"
	orders = "spiffe://example.org/ns/shop/sa/orders"
)

// node is a `narthex proxy` that Envoy asks.
type node struct {
	*stage.Process
	*stage.Face
	t      *testing.T
	dir    string
	ca     *testca.Authority
	places string // YAML of ext_authz
}

// newNode prepares one with a Unix socket. Nothing runs yet.
func newNode(t *testing.T) *node {
	t.Helper()
	dir := stage.Folder(t, "node")
	n := &node{t: t, dir: dir, ca: testca.New(t, "example.org"), Face: stage.NewFace(t, "node", dir)}
	own := n.ca.SVID("/ns/narthex/sa/proxy")
	stage.WriteFile(t, n.file("svid.pem"), string(testca.CertPEM(own.Certificate...)), 0o644)
	stage.WriteFile(t, n.file("svid.key"), string(testca.KeyPEM(t, own)), 0o600)
	stage.WriteFile(t, n.file("bundle.pem"), string(testca.CertPEM(n.ca.Cert.Raw)), 0o644)
	n.places = fmt.Sprintf("[{name: envoy, bind: %q}]", "unix:"+n.file("authz.sock"))
	return n
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

// rules writes the policy but for its version.
func (n *node) rules(text string) {
	n.t.Helper()
	stage.WriteFile(n.t, n.file("rules.yaml"), "version: 1\n"+text, 0o644)
}

func (n *node) configure() {
	n.t.Helper()
	stage.WriteFile(n.t, n.file("narthex.yaml"), fmt.Sprintf(`proxy:
  source: files
  files: {cert: svid.pem, key: svid.key, bundle: bundle.pem}
  policies: [rules.yaml]
  handover: {socket: %s}
  listeners: []
  ext_authz: %s
%slog: {level: debug}
`, n.file("handover.sock"), n.places, n.YAML()), 0o644)
}

// start starts the proxy and waits until it can serve.
func (n *node) start() *stage.Process {
	n.t.Helper()
	n.configure()
	p := stage.Start(n.t, "narthex proxy", stage.Narthex, []string{"proxy", "-c", n.file("narthex.yaml")})
	stage.Eventually(n.t, stage.Soon, "the proxy is ready", func() error {
		if err := p.Alive(); err != nil {
			n.t.Fatal(err)
		}
		return n.Ready()
	})
	n.Process = p
	return p
}

// reload makes the proxy read its files again and waits until it has.
func (n *node) reload() {
	n.t.Helper()
	const ok, bad = `narthex_policy_reloads_total{result="ok"}`, `narthex_policy_reloads_total{result="error"}`
	before, errors := n.Metric(ok), n.Metric(bad)
	n.Signal(syscall.SIGHUP)
	stage.Eventually(n.t, stage.Soon, "the proxy has read its files again", func() error {
		if n.Metric(bad) > errors {
			n.t.Fatalf("it cannot reload:\n%s", n.Said())
		}
		if n.Metric(ok) == before {
			return fmt.Errorf("not yet")
		}
		return nil
	})
}

// envoy is one that asks.
type envoy struct {
	t *testing.T
	auth.AuthorizationClient
}

func (n *node) dial(target string, creds credentials.TransportCredentials) envoy {
	n.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = conn.Close() })
	return envoy{n.t, auth.NewAuthorizationClient(conn)}
}

// onSocket asks over a Unix socket.
func (n *node) onSocket(name string) envoy {
	n.t.Helper()
	return n.dial("unix:"+n.file(name), insecure.NewCredentials())
}

// as asks over mTLS.
func (n *node) as(path, address string) envoy {
	n.t.Helper()
	return n.dial("passthrough:///"+address, credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{n.ca.SVID(path)}, InsecureSkipVerify: true, // whom we ask is not what is tested
	}))
}

// question is what an Envoy before orders says of a request.
type question struct {
	from, method, path string
	headers            map[string]string
	source             string
}

func (q question) request() *auth.CheckRequest {
	at := func(ip string, port uint32) *core.Address {
		return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{Address: ip, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port}}}}
	}
	headers := map[string]string{":method": q.method, ":path": q.path, ":authority": "orders.shop", "x-request-id": "4f2c"}
	for name, value := range q.headers {
		headers[name] = value
	}
	if q.source == "" {
		q.source = "10.1.2.3"
	}
	return &auth.CheckRequest{Attributes: &auth.AttributeContext{
		Source:      &auth.AttributeContext_Peer{Address: at(q.source, 40000), Principal: q.from},
		Destination: &auth.AttributeContext_Peer{Address: at("10.9.9.9", 8443), Principal: orders},
		Request: &auth.AttributeContext_Request{Http: &auth.AttributeContext_HttpRequest{
			Method: q.method, Path: q.path, Host: "orders.shop", Headers: headers,
		}},
	}}
}

// ask returns the status of the answer, 200 where the request may go on, or the
// code of a call that failed.
func (e envoy) ask(q question) (int, codes.Code) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), 20*time.Second)
	defer cancel()
	answer, err := e.Check(ctx, q.request(), grpc.WaitForReady(false))
	switch {
	case err != nil:
		return 0, status.Code(err)
	case answer.GetOkResponse() != nil:
		return 200, codes.OK
	}
	return int(answer.GetDeniedResponse().GetStatus().GetCode()), codes.OK
}

func (e envoy) wants(q question, want int, code codes.Code) {
	e.t.Helper()
	if got, have := e.ask(q); got != want || have != code {
		e.t.Errorf("%+v: got %d, %s, want %d, %s", q, got, have, want, code)
	}
}
