package importer

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/config"
)

// stockSocket is where spire-agent serves its Workload API when it is not told.
const stockSocket = "/tmp/spire-agent/public/api.sock"

// bundleFile stands for a bootstrap bundle that has to be fetched by hand, and
// tokenFile for a join token; both are beside narthex.yaml.
const (
	bundleFile = "bootstrap-bundle.pem"
	tokenFile  = "join-token"
)

// node carries what the agent is.
func (d *draft) node(f *fields) {
	if s := f.text("trust_domain"); s != "" {
		td, err := spiffeid.TrustDomainFromString(s)
		if err != nil {
			d.lose(f.at("trust_domain"), f.key("trust_domain"), "%q is no trust domain: %v", clip(s), err)
		} else {
			d.out.set("trust_domain", td.Name())
		}
	}
	d.out.set("data_dir", d.options.DataDir)
}

// server carries where the server is and how it is trusted the first time.
func (d *draft) server(f *fields) {
	host, port := f.text("server_address"), f.text("server_port")
	switch {
	case host == "" || port == "":
		d.lose(f.at("server_address"), f.key("server_address"), "want server_address and server_port, without which spire-agent does not start")
	default:
		if n, err := strconv.ParseUint(port, 0, 16); err == nil { // 0x1f91 is a port to spire-agent
			port = strconv.FormatUint(n, 10)
		}
		d.out.set("agent.server.address", net.JoinHostPort(host, port))
	}
	d.bundle(f)
	d.rebootstrap(f)
}

// bundle carries the bootstrap bundle. Where this version cannot have it from
// where spire-agent has it, a file takes its place, which has to be filled.
func (d *draft) bundle(f *fields) {
	const into = "agent.server.bundle"
	d.setFlag(f, "insecure_bootstrap", "agent.server.insecure_bootstrap")
	d.setPath(f, "trust_bundle_path", into+".file")
	bySocket := f.has("trust_bundle_unix_socket")
	url := f.text("trust_bundle_url")
	switch {
	case url == "":
	case config.Knows(into+".url") && (!bySocket || config.Knows(into+".unix_socket")):
		d.out.set(into+".url", url)
		d.setPath(f, "trust_bundle_unix_socket", into+".unix_socket")
	default:
		d.out.set(into+".file", bundleFile)
		d.lose(f.at("trust_bundle_url"), f.key("trust_bundle_url"),
			"this version of Narthex fetches no bundle: put the PEM certificates that are there into %s, beside narthex.yaml", bundleFile)
	}
	f.ignore("trust_bundle_unix_socket") // goes with the URL
	if f.text("trust_bundle_spiffe_workload_api") != "" {
		d.out.set(into+".file", bundleFile)
		d.lose(f.at("trust_bundle_spiffe_workload_api"), f.key("trust_bundle_spiffe_workload_api"),
			"Narthex asks no other Workload API for its bundle: put its PEM certificates into %s, beside narthex.yaml", bundleFile)
	}
	switch format := f.text("trust_bundle_format"); {
	case format == "" || format == "pem":
	case config.Knows(into + ".format"):
		d.out.set(into+".format", format)
	default:
		d.lose(f.at("trust_bundle_format"), f.key("trust_bundle_format"),
			"this version of Narthex reads PEM alone: write the bundle with `spire-server bundle show`")
	}
}

// rebootstrap carries what happens when the server's bundle was lost. never is
// what happens anyway, and then the delay says nothing.
func (d *draft) rebootstrap(f *fields) {
	mode, delay := f.text("rebootstrap_mode"), f.duration("rebootstrap_delay")
	if mode == "" || mode == "never" {
		return
	}
	d.set(f, "rebootstrap_mode", "agent.server.rebootstrap.mode", mode)
	if delay != "" && config.Knows("agent.server.rebootstrap.delay") {
		d.out.set("agent.server.rebootstrap.delay", delay)
	}
}

// sockets carries what the agent listens on for workloads and administrators.
func (d *draft) sockets(f *fields) {
	socket := stockSocket
	if s := f.text("socket_path"); s != "" {
		socket = d.path(f, "socket_path", s)
	}
	d.out.set("agent.workload_api.socket", socket)
	d.setFlag(f, "allow_unauthenticated_verifiers", "agent.workload_api.allow_unauthenticated_verifiers")
	if claims := f.texts("allowed_foreign_jwt_claims"); len(claims) > 0 {
		d.set(f, "allowed_foreign_jwt_claims", "agent.workload_api.allowed_foreign_jwt_claims", claims)
	}
	f.loseFlag("disable_workload_api", "the agent of Narthex always serves the Workload API: let nobody reach its socket")
	f.loseFlag("disable_sds_api", "what Envoy asks for is served at the socket of the Workload API: let nobody reach it")
	d.setPath(f, "admin_socket_path", "agent.admin.socket")
	if ids := f.texts("authorized_delegates"); len(ids) > 0 {
		if f.has("admin_socket_path") {
			d.set(f, "authorized_delegates", "agent.admin.authorized_delegates", ids)
		} else {
			d.note(f.at("authorized_delegates"), f.key("authorized_delegates"), "left out: without admin_socket_path spire-agent serves no delegates either")
		}
	}
	d.sds(f.fields("sds"))
}

