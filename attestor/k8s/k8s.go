// Package k8s is the workload attestor "k8s": it tells in which pod and
// container of this node a process runs, and what the kubelet says of them.
//
//	a := k8s.New(k8s.Config{NodeName: os.Getenv("NODE_NAME"), Kubelet: k8s.Kubelet{Host: nodeIP}})
//	go a.Run(ctx) // makes all requests to the kubelet, in whose answers Attest looks
//	selectors, err := a.Attest(ctx, p)
//
// The kernel says where the process is: cgroup.go reads the pod's UID and the
// container's ID out of /proc/PID/cgroup, and nothing else of the process is
// believed. The kubelet says what that is: kubelet.go asks it for the pods of
// the node, split.go cuts its answer into them, pods.go decodes those that are
// not as before and indexes them, selectors.go makes the selectors of them. cache.go shares one request among all who wait, and
// follow.go tells those who follow a process when its pod changes, object.go finds
// a pod that is named, and check.go tells whoever starts the agent what is missing
// on this node.
//
// Which selectors entitle to what is left to agent/registry, whether the
// process is still the one that called to attestor.Attest, and the signatures
// of images to whoever implements Signatures. The API server is never asked.
// Why it is built so is in docs/design/0014-kubernetes-attestor.md.
package k8s

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/narthex-id/narthex/attestor"
)

const typeK8s = "k8s"

// Config is what New needs. Its zero value works on a node whose kubelet is
// reached at 127.0.0.1 with the service account of the pod.
type Config struct {
	// NodeName is this node's name. Pods that the kubelet lists for another
	// one are not believed. Empty: it is not compared.
	NodeName string

	// Kubelet is where to ask, and with what.
	Kubelet Kubelet

	// PodOnly leaves out the selectors of the container, and the wait for it:
	// the pod of a process is known from its cgroup and the API server, its
	// containers only once the kubelet has seen them run. It is spire-agent's
	// disable_container_selectors.
	PodOnly bool

	// Signatures, unless nil, are asked for the signatures of each image.
	// There is no attestation by the pod alone then, PodOnly or not.
	Signatures Signatures

	// Report, unless nil, is called from Run when requests begin to fail, for
	// every tenth failure after that, and with nil once they succeed again; and
	// once where the processes of the node cannot be seen.
	Report func(error)
}

// Signatures tells who signed an image.
type Signatures interface {
	// Selectors returns the values of the selectors of this image, which is
	// given by the ID that the kubelet has for it (name@sha256:…). What was found
	// out is remembered: it is asked again every 10 s while somebody follows a
	// process with such selectors. The error wraps attestor.ErrNotKnown where the
	// image has no signature that counts; any other says nothing of the image.
	Selectors(ctx context.Context, image string) ([]string, error)
}

// Attestor is the workload attestor "k8s". It is an attestor.Follower,
// attestor.Housing, attestor.Objects, attestor.Runner and attestor.Dependent.
type Attestor struct {
	podOnly    bool
	signatures Signatures
	source     *source

	where *attestor.Fact[place]

	mu        sync.Mutex             // guards the following
	readOwn   func() (string, error) // cgroups, of the agent
	readFirst func() (string, error) // and of process 1
	own       string                 // what readOwn returned; empty until then
}

// New returns the attestor. It reads no file and asks nobody: that begins
// with Run, without which Attest finds nothing.
func New(cfg Config) *Attestor {
	a := &Attestor{
		podOnly:    cfg.PodOnly,
		signatures: cfg.Signatures,
		source:     newSource(newClient(cfg.Kubelet, cfg.NodeName).pods, cfg.Report),
		readOwn:    func() (string, error) { return cgroupBy(os.Getpid()) },
		readFirst:  func() (string, error) { return cgroupBy(1) },
	}
	a.where = a.placeBy(cgroupOf)
	return a
}

// Type returns "k8s".
func (*Attestor) Type() string { return typeK8s }

