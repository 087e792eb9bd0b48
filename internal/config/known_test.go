package config

import "testing"

func TestKnows(t *testing.T) {
	for key, want := range map[string]bool{
		"data_dir":                 true,
		"agent.server.bundle.file": true,
		"agent.take_over":          true,
		"agent.workload_attestors.k8s.kubelet.ca": true,
		"proxy.listeners[].routes[].target":       true,
		"proxy.policies[]":                        true,
		"":                                        false,
		"agent.":                                  false,
		"agent.colour":                            false,
		"data_dir.more":                           false,
		"data_dir[]":                              false,
		"proxy.listeners.name":                    false,
		"agent.workload_attestors.k8s.sigstore.keys": false,
	} {
		if got := Knows(key); got != want {
			t.Errorf("Knows(%q) = %v", key, got)
		}
	}
}
