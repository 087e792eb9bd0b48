package config

import (
	"reflect"
	"strings"
	"testing"
)

func TestK8s(t *testing.T) {
	const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	parse := func(attestors string) *Config {
		t.Helper()
		c, err := Parse("/etc/narthex/narthex.yaml", []byte(`trust_domain: example.org
agent:
  server: {address: "s:1", bundle: {file: b}}
  node_attestor: {k8s_psat: {cluster: demo}}
  key_manager: {memory: {}}
  workload_attestors: `+attestors))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := parse(`{k8s: {}}`)
	if got, want := c.Agent.NodeAttestor.K8sPSAT, (&K8sPSAT{Cluster: "demo", Token: "/var/run/secrets/tokens/spire-agent"}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	want := WorkloadAttestors{K8s: &K8sAttestor{Kubelet: Kubelet{CA: account + "ca.crt", Token: account + "token"}, Containers: true}}
	if !reflect.DeepEqual(c.Agent.WorkloadAttestors, want) || len(c.Warnings) != 0 {
		t.Errorf("got %+v, %v", c.Agent.WorkloadAttestors.K8s, c.Warnings)
	}
	c = parse(`{k8s: {node_name_env: NODE_NAME, containers: false, kubelet: {host: "fd00::1", port: 1250, ca: ca.crt, certificate: c.crt, key: /c.key}}}`)
	want.K8s = &K8sAttestor{NodeNameEnv: "NODE_NAME", Kubelet: Kubelet{
		Host: "fd00::1", Port: 1250, CA: "/etc/narthex/ca.crt", Token: account + "token", Certificate: "/etc/narthex/c.crt", Key: "/c.key",
	}}
	if !reflect.DeepEqual(c.Agent.WorkloadAttestors, want) {
		t.Errorf("got %+v", c.Agent.WorkloadAttestors.K8s)
	}
	for _, key := range []string{"read_only", "skip_verification"} {
		c = parse(`{k8s: {kubelet: {` + key + `: true}}}`)
		if len(c.Warnings) != 1 || !strings.HasSuffix(c.Warnings[0].Key, "kubelet."+key) {
			t.Errorf("%s: warnings %v", key, c.Warnings)
		}
	}
}