// Attest implements attestor.Workload. For a process that is in no container
// of a pod there is nothing to find, and the kubelet is not asked. A container
// that the kubelet does not know yet is waited for until ctx ends, at most
// 30 s. The selectors are shared: they are not to be changed.
func (a *Attestor) Attest(ctx context.Context, p *attestor.Process) ([]attestor.Selector, error) {
	at, err := a.place(p)
	if err != nil || at == (place{}) {
		return nil, err
	}
	found, err := a.source.find(ctx, a.question(at), p.Alive)
	if err != nil {
		return nil, err
	}
	if a.signatures == nil {
		return found.all(), nil
	}
	values, err := a.signatures.Selectors(ctx, found.image)
	if err != nil {
		// Whoever owns the image's registry could see to it that it is away.
		if !errors.Is(err, attestor.ErrNotKnown) {
			err = unsure(err)
		}
		return nil, fmt.Errorf("signatures of image %.200q: %w", found.image, err)
	}
	selectors := found.all()
	if a.podOnly {
		selectors = found.ofPod.selectors
	}
	for _, value := range values {
		selectors = append(selectors, attestor.Selector{Type: typeK8s, Value: value}) // the shared slice has no room: it is copied
	}
	return selectors, nil
}

// House implements attestor.Housing: the pod's UID, or the container's ID
// where the cgroup does not name the pod; all that cannot be placed have one
// together.
func (a *Attestor) House(p *attestor.Process) string {
	at, err := a.place(p)
	switch {
	case err != nil: // those share one: they are not to count as users of the node
		return "unplaced"
	case at.pod != "":
		return at.pod
	}
	return at.container
}

// place returns where p runs. That is asked three times of a caller, whose
// limits, attestation and following need it, and read once: a process is moved
// out of its container's cgroups, or into them, by none but who may write to
// both, and that is root of the node, who could as well start a process in
// any container.
func (a *Attestor) place(p *attestor.Process) (place, error) { return a.where.Of(p) }

// placeBy is the place of processes whose /proc/PID/cgroup read reads.
func (a *Attestor) placeBy(read func(*attestor.Process) (string, error)) *attestor.Fact[place] {
	return attestor.NewFact(func(p *attestor.Process) (place, error) {
		own, err := a.ownPlace()
		if err != nil {
			return place{}, fmt.Errorf("read the agent's own cgroups: %w", err)
		}
		cgroup, err := read(p)
		if err != nil { // of a process that has ended, Alive tells
			return place{}, fmt.Errorf("process %d: %w (%w)", p.PID, err, attestor.ErrNotKnown)
		}
		at, err := placeOf(cgroup, own)
		if err != nil {
			return place{}, fmt.Errorf("process %d: %w (%w)", p.PID, err, attestor.ErrNotKnown)
		}
		// What is kept for as long as p is held is not to keep all of cgroup.
		return place{pod: strings.Clone(at.pod), container: strings.Clone(at.container)}, nil
	})
}

// ownPlace reads the agent's cgroups once: it stays where it was started.
func (a *Attestor) ownPlace() (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.own == "" {
		own, err := a.readOwn()
		if err != nil {
			return "", err
		}
		a.own = own
	}
	return a.own, nil
}

func cgroupBy(pid int) (string, error) {
	p, err := attestor.Pin(pid)
	if err != nil {
		return "", err
	}
	defer p.Close()
	return cgroupOf(p)
}

func cgroupOf(p *attestor.Process) (string, error) {
	content, err := p.ReadProc("cgroup", maxCgroup)
	return string(content), err
}

// question is what is asked of a list.
type question struct {
	place
	podOnly bool // the pod is answer enough, also where the container is not known yet
}

func (a *Attestor) question(at place) question {
	return question{place: at, podOnly: a.podOnly && a.signatures == nil}
}

// in returns the answer of a list: nil without an error where it does not
// know the container yet.
func (q question) in(l *list) (*record, error) {
	if ofPod := l.pods[q.pod]; ofPod != nil && ofPod.err != nil {
		return nil, unsure(ofPod.err)
	}
	c := l.containers[q.container]
	switch {
	case c == nil && q.podOnly && q.pod != "" && l.pods[q.pod] != nil:
		return l.pods[q.pod], nil
	case c == nil:
		return nil, nil
	case c.err != nil:
		return nil, unsure(c.err)
	case q.pod != "" && c.uid != q.pod:
		return nil, unsure(fmt.Errorf("container %s is of pod %s by its cgroup, and of pod %s (%.200s) by the kubelet", q.container, q.pod, c.uid, c.who))
	case l.pods[c.uid].err != nil:
		return nil, unsure(l.pods[c.uid].err)
	case q.podOnly:
		return c.ofPod, nil
	}
	return c, nil
}

// unsure is an error about the process: the kubelet has answered.
func unsure(err error) error { return fmt.Errorf("%w (%w)", err, attestor.ErrNotKnown) }
