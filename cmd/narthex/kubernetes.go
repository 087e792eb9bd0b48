package main

import (
	"cmp"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/attestor/k8s"
	"github.com/narthex-id/narthex/internal/config"
)

// k8sConfig says in the attestor's words what the file and the environment
// say. A variable that the file names and that is not there is an error: what
// it was meant to compare would go unnoticed.
func k8sConfig(k *config.K8sAttestor, finding func(key, format string, args ...any) config.Finding, lookup func(string) (string, bool), log hclog.Logger) (k8s.Config, error) {
	const key = "agent.workload_attestors.k8s"
	env := func(key, name, field string) (string, error) {
		value, _ := lookup(name)
		if name != "" && value == "" {
			f := finding(key, "the environment variable %s is not set; in a pod, give it by fieldRef: {fieldPath: %s}", name, field)
			return "", &f
		}
		return value, nil
	}
	node, err := env(key+".node_name_env", k.NodeNameEnv, "spec.nodeName")
	if err != nil {
		return k8s.Config{}, err
	}
	host, err := env(key+".kubelet.host_env", k.Kubelet.HostEnv, "status.hostIP")
	if err != nil {
		return k8s.Config{}, err
	}
	return k8s.Config{
		NodeName: node,
		Kubelet: k8s.Kubelet{
			Host:             cmp.Or(k.Kubelet.Host, host, node),
			Port:             k.Kubelet.Port,
			ReadOnly:         k.Kubelet.ReadOnly,
			CA:               string(k.Kubelet.CA),
			SkipVerification: k.Kubelet.SkipVerification,
			Token:            string(k.Kubelet.Token),
			Certificate:      string(k.Kubelet.Certificate),
			Key:              string(k.Kubelet.Key),
		},
		PodOnly: !k.Containers,
		Report: func(err error) {
			if err == nil {
				log.Info("the kubelet answers again")
				return
			}
			log.Warn("cannot list the pods of this node", "error", err)
		},
	}, nil
}
