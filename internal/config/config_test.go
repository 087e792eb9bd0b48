package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const bothHalves = `trust_domain: example.org
data_dir: /srv/narthex
fips: true
agent:
  server:
    address: spire-server:8081
    bundle: {file: bundle.crt, format: spiffe}
    rebootstrap: {mode: always, delay: 1m}
    require_pq_kem: true
  node_attestor:
    x509pop: {key: node.key, certificate: /etc/node.crt}
  key_manager: {memory: {}}
  workload_attestors:
    unix: {discover_workload_path: true, workload_size_limit: -1}
  workload_api: {socket: /run/n/api.sock, allow_unauthenticated_verifiers: true, allowed_foreign_jwt_claims: [iss]}
  sds: {default_svid_name: mine, default_bundle_name: "null", default_all_bundles_name: ROOTCA, disable_spiffe_cert_validation: true}
  svid: {key_type: ec-p384, availability_target: 24h, x509_cache: 10, jwt_cache: 20}
  sync: {interval: 1s}
proxy:
  user: nobody
  sandbox: off
  crls: {example.org: [crls/*.pem, /etc/root.crl]}
  policies: ["policies/*.yaml"]
  max_connections: 5000
  listeners:
    - name: in
      direction: inbound
      bind: :8443
      target: unix:/run/app.sock
      routes: [{sni: [DB.example.org., "*.shop.example"], alpn: [postgresql], target: "127.0.0.1:5432"}, {alpn: [h2], target: ["127.0.0.1:1", "127.0.0.1:2"]}]
      alpn: [h2, http/1.1]
      identity: {hint: internal}
      timeouts: {idle: 0s, drain: 1m}
      on_policy_change: drain
      max_age: 1h
      max_connections: 100
      max_connections_per_identity: 10
      mode: permissive
      enforcement: audit
    - name: out
      direction: outbound
      bind: 127.0.0.1:15001
      target: ["[::1]:8443", unix:/run/b.sock]
      upstream: {balance: least_connections, health: {interval: 5s}, ejection: {after: 0}}
      expect: [spiffe://example.org/a, "spiffe://partner.example/b"]
      server_name: Inventory.example.org
      proxy_protocol: {send: v2, accept_from: [10.0.0.0/8, 192.0.2.7, "2001:DB8::/32"]}
  ext_authz:
    - {name: envoy, bind: "unix:/run/n/authz.sock", mode: "0600", enforcement: audit}
    - {name: gateway, bind: ":9191", clients: ["spiffe://example.org/ns/*/sa/gateway"], identity: {hint: internal}}
telemetry: {listen: localhost:9901, health: ":9902"}
access_log: {path: /var/log/access.log, format: text}
log: {level: debug, format: json}
`

// plainHTTP is what a listener has of which nothing is said.
var plainHTTP = HTTP{
	Forwarded: "replace", RequestID: "x-request-id", Versions: []HTTPVersion{HTTP2, HTTP1}, MaxStreams: 250, Retries: Retries{2, 20},
}

