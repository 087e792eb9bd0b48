//go:build integration

package extauthz_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/narthex-id/narthex/integration/internal/stage"
	"github.com/narthex-id/narthex/internal/telemetry"
)

const someRules = `groups: {shop: ["spiffe://example.org/ns/shop/sa/*"]}
rules:
  - {id: web-reads, effect: allow, on: [envoy], from: ["` + web + `"], to: ["` + orders + `"], http: {methods: [GET], paths: ["/v1/orders/{id}", "/v1/items/**"]}}
  - {id: prod-writes, effect: allow, on: [envoy], from: [group:shop], http: {methods: [PUT], headers: {x-env: [prod]}}}
  - {id: no-admin, effect: deny, http: {paths: ["/v1/items/admin/**"]}}
  - {id: batch-by-night, effect: allow, from: ["` + batch + `"], source_ip: [10.0.0.0/8], when: 'request.path.startsWith("/v1/batch")'}
  - {id: elsewhere, effect: allow, on: [orders], from: ["` + batch + `"]}
  - {id: calls, effect: allow, from: [group:shop], grpc: {services: [shop.v1.Orders], methods: [Get]}}
revoked: ["spiffe://example.org/ns/shop/sa/old"]
`

func TestOnSocket(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules(someRules)
	n.start()
	e := n.onSocket("authz.sock")
	e.wants(question{from: web, method: "GET", path: "/v1/orders/7?full=1"}, 200, codes.OK)
	e.wants(question{from: web, method: "DELETE", path: "/v1/orders/7"}, 403, codes.OK)
	e.wants(question{from: web, method: "GET", path: "/v1/items/admin/x"}, 403, codes.OK)
	e.wants(question{from: "", method: "GET", path: "/v1/orders/7"}, 403, codes.OK)
	e.wants(question{from: "web.shop", method: "GET", path: "/v1/orders/7"}, 403, codes.OK)
	e.wants(question{from: web, method: "GET", path: "/v1/orders/../admin"}, 400, codes.OK)
	e.wants(question{from: web, method: "GET", path: "/v1/%6frders/7"}, 400, codes.OK)

	allowed := n.Record(0, "of a check that passed", func(a telemetry.Access) bool { return a.Decision == "allow" })
	if allowed.Action != "check" || allowed.Listener != "envoy" || allowed.Rule != "web-reads" || allowed.From != web || allowed.To != orders ||
		allowed.Source != "10.1.2.3:40000" || allowed.Port != 8443 || allowed.HTTP.Path != "/v1/orders/7" || allowed.HTTP.RequestID != "4f2c" || allowed.Outcome != "success" {
		t.Errorf("recorded %+v %+v", allowed, allowed.HTTP)
	}
	n.Record(0, "of one without a principal", func(a telemetry.Access) bool {
		return a.HTTP.Status == 403 && a.Decision == "" && strings.Contains(a.Reason, "source.principal")
	})
	for series, want := range map[string]float64{
		`narthex_policy_decisions_total{decision="allow",listener="envoy",rule="web-reads"}`: 1,
		`narthex_policy_decisions_total{decision="deny",listener="envoy",rule="no-admin"}`:   1,
		`narthex_ext_authz_checks_total{listener="envoy",result="deny"}`:                     2,
		`narthex_ext_authz_checks_total{listener="envoy",result="refused_400"}`:              2,
		`narthex_ext_authz_checks_total{listener="envoy",result="refused_403"}`:              2,
	} {
		if got := n.Metric(series); got != want {
			t.Errorf("%s is %g, want %g", series, got, want)
		}
	}
	s, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	if a := s.Proxy.ExtAuthz; len(a) != 1 || a[0].Checks != 7 || a[0].Denied != 6 || a[0].Active != 1 || a[0].Problem != "" {
		t.Errorf("status %+v", a)
	}
	if out := stage.Must(t, stage.Narthex, "status", "--address", "unix:"+n.Figures()); !strings.Contains(out, "envoy  ext_authz unix:") || !strings.Contains(out, "7 asked, 6 denied") {
		t.Errorf("status says\n%s", out)
	}
	n.Signal(syscall.SIGTERM)
	<-n.Done
	if _, err := os.Stat(n.file("authz.sock")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestOverTLS(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules(someRules)
	address := stage.FreeAddress(t)
	place := func(clients string) string {
		return fmt.Sprintf("[{name: envoy, bind: %q, clients: [%q]}]", address, clients)
	}
	n.places = place("spiffe://example.org/ns/istio/sa/*")
	n.start()
	gateway, stranger := n.as("/ns/istio/sa/gateway", address), n.as("/ns/shop/sa/web", address)
	q := question{from: web, method: "GET", path: "/v1/orders/7"}
	gateway.wants(q, 200, codes.OK)
	stranger.wants(q, 0, codes.Unavailable)
	if r := n.Record(0, "of the gateway", func(a telemetry.Access) bool { return a.Decision == "allow" }); r.Via != "spiffe://example.org/ns/istio/sa/gateway" {
		t.Errorf("recorded %+v", r)
	}
	n.places = place("spiffe://example.org/ns/other/sa/gateway")
	n.configure()
	n.reload()
	gateway.wants(q, 0, codes.Unauthenticated) // on the connection that it has
	n.places = place("spiffe://example.org/ns/istio/sa/gateway")
	n.configure()
	n.rules(strings.Replace(someRules, "sa/old\"]", "sa/old\", \"spiffe://example.org/ns/istio/sa/gateway\"]", 1))
	n.reload()
	gateway.wants(q, 0, codes.Unauthenticated) // revoked by the rules
	n.rules(someRules)
	n.reload()
	gateway.wants(q, 200, codes.OK)
}

func TestRulesChange(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules(someRules)
	n.start()
	e := n.onSocket("authz.sock")
	q := question{from: web, method: "GET", path: "/v1/orders/7"}
	e.wants(q, 200, codes.OK)
	n.rules("rules: [{id: none, effect: deny}]\n")
	n.reload()
	e.wants(q, 403, codes.OK)
	n.rules("rules: [{id: web, effect: allow, from: [\"" + web + "\"]}]\nlimits: [{id: few, from: [\"" + web + "\"], rps: 0.01, burst: 2}]\n")
	n.reload()
	e.wants(q, 200, codes.OK)
	e.wants(q, 200, codes.OK)
	e.wants(q, 429, codes.OK)
}

func TestPlacesChange(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules("rules: [{id: web, effect: allow, on: [envoy, second], from: [\"" + web + "\"]}]\n")
	n.start()
	q := question{from: web, method: "GET", path: "/"}
	first, second := n.onSocket("authz.sock"), n.onSocket("second.sock")
	first.wants(q, 200, codes.OK)
	second.wants(q, 0, codes.Unavailable)
	n.places = fmt.Sprintf("[{name: envoy, bind: %q}, {name: second, bind: %q, mode: \"0600\", enforcement: audit}]", "unix:"+n.file("authz.sock"), "unix:"+n.file("second.sock"))
	n.configure()
	n.reload()
	first.wants(q, 200, codes.OK)
	n.onSocket("second.sock").wants(question{from: batch, method: "GET", path: "/"}, 200, codes.OK) // audited
	n.Record(0, "of what an audit lets pass", func(a telemetry.Access) bool { return a.Decision == "would_deny" && a.Listener == "second" })
	if info, err := os.Stat(n.file("second.sock")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	n.places = fmt.Sprintf("[{name: second, bind: %q}]", "unix:"+n.file("second.sock"))
	n.configure()
	n.reload()
	first.wants(q, 0, codes.Unavailable)
	n.onSocket("second.sock").wants(question{from: batch, method: "GET", path: "/"}, 403, codes.OK)
}

// TestTakesPlace upgrades while Envoy asks: no question fails.
func TestTakesPlace(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules(someRules)
	old := n.start()
	e := n.onSocket("authz.sock")
	q := question{from: web, method: "GET", path: "/v1/orders/7"}
	e.wants(q, 200, codes.OK)
	stop, asked := make(chan struct{}), make(chan int)
	go func() {
		count := 0
		defer func() { asked <- count }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if got, code := e.ask(q); got != 200 {
				t.Errorf("question %d: %d, %s", count, got, code)
				return
			}
			count++
		}
	}()
	next := stage.Start(t, "the next narthex proxy", stage.Narthex, []string{"proxy", "-c", n.file("narthex.yaml")})
	<-old.Done
	close(stop)
	t.Logf("%d questions were asked meanwhile", <-asked)
	n.Process = next
	e.wants(q, 200, codes.OK)
	next.Signal(syscall.SIGTERM)
	<-next.Done
	if _, err := os.Stat(n.file("authz.sock")); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// TestExplainAgrees holds what Envoy is answered against what `narthex policy
// explain` says of the same request.
func TestExplainAgrees(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules(someRules)
	n.start()
	e := n.onSocket("authz.sock")
	call := map[string]string{"content-type": "application/grpc"}
	prod := map[string]string{"x-env": "prod"}
	allowed := 0
	for _, q := range []question{
		{from: web, method: "GET", path: "/v1/orders/7"},
		{from: web, method: "GET", path: "/v1/orders"},
		{from: web, method: "HEAD", path: "/v1/orders/7"},
		{from: web, method: "GET", path: "/v1/items/a/b"},
		{from: web, method: "GET", path: "/v1/items/admin/b"},
		{from: batch, method: "GET", path: "/v1/orders/7"},
		{from: batch, method: "PUT", path: "/v1/orders/7", headers: prod},
		{from: batch, method: "PUT", path: "/v1/orders/7"},
		{from: batch, method: "PUT", path: "/v1/orders/7", headers: map[string]string{"x-env": "test"}},
		{from: batch, method: "GET", path: "/v1/batch/run"},
		{from: batch, method: "GET", path: "/v1/batch/run", source: "192.0.2.1"},
		{from: batch, method: "POST", path: "/shop.v1.Orders/Get", headers: call},
		{from: batch, method: "POST", path: "/shop.v1.Orders/Put", headers: call},
		{from: "spiffe://example.org/ns/shop/sa/old", method: "PUT", path: "/v1", headers: prod},
		{from: "spiffe://other.example/ns/shop/sa/web", method: "GET", path: "/v1/orders/7"},
	} {
		args := []string{
			"policy", "explain", "-c", n.file("narthex.yaml"), "--on", "envoy", "--as", q.from, "--to", orders, "--port", "8443",
			"--host", "orders.shop", "--do", q.method + " " + q.path, "--source-ip", "10.1.2.3",
		}
		if q.source != "" {
			args[len(args)-1] = q.source
		}
		for name, value := range q.headers {
			args = append(args, "--header", name+"="+value)
		}
		out, err := stage.Tell(t, stage.Narthex, args...)
		want := 200
		if err != nil {
			want = 403
		} else {
			allowed++
		}
		if got, code := e.ask(q); got != want || code != codes.OK {
			t.Errorf("%+v: answered %d, %s; explain says\n%s", q, got, code, out)
		}
	}
	if allowed != 5 {
		t.Errorf("%d were allowed, want 5", allowed)
	}
}

func TestCheckCommand(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.rules("rules: [{id: web, effect: allow, on: [envoy], from: [\"" + web + "\"], http: {paths: [\"/v1/**\"]}}]\n")
	n.configure()
	if out, err := stage.Tell(t, stage.Narthex, "check", "--host", "-c", n.file("narthex.yaml")); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	n.places = `[{name: envoy, bind: "127.0.0.1:9191"}]`
	n.configure()
	if out, err := stage.Tell(t, stage.Narthex, "check", "-c", n.file("narthex.yaml")); err == nil || !strings.Contains(out, "proxy.ext_authz[0].clients: is required") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "authz.sock")); !os.IsNotExist(err) {
		t.Error("check opens sockets")
	}
}
