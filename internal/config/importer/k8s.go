package importer

import (
	"fmt"
	"strings"
)

// k8s carries the workload attestor of Kubernetes.
func (d *draft) k8s(f *fields, into string) {
	d.setText(f, "node_name_env", into+".node_name_env")
	switch {
	case f.text("node_name") != "":
		d.setText(f, "node_name", into+".kubelet.host")
		d.note(f.at("node_name"), f.key("node_name"), "the kubelet is asked by this name; to have the pods of other nodes refused too, set node_name_env")
	case !f.has("node_name_env"):
		d.note(f.at("node_name_env"), f.path, "spire-agent takes the node's name from MY_NODE_NAME where that is set: then set agent.workload_attestors.k8s.node_name_env")
	}
	d.kubelet(f, into+".kubelet")
	if f.flag("disable_container_selectors") {
		d.out.set(into+".containers", false)
	}
	f.lose("max_poll_attempts", "how long a container that has just started is waited for is set by no key: within the attestation's 10 s")
	f.lose("poll_retry_interval", "how often the kubelet is asked is set by no key: each 500 ms while a caller waits, once for all of them")
	if s := f.duration("reload_interval"); s != "" && s != "1m0s" {
		f.lose("reload_interval", "credentials are read again each minute, and at once when the kubelet refuses them")
	}
	locator(f)
	if f.has("sigstore") {
		d.sigstore(f.fields("sigstore"), into+".sigstore")
	}
	f.lose("experimental", "what brokers may refer to in Kubernetes is not supported by this version of Narthex")
}

// locator accounts for how a container is found by its process: there is one way
// here, that of both kinds of cgroups.
func locator(f *fields) {
	if f.has("use_new_container_locator") && !f.flag("use_new_container_locator") {
		f.lose("use_new_container_locator", "there is one way here, and it reads no mountinfo, which workloads can forge")
	}
	f.loseFlag("verbose_container_locator_logs", "there is no such log; `log: {level: debug}` tells more of attestation")
}

// kubelet carries how the kubelet is asked.
func (d *draft) kubelet(f *fields, into string) {
	if port, ok := f.number("kubelet_read_only_port"); ok && port > 0 {
		d.out.set(into+".read_only", true)
		d.out.set(into+".port", port)
		// Nothing of this is used on that port.
		f.ignore("kubelet_ca_path", "skip_kubelet_verification", "token_path", "certificate_path", "private_key_path", "use_anonymous_authentication")
		f.lose("kubelet_secure_port", "spire-agent does not start with both ports: the read-only one was taken; better keep this one")
		return
	}
	if port, ok := f.number("kubelet_secure_port"); ok && port > 0 {
		d.out.set(into+".port", port)
	}
	if f.flag("skip_kubelet_verification") {
		d.out.set(into+".skip_verification", true)
		f.ignore("kubelet_ca_path") // which has no use then
	} else {
		d.setPath(f, "kubelet_ca_path", into+".ca")
	}
	f.loseFlag("use_anonymous_authentication", "the kubelet is asked with the agent's token all the same; it may ignore it")
	if f.text("certificate_path") != "" {
		d.setPath(f, "certificate_path", into+".certificate")
		d.setPath(f, "private_key_path", into+".key")
		f.ignore("token_path") // which has no use then
		return
	}
	d.setPath(f, "token_path", into+".token")
}

// sigstore carries the verification of image signatures.
func (d *draft) sigstore(f *fields, into string) {
	d.out.set(into+".trusted_root", "trusted_root.json")
	d.lose(f.at("allowed_identities"), f.path,
		"Narthex fetches no keys of Sigstore: write them with `cosign trusted-root create` into trusted_root.json, beside narthex.yaml")
	if url := f.text("rekor_url"); url != "" && strings.TrimSuffix(url, "/") != "https://rekor.sigstore.dev" {
		f.lose("rekor_url", "the transparency logs are those of trusted_root.json: have its key in there")
	}
	for i, p := range d.bounded(f, "allowed_identities", f.fields("allowed_identities").pairs) {
		at := fmt.Sprintf("%s.allowed_identities[%d]", into, i)
		d.out.set(at+".issuer", p.key)
		d.out.set(at+".subjects", d.texts(f.key("allowed_identities"), p))
	}
	if images := f.texts("skipped_images"); len(images) > 0 {
		d.out.set(into+".skipped_images", images)
	}
	for _, key := range []string{"ignore_sct", "ignore_tlog", "ignore_attestations"} {
		d.setFlag(f, key, into+"."+key)
	}
	for i, host := range d.bounded(f, "registry_credentials", f.fields("registry_credentials").pairs) {
		c := d.fieldsOf(f.key("registry_credentials."+clip(host.key)), host)
		at := fmt.Sprintf("%s.registries[%d]", into, i)
		d.out.set(at+".host", host.key)
		d.setText(c, "username", at+".username")
		if password := c.text("password"); password != "" {
			d.out.set(at+".password", d.secret(c, "password", fmt.Sprintf("registry-password-%d", i+1), password))
		}
		c.rest()
	}
	f.rest()
}

// bounded cuts off what no configuration has so many of.
func (d *draft) bounded(f *fields, key string, all []pair) []pair {
	if len(all) > maxItems {
		d.lose(all[maxItems].at, f.key(key), "%d of these are carried, and no more", maxItems)
	}
	return all[:min(len(all), maxItems)]
}
