package k8s

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// Bounds on the kubelet's pod list. A pod of a real cluster has 10 to 20 KiB;
// the API server takes none that has more than 1.5 MiB in its own encoding,
// which JSON makes up to six times as long.
//
// The list as a whole costs time alone, as one pod of it is in memory at a time.
// So its bound is one that no pods which an API server takes can reach: else
// a few fat ones would keep all others of the node from their identities.
const (
	maxList      = 4 << 30  // bytes
	maxPod       = 16 << 20 // bytes
	maxPods      = 4096     // the kubelet runs 110 unless told otherwise
	maxSelectors = 1024     // of one pod, and so its labels
	maxListed    = 256      // containers of one kind, and owners, of one pod
)

// What is read of a Pod, core/v1. Everything else is skipped.
type (
	pod struct {
		Metadata struct {
			Name      string      `json:"name"`
			Namespace string      `json:"namespace"`
			UID       string      `json:"uid"`
			Labels    labelled    `json:"labels"`
			Owners    some[owner] `json:"ownerReferences"`
		} `json:"metadata"`
		Spec struct {
			NodeName           string `json:"nodeName"`
			ServiceAccountName string `json:"serviceAccountName"`
		} `json:"spec"`
		Status struct {
			Containers          some[container] `json:"containerStatuses"`
			InitContainers      some[container] `json:"initContainerStatuses"` // sidecars too: they are init containers that may restart
			EphemeralContainers some[container] `json:"ephemeralContainerStatuses"`
		} `json:"status"`
	}
	owner struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	container struct {
		Name    string `json:"name"`
		ID      string `json:"containerID"` // containerd://<64 hex>; empty until the container is made
		Image   string `json:"image"`
		ImageID string `json:"imageID"`
	}
)

// some is a list of at most maxListed elements. What a stranger may make as long
// as a pod may be is not decoded further: a few bytes each would become a hundred
// times as many.
type some[T any] struct {
	all  []T
	over bool // there are more
}

// UnmarshalJSON implements json.Unmarshaler.
func (s *some[T]) UnmarshalJSON(data []byte) error {
	*s = some[T]{}
	return each(data, '[', func(dec *json.Decoder) (more bool, err error) {
		if s.over = len(s.all) == maxListed; s.over {
			return false, nil
		}
		var one T
		if err := dec.Decode(&one); err != nil {
			return false, err
		}
		s.all = append(s.all, one)
		return true, nil
	})
}

// labelled are at most maxSelectors labels, likewise.
type labelled struct {
	all  map[string]string
	over bool
}

// UnmarshalJSON implements json.Unmarshaler.
func (l *labelled) UnmarshalJSON(data []byte) error {
	*l = labelled{all: map[string]string{}}
	return each(data, '{', func(dec *json.Decoder) (more bool, err error) {
		if l.over = len(l.all) == maxSelectors; l.over {
			return false, nil
		}
		key, err := dec.Token()
		if err != nil {
			return false, err
		}
		name, _ := key.(string)
		var value string
		if err := dec.Decode(&value); err != nil {
			return false, err
		}
		l.all[name] = value
		return true, nil
	})
}

// each calls element at each element of a list or object, null being an empty
// one, until it says that no more are wanted.
func each(data []byte, open json.Delim, element func(*json.Decoder) (more bool, err error)) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	first, err := dec.Token()
	if err != nil || first == nil {
		return err
	}
	if first != open {
		return fmt.Errorf("%.40q where %q should be", fmt.Sprint(first), open.String())
	}
	for dec.More() {
		if more, err := element(dec); err != nil || !more {
			return err
		}
	}
	return nil
}

// over tells whether something of the pod is more than is read.
func (p *pod) over() bool {
	return p.Metadata.Labels.over || p.Metadata.Owners.over ||
		p.Status.Containers.over || p.Status.InitContainers.over || p.Status.EphemeralContainers.over
}