func TestParseReadsEveryKey(t *testing.T) {
	c, err := Parse("/etc/narthex/narthex.yaml", []byte(bothHalves))
	if err != nil {
		t.Fatal(err)
	}
	c.pos, c.file = nil, ""
	want := &Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		DataDir:     "/srv/narthex",
		FIPS:        true,
		Agent: &Agent{
			Server: Server{
				Address: "spire-server:8081", Bundle: &ServerBundle{File: "/etc/narthex/bundle.crt", Format: "spiffe"},
				Rebootstrap: Rebootstrap{Mode: "always", Delay: Duration(time.Minute)}, RequirePQKEM: true,
			},
			NodeAttestor:      NodeAttestor{X509PoP: &X509PoP{Key: "/etc/narthex/node.key", Certificate: "/etc/node.crt"}},
			KeyManager:        KeyManager{Memory: &Empty{}},
			WorkloadAttestors: WorkloadAttestors{Unix: &UnixAttestor{DiscoverWorkloadPath: true, WorkloadSizeLimit: -1}},
			WorkloadAPI:       ServedWorkloadAPI{Socket: "/run/n/api.sock", AllowUnauthenticatedVerifiers: true, AllowedForeignJWTClaims: []string{"iss"}},
			SDS:               SDS{DefaultSVIDName: "mine", DefaultBundleName: "null", DefaultAllBundlesName: "ROOTCA", DisableSPIFFECertValidation: true},
			SVID:              SVID{KeyType: "ec-p384", AvailabilityTarget: Duration(24 * time.Hour), X509Cache: 10, JWTCache: 20},
			Sync:              Sync{Interval: Duration(time.Second)},
		},
		Proxy: &Proxy{
			Source:         "workload_api",
			WorkloadAPI:    &WorkloadAPI{Socket: "/run/n/api.sock"},
			User:           "nobody",
			Sandbox:        "off",
			Policies:       []File{"/etc/narthex/policies/*.yaml"},
			MaxConnections: 5000,
			CRLs:           map[spiffeid.TrustDomain][]File{spiffeid.RequireTrustDomainFromString("example.org"): {"/etc/narthex/crls/*.pem", "/etc/root.crl"}},
			Listeners: []Listener{{
				Name: "in", Direction: "inbound", Bind: ":8443", Target: Targets{"unix:/run/app.sock"}, Protocol: "tcp", HTTP: plainHTTP,
				Routes: []Route{
					{SNI: []ServerName{"db.example.org", "*.shop.example"}, ALPN: []string{"postgresql"}, Target: Targets{"127.0.0.1:5432"}},
					{ALPN: []string{"h2"}, Target: Targets{"127.0.0.1:1", "127.0.0.1:2"}},
				},
				ALPN:           []string{"h2", "http/1.1"},
				Identity:       &ListenerIdentity{Hint: "internal"},
				ProxyProtocol:  ProxyProtocol{Send: "off"},
				Upstream:       Upstream{Protocol: "auto", Balance: "round_robin", Ejection: Ejection{After: 5, For: Duration(30 * time.Second)}, MaxPending: 1024},
				Timeouts:       Timeouts{Duration(10 * time.Second), Duration(5 * time.Second), 0, Duration(time.Minute), Duration(10 * time.Second), Duration(time.Minute), Duration(30 * time.Second)},
				OnPolicyChange: "drain", MaxAge: Duration(time.Hour), MaxConnections: 100, MaxConnectionsPerIdentity: 10,
				Mode: "permissive", Enforcement: "audit",
			}, {
				Name: "out", Direction: "outbound", Bind: "127.0.0.1:15001", Target: Targets{"[::1]:8443", "unix:/run/b.sock"}, Protocol: "tcp", HTTP: plainHTTP,
				ServerName:    "inventory.example.org",
				Expect:        []spiffeid.ID{spiffeid.RequireFromString("spiffe://example.org/a"), spiffeid.RequireFromString("spiffe://partner.example/b")},
				ProxyProtocol: ProxyProtocol{Send: "v2", AcceptFrom: []Network{"10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32"}},
				Upstream: Upstream{Protocol: "auto", Balance: "least_connections", Health: &Health{
					Interval: Duration(5 * time.Second), Timeout: Duration(2 * time.Second), UnhealthyAfter: 3, HealthyAfter: 2,
				}, Ejection: Ejection{For: Duration(30 * time.Second)}, MaxPending: 1024},
				Timeouts:       Timeouts{Duration(10 * time.Second), Duration(5 * time.Second), Duration(5 * time.Minute), Duration(30 * time.Second), Duration(10 * time.Second), Duration(time.Minute), Duration(30 * time.Second)},
				OnPolicyChange: "close", MaxConnections: 10_000, Mode: "strict", Enforcement: "enforce",
			}},
			ExtAuthz: []ExtAuthz{
				{Name: "envoy", Bind: "unix:/run/n/authz.sock", Mode: "0600", Enforcement: "audit"},
				{Name: "gateway", Bind: ":9191", Clients: []IDPattern{"spiffe://example.org/ns/*/sa/gateway"}, Identity: &ListenerIdentity{Hint: "internal"}, Enforcement: "enforce"},
			},
		},
		Telemetry: Telemetry{Listen: "localhost:9901", Health: ":9902"},
		AccessLog: AccessLog{Path: "/var/log/access.log", Format: "text"},
		Log:       Log{Level: "debug", Format: "json"},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
		t.Errorf("got agent %+v\nproxy %+v", c.Agent, c.Proxy)
	}
}

