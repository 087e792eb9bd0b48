package importer

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/config"
)

// options are those of tests: spire-agent was started in /opt/spire.
var options = Options{Dir: "/opt/spire", DataDir: "/var/lib/narthex"}

func importText(t *testing.T, text string) *Result {
	t.Helper()
	r, err := SpireAgent("agent.conf", []byte(text), options)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// least is a configuration with which spire-agent starts, and a place for more
// in each block.
func least(agent, plugins, more string) string {
	return fmt.Sprintf(`agent {
  server_address = "spire-server"
  server_port = 8081
  trust_domain = "example.org"
  %s
}
plugins {
  %s
}
%s`, agent, plugins, more)
}

const (
	bundlePath = `trust_bundle_path = "/b.crt"`
	x509pop    = `NodeAttestor "x509pop" { plugin_data { private_key_path = "/n.key" certificate_path = "/n.crt" } } KeyManager "memory" { plugin_data {} } WorkloadAttestor "unix" { plugin_data {} }`
)

func TestNode(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "node.conf"))
	if err != nil {
		t.Fatal(err)
	}
	r := importText(t, string(data))
	_, body, _ := strings.Cut(string(r.Text), "\n\n")
	const want = `trust_domain: example.org
data_dir: /var/lib/narthex
agent:
  server:
    address: "spire-server.example.org:8081"
    bundle:
      file: /opt/spire/conf/bundle.crt
    require_pq_kem: true
  node_attestor:
    join_token:
      token_file: join-token
  key_manager:
    disk: {}
  take_over:
    data_dir: /opt/spire/data/agent
    keys: /opt/spire/keys
  workload_attestors:
    unix:
      discover_workload_path: true
      workload_size_limit: 1048576
  workload_api:
    socket: /run/spire/sockets/agent.sock
  svid:
    key_type: rsa-2048
    availability_target: "48h0m0s"
    x509_cache: 200
  sync:
    interval: "30s"
log:
  level: warn
  format: json
telemetry:
  listen: "localhost:9988"
`
	if body != want {
		t.Errorf("got\n%s\nwant\n%s", body, want)
	}
	if !r.Complete() {
		t.Errorf("not all was carried: %v", r.Notes)
	}
	if len(r.Secrets) != 1 || r.Secrets[0].Name != "join-token" || string(r.Secrets[0].Value) != "5c1e4f0a-not-to-be-shown" {
		t.Errorf("secrets: %d", len(r.Secrets))
	}
}

// What comes of a file that spire-agent takes can be used, and no secret is
// shown on the way.
func TestCorpus(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "*.*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r := importText(t, string(data))
		for _, f := range r.Check("narthex.yaml") {
			t.Errorf("%s: %v\n%s", file, &f, r.Text)
		}
		for _, n := range r.Notes {
			if strings.Contains(n.Problem, "unknown key") {
				t.Errorf("%s: %s", file, n.String())
			}
			if !strings.Contains(string(r.Text), n.Key+": "+n.Problem) {
				t.Errorf("%s: not in the comments of the result: %s", file, n.String())
			}
		}
		shown := fmt.Sprint(string(r.Text), r.Notes, r.Secrets)
		if strings.Contains(shown, "not-to-be-shown") {
			t.Errorf("%s: a secret is shown:\n%s", file, shown)
		}
	}
}