// record is what is known of a pod or a container. It never changes, so that
// everybody may have it.
type record struct {
	uid       string // of the pod
	who       string // namespace/name of the pod, and the container's name
	image     string // image ID of the container; empty for a pod
	ofPod     *record
	selectors []attestor.Selector // a container's own alone: see all
	err       error               // why nobody may have the selectors
}

// all returns the selectors. Those of a pod are not kept again with each of its
// containers, which may be many.
func (r *record) all() []attestor.Selector {
	if r.ofPod == nil {
		return r.selectors
	}
	return tidy(slices.Concat(r.ofPod.selectors, r.selectors))
}

// same tells whether two records say the same.
func (r *record) same(other *record) bool {
	return r == other || r.err == nil && other.err == nil && r.uid == other.uid && r.image == other.image && slices.Equal(r.selectors, other.selectors)
}

// list is one answer of the kubelet. It does not change once it is decoded.
type list struct {
	began      time.Time          // when it was asked for
	pods       map[string]*record // by UID
	containers map[string]*record // by ID
	count      int                // pods, with those of other nodes
	elsewhere  int                // pods of other nodes

	known map[[sha256.Size]byte]*known // pods, by the SHA-256 of how they are written
}

// known is a pod as it was written and what came of it, of which nothing is
// wrong.
type known struct {
	pod        *record
	containers map[string]*record // by ID
}

// decode reads a PodList, core/v1, pod by pod: no more than one of them is in
// memory in more than what is kept of it. Of pods of nodes other than node,
// unless that is empty, nothing is believed. old is the list before it, whose
// records are used on where they say the same; it may be nil.
func decode(r io.Reader, node string, old *list) (*list, error) {
	return decodeWithin(newSplitter(r, maxList, maxPod), node, old)
}

// decodeWithin is decode with other bounds.
func decodeWithin(in *splitter, node string, old *list) (*list, error) {
	l := &list{pods: map[string]*record{}, containers: map[string]*record{}, known: map[[sha256.Size]byte]*known{}}
	if err := in.take('{'); err != nil {
		return nil, err
	}
	seen := false
	for first := true; ; first = false {
		more, err := in.another(first, '}')
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
		key, err := in.key()
		if err != nil {
			return nil, err
		}
		if key == "items" {
			if seen {
				return nil, errors.New("two lists of items")
			}
			seen = true
			err = l.items(in, node, old)
		} else {
			err = member(in, key)
		}
		if err != nil {
			return nil, err
		}
	}
	if !seen {
		return nil, errors.New("no items")
	}
	if err := in.done(); err != nil {
		return nil, err
	}
	return l, nil
}

// member reads what stands beside the items.
func member(in *splitter, key string) error {
	raw, err := in.value()
	if err != nil {
		return err
	}
	if key != "kind" {
		var skipped skip
		return json.Unmarshal(raw, &skipped)
	}
	var kind string
	if err := json.Unmarshal(raw, &kind); err != nil {
		return err
	}
	if kind != "PodList" {
		return fmt.Errorf("kind %.40q instead of PodList", kind)
	}
	return nil
}

// skip is a value of which only the end matters.
type skip struct{}

// UnmarshalJSON implements json.Unmarshaler.
func (*skip) UnmarshalJSON([]byte) error { return nil }

// items reads the list of pods, which is null where there are none. Kubelets
// list them in no order, and write a pod as before unless something of it has
// changed.
func (l *list) items(in *splitter, node string, old *list) error {
	c, err := in.next()
	if err != nil {
		return err
	}
	if c != '[' {
		raw, err := in.value()
		if err == nil && string(raw) != "null" {
			err = errors.New("items is no list")
		}
		return err
	}
	if err := in.take('['); err != nil {
		return err
	}
	for ; ; l.count++ {
		if more, err := in.another(l.count == 0, ']'); err != nil || !more {
			return err
		}
		if l.count == maxPods {
			return fmt.Errorf("more than %d pods", maxPods)
		}
		raw, err := in.value()
		if err != nil {
			return fmt.Errorf("items[%d]: %w", l.count, err)
		}
		sum := sha256.Sum256(raw)
		if l.goOn(sum, old) {
			continue
		}
		var p pod
		if err := json.Unmarshal(raw, &p); err != nil {
			return fmt.Errorf("items[%d]: %w", l.count, err)
		}
		l.add(&p, sum, node, old)
	}
}

