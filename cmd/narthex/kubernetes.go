package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/go-hclog"

	"github.com/narthex-id/narthex/attestor"
	"github.com/narthex-id/narthex/attestor/k8s"
	"github.com/narthex-id/narthex/attestor/sigstore"
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
	signatures, err := imageSignatures(k.Sigstore, key+".sigstore", finding, log)
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
		PodOnly:    !k.Containers,
		Signatures: signatures,
		Report: func(err error) {
			if err == nil {
				log.Info("the kubelet answers again")
				return
			}
			log.Warn("workloads in pods cannot be attested now", "error", err)
		},
	}, nil
}

// imageSignatures returns what verifies images, nil where s is.
func imageSignatures(s *config.Sigstore, key string, finding func(key, format string, args ...any) config.Finding, log hclog.Logger) (k8s.Signatures, error) {
	if s == nil {
		return nil, nil
	}
	c := sigstore.Config{
		TrustedRoot:        string(s.TrustedRoot),
		AllowedIdentities:  map[string][]string{},
		SkippedImages:      s.SkippedImages,
		IgnoreSCT:          s.IgnoreSCT,
		IgnoreTlog:         s.IgnoreTlog,
		IgnoreAttestations: s.IgnoreAttestations,
		AllowUnsigned:      s.AllowUnsigned,
		Registries:         map[string]sigstore.Registry{},
	}
	for _, id := range s.AllowedIdentities {
		c.AllowedIdentities[id.Issuer] = append(c.AllowedIdentities[id.Issuer], id.Subjects...)
	}
	for i, r := range s.Registries {
		if _, ok := c.Registries[r.Host]; ok {
			f := finding(fmt.Sprintf("%s.registries[%d].host", key, i), "%q is there already", r.Host)
			return nil, &f
		}
		c.Registries[r.Host] = sigstore.Registry{
			Username: r.Username, PasswordFile: string(r.Password), TokenHost: r.TokenHost, CA: string(r.CA), PlainHTTP: r.PlainHTTP,
		}
	}
	v, err := sigstore.New(c)
	if err != nil {
		f := finding(key, "%v", err)
		return nil, &f
	}
	for _, w := range v.Warnings() {
		f := finding(key, "%s", w)
		log.Warn(f.Error())
	}
	return verifiedImages{v}, nil
}

// verifiedImages says in the attestor's words what is known of signatures.
type verifiedImages struct{ *sigstore.Verifier }

// Selectors implements k8s.Signatures.
func (v verifiedImages) Selectors(ctx context.Context, image string) ([]string, error) {
	values, err := v.Verifier.Selectors(ctx, image)
	if errors.Is(err, sigstore.ErrUnverified) {
		err = fmt.Errorf("%w (%w)", err, attestor.ErrNotKnown)
	}
	return values, err
}