const smallAgent = `trust_domain: example.org
agent:
  server: {address: "s:1", bundle: {file: b}}
  node_attestor: {join_token: {token_file: t}}
`

const smallProxy = `proxy:
  policies: [p.yaml]
  listeners:
    - {name: in, direction: inbound, bind: "127.0.0.1:1", target: "127.0.0.1:2"}
`

func TestDefaults(t *testing.T) {
	c, err := Parse("dir/narthex.yaml", []byte(smallAgent+smallProxy))
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != "/var/lib/narthex" || c.Agent.KeyManager.Disk == nil || c.Agent.KeyManager.Memory != nil ||
		c.Agent.WorkloadAttestors.Unix == nil || c.Agent.WorkloadAPI.Socket != defaultSocket || c.Agent.SVID.X509Cache != 1000 || c.Agent.SVID.JWTCache != 1000 ||
		c.Agent.Sync.Interval != Duration(5*time.Second) || c.AccessLog.Path != "stdout" || c.Log.Level != "info" {
		t.Errorf("defaults are wrong: %+v, agent %+v", c, c.Agent)
	}
	if got := c.Agent.NodeAttestor.JoinToken.TokenFile; got != "dir/t" {
		t.Errorf("a relative path became %q, want it relative to the file's directory", got)
	}
	if c.Proxy.WorkloadAPI.Socket != defaultSocket || c.Proxy.Listeners[0].Timeouts.Handshake != Duration(10*time.Second) {
		t.Errorf("proxy defaults are wrong: %+v", c.Proxy)
	}
	if len(c.Warnings) != 0 {
		t.Errorf("warnings: %v", c.Warnings)
	}
}

// TestHTTP2Keys: what a listener says of HTTP/2 comes through, and a gRPC health
// check without a service is of the server as a whole.
func TestHTTP2Keys(t *testing.T) {
	both := []HTTPVersion{HTTP2, HTTP1}
	const inbound, outbound = "direction: inbound, ", `direction: outbound, expect: ["spiffe://example.org/a"], `
	for _, tt := range []struct {
		keys     string
		versions []HTTPVersion
		streams  int
		protocol string
		grpc     *GRPCHealth
	}{
		{inbound + `upstream: {health: {}}`, both, 250, "auto", nil},
		{inbound + `http: {versions: [http/1.1]}, upstream: {protocol: http1, health: {path: /}}`, []HTTPVersion{HTTP1}, 250, "http1", nil},
		{inbound + `http: {versions: [http/1.1, h2], max_streams: 1000}`, []HTTPVersion{HTTP1, HTTP2}, 1000, "auto", nil},
		{inbound + `http: {versions: [h2], max_streams: 1}, upstream: {protocol: h2c, health: {grpc: {}}}`, []HTTPVersion{HTTP2}, 1, "h2c", &GRPCHealth{}},
		{inbound + `upstream: {health: {grpc: {service: ""}}}`, both, 250, "auto", &GRPCHealth{}},
		{inbound + `upstream: {health: {grpc: {service: shop.v1.Orders}}}`, both, 250, "auto", &GRPCHealth{"shop.v1.Orders"}},
		{outbound + `upstream: {protocol: h2}`, both, 250, "h2", nil},
		{outbound + `upstream: {protocol: http1}`, both, 250, "http1", nil},
	} {
		c, err := Parse("n.yaml", []byte("proxy:\n  policies: [p.yaml]\n  listeners:\n    - {name: web, protocol: http, bind: \"127.0.0.1:1\", target: \"127.0.0.1:2\", "+tt.keys+"}\n"))
		if err != nil {
			t.Errorf("%s: %v", tt.keys, err)
			continue
		}
		l := c.Proxy.Listeners[0]
		if !slices.Equal(l.HTTP.Versions, tt.versions) || l.HTTP.MaxStreams != tt.streams || l.Upstream.Protocol != tt.protocol {
			t.Errorf("%s: %+v, %+v", tt.keys, l.HTTP, l.Upstream)
		}
		if h := l.Upstream.Health; h != nil && !reflect.DeepEqual(h.GRPC, tt.grpc) {
			t.Errorf("%s: %+v", tt.keys, h)
		}
	}
}