// TestKeys has each key of spire-agent say something other than its default.
func TestKeys(t *testing.T) {
	type row struct {
		agent, plugins, more string // in the file
		key                  string // as it is named where it is lost
		into                 string // as it is carried; "": it cannot be, in any version
		text                 string // of the result, where it is carried
	}
	k8s := func(s string) string { return `WorkloadAttestor "k8s" { plugin_data { ` + s + ` } }` }
	const k8sKey = "plugins.WorkloadAttestor.k8s.plugin_data."
	rows := []row{
		{agent: `rebootstrap_mode = "auto"`, key: "agent.rebootstrap_mode", into: "agent.server.rebootstrap.mode", text: "mode: auto"},
		{agent: `log_file = "/var/log/a"`, key: "agent.log_file"},
		{agent: `log_level = "loud"`, key: "agent.log_level"},
		{agent: `log_format = "xml"`, key: "agent.log_format"},
		{agent: `log_selectors = ["k8s:ns"]`, key: "agent.log_selectors"},
		{agent: `log_source_location = true`, key: "agent.log_source_location"},
		{agent: `sds { default_svid_name = "mine" }`, key: "agent.sds.default_svid_name", into: "agent.sds.default_svid_name", text: "default_svid_name: mine"},
		{agent: `sds = { default_bundle_name = "mine" }`, key: "agent.sds.default_bundle_name", into: "agent.sds.default_bundle_name", text: "default_bundle_name: mine"},
		{agent: `sds { default_all_bundles_name = "mine" }`, key: "agent.sds.default_all_bundles_name", into: "agent.sds.default_all_bundles_name", text: "default_all_bundles_name: mine"},
		{agent: `sds { disable_spiffe_cert_validation = true }`, key: "agent.sds.disable_spiffe_cert_validation", into: "agent.sds.disable_spiffe_cert_validation", text: "disable_spiffe_cert_validation: true"},
		{agent: `disable_workload_api = true`, key: "agent.disable_workload_api"},
		{agent: `disable_sds_api = true`, key: "agent.disable_sds_api"},
		{agent: `workload_x509_svid_key_type = "ec-p384"`, key: "agent.workload_x509_svid_key_type", into: "agent.svid.key_type", text: "key_type: ec-p384"},
		{agent: `trust_bundle_format = "spiffe"`, key: "agent.trust_bundle_format", into: "agent.server.bundle.format", text: "format: spiffe"},
		{agent: `allow_unauthenticated_verifiers = true`, key: "agent.allow_unauthenticated_verifiers", into: "agent.workload_api.allow_unauthenticated_verifiers", text: "allow_unauthenticated_verifiers: true"},
		{agent: `allowed_foreign_jwt_claims = ["email"]`, key: "agent.allowed_foreign_jwt_claims", into: "agent.workload_api.allowed_foreign_jwt_claims", text: "allowed_foreign_jwt_claims: [email]"},
		{agent: `availability_target = "soon"`, key: "agent.availability_target"},
		{agent: `jwt_svid_cache_max_size = 10`, key: "agent.jwt_svid_cache_max_size", into: "agent.svid.jwt_cache", text: "jwt_cache: 10"},
		{agent: `admin_socket_path = "/run/admin/a.sock"`, key: "agent.admin_socket_path", into: "agent.admin.socket", text: "socket: /run/admin/a.sock"},
		{agent: `admin_socket_path = "/run/admin/a.sock" authorized_delegates = ["spiffe://example.org/d"]`, key: "agent.authorized_delegates", into: "agent.admin.authorized_delegates", text: `authorized_delegates: ["spiffe://example.org/d"]`},
		{agent: `profiling_enabled = true profiling_port = 1 profiling_freq = 1 profiling_names = ["heap"]`, key: "agent.profiling_enabled"},
		{agent: `experimental { jwt_svid_cache_hit_timeout = "9s" }`, key: "agent.experimental.jwt_svid_cache_hit_timeout"},
		{agent: `experimental { named_pipe_name = "p" }`, key: "agent.experimental.named_pipe_name"},
		{agent: `experimental { use_sync_authorized_entries = false }`, key: "agent.experimental.use_sync_authorized_entries"},
		{agent: `experimental { ratelimit { fetch_x509_svid = 5 } }`, key: "agent.experimental.ratelimit.fetch_x509_svid"},
		{agent: `experimental { feature_flags = ["x"] }`, key: "agent.experimental.feature_flags"},
		{agent: `experimental { broker { socket_path = "/run/b/b.sock" brokers = [ { id = "spiffe://example.org/b" allowed_reference_types = [ { type_url = "*" allow_over_tcp = true } ] } ] } }`, key: "agent.experimental.broker", into: "agent.broker.brokers[].references[].type_url", text: `type_url: "*"`},
		{agent: `colour = "red"`, key: "agent.colour"},
		{plugins: `SVIDStore "aws_secretsmanager" { plugin_data { secret_access_key = "not-to-be-shown" } }`, key: "plugins.SVIDStore.aws_secretsmanager"},
		{plugins: `WorkloadAttestor "docker" { plugin_data {} }`, key: "plugins.WorkloadAttestor.docker"},
		{plugins: `WorkloadAttestor "mine" { plugin_cmd = "/p" plugin_args = ["a"] plugin_checksum = "1" }`, key: "plugins.WorkloadAttestor.mine"},
		{plugins: `WorkloadAttestor "k8s" { plugin_data_file = "/f" }`, key: "plugins.WorkloadAttestor.k8s.plugin_data_file"},
		{plugins: `Colour "red" { plugin_data {} }`, key: "plugins.Colour.red"},
		{plugins: k8s(`colour = "red"`), key: k8sKey + "colour"},
		{plugins: k8s(`max_poll_attempts = 5`), key: k8sKey + "max_poll_attempts"},
		{plugins: k8s(`poll_retry_interval = "1s"`), key: k8sKey + "poll_retry_interval"},
		{plugins: k8s(`reload_interval = "5m"`), key: k8sKey + "reload_interval"},
		{plugins: k8s(`use_anonymous_authentication = true`), key: k8sKey + "use_anonymous_authentication"},
		{plugins: k8s(`use_new_container_locator = false`), key: k8sKey + "use_new_container_locator"},
		{plugins: k8s(`verbose_container_locator_logs = true`), key: k8sKey + "verbose_container_locator_logs"},
		{plugins: k8s(`experimental { api_server { cache { enabled = true } } }`), key: k8sKey + "experimental"},
		{plugins: k8s(`sigstore { rekor_url = "https://rekor.example.org" }`), key: k8sKey + "sigstore.rekor_url"},
		{plugins: k8s(`kubelet_ca_path = "/ca" token_path = "/t" node_name = "n1" kubelet_secure_port = 10251`), into: "agent.workload_attestors.k8s.kubelet.ca", text: "kubelet:\n        host: n1\n        port: 10251\n        ca: /ca\n        token: /t\n"},
		{plugins: k8s(`certificate_path = "/c" private_key_path = "/k" token_path = "/t"`), into: "agent.workload_attestors.k8s.kubelet.key", text: "kubelet:\n        certificate: /c\n        key: /k\n"},
		{more: `telemetry { Statsd = [ { address = "a:1" } ] }`, key: "telemetry.Statsd"},
		{more: `telemetry { InMem {} }`, key: "telemetry.InMem"},
		{more: `telemetry { MetricPrefix = "x" }`, key: "telemetry.MetricPrefix"},
		{more: `telemetry { Prometheus { host = "[::1]" port = 9 tls { use_spire_svid = true } } }`, key: "telemetry.Prometheus.tls"},
		{more: `health_checks { listener_enabled = true bind_address = "0.0.0.0" bind_port = 8080 }`, key: "health_checks.live_path"},
		{more: `colour { red = 1 }`, key: "colour"},
	}
	for _, r := range rows {
		got := importText(t, least(bundlePath+"\n"+r.agent, x509pop+"\n"+r.plugins, r.more))
		lost := slices.ContainsFunc(got.Notes, func(n Note) bool { return n.Lost && n.Key == r.key })
		carried := r.into != "" && config.Knows(r.into)
		if lost == carried {
			t.Errorf("%s%s%s: lost: %v, carried into %q: %v\n%s", r.agent, r.plugins, r.more, lost, r.into, carried, got.Text)
		}
		if carried && !strings.Contains(string(got.Text), r.text) {
			t.Errorf("%s%s%s: want %q in\n%s", r.agent, r.plugins, r.more, r.text, got.Text)
		}
		if strings.Contains(fmt.Sprint(string(got.Text), got.Notes), "not-to-be-shown") {
			t.Errorf("a secret is shown in\n%s", got.Text)
		}
		for _, f := range got.Check("narthex.yaml") {
			t.Errorf("%s%s%s: %v\n%s", r.agent, r.plugins, r.more, &f, got.Text)
		}
	}
}

