package k8s

import (
	"context"
	"fmt"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// Knows implements attestor.Objects: pods of this node, unless the signatures of
// images are verified. A pod has several images, and who names it does not say
// which of them is to count.
func (a *Attestor) Knows(plural, group string) bool {
	return plural == "pods" && group == "core" && a.signatures == nil
}

// AttestObject implements attestor.Objects: the selectors are those of the pod
// alone. A pod is there as long as the kubelet of this node lists it. One that it
// does not is looked for in a list that was asked for after the call.
func (a *Attestor) AttestObject(ctx context.Context, o attestor.Object) (uid string, selectors []attestor.Selector, err error) {
	found, err := a.source.pod(ctx, o)
	if err != nil {
		return "", nil, err
	}
	return found.uid, found.selectors, nil
}

// FollowObject implements attestor.Objects, as Follow.
func (a *Attestor) FollowObject(o attestor.Object, found []attestor.Selector, changed func()) (stop func()) {
	return a.source.follow(&follower{q: question{place: place{pod: o.UID}, podOnly: true}, found: fromPod(found), changed: changed})
}

// pod returns a pod of the newest list, or of the first that was asked for from
// now on.
func (s *source) pod(ctx context.Context, o attestor.Object) (*record, error) {
	arrived := time.Now()
	for asked := false; ; asked = true {
		s.mu.Lock()
		found, err := s.podNow(o, arrived, asked)
		if found != nil || err != nil {
			s.mu.Unlock()
			return found, err
		}
		next := s.next
		next.waiting++
		s.mu.Unlock()
		s.poke()
		select {
		case <-next.done:
		case <-ctx.Done():
			s.mu.Lock()
			defer s.mu.Unlock()
			next.waiting--
			return nil, fmt.Errorf("%s: the kubelet has not answered yet: %w", o, ctx.Err())
		}
	}
}

// podNow is pod for this moment, as answer is find.
func (s *source) podNow(o attestor.Object, arrived time.Time, asked bool) (*record, error) {
	now := time.Now()
	if l := s.newest; l != nil {
		fresh := !l.began.Before(arrived)
		if fresh || now.Sub(l.began) < maxAge {
			found, err := l.pod(o)
			if found != nil || err != nil {
				return found, err
			}
		}
		if fresh {
			return nil, fmt.Errorf("%s: the kubelet of this node does not list it among its %d pods: %w", o, l.count, attestor.ErrNoObject)
		}
	}
	switch {
	case s.over:
		return nil, errNotRunning
	case s.err != nil && (asked || now.Sub(s.ended) < errorAge):
		return nil, s.err
	}
	return nil, nil
}

// pod returns the pod that has all that o says, nil where there is none.
func (l *list) pod(o attestor.Object) (*record, error) {
	name := o.Namespace + "/" + o.Name
	if o.UID != "" {
		found := l.pods[o.UID]
		switch {
		case found == nil, o.Name != "" && found.err == nil && found.who != name:
			return nil, nil
		case found.err != nil:
			return nil, unsure(found.err)
		}
		return found, nil
	}
	var found *record
	for _, r := range l.pods {
		switch {
		case r.who != name:
		case r.err != nil:
			return nil, unsure(r.err)
		case found != nil:
			return nil, unsure(fmt.Errorf("the kubelet lists two pods %s, with the UIDs %s and %s", name, found.uid, r.uid))
		default:
			found = r
		}
	}
	return found, nil
}
