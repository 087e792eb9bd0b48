package config

import (
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// HasAgent reports whether the file configures an agent.
func (c *Config) HasAgent() bool { return c.Agent != nil }

// HasProxy reports whether the file configures a proxy.
func (c *Config) HasProxy() bool { return c.Proxy != nil }

// ForAgent reports, as an *Error, what `narthex agent` lacks in the file.
func (c *Config) ForAgent() error {
	f := c.again()
	c.lackForAgent(f)
	return f.err()
}

func (c *Config) lackForAgent(f *findings) {
	if c.Agent == nil {
		f.addf("agent", "the agent block is missing; it needs at least server and node_attestor")
	}
}

// ForProxy reports, as an *Error, what `narthex proxy` lacks in the file.
func (c *Config) ForProxy() error {
	f := c.again()
	c.lackForProxy(f)
	return f.err()
}

// Decides reports whether anything asks the rules: a listener, or Envoy.
func (p *Proxy) Decides() bool { return len(p.Listeners)+len(p.ExtAuthz) > 0 }

// HasDataDir reports whether the file says where data_dir is.
func (c *Config) HasDataDir() bool {
	_, said := c.pos["data_dir"]
	return said
}

func (c *Config) lackForProxy(f *findings) {
	if c.Proxy == nil {
		f.addf("proxy", "the proxy block is missing; it needs at least policies and listeners")
	}
}

// ForRun reports, as an *Error, what `narthex run` lacks in the file: it
// needs both halves.
func (c *Config) ForRun() error {
	f := c.again()
	c.lackForAgent(f)
	c.lackForProxy(f)
	return f.err()
}

func (c *Config) again() *findings {
	f := newFindings(c.file)
	if c.pos != nil {
		f.pos = c.pos
	}
	return f
}

// validate checks what no single value can be blamed for, and fills in what
// depends on other keys.
func (c *Config) validate(f *findings) {
	if c.Agent == nil && c.Proxy == nil && !f.isBad("") && !f.isBad("agent") && !f.isBad("proxy") {
		f.add(position{1, 1}, "", "the file needs an agent or a proxy block, or both")
	}
	if c.Agent != nil {
		c.Agent.validate(f)
		if t := c.Agent.TakeOver; t != nil && t.DataDir == c.DataDir {
			f.addf("agent.take_over.data_dir", "is this agent's own data_dir; give that a directory of its own, so that spire-agent's stays as it is")
		}
		if c.Agent.Broker != nil {
			c.Agent.Broker.validate(f, c.TrustDomain, c.Agent.WorkloadAPI.Socket)
		}
		if c.TrustDomain.IsZero() {
			f.addf("trust_domain", "is required for the agent")
		}
	}
	if c.Proxy != nil {
		c.shareSocket()
		c.Proxy.validate(f)
	}
	if p := c.AccessLog.Path; p != "" && p != "stdout" && p != "stderr" && !filepath.IsAbs(p) {
		c.AccessLog.Path = filepath.Join(filepath.Dir(c.file), p)
	}
	c.checkPlaces(f)
}

// shareSocket gives the proxy the agent's Workload API where the file says no
// other.
func (c *Config) shareSocket() {
	p := c.Proxy
	if p.Source != "workload_api" {
		return
	}
	if _, said := c.pos["proxy.workload_api.socket"]; said {
		return
	}
	p.WorkloadAPI = &WorkloadAPI{Socket: defaultSocket}
	if c.Agent != nil {
		p.WorkloadAPI.Socket = c.Agent.WorkloadAPI.Socket
	}
}

// defaultSocket is the default tag of both Workload APIs' socket; a test compares.
const defaultSocket = "/run/narthex/public/api.sock"

func (a *Agent) validate(f *findings) {
	a.Server.validate(f, a.NodeAttestor.JoinToken != nil)
	needHost(f, "agent.server.address", a.Server.Address, "the server")
	if t := a.NodeAttestor.JoinToken; t != nil {
		const key = "agent.node_attestor.join_token"
		switch {
		case t.Token != "" && t.TokenFile != "":
			f.addf(key+".token", "cannot stand beside token_file; keep token_file")
		case t.Token == "" && t.TokenFile == "" && !f.isBad(key+".token") && !f.isBad(key+".token_file"):
			f.addf(key, "needs token_file")
		}
		if a.KeyManager.Memory != nil && a.NodeAttestor.X509PoP == nil {
			f.addf("agent.key_manager.memory", "cannot stand beside join_token: a token is good once, so a restarted agent without its key could not attest again; use disk")
		}
	}
	if a.TakeOver != nil && a.KeyManager.Memory != nil {
		f.addf("agent.take_over", "cannot stand beside key_manager: {memory: {}}: what was taken over would be gone at the next start; use disk")
	}
	if a.Admin != nil {
		a.Admin.validate(f, a.WorkloadAPI.Socket)
	}
	if k := a.WorkloadAttestors.K8s; k != nil {
		k.validate(f, "agent.workload_attestors.k8s")
	}
	a.SDS.validate(f)
	if t := time.Duration(a.SVID.AvailabilityTarget); t != 0 && t < 24*time.Hour {
		f.addf("agent.svid.availability_target", "%s is too short; 0s (off) or at least 24h", t)
	}
}

// maxResourceName is the length of the longest SPIFFE ID, which is the longest
// name that is served.
const maxResourceName = 2048

// validate checks that each name says one thing.
func (s *SDS) validate(f *findings) {
	names := []struct{ key, name string }{
		{"agent.sds.default_svid_name", s.DefaultSVIDName},
		{"agent.sds.default_bundle_name", s.DefaultBundleName},
		{"agent.sds.default_all_bundles_name", s.DefaultAllBundlesName},
	}
	for i, n := range names {
		switch {
		case f.isBad(n.key):
		case n.name == "*" || len(n.name) > maxResourceName || strings.HasPrefix(n.name, "spiffe://"):
			f.addf(n.key, "%.40q cannot be a resource's name: write one of at most %d bytes that is not * and no SPIFFE ID, which is served by itself", n.name, maxResourceName)
		case slices.ContainsFunc(names[:i], func(o struct{ key, name string }) bool { return o.name == n.name }):
			f.addf(n.key, "%.40q is the name of another resource in agent.sds", n.name)
		}
	}
}

// validate checks the admin socket beside the Workload API's.
func (a *Admin) validate(f *findings, workloadAPI Socket) {
	public := filepath.Dir(filepath.Clean(string(workloadAPI)))
	if dir := filepath.Dir(filepath.Clean(string(a.Socket))); workloadAPI != "" && a.Socket != "" && (dir == public || strings.HasPrefix(dir, strings.TrimSuffix(public, "/")+"/")) {
		f.addf("agent.admin.socket", "%s is in the directory of agent.workload_api.socket, which is shown to workloads; choose another directory, such as %s", a.Socket, filepath.Dir(defaultAdminSocket))
	}
	for i, id := range a.AuthorizedDelegates {
		if slices.Contains(a.AuthorizedDelegates[:i], id) && !id.IsZero() {
			f.addf(fmt.Sprintf("agent.admin.authorized_delegates[%d]", i), "%s is in the list already", id)
		}
	}
}

// validate checks how the server is known; once says that the node can attest
// only once.
func (s *Server) validate(f *findings, once bool) {
	switch {
	case s.Bundle != nil && s.InsecureBootstrap:
		f.addf("agent.server.insecure_bootstrap", "cannot be true beside agent.server.bundle; keep the bundle")
	case s.Bundle != nil:
		s.Bundle.validate(f)
	case !s.InsecureBootstrap && !f.isBad("agent.server.bundle") && !f.isBad("agent.server.insecure_bootstrap"):
		f.addf("agent.server", "needs bundle: {file: …}, to know the server the first time; to try things out, insecure_bootstrap: true")
	}
	const mode = "agent.server.rebootstrap.mode"
	switch again := s.Rebootstrap.Mode; {
	case again == "never" || f.isBad(mode):
	case s.InsecureBootstrap:
		f.addf(mode, "%s cannot stand beside insecure_bootstrap: any server would be believed again; use a bundle, or never", again)
	case again == "always" && once:
		f.addf(mode, "always needs a node attestor that can attest again, and a join token is good once; use auto or never")
	}
}

func (b *ServerBundle) validate(f *findings) {
	const key = "agent.server.bundle"
	switch {
	case f.isBad(key) || f.isBad(key+".file") || f.isBad(key+".url") || f.isBad(key+".unix_socket"):
	case b.File == "" && b.URL == "" && b.UnixSocket == "":
		f.addf(key, "needs file, url or unix_socket")
	case b.File != "" && (b.URL != "" || b.UnixSocket != ""):
		f.addf(key+".file", "stands alone; leave out url and unix_socket, or this")
	case b.URL != "":
		b.validateURL(f, key+".url")
	}
}

func (b *ServerBundle) validateURL(f *findings, key string) {
	u, err := url.Parse(b.URL)
	switch {
	case err != nil || u.Host == "":
		f.addf(key, "%q is no URL with a host", b.URL)
		return
	case u.User != nil:
		f.addf(key, "cannot have a user or a password in it, which logs would show")
	case b.UnixSocket == "" && u.Scheme != "https":
		f.addf(key, "%q does not begin with https://: whoever is on the way would choose the server that is believed", b.URL)
	case b.UnixSocket != "" && u.Scheme != "http":
		f.addf(key, "%q does not begin with http://, which is what is spoken at unix_socket", b.URL)
	}
	for _, name := range slices.Sorted(maps.Keys(u.Query())) {
		if b.UnixSocket != "" && (strings.HasPrefix(name, "spiffe-") || strings.HasPrefix(name, "spire-")) {
			f.addf(key, "has the parameter %q; names that begin with spiffe- and spire- are for what the agent adds", name)
		}
	}
}

// defaultAdminSocket is the default tag of Admin.Socket; a test compares.
const defaultAdminSocket = "/run/narthex/private/admin.sock"

// needHost checks an address that is dialled over the network.
func needHost(f *findings, key string, a Address, what string) {
	switch {
	case a == "":
	case a.Network() == "unix":
		f.addf(key, "%q is a Unix socket; %s is reached at host:port", a, what)
	case a.Host() == "":
		f.addf(key, "%q has no host", a)
	case a.Port() == 0:
		f.addf(key, "%q has port 0", a)
	}
}

func (p *Proxy) validate(f *findings) {
	switch p.Source {
	case "files":
		if p.Files == nil && !f.isBad("proxy.files") {
			f.addf("proxy.source", "files needs proxy.files with cert, key and bundle")
		}
		if p.WorkloadAPI != nil {
			f.addf("proxy.workload_api", "has no use with proxy.source: files; leave one of them out")
		}
	case "workload_api":
		if p.Files != nil {
			f.addf("proxy.files", "has no use with proxy.source: workload_api; set proxy.source: files or leave it out")
		}
	}
	if p.User == "root" || p.User == "0" {
		f.addf("proxy.user", "%q would give the half that reads what strangers send all rights of the agent's; name a user of its own, such as narthex", p.User)
	}
	for i, pattern := range p.Policies {
		if _, err := filepath.Match(string(pattern), ""); err != nil {
			f.addf(fmt.Sprintf("proxy.policies[%d]", i), "%q is no file name or pattern: %v", pattern, err)
		}
	}
	p.validateCRLs(f)
	names := map[string]string{}
	name := func(key, name string) {
		if first, ok := names[name]; ok && name != "" {
			f.addf(key+".name", "%q is the name of %s already", name, first)
			return
		}
		names[name] = key
	}
	for i := range p.Listeners {
		key := fmt.Sprintf("proxy.listeners[%d]", i)
		p.Listeners[i].validate(f, key, p.Source)
		name(key, p.Listeners[i].Name)
	}
	for i := range p.ExtAuthz {
		key := fmt.Sprintf("proxy.ext_authz[%d]", i)
		p.ExtAuthz[i].validate(f, key, p.Source)
		name(key, p.ExtAuthz[i].Name)
	}
}

func (e *ExtAuthz) validate(f *findings, key, source string) {
	validateName(f, key, e.Name)
	switch {
	case e.Bind == "": // said already
	case e.Bind.Network() == "unix":
		for _, only := range []struct {
			key   string
			given bool
		}{{"clients", len(e.Clients) > 0}, {"identity", e.Identity != nil}} {
			if only.given {
				f.addf(key+"."+only.key, "is for mTLS; on a Unix socket mode says who may ask")
			}
		}
	case len(e.Clients) == 0 && !f.isBad(key+".clients"):
		f.addf(key+".clients", "is required with host:port: the SPIFFE IDs of the Envoys that may ask, since they are believed in whom a request comes from")
	case e.Mode != "":
		f.addf(key+".mode", "is for a Unix socket; over mTLS clients says who may ask")
	}
	for i, c := range e.Clients {
		if c != "" && slices.Contains(e.Clients[:i], c) {
			f.addf(fmt.Sprintf("%s.clients[%d]", key, i), "%s is in the list already", c)
		}
	}
	if e.Identity != nil && e.Identity.Hint != "" && source == "files" {
		f.addf(key+".identity.hint", "has no use with proxy.source: files, where SVIDs have no hints; use spiffe_id or leave it out")
	}
}

func validateName(f *findings, key, name string) {
	if name != "" && !listenerName.MatchString(name) {
		f.addf(key+".name", "%q is no listener name; use letters, digits, dot, dash and underscore, at most 63, a letter or digit first", clip(name))
	}
}

// validateCRLs refuses patterns that could never name a file.
func (p *Proxy) validateCRLs(f *findings) {
	for td, patterns := range p.CRLs {
		key := "proxy.crls." + td.Name()
		for i, pattern := range patterns {
			if _, err := filepath.Match(string(pattern), ""); err != nil {
				f.addf(fmt.Sprintf("%s[%d]", key, i), "%q is no file name or pattern: %v", pattern, err)
			}
		}
	}
}

// listenerName keeps names fit for metric labels, log fields and rules.
var listenerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func (l *Listener) validate(f *findings, key, source string) {
	validateName(f, key, l.Name)
	l.Target.validate(f, key+".target", l.Bind)
	l.validateRoutes(f, key)
	l.validateHTTP(f, key)
	l.ProxyProtocol.validate(f, key+".proxy_protocol", l.Bind)
	if h := l.Upstream.Health; h != nil && h.Timeout > h.Interval {
		f.addf(key+".upstream.health.timeout", "%s is longer than the interval, %s", h.Timeout, h.Interval)
	}
	switch {
	case l.Direction == "outbound" && len(l.Expect) == 0 && !f.isBad(key+".expect"):
		f.addf(key+".expect", "is required on an outbound listener: the SPIFFE IDs the peer may have")
	case l.Direction == "inbound" && len(l.Expect) > 0:
		f.addf(key+".expect", "has no use on an inbound listener; who may call is said by rules (from)")
	}
	if l.Direction == "outbound" && l.Mode == "permissive" {
		f.addf(key+".mode", "permissive has no use on an outbound listener: what leaves is always mTLS; leave it out")
	}
	seen := map[spiffeid.ID]bool{}
	for i, id := range l.Expect {
		if seen[id] && !id.IsZero() {
			f.addf(fmt.Sprintf("%s.expect[%d]", key, i), "%s is in the list already", id)
		}
		seen[id] = true
	}
	if l.Identity != nil && l.Identity.Hint != "" && source == "files" {
		f.addf(key+".identity.hint", "has no use with proxy.source: files, where SVIDs have no hints; use spiffe_id or leave it out")
	}
}

// validate checks the targets of a listener that is bound to bind.
func (t Targets) validate(f *findings, key string, bind Address) {
	if len(t) > maxTargets {
		f.addf(key, "has %d addresses; at most %d", len(t), maxTargets)
	}
	for i, target := range t {
		at := t.key(key, i)
		if target.Network() == "tcp" {
			needHost(f, at, target, "the target")
		}
		if bind != "" && bind == target {
			f.addf(at, "is %s, the listener's own bind address", target)
		}
		if target != "" && slices.Contains(t[:i], target) {
			f.addf(at, "%s is in the list already", target)
		}
	}
}

// key returns the key of one of the targets: a lone one may stand without a
// list around it.
func (t Targets) key(key string, i int) string {
	if len(t) == 1 {
		return key
	}
	return fmt.Sprintf("%s[%d]", key, i)
}

func (p *ProxyProtocol) validate(f *findings, key string, bind Address) {
	for i, n := range p.AcceptFrom {
		at := fmt.Sprintf("%s.accept_from[%d]", key, i)
		switch {
		case n == "" || bind == "":
		case slices.Contains(p.AcceptFrom[:i], n):
			f.addf(at, "%s is in the list already", n)
		case n.Unix() && bind.Network() != "unix":
			f.addf(at, "has no use on %s, where every client has an address; name the networks of the proxies", bind)
		case !n.Unix() && bind.Network() == "unix":
			f.addf(at, "has no use on a Unix socket, whose clients have no address; write unix, and see who may connect")
		}
	}
}

// place is an address or socket that the program listens on.
type place struct {
	key string
	at  Address
}

// checkPlaces finds two things that would listen on one place.
func (c *Config) checkPlaces(f *findings) {
	var places []place
	if c.Agent != nil {
		places = append(places, place{"agent.workload_api.socket", Address("unix:" + c.Agent.WorkloadAPI.Socket)})
		if c.Agent.Admin != nil {
			places = append(places, place{"agent.admin.socket", Address("unix:" + c.Agent.Admin.Socket)})
		}
		if b := c.Agent.Broker; b != nil {
			if b.Socket != "" {
				places = append(places, place{"agent.broker.socket", Address("unix:" + b.Socket)})
			}
			places = append(places, place{"agent.broker.listen", b.Listen})
		}
	}
	if c.Proxy != nil {
		if h := c.Proxy.Handover; h != nil && h.Socket != "" {
			places = append(places, place{"proxy.handover.socket", Address("unix:" + h.Socket)})
		}
		for i, l := range c.Proxy.Listeners {
			places = append(places, place{fmt.Sprintf("proxy.listeners[%d].bind", i), l.Bind})
		}
		for i := range c.Proxy.ExtAuthz {
			places = append(places, place{fmt.Sprintf("proxy.ext_authz[%d].bind", i), c.Proxy.ExtAuthz[i].Bind})
		}
	}
	places = append(places, place{"telemetry.listen", c.Telemetry.Listen}, place{"telemetry.health", c.Telemetry.Health})
	taken := map[uint16][]place{} // by port, sockets under 0: only these can collide
	for _, p := range places {
		near := taken[p.at.Port()]
		if i := slices.IndexFunc(near, func(q place) bool { return p.at.collides(q.at) }); i >= 0 {
			f.addf(p.key, "%s is taken by %s already", p.at, near[i].key)
			continue
		}
		if p.at.Port() != 0 || p.at.Network() == "unix" {
			taken[p.at.Port()] = append(near, p)
		}
	}
}

// collides reports whether two listeners cannot have both addresses.
func (a Address) collides(b Address) bool {
	if a == "" || b == "" || a.Network() != b.Network() {
		return false
	}
	if a.Network() == "unix" {
		return filepath.Clean(a.Addr()) == filepath.Clean(b.Addr())
	}
	if a.Port() != b.Port() || a.Port() == 0 {
		return false
	}
	return a.Host() == b.Host() || a.everywhere() || b.everywhere()
}

func (a Address) everywhere() bool {
	switch a.Host() {
	case "", "0.0.0.0", "::":
		return a.Network() == "tcp"
	}
	return false
}

// PolicyFiles returns the files that the patterns of proxy.policies name now,
// each once, in the order of the patterns. A pattern that names no file is an
// error, an *Error: a policy that is not there must not look like one that
// allows nothing. Without listeners nobody can tell the two apart, and whoever
// brings the first listener brings rules. Without a proxy block there are none.
func (c *Config) PolicyFiles() ([]string, error) {
	if c.Proxy == nil {
		return nil, nil
	}
	f := c.again()
	var files []string
	for i, pattern := range c.Proxy.Policies {
		key := fmt.Sprintf("proxy.policies[%d]", i)
		found, err := filepath.Glob(string(pattern))
		switch {
		case err != nil:
			f.addf(key, "%q: %v", pattern, err)
		case len(found) == 0 && c.Proxy.Decides():
			f.addf(key, "no file matches %s", pattern)
		}
		for _, name := range found {
			if !slices.Contains(files, name) {
				files = append(files, name)
			}
		}
	}
	return files, f.err()
}