// What says what happens anyway is carried by saying nothing.
func TestDefaults(t *testing.T) {
	r := importText(t, least(bundlePath+`
  rebootstrap_mode = "never" rebootstrap_delay = "1h" trust_bundle_format = "pem" log_level = "INFO" log_format = "text"
  log_source_location = false sds { default_svid_name = "default" } disable_workload_api = false profiling_enabled = false profiling_port = 1
  allow_unauthenticated_verifiers = false x509_svid_cache_max_size = 0 jwt_svid_cache_max_size = 1000
  experimental { use_sync_authorized_entries = true ratelimit { fetch_jwt_svid = 0 } require_pq_kem = false }`, x509pop+`
  WorkloadAttestor "docker" { enabled = false plugin_data {} }`, `telemetry {} health_checks { listener_enabled = false bind_port = "80" }`))
	for _, n := range r.Notes {
		if n.Lost {
			t.Error(n.String())
		}
	}
	if want := "workload_api:\n    socket: /tmp/spire-agent/public/api.sock\n"; !strings.Contains(string(r.Text), want) {
		t.Errorf("want spire-agent's own socket, %q, in\n%s", want, r.Text)
	}
}

// Where this version cannot fetch the bundle, its place is kept for a person.
func TestBundleByURL(t *testing.T) {
	for agent, into := range map[string]string{
		`trust_bundle_url = "https://b.example.org/b"`:                                       "agent.server.bundle.url",
		`trust_bundle_url = "http://b/b" trust_bundle_unix_socket = "/run/b.sock"`:           "agent.server.bundle.unix_socket",
		`trust_bundle_spiffe_workload_api = "unix:///run/other.sock"`:                        "agent.server.bundle.workload_api",
		`insecure_bootstrap = true`:                                                          "agent.server.insecure_bootstrap",
		`trust_bundle_path = "relative.crt"`:                                                 "agent.server.bundle.file",
		`insecure_bootstrap = false trust_bundle_path = "/b.crt" trust_domain = "other.org"`: "agent.server.bundle.file",
	} {
		r := importText(t, least(agent, x509pop, ""))
		if known := config.Knows(into); r.Complete() != known {
			t.Errorf("%s: complete: %v, want %v: %v", agent, r.Complete(), known, r.Notes)
		}
		for _, f := range r.Check("narthex.yaml") {
			t.Errorf("%s: %v\n%s", agent, &f, r.Text)
		}
	}
}