// goOn takes a pod over from the list before, where it was written in the same
// way. A pod or a container that is in this list already is no matter of one
// pod alone, and is looked at.
func (l *list) goOn(sum [sha256.Size]byte, old *list) bool {
	if old == nil || old.known[sum] == nil {
		return false
	}
	k := old.known[sum]
	if l.pods[k.pod.uid] != nil {
		return false
	}
	for id := range k.containers {
		if l.containers[id] != nil {
			return false
		}
	}
	l.known[sum] = k
	l.pods[k.pod.uid] = k.pod
	maps.Copy(l.containers, k.containers)
	return true
}

// add indexes a pod and its containers. What is wrong with one pod is the
// trouble of its own processes, and of no others: pods are written by many.
func (l *list) add(p *pod, sum [sha256.Size]byte, node string, old *list) {
	uid := p.Metadata.UID
	if uid == "" {
		return // no process can be shown to be in it
	}
	r := &record{uid: uid, who: p.Metadata.Namespace + "/" + p.Metadata.Name}
	switch {
	case node != "" && p.Spec.NodeName != node:
		l.elsewhere++
		r.err = fmt.Errorf("pod %.100s is one of node %.100q, and this is node %.100q; is node_name_env right?", r.who, p.Spec.NodeName, node)
	case l.pods[uid] != nil:
		r.err = fmt.Errorf("the kubelet lists two pods with the UID %.64s: %.100s and %.100s", uid, l.pods[uid].who, r.who)
	case p.over():
		r.err = fmt.Errorf("pod %.100s has more than %d labels, or %d owners or containers of a kind", r.who, maxSelectors, maxListed)
	default:
		if r.selectors = p.selectorsOf(); len(r.selectors) > maxSelectors {
			r.selectors, r.err = nil, fmt.Errorf("pod %.100s has more than %d selectors", r.who, maxSelectors)
		}
	}
	if old != nil {
		r = old.pods[uid].orNew(r)
	}
	l.pods[uid] = r
	right := r.err == nil
	k := &known{pod: r, containers: map[string]*record{}}
	for _, c := range slices.Concat(p.Status.Containers.all, p.Status.InitContainers.all, p.Status.EphemeralContainers.all) {
		_, id, _ := strings.Cut(c.ID, "://")
		if !isContainerID(id) {
			continue // not made yet
		}
		k.containers[id] = l.addContainer(r, id, c, old)
		right = right && k.containers[id].err == nil
	}
	if right {
		l.known[sum] = k
	}
}

func (l *list) addContainer(ofPod *record, id string, c container, old *list) *record {
	r := &record{uid: ofPod.uid, who: ofPod.who + " " + c.Name, image: c.ImageID, ofPod: ofPod, err: ofPod.err}
	if first := l.containers[id]; first != nil {
		r.err = fmt.Errorf("the kubelet lists two containers with the ID %s: %.200s and %.200s", id, first.who, r.who)
	}
	if r.err == nil {
		r.selectors = c.selectorsOf()
	}
	if old != nil {
		r = old.containers[id].orNew(r)
	}
	l.containers[id] = r
	return r
}

// orNew returns r where it says the same as the new record, and is of the
// same pod's record; r may be nil.
func (r *record) orNew(latest *record) *record {
	if r != nil && r.ofPod == latest.ofPod && r.same(latest) {
		return r
	}
	return latest
}
