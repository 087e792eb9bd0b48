package importer

import (
	"fmt"
	"slices"
	"strings"

	"github.com/narthex-id/narthex/internal/config"
)

// plugin is one plugin of the file that is on.
type plugin struct {
	kind, name string
	at         place
	data       *fields
	taken      bool
}

// plugins reads the plugins block. Those that are off are left out.
func (d *draft) plugins(blocks []pair) []*plugin {
	var found []*plugin
	pieces := map[[2]string][]pair{}
	all := d.fieldsOf("plugins", blocks...)
	for _, kind := range all.pairs {
		for _, p := range d.fieldsOf("plugins."+clip(kind.key), kind).pairs {
			id := [2]string{kind.key, p.key}
			if pieces[id] == nil {
				found = append(found, &plugin{kind: kind.key, name: p.key, at: p.at})
			}
			pieces[id] = append(pieces[id], p)
		}
	}
	return slices.DeleteFunc(found, func(p *plugin) bool { return !d.plugin(p, pieces[[2]string{p.kind, p.name}]) })
}

// path is where the plugin stands.
func (p *plugin) path() string { return fmt.Sprintf("plugins.%s.%s", clip(p.kind), clip(p.name)) }

// plugin reads what plugins have in common, and reports whether it is one of
// spire-agent's own that is on.
func (d *draft) plugin(p *plugin, pieces []pair) bool {
	f := d.fieldsOf(p.path(), pieces...)
	if f.has("enabled") && !f.flag("enabled") {
		return false
	}
	p.data = f.fields("plugin_data")
	external := f.text("plugin_cmd") != ""
	if external {
		d.lose(p.at, p.path(), "Narthex runs no plugins of others")
	}
	f.ignore("plugin_args", "plugin_checksum") // of those
	f.lose("plugin_data_file", "this file is not read: write its content into plugin_data, and import again")
	f.rest()
	return !external
}

// lose names a plugin that is not carried.
func (d *draft) losePlugin(p *plugin, why string) {
	p.taken = true
	d.lose(p.at, p.path(), "%s", why)
}

// of returns the plugins of a kind and takes them.
func of(all []*plugin, kind string) []*plugin {
	var found []*plugin
	for _, p := range all {
		if p.kind == kind {
			p.taken = true
			found = append(found, p)
		}
	}
	return found
}

// one returns the plugin of a kind of which spire-agent has exactly one: the
// first that this version can carry, so that a file that names all kinds comes
// to something.
func (d *draft) one(all []*plugin, kind string, can ...string) *plugin {
	var found *plugin
	for _, p := range of(all, kind) {
		switch {
		case !slices.Contains(can, p.name):
			d.losePlugin(p, fmt.Sprintf("not supported by this version of Narthex; choose one of %s", strings.Join(can, ", ")))
		case found != nil:
			d.losePlugin(p, fmt.Sprintf("there is %s already, and spire-agent takes only one", found.path()))
		default:
			found = p
		}
	}
	return found
}

// nodeAttestor carries how the node proves what it is.
func (d *draft) nodeAttestor(agent *fields, all []*plugin) {
	token, file := agent.text("join_token"), agent.text("join_token_file")
	p := d.one(all, "NodeAttestor", "join_token", "x509pop", "k8s_psat")
	if p == nil {
		if token != "" || file != "" {
			agent.lose("join_token", "there is no NodeAttestor join_token, which would use it")
			agent.lose("join_token_file", "there is no NodeAttestor join_token, which would use it")
		}
		return
	}
	into := "agent.node_attestor." + p.name
	switch p.name {
	case "join_token":
		d.joinToken(agent, token, file, into)
	case "x509pop":
		d.setPath(p.data, "private_key_path", into+".key")
		d.setPath(p.data, "certificate_path", into+".certificate")
		d.setPath(p.data, "intermediates_path", into+".intermediates")
		p.data.lose("spiffe_endpoint_socket", "Narthex attests with certificates from files alone: have them written by spiffe-helper, or `narthex fetch x509 --write`")
	case "k8s_psat":
		d.setText(p.data, "cluster", into+".cluster")
		d.setPath(p.data, "token_path", into+".token")
	}
	p.data.rest()
}