// sds carries the names by which Envoy asks.
func (d *draft) sds(f *fields) {
	for _, name := range []struct{ key, usual string }{
		{"default_svid_name", "default"}, {"default_bundle_name", "ROOTCA"}, {"default_all_bundles_name", "ALL"},
	} {
		if s := f.text(name.key); s != "" && s != name.usual {
			d.set(f, name.key, "agent.sds."+name.key, s)
		}
	}
	d.setFlag(f, "disable_spiffe_cert_validation", "agent.sds.disable_spiffe_cert_validation")
	f.rest()
}

// svids carries what the SVIDs of workloads are like.
func (d *draft) svids(f *fields) {
	d.setText(f, "workload_x509_svid_key_type", "agent.svid.key_type")
	if s := f.duration("availability_target"); s != "" {
		d.set(f, "availability_target", "agent.svid.availability_target", s)
	}
	d.cacheSize(f, "x509_svid_cache_max_size", "agent.svid.x509_cache")
	d.cacheSize(f, "jwt_svid_cache_max_size", "agent.svid.jwt_cache")
}

// cacheSize carries how many SVIDs are held.
func (d *draft) cacheSize(f *fields, from, into string) {
	const usual, most = 1000, 1_000_000
	switch n, ok := f.number(from); {
	case !ok || n == 0 || n == usual: // 0 is the default to spire-agent
	case n > most:
		d.set(f, from, into, int64(most))
		d.note(f.at(from), f.key(from), "%d is the most here", most)
	default:
		d.set(f, from, into, n)
	}
}

// experimental carries the block of that name.
func (d *draft) experimental(f *fields) {
	if s := f.duration("sync_interval"); s != "" {
		d.set(f, "sync_interval", "agent.sync.interval", s)
	}
	d.setFlag(f, "require_pq_kem", "agent.server.require_pq_kem")
	f.lose("jwt_svid_cache_hit_timeout", "how long a cached JWT-SVID waits for a new one is set by no key")
	f.lose("named_pipe_name", "pipes are of Windows, where Narthex does not run")
	f.lose("admin_named_pipe_name", "pipes are of Windows, where Narthex does not run")
	if f.has("use_sync_authorized_entries") && !f.flag("use_sync_authorized_entries") {
		f.lose("use_sync_authorized_entries", "Narthex uses it where the server has it, and does without where it has not: leave it out")
	}
	limits := f.fields("ratelimit")
	for _, key := range []string{"fetch_x509_svid", "fetch_jwt_svid", "fetch_x509_bundles", "fetch_jwt_bundles", "stream_secrets", "fetch_secrets"} {
		if n, ok := limits.number(key); ok && n != 0 {
			limits.lose(key, "the limits of each caller are set by no key (docs/limits.md)")
		}
	}
	limits.rest()
	if f.has("broker") {
		d.broker(f.fields("broker"))
	}
	if len(f.texts("feature_flags")) > 0 {
		f.lose("feature_flags", "these are switches of spire-agent's own code")
	}
	f.rest()
}

// pidReference names a process by its PID, in the Broker API.
const pidReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"

// broker carries the endpoint of the SPIFFE Broker API.
func (d *draft) broker(f *fields) {
	const into = "agent.broker"
	brokers := f.blocks("brokers")
	if !config.Knows(into) {
		d.lose(f.at("brokers"), f.path, "%s is not supported by this version of Narthex", into)
		f.ignore("socket_path", "bind_address")
		brokers = nil
	}
	d.setPath(f, "socket_path", into+".socket")
	d.setText(f, "bind_address", into+".listen")
	for i, b := range brokers {
		at := fmt.Sprintf("%s.brokers[%d]", into, i)
		d.setText(b, "id", at+".id")
		for j, r := range b.blocks("allowed_reference_types") {
			d.setText(r, "type_url", fmt.Sprintf("%s.references[%d].type_url", at, j))
			if r.text("type_url") == pidReference {
				r.loseFlag("allow_over_tcp", "a PID means another process on every node: over TCP it is refused here")
			} else {
				d.setFlag(r, "allow_over_tcp", fmt.Sprintf("%s.references[%d].allow_over_tcp", at, j))
			}
			r.rest()
		}
		b.rest()
	}
	f.rest()
}

// log carries what the agent says of itself.
func (d *draft) log(f *fields) {
	switch level := strings.ToLower(f.text("log_level")); level {
	case "", "info":
	case "trace", "debug", "warn", "error":
		d.out.set("log.level", level)
	case "warning":
		d.out.set("log.level", "warn")
	case "fatal", "panic":
		d.out.set("log.level", "error")
		d.note(f.at("log_level"), f.key("log_level"), "error is the least that is logged here")
	default:
		f.lose("log_level", "want debug, info, warn or error")
	}
	switch format := strings.ToLower(f.text("log_format")); format {
	case "", "text":
	case "json":
		d.out.set("log.format", format)
	default:
		f.lose("log_format", "want text or json")
	}
	if path := f.text("log_file"); path != "" {
		f.lose("log_file", "the log goes to standard error: have the service manager write the file, as systemd does with StandardError=append:FILE")
	}
	f.loseFlag("log_source_location", "log lines name no place of the source")
	if len(f.texts("log_selectors")) > 0 {
		f.lose("log_selectors", "log lines hold no selectors of callers")
	}
}

// profiling names what only spire-agent has.
func (d *draft) profiling(f *fields) {
	f.loseFlag("profiling_enabled", "the agent has no profiling endpoint: use perf, or a build with the tag profile")
	f.ignore("profiling_port", "profiling_freq", "profiling_names") // without it they say nothing
}
