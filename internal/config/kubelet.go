package config

import (
	"net/netip"
	"strings"
)

func (k *K8sAttestor) validate(f *findings, key string) {
	checkEnv(f, key+".node_name_env", k.NodeNameEnv)
	k.Kubelet.validate(f, key+".kubelet")
}

func (k *Kubelet) validate(f *findings, key string) {
	said := func(name string) bool {
		_, ok := f.pos[key+"."+name]
		return ok
	}
	checkEnv(f, key+".host_env", k.HostEnv)
	if k.Host != "" && k.HostEnv != "" {
		f.addf(key+".host_env", "cannot stand beside host; keep one of them")
	}
	if _, err := netip.ParseAddr(k.Host); err != nil && strings.ContainsAny(k.Host, ":/ []@") {
		f.addf(key+".host", "%q is no name or address; the port is said by port", clip(k.Host))
	}
	if k.ReadOnly {
		for _, name := range []string{"ca", "skip_verification", "token", "certificate", "key"} {
			if said(name) {
				f.addf(key+"."+name, "has no use with read_only: true, where nobody proves anything; leave one of them out")
			}
		}
		return
	}
	if k.SkipVerification && said("ca") {
		f.addf(key+".ca", "has no use with skip_verification: true; keep ca")
	}
	switch {
	case k.Certificate != "" && k.Key == "" && !f.isBad(key+".key"):
		f.addf(key+".certificate", "needs key, the private key of the certificate")
	case k.Certificate == "" && k.Key != "" && !f.isBad(key+".certificate"):
		f.addf(key+".key", "needs certificate, whose private key it is")
	case k.Certificate != "" && said("token"):
		f.addf(key+".token", "cannot stand beside certificate; keep one of them")
	}
}

// checkEnv checks the name of an environment variable.
func checkEnv(f *findings, key, name string) {
	for i, c := range []byte(name) {
		letter := c == '_' || c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			f.addf(key, "%q is no name of an environment variable; use letters, digits and underscore, no digit first", clip(name))
			return
		}
	}
}