func TestJoinToken(t *testing.T) {
	const disk, memory = `NodeAttestor "join_token" { plugin_data {} } KeyManager "disk" { plugin_data { directory = "." } }`, `NodeAttestor "join_token" { plugin_data {} } KeyManager "memory" {}`
	for name, test := range map[string]struct {
		agent, plugins string
		want           string // in the text
		secrets        int
		complete       bool
	}{
		"a file":      {`join_token_file = "t"`, disk, "token_file: /opt/spire/t", 0, true},
		"in the file": {`join_token = "secret"`, disk, "token_file: join-token", 1, true},
		"none":        {"", disk, "token_file: join-token", 0, true},
		"in memory":   {`join_token = "secret"`, memory, "disk: {}", 1, false},
		"no attestor": {`join_token = "secret"`, x509pop, "x509pop:", 0, false},
	} {
		r := importText(t, least(bundlePath+"\n"+test.agent, test.plugins, ""))
		if name == "no attestor" {
			test.complete = true // it is never used, by spire-agent neither
		}
		if !strings.Contains(string(r.Text), test.want) || len(r.Secrets) != test.secrets || r.Complete() != test.complete {
			t.Errorf("%s: complete: %v, %d secrets, want %v, %d and %q in\n%s", name, r.Complete(), len(r.Secrets), test.complete, test.secrets, test.want, r.Text)
		}
		if strings.Contains(fmt.Sprint(string(r.Text), r.Notes, r.Secrets), "secret\"") {
			t.Errorf("%s: the token is shown", name)
		}
	}
}

