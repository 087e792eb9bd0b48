package k8s

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/narthex-id/narthex/attestor"
)

// The keys of the selectors, which are those of SPIRE's workload attestor
// "k8s" (doc/plugin_agent_workloadattestor_k8s.md of SPIRE v1.15).
const (
	keyAccount        = "sa"
	keyNamespace      = "ns"
	keyNode           = "node-name"
	keyUID            = "pod-uid"
	keyName           = "pod-name"
	keyImage          = "pod-image"
	keyImages         = "pod-image-count"
	keyInitImage      = "pod-init-image"
	keyInitImages     = "pod-init-image-count"
	keyLabel          = "pod-label"
	keyOwner          = "pod-owner"
	keyOwnerUID       = "pod-owner-uid"
	keyContainer      = "container-name"
	keyContainerImage = "container-image"
)

// selectorsOf returns what is known of a pod, whichever of its containers a
// process is in. Ephemeral containers are not among its images: anybody who
// may debug the pod adds them.
func (p *pod) selectorsOf() []attestor.Selector {
	s := make([]attestor.Selector, 0, 7+2*(len(p.Status.Containers.all)+len(p.Status.InitContainers.all)+len(p.Metadata.Owners.all))+len(p.Metadata.Labels.all))
	s = append(
		s,
		selector(keyAccount, p.Spec.ServiceAccountName),
		selector(keyNamespace, p.Metadata.Namespace),
		selector(keyNode, p.Spec.NodeName),
		selector(keyUID, p.Metadata.UID),
		selector(keyName, p.Metadata.Name),
		selector(keyImages, strconv.Itoa(len(p.Status.Containers.all))),
		selector(keyInitImages, strconv.Itoa(len(p.Status.InitContainers.all))),
	)
	for _, c := range p.Status.Containers.all {
		s = append(s, selector(keyImage, c.ImageID), selector(keyImage, c.Image))
	}
	for _, c := range p.Status.InitContainers.all {
		s = append(s, selector(keyInitImage, c.ImageID), selector(keyInitImage, c.Image))
	}
	for k, v := range p.Metadata.Labels.all {
		s = append(s, selector(keyLabel, k+":"+v))
	}
	for _, o := range p.Metadata.Owners.all {
		s = append(s, selector(keyOwner, o.Kind+":"+o.Name), selector(keyOwnerUID, o.Kind+":"+o.UID))
	}
	return tidy(s)
}

// selectorsOf returns the selectors that a container adds to those of its pod.
func (c *container) selectorsOf() []attestor.Selector {
	return tidy([]attestor.Selector{selector(keyContainer, c.Name), selector(keyContainerImage, c.ImageID), selector(keyContainerImage, c.Image)})
}

func selector(key, value string) attestor.Selector {
	return attestor.Selector{Type: typeK8s, Value: key + ":" + value}
}

// tidy sorts selectors of this attestor and drops those that come again.
func tidy(s []attestor.Selector) []attestor.Selector {
	slices.SortFunc(s, func(a, b attestor.Selector) int { return cmp.Compare(a.Value, b.Value) })
	return slices.Clip(slices.Compact(s))
}

// fromPod returns those of found that came from a pod list, in order, without
// the ones of other attestors and of signatures.
func fromPod(found []attestor.Selector) []attestor.Selector {
	var s []attestor.Selector
	for _, f := range found {
		if f.Type == typeK8s && isPodKey(f.Value) {
			s = append(s, f)
		}
	}
	return tidy(s)
}

// fromSignatures returns those of found that came from an image's signatures, in
// order.
func fromSignatures(found []attestor.Selector) []attestor.Selector {
	var s []attestor.Selector
	for _, f := range found {
		if f.Type == typeK8s && !isPodKey(f.Value) {
			s = append(s, f)
		}
	}
	return tidy(s)
}

// signedSelectors returns the selectors of these values, as fromSignatures does.
func signedSelectors(values []string) []attestor.Selector {
	s := make([]attestor.Selector, len(values))
	for i, value := range values {
		s[i] = attestor.Selector{Type: typeK8s, Value: value}
	}
	return tidy(s)
}

func isPodKey(value string) bool {
	key, _, _ := strings.Cut(value, ":")
	switch key {
	case keyAccount, keyNamespace, keyNode, keyUID, keyName, keyImage, keyImages, keyInitImage, keyInitImages,
		keyLabel, keyOwner, keyOwnerUID, keyContainer, keyContainerImage:
		return true
	}
	return false
}