// TestNoListeners is a proxy that waits for its first listener; the other
// lists say nothing when they are empty.
func TestNoListeners(t *testing.T) {
	c, err := Parse("n.yaml", []byte("proxy: {policies: [r.yaml], listeners: []}"))
	if err != nil || len(c.Proxy.Listeners) != 0 {
		t.Errorf("%v, %v", c, err)
	}
	if _, err := Parse("n.yaml", []byte("proxy: {policies: [], listeners: []}")); err == nil || !strings.Contains(err.Error(), "proxy.policies: is an empty list") {
		t.Errorf("no policies: %v", err)
	}
}

func TestAliases(t *testing.T) {
	c, err := Parse("n.yaml", []byte(`proxy:
  policies: [p.yaml]
  listeners:
    - {name: a, direction: inbound, bind: ":1", target: "127.0.0.1:2", timeouts: &t {idle: 7s}}
    - {name: b, direction: inbound, bind: ":3", target: "127.0.0.1:2", timeouts: *t}
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Proxy.Listeners[1].Timeouts; got.Idle != Duration(7*time.Second) || got.Connect != Duration(5*time.Second) {
		t.Errorf("alias gave %+v", got)
	}
}

func TestHalves(t *testing.T) {
	tests := []struct{ name, yaml, agent, proxy, run string }{
		{"both", smallAgent + smallProxy, "", "", ""},
		{
			"agent", smallAgent, "", "n.yaml:1:1: proxy: the proxy block is missing; it needs at least policies and listeners",
			"n.yaml:1:1: proxy: the proxy block is missing; it needs at least policies and listeners",
		},
		{
			"proxy", smallProxy, "n.yaml:1:1: agent: the agent block is missing; it needs at least server and node_attestor", "",
			"n.yaml:1:1: agent: the agent block is missing; it needs at least server and node_attestor",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse("n.yaml", []byte(tt.yaml))
			if err != nil {
				t.Fatal(err)
			}
			for _, half := range []struct {
				what string
				err  error
				want string
			}{{"agent", c.ForAgent(), tt.agent}, {"proxy", c.ForProxy(), tt.proxy}, {"run", c.ForRun(), tt.run}} {
				if got := text(half.err); got != half.want {
					t.Errorf("for %s: got %q, want %q", half.what, got, half.want)
				}
			}
		})
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestWarnings(t *testing.T) {
	c, err := Parse("n.yaml", []byte(`trust_domain: example.org
agent:
  server: {address: "s:1", insecure_bootstrap: true}
  node_attestor: {join_token: {token: secret-token}}
proxy:
  policies: [p.yaml]
  listeners:
    - {name: in, direction: inbound, bind: ":1", target: "10.0.0.1:2"}
    - {name: out, direction: outbound, bind: "0.0.0.0:3", target: "peer:2", expect: ["spiffe://example.org/x"]}
    - {name: b, direction: inbound, bind: ":4", target: "127.0.0.1:2", identity: {spiffe_id: "spiffe://example.com/x"}, proxy_protocol: {accept_from: [10.0.0.0/8, "::/0"]}}
    - name: r
      direction: inbound
      bind: ":5"
      routes:
        - {sni: ["*.a.example"], target: "127.0.0.1:1"}
        - {sni: [b.example], alpn: [h2, x], target: "10.0.0.1:1"}
        - {alpn: [h2], target: "127.0.0.1:1"}
        - {sni: [x.a.example, a.example, "*.y.a.example"], target: "127.0.0.1:1"}
        - {sni: [b.example], alpn: [y], target: "127.0.0.1:1"}
        - {sni: [c.example], alpn: [h2], target: "127.0.0.1:1"}
        - {alpn: [x], target: "127.0.0.1:1"}
telemetry: {listen: ":9901"}
`))
	if err != nil {
		t.Fatal(err)
	}
	c.warnMode(0o644)
	var keys []string
	for _, w := range c.Warnings {
		keys = append(keys, fmt.Sprintf("%d %s", w.Line, w.Key))
		if strings.Contains(w.Error(), "secret-token") {
			t.Errorf("a warning shows the token: %v", w)
		}
	}
	want := []string{
		"3 agent.server.insecure_bootstrap", "4 agent.node_attestor.join_token.token",
		"8 proxy.listeners[0].target", "9 proxy.listeners[1].bind", "10 proxy.listeners[2].identity.spiffe_id", "10 proxy.listeners[2].proxy_protocol.accept_from[1]", "16 proxy.listeners[3].routes[1].target",
		"18 proxy.listeners[3].routes[3].sni[0]", "18 proxy.listeners[3].routes[3].sni[2]", "20 proxy.listeners[3].routes[5].sni[0]", "22 telemetry.listen",
	}
	if !reflect.DeepEqual(keys, want) {
		t.Errorf("got %q, want %q", keys, want)
	}
	if s := fmt.Sprintf("%v %+v %#v", c, c.Agent.NodeAttestor.JoinToken, c.Agent.NodeAttestor.JoinToken); strings.Contains(s, "secret-token") {
		t.Errorf("printing shows the token: %s", s)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "narthex.yaml")
	if _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	inline := strings.Replace(smallAgent, "token_file: t", "token: t", 1)
	for mode, warnings := range map[os.FileMode]int{0o600: 0, 0o644: 1} {
		if err := os.WriteFile(path, []byte(inline), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(c.Warnings) != warnings {
			t.Errorf("mode %o: warnings %v, want %d", mode, c.Warnings, warnings)
		}
	}
	if err := os.WriteFile(path, make([]byte, MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "larger than 1048576 bytes") {
		t.Errorf("a huge file: %v", err)
	}
}

func TestPolicyFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"b.yaml", "a.yaml", "c.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	waits := &Config{Proxy: &Proxy{Policies: []File{File(dir + "/*.rego")}}}
	if files, err := waits.PolicyFiles(); err != nil || len(files) != 0 {
		t.Errorf("no listeners and no rules: %q, %v", files, err)
	}
	c := &Config{Proxy: &Proxy{Policies: []File{File(dir + "/c.txt"), File(dir + "/*.yaml"), File(dir + "/a.*")}}}
	got, err := c.PolicyFiles()
	if want := []string{dir + "/c.txt", dir + "/a.yaml", dir + "/b.yaml"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	c, err = Parse(dir+"/n.yaml", []byte(strings.Replace(smallProxy, "[p.yaml]", `[c.txt, "*.rego"]`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	want := dir + "/n.yaml:2:21: proxy.policies[1]: no file matches " + dir + "/*.rego"
	var all *Error
	if _, err := c.PolicyFiles(); !errors.As(err, &all) || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

func TestLoadTakesPlainFilesOnly(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:           "is a directory, not a plain file; name the file in it, such as " + dir + "/narthex.yaml",
		dir + "/fifo": "is not a plain file; the configuration is read again at each reload",
		"/dev/null":   "/dev/null is not a plain file",
	} {
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", path, err, want)
		}
	}
}

func TestByteOrderMark(t *testing.T) {
	if _, err := Parse("n.yaml", []byte("\ufeff"+smallProxy)); err != nil {
		t.Error(err)
	}
}

func TestAddress(t *testing.T) {
	tests := []struct {
		in, network, addr, host string
		port                    uint16
		local, bad              bool
	}{
		{in: "127.0.0.1:80", network: "tcp", addr: "127.0.0.1:80", host: "127.0.0.1", port: 80, local: true},
		{in: "[::1]:80", network: "tcp", addr: "[::1]:80", host: "::1", port: 80, local: true},
		{in: "[::ffff:127.0.0.1]:80", network: "tcp", addr: "[::ffff:127.0.0.1]:80", host: "::ffff:127.0.0.1", port: 80, local: true},
		{in: "LocalHost:80", network: "tcp", addr: "LocalHost:80", host: "LocalHost", port: 80, local: true},
		{in: ":0", network: "tcp", addr: ":0"},
		{in: "a_b.c-d.svc.:65535", network: "tcp", addr: "a_b.c-d.svc.:65535", host: "a_b.c-d.svc.", port: 65535},
		{in: "unix:/run/a b.sock", network: "unix", addr: "/run/a b.sock", local: true},
		{in: "unix:/" + strings.Repeat("x", 106), network: "unix", addr: "/" + strings.Repeat("x", 106), local: true},
		{in: "unix:/" + strings.Repeat("x", 107), bad: true},
		{in: "unix:run/a.sock", bad: true},
		{in: "unix:///run/", bad: true},
		{in: "unix:/a\x00b", bad: true},
		{in: "host", bad: true},
		{in: "host:http", bad: true},
		{in: "host:65536", bad: true},
		{in: "host:080", bad: true},
		{in: "host:+80", bad: true},
		{in: "::1:80", bad: true},
		{in: "-a:80", bad: true},
		{in: "a..b:80", bad: true},
		{in: "a b:80", bad: true},
		{in: "http://a:80", bad: true},
		{in: strings.Repeat("a", 64) + ":80", bad: true},
	}
	for _, tt := range tests {
		var a Address
		err := a.UnmarshalText([]byte(tt.in))
		if (err != nil) != tt.bad {
			t.Errorf("%q: error %v, want one: %v", tt.in, err, tt.bad)
			continue
		}
		if !tt.bad && (a.Network() != tt.network || a.Addr() != tt.addr || a.Host() != tt.host || a.Port() != tt.port || a.Local() != tt.local) {
			t.Errorf("%q: %s %s %q %d %v, want %+v", tt.in, a.Network(), a.Addr(), a.Host(), a.Port(), a.Local(), tt)
		}
	}
}

// TestTags reads every tag of every type: defaults decode, and no two tags
// contradict each other.
func TestTags(t *testing.T) {
	seen := map[reflect.Type]bool{}
	var walk func(typ reflect.Type)
	walk = func(typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || seen[typ] {
			return
		}
		seen[typ] = true
		(&decoder{}).fillDefaults(reflect.New(typ).Elem())
		for key, f := range keysOf(typ) {
			if f.Tag.Get("required") != "" && f.Tag.Get("default") != "" {
				t.Errorf("%s.%s is required and has a default", typ.Name(), key)
			}
			walk(f.Type)
		}
	}
	walk(reflect.TypeFor[Config]())
	var client WorkloadAPI
	var served ServedWorkloadAPI
	(&decoder{}).fillDefaults(reflect.ValueOf(&client).Elem())
	(&decoder{}).fillDefaults(reflect.ValueOf(&served).Elem())
	if client.Socket != defaultSocket || served.Socket != defaultSocket {
		t.Errorf("defaultSocket is %s, the tags say %s and %s", defaultSocket, client.Socket, served.Socket)
	}
	var admin Admin
	(&decoder{}).fillDefaults(reflect.ValueOf(&admin).Elem())
	if admin.Socket != defaultAdminSocket {
		t.Errorf("defaultAdminSocket is %s, the tag says %s", defaultAdminSocket, admin.Socket)
	}
}
