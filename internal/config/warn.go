package config

import (
	"fmt"
	"io/fs"
)

func (c *Config) warnf(key, format string, args ...any) {
	c.Warnings = append(c.Warnings, c.Finding(key, format, args...))
	sortFindings(c.Warnings)
}

// Finding returns a finding at the place of a key, or of the block it would
// stand in.
func (c *Config) Finding(key, format string, args ...any) Finding {
	at := c.pos.of(key)
	return Finding{c.file, at.line, at.column, key, fmt.Sprintf(format, args...)}
}

// warn gathers what the file alone shows.
func (c *Config) warn() {
	if c.Agent != nil && c.Agent.Server.InsecureBootstrap {
		c.warnf("agent.server.insecure_bootstrap", "the server is not authenticated the first time: whoever answers there is trusted; use bundle: {file: …}")
	}
	if c.Agent != nil && c.Agent.WorkloadAttestors.K8s != nil {
		c.warnKubelet(&c.Agent.WorkloadAttestors.K8s.Kubelet, "agent.workload_attestors.k8s.kubelet")
	}
	if a := c.Telemetry.Listen; a != "" && !a.Local() {
		c.warnf("telemetry.listen", "%s is open to the network and shows identities and connections without authentication; use a loopback address, and telemetry.health for probes", a)
	}
	if c.Proxy == nil {
		return
	}
	for i := range c.Proxy.ExtAuthz {
		c.warnIdentity(c.Proxy.ExtAuthz[i].Identity, fmt.Sprintf("proxy.ext_authz[%d]", i))
	}
	for i, l := range c.Proxy.Listeners {
		key := fmt.Sprintf("proxy.listeners[%d]", i)
		c.warnIdentity(l.Identity, key)
		if l.Direction == "outbound" && !l.Bind.Local() {
			c.warnf(key+".bind", "%s is open to the network: whoever reaches it speaks as this listener's identity; use a loopback address or a Unix socket", l.Bind)
		}
		for n, from := range l.ProxyProtocol.AcceptFrom {
			if from.Prefix().IsValid() && from.Prefix().Bits() == 0 {
				c.warnf(fmt.Sprintf("%s.proxy_protocol.accept_from[%d]", key, n), "%s is everybody: whoever connects chooses the source that rules and log see; name the networks of the proxies", from)
			}
		}
		c.warnRoutes(&l, key)
		if l.Direction == "inbound" {
			c.warnRemote(l.Target, key+".target")
			for n, r := range l.Routes {
				c.warnRemote(r.Target, fmt.Sprintf("%s.routes[%d].target", key, n))
			}
		}
	}
}

// warnIdentity finds an identity that nobody can give to this proxy.
func (c *Config) warnIdentity(id *ListenerIdentity, key string) {
	if id != nil && !id.SPIFFEID.IsZero() && !c.TrustDomain.IsZero() && !id.SPIFFEID.MemberOf(c.TrustDomain) {
		c.warnf(key+".identity.spiffe_id", "%s is not of trust_domain %s: no agent of that domain can give it to this proxy, so the listener would wait for ever", id.SPIFFEID, c.TrustDomain)
	}
}

// warnKubelet finds what lets others speak for the kubelet.
func (c *Config) warnKubelet(k *Kubelet, key string) {
	switch {
	case k.ReadOnly:
		c.warnf(key+".read_only", "whoever answers on the read-only port decides who gets which identity, and anybody can read it; use the secure port")
	case k.SkipVerification:
		c.warnf(key+".skip_verification", "whoever answers at the kubelet's address is sent the token and decides who gets which identity; give ca the kubelet's CA")
	}
}

// warnRemote finds targets of an inbound listener that are elsewhere.
func (c *Config) warnRemote(targets Targets, key string) {
	for i, target := range targets {
		if !target.Local() {
			c.warnf(targets.key(key, i), "%s is not on this host, as far as its name tells: what passes between is neither encrypted nor authenticated", target)
		}
	}
}

// warnMode adds what the mode of the file shows.
func (c *Config) warnMode(mode fs.FileMode) {
	if c.Agent == nil || c.Agent.NodeAttestor.JoinToken == nil || c.Agent.NodeAttestor.JoinToken.Token == "" {
		return
	}
	if mode&0o077 != 0 {
		c.warnf("agent.node_attestor.join_token.token", "the file holds a join token and has mode %04o, so others can read it; chmod 600 it, or use token_file", mode)
	}
}
