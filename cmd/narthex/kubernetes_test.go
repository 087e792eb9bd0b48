package main

import (
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/telemetry"
)

func TestK8sConfig(t *testing.T) {
	for name, test := range map[string]struct {
		attestor, host, node, err string
	}{
		"nothing said":         {"{}", "", "", ""},
		"host":                 {"{node_name_env: NODE_NAME, kubelet: {host: k}}", "k", "node-1", ""},
		"host from a variable": {"{node_name_env: NODE_NAME, kubelet: {host_env: NODE_IP}}", "10.0.0.7", "node-1", ""},
		"host from the node":   {"{node_name_env: NODE_NAME}", "node-1", "node-1", ""},
		"no such node":         {"{node_name_env: MY_NODE}", "", "", "narthex.yaml:5:30: agent.workload_attestors.k8s.node_name_env: the environment variable MY_NODE is not set; in a pod, give it by fieldRef: {fieldPath: spec.nodeName}"},
		"no such host":         {"{kubelet: {host_env: MY_IP}}", "", "", "kubelet.host_env: the environment variable MY_IP is not set"},
		"empty":                {"{node_name_env: EMPTY}", "", "", "EMPTY is not set"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := config.Parse("narthex.yaml", []byte(`trust_domain: example.org
agent:
  server: {address: "s:1", bundle: {file: b}}
  node_attestor: {k8s_psat: {cluster: demo}}
  workload_attestors: {k8s: `+test.attestor+`}
`))
			if err != nil {
				t.Fatal(err)
			}
			env := map[string]string{"NODE_NAME": "node-1", "NODE_IP": "10.0.0.7", "EMPTY": ""}
			lookup := func(name string) (string, bool) {
				value, ok := env[name]
				return value, ok
			}
			got, err := k8sConfig(c.Agent.WorkloadAttestors.K8s, c.Finding, lookup, hclog.NewNullLogger())
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || got.NodeName != test.node || got.Kubelet.Host != test.host || got.PodOnly || got.Signatures != nil {
				t.Fatalf("got %+v, %v", got, err)
			}
		})
	}
}

func TestAgentConfigOfAPod(t *testing.T) {
	c, err := config.Parse("narthex.yaml", []byte(`trust_domain: example.org
agent:
  server: {address: "s:1", bundle: {file: b}}
  node_attestor: {k8s_psat: {cluster: demo}}
  key_manager: {memory: {}}
  workload_attestors: {unix: {}, k8s: {containers: false}}
`))
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := agentConfig(c, telemetry.NewMetrics(), hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Node.Type() != "k8s_psat" || len(cfg.WorkloadAttestors) != 2 || cfg.WorkloadAttestors[1].Type() != "k8s" || cfg.Keys == nil {
		t.Errorf("got %+v", cfg)
	}
}

func TestImageSignatures(t *testing.T) {
	const root = "../../attestor/sigstore/testdata/public-root.json"
	for name, test := range map[string]struct{ block, err, warns string }{
		"identities": {"{trusted_root: " + root + ", allowed_identities: [{issuer: a, subjects: [b]}, {issuer: a, subjects: [^c$]}]}", "", ""},
		"anybody":    {"{trusted_root: " + root + "}", "", "allowed_identities is empty"},
		"no root":    {"{trusted_root: missing.json}", "narthex.yaml:5:30: agent.workload_attestors.k8s.sigstore: sigstore: trusted root: stat", ""},
		"twice":      {"{trusted_root: " + root + ", registries: [{host: a.b}, {host: a.b}]}", "k8s.sigstore.registries[1].host: \"a.b\" is there already", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := config.Parse("narthex.yaml", []byte(`trust_domain: example.org
agent:
  server: {address: "s:1", bundle: {file: b}}
  node_attestor: {k8s_psat: {cluster: demo}}
  workload_attestors: {k8s: {sigstore: `+test.block+`}}
`))
			if err != nil {
				t.Fatal(err)
			}
			var logged strings.Builder
			log := hclog.New(&hclog.LoggerOptions{Output: &logged})
			lookup := func(string) (string, bool) { return "", false }
			got, err := k8sConfig(c.Agent.WorkloadAttestors.K8s, c.Finding, lookup, log)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || got.Signatures == nil || !strings.Contains(logged.String(), test.warns) || test.warns == "" && logged.Len() > 0 {
				t.Fatalf("got %+v, %v, log %q", got, err, logged.String())
			}
		})
	}
}
