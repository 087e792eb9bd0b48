package k8s

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// Bounds on the kubelet's pod list. A pod of a real cluster has 10 to 20 KiB;
// the API server takes none that has more than 1.5 MiB in its own encoding,
// which JSON makes up to six times as long.
const (
	maxList      = 64 << 20 // bytes
	maxPod       = 16 << 20 // bytes
	maxPods      = 4096     // the kubelet runs 110 unless told otherwise
	maxSelectors = 4096     // of one pod
)

// What is read of a Pod, core/v1. Everything else is skipped.
type (
	pod struct {
		Metadata struct {
			Name      string            `json:"name"`
			Namespace string            `json:"namespace"`
			UID       string            `json:"uid"`
			Labels    map[string]string `json:"labels"`
			Owners    []owner           `json:"ownerReferences"`
		} `json:"metadata"`
		Spec struct {
			NodeName           string `json:"nodeName"`
			ServiceAccountName string `json:"serviceAccountName"`
		} `json:"spec"`
		Status struct {
			Containers          []container `json:"containerStatuses"`
			InitContainers      []container `json:"initContainerStatuses"` // sidecars too: they are init containers that may restart
			EphemeralContainers []container `json:"ephemeralContainerStatuses"`
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

// record is what is known of a pod or a container. It never changes, so that
// everybody may have it.
type record struct {
	uid       string // of the pod
	who       string // namespace/name of the pod, and the container's name
	image     string // image ID of the container; empty for a pod
	ofPod     *record
	selectors []attestor.Selector
	err       error // why nobody may have the selectors
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
}

// decode reads a PodList, core/v1, pod by pod: no more than one of them is in
// memory in more than what is kept of it. Of pods of nodes other than node,
// unless that is empty, nothing is believed. old is the list before it, whose
// records are used on where they say the same; it may be nil.
func decode(r io.Reader, node string, old *list) (*list, error) {
	return decodeWithin(&bounded{r: r, most: maxList, each: maxPod}, node, old)
}

// decodeWithin is decode with other bounds.
func decodeWithin(in *bounded, node string, old *list) (*list, error) {
	l := &list{pods: map[string]*record{}, containers: map[string]*record{}}
	dec := json.NewDecoder(in)
	renew := func() { in.until = dec.InputOffset() + in.each }
	renew()
	if err := expect(dec, '{'); err != nil {
		return nil, err
	}
	seen := false
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, broken(err)
		}
		renew()
		switch key {
		case "items":
			if seen {
				return nil, errors.New("two lists of items")
			}
			seen = true
			if err := l.items(dec, renew, node, old); err != nil {
				return nil, err
			}
		case "kind":
			var kind string
			if err := dec.Decode(&kind); err != nil {
				return nil, broken(err)
			}
			if kind != "PodList" {
				return nil, fmt.Errorf("kind %.40q instead of PodList", kind)
			}
		default:
			var skipped skip
			if err := dec.Decode(&skipped); err != nil {
				return nil, broken(err)
			}
		}
	}
	if err := expect(dec, '}'); err != nil {
		return nil, err
	}
	if !seen {
		return nil, errors.New("no items")
	}
	// To the end, so that the connection can be used again.
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the list")
	}
	return l, nil
}

// skip is a value of which only the end matters.
type skip struct{}

// UnmarshalJSON implements json.Unmarshaler.
func (*skip) UnmarshalJSON([]byte) error { return nil }

func expect(dec *json.Decoder, want json.Delim) error {
	token, err := dec.Token()
	if err != nil {
		return broken(err)
	}
	if token != want {
		return fmt.Errorf("%.40q where %q should be", fmt.Sprint(token), want.String())
	}
	return nil
}

// broken says that JSON ended early, which encoding/json calls by two names.
func broken(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it ends in the middle")
	}
	return err
}

// items reads the list of pods, which is null where there are none.
func (l *list) items(dec *json.Decoder, renew func(), node string, old *list) error {
	open, err := dec.Token()
	if err != nil {
		return broken(err)
	}
	if open == nil {
		return nil
	}
	if open != json.Delim('[') {
		return errors.New("items is no list")
	}
	for dec.More() {
		if l.count++; l.count > maxPods {
			return fmt.Errorf("more than %d pods", maxPods)
		}
		renew()
		var p pod
		if err := dec.Decode(&p); err != nil {
			return fmt.Errorf("items[%d]: %w", l.count-1, broken(err))
		}
		l.add(&p, node, old)
	}
	return expect(dec, ']')
}

// add indexes a pod and its containers. What is wrong with one pod is the
// trouble of its own processes, and of no others: pods are written by many.
func (l *list) add(p *pod, node string, old *list) {
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
	default:
		if r.selectors = p.selectorsOf(); len(r.selectors) > maxSelectors {
			r.selectors, r.err = nil, fmt.Errorf("pod %.100s has more than %d selectors", r.who, maxSelectors)
		}
	}
	if old != nil {
		r = old.pods[uid].orNew(r)
	}
	l.pods[uid] = r
	for _, c := range slices.Concat(p.Status.Containers, p.Status.InitContainers, p.Status.EphemeralContainers) {
		l.addContainer(r, c, old)
	}
}

func (l *list) addContainer(ofPod *record, c container, old *list) {
	_, id, _ := strings.Cut(c.ID, "://")
	if !isContainerID(id) {
		return // not made yet
	}
	r := &record{uid: ofPod.uid, who: ofPod.who + " " + c.Name, image: c.ImageID, ofPod: ofPod, err: ofPod.err}
	if first := l.containers[id]; first != nil {
		r.err = fmt.Errorf("the kubelet lists two containers with the ID %s: %.200s and %.200s", id, first.who, r.who)
	}
	if r.err == nil {
		r.selectors = with(ofPod.selectors, c)
	}
	if old != nil {
		r = old.containers[id].orNew(r)
	}
	l.containers[id] = r
}

// orNew returns r where it says the same as the new record, and is of the
// same pod's record; r may be nil.
func (r *record) orNew(latest *record) *record {
	if r != nil && r.ofPod == latest.ofPod && r.same(latest) {
		return r
	}
	return latest
}

// bounded is a reader that ends with an error where the whole, or one pod of
// it, gets too long.
type bounded struct {
	r     io.Reader
	most  int64 // bytes of the whole
	each  int64 // bytes of a pod, or of what stands beside the list of them
	until int64 // offset that the value being read may not pass
	read  int64
}

// Read implements io.Reader.
func (b *bounded) Read(p []byte) (int, error) {
	left := min(b.most, b.until) - b.read
	if left <= 0 {
		if b.until < b.most {
			return 0, fmt.Errorf("a pod of more than %d KiB", b.each>>10)
		}
		return 0, fmt.Errorf("more than %d KiB", b.most>>10)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), left)])
	b.read += int64(n)
	return n, err
}