// joinToken carries the token as a file of its own. Where the file has none, the
// agent has been attested with one, and lives on its data_dir.
func (d *draft) joinToken(agent *fields, token, file, into string) {
	switch {
	case file != "":
		d.out.set(into+".token_file", d.path(agent, "join_token_file", file))
	case token != "":
		d.out.set(into+".token_file", d.secret(agent, "join_token", tokenFile, token))
	default:
		d.out.set(into+".token_file", tokenFile)
		d.note(agent.at("join_token"), agent.key("join_token"), "there is none: a token is good once, and needed again only where the agent has to attest anew; write it into %s, beside narthex.yaml, then", tokenFile)
	}
}

// keyManager carries where the agent's key is, and has the new agent take over
// what the old one has left.
func (d *draft) keyManager(agent *fields, all []*plugin) {
	dataDir := d.options.Dir
	if s := agent.text("data_dir"); s != "" {
		dataDir = d.path(agent, "data_dir", s)
	}
	p := d.one(all, "KeyManager", "disk", "memory")
	if p == nil {
		return
	}
	keys := dataDir
	if s := p.data.text("directory"); s != "" {
		keys = d.path(p.data, "directory", s)
	}
	p.data.rest()
	switch {
	case p.name == "disk":
		d.out.set("agent.key_manager.disk", nil)
		if config.Knows("agent.take_over") {
			d.out.set("agent.take_over.data_dir", dataDir)
			if keys != dataDir {
				d.out.set("agent.take_over.keys", keys)
			}
		}
	case d.attestsBy(all) == "join_token":
		d.out.set("agent.key_manager.disk", nil)
		d.losePlugin(p, "a join token is good once, so an agent that has lost its key could not come back: the key is kept on disk")
	default:
		d.out.set("agent.key_manager.memory", nil)
	}
	d.dataDir(agent, dataDir, p.name)
}

// dataDir tells what becomes of the old data directory.
func (d *draft) dataDir(agent *fields, old, keyManager string) {
	if keyManager == "disk" {
		d.note(agent.at("data_dir"), agent.key("data_dir"), "%s stays as it is: the agent of Narthex has %s of its own, and takes over from the old one, once, what spire-agent has left there", clip(old), clip(d.options.DataDir))
		return
	}
	d.note(agent.at("data_dir"), agent.key("data_dir"), "%s is not needed any more: the key of what is there was in spire-agent's memory, so the agent of Narthex attests anew", clip(old))
}

// attestsBy is the node attestor that was chosen.
func (d *draft) attestsBy(all []*plugin) string {
	for _, p := range all {
		if p.kind == "NodeAttestor" {
			if _, ok := d.out.get("agent.node_attestor." + p.name); ok {
				return p.name
			}
		}
	}
	return ""
}

// workloadAttestors carries what is found out about callers.
func (d *draft) workloadAttestors(all []*plugin) {
	const into = "agent.workload_attestors"
	carried := 0
	for _, p := range of(all, "WorkloadAttestor") {
		switch p.name {
		case "unix":
			d.out.set(into+".unix", nil)
			d.setFlag(p.data, "discover_workload_path", into+".unix.discover_workload_path")
			if n, ok := p.data.number("workload_size_limit"); ok && n != 0 {
				d.out.set(into+".unix.workload_size_limit", max(n, -1)) // below zero, all mean no hash
			}
		case "k8s":
			d.out.set(into+".k8s", nil)
			d.k8s(p.data, into+".k8s")
		default:
			d.losePlugin(p, "not supported by this version of Narthex: entries with its selectors match nobody")
			continue
		}
		carried++
		p.data.rest()
	}
	if carried == 0 {
		d.out.set(into, nil) // the default has unix, which the file has not
	}
}

// otherPlugins names those that have no place here.
func (d *draft) otherPlugins(all []*plugin) {
	for _, p := range all {
		switch {
		case p.taken:
		case p.kind == "SVIDStore":
			d.losePlugin(p, "Narthex stores SVIDs nowhere: entries with store_svid are not served; leave them to a spire-agent")
		default:
			d.losePlugin(p, "spire-agent has no such plugins; look for a slip of the hand")
		}
	}
}
