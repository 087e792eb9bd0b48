package config

import (
	"slices"
	"testing"
)

func TestKnows(t *testing.T) {
	known := []string{
		"data_dir", "agent.server.bundle.file", "agent.take_over", "agent.workload_attestors.k8s.kubelet.ca",
		"proxy.listeners[].routes[].target", "proxy.policies[]",
	}
	unknown := []string{
		"", "agent.", "agent.colour", "data_dir.more", "data_dir[]", "proxy.listeners.name",
		"agent.workload_attestors.k8s.sigstore.keys",
	}
	for i, key := range slices.Concat(known, unknown) {
		want := i < len(known)
		if got := Knows(key); got != want {
			t.Errorf("Knows(%q) = %v", key, got)
		}
	}
}