func TestSigstore(t *testing.T) {
	r := importText(t, least(bundlePath, x509pop+` WorkloadAttestor "k8s" { plugin_data { sigstore {
    allowed_identities { "https://accounts.example.org" = ["a@example.org", ".*@example.org"] }
    skipped_images = ["registry/pause@sha256:7031c1b283388d2c2e09b57badb803c05ebed362dc88d84b480cc47f72a21097"]
    ignore_sct = true
    registry_credentials = { "quay.io" = { username = "u" password = "not-to-be-shown" } }
  } } }`, ""))
	for _, want := range []string{
		"trusted_root: trusted_root.json", `issuer: "https://accounts.example.org"`, `subjects: ["a@example.org", ".*@example.org"]`,
		"ignore_sct: true", "host: quay.io", `password: registry-password-1`,
	} {
		if !strings.Contains(string(r.Text), want) {
			t.Errorf("want %q in\n%s", want, r.Text)
		}
	}
	if strings.Contains(fmt.Sprint(string(r.Text), r.Notes, r.Secrets), "not-to-be-shown") || len(r.Secrets) != 1 {
		t.Error("the password is not kept apart")
	}
	for _, f := range r.Check("narthex.yaml") {
		t.Errorf("%v\n%s", &f, r.Text)
	}
}

func TestExpandEnv(t *testing.T) {
	o := options
	o.Getenv = func(name string) string { return map[string]string{"TD": "example.org"}[name] }
	for text, want := range map[string]string{`"$TD"`: "trust_domain: example.org", `"${TD}"`: "trust_domain: example.org"} {
		r, err := SpireAgent("agent.conf", []byte("agent { trust_domain = "+text+" }"), o)
		if err != nil || !strings.Contains(string(r.Text), want) {
			t.Errorf("%s: %v, want %q in %v", text, err, want, r)
		}
	}
}

func TestUnreadable(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"empty":          {"", "agent.conf: neither an agent nor a plugins block"},
		"something else": {`upstream { trust_domain = "x" }`, "neither an agent nor a plugins block"},
		"of a server":    {"server { trust_domain = \"x\" }\nplugins {}", "it is a spire-server's configuration"},
		"no HCL":         {"agent {\n  data_dir 1\n}", "agent.conf:2:"},
		"a token":        {"agent {\n  join_token \"not-to-be-shown\"\n}", "agent.conf:3:1"},
		"open":           {"agent {", "not valid HCL"},
		"no JSON":        {"{\n\"agent\": tok}", "agent.conf:2:11: not valid JSON: invalid character"},
		"deep":           {strings.Repeat("a {", 100), "nested more than 32 deep"},
		"deep list":      {"agent { a = " + strings.Repeat("[", 100), "nested more than 32 deep"},
		"deep JSON":      {strings.Repeat(`{"a":`, 100), "nested more than 32 deep"},
		"not text":       {"agent \xff", "not UTF-8"},
		"large":          {strings.Repeat("#\n", MaxSize), "larger than 1048576 bytes"},
		"a number":       {"agent { server_port = 99999999999999999999999 }", ""},
		"a heredoc":      {"agent { data_dir = <<E", "not valid HCL"},
	} {
		r, err := SpireAgent("agent.conf", []byte(test.text), options)
		if test.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "not-to-be-shown") {
			t.Errorf("%s: %v, %v, want %q", name, r, err, test.want)
		}
	}
}

// Whatever the file, what comes of it is YAML with keys that Narthex has, each
// once: only values can be wrong in it.
func FuzzSpireAgent(f *testing.F) {
	files, err := filepath.Glob(filepath.Join("testdata", "*.*"))
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("agent { trust_domain = \"a\\nb: c\" socket_path = \"#\" }"))
	f.Add([]byte(`agent { experimental { broker { brokers = [ { id = "x" } ] } } }`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := SpireAgent("agent.conf", data, options)
		if err != nil {
			return
		}
		for _, found := range r.Check("narthex.yaml") {
			if p := found.Problem; strings.Contains(p, "YAML") || strings.Contains(p, "unknown key") || strings.Contains(p, "is there already") || strings.Contains(p, "not supported") {
				t.Errorf("%v\n%s", &found, r.Text)
			}
		}
	})
}
