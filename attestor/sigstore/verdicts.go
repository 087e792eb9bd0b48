package sigstore

import (
	"errors"
	"slices"
	"sync"
	"time"
)

const (
	// fresh is how long a signature once verified is taken for verified. A
	// digest never means another image, and a new trusted root or the end of a
	// certificate is noticed at once; what is left is that somebody adds a
	// signature, or takes one back by deleting it. Asking more often would
	// use up what public registries grant a node in pulls: Docker Hub counts
	// each look as one.
	fresh = 6 * time.Hour

	// lasting is for how long it stands when the registry cannot be asked
	// again: a registry that is down for a day does not take identities away.
	lasting = 24 * time.Hour

	// unsignedFor is short because signing often ends moments after the
	// image is pushed.
	unsignedFor = time.Minute

	// unknownFor keeps a registry that fails from being asked by each pod.
	unknownFor = 5 * time.Second

	// maxVerdicts bounds the images remembered; a node runs fewer. One is
	// about 2 KiB, at most some 50 KiB.
	maxVerdicts = 512
)

// verdicts remembers what was found out about images.
type verdicts struct {
	mu    sync.Mutex // guards the following
	known map[reference]*verdict
	order []reference // of known, the oldest first
}

// verdict is one verification. The fields below done may be read once it is
// closed.
type verdict struct {
	trusted *trust
	before  *verdict // the last one with selectors, while this one is made

	done      chan struct{}
	selectors []string
	err       error
	abandoned bool      // by the caller who made it: nothing was found out
	verified  time.Time // when the selectors were found
	expires   time.Time // zero: never by itself
	until     time.Time // when to look again
}

func newVerdicts() *verdicts { return &verdicts{known: map[reference]*verdict{}} }

// claim returns the verdict on ref, which may still be in the making, or a
// new one that the caller has to fill in and settle.
func (vs *verdicts) claim(ref reference, trusted *trust, now time.Time) (v *verdict, mine bool) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	old := vs.known[ref]
	var before *verdict
	if old != nil && old.trusted == trusted {
		select {
		case <-old.done:
			if !old.abandoned && now.Before(old.until) {
				return old, false
			}
			before = old.before
			if old.err == nil && !old.abandoned {
				before = old
			}
		default:
			return old, false
		}
	}
	v = &verdict{trusted: trusted, before: before, done: make(chan struct{})}
	if old == nil {
		if len(vs.order) == maxVerdicts {
			delete(vs.known, vs.order[0])
			vs.order = slices.Delete(vs.order, 0, 1)
		}
		vs.order = append(vs.order, ref)
	}
	vs.known[ref] = v
	return v, true
}

// settle ends the making of v, whose selectors, err and expires are set.
// abandoned says that its maker gave up: the next to ask starts anew.
func (vs *verdicts) settle(v *verdict, now time.Time, abandoned bool) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	defer close(v.done)
	before := v.before
	v.before = nil
	switch {
	case v.err == nil:
		v.verified, v.until = now, now.Add(fresh)
		if !v.expires.IsZero() && v.expires.Before(v.until) {
			v.until = v.expires
		}
	case errors.Is(v.err, ErrUnverified):
		v.until = now.Add(unsignedFor)
	case abandoned:
		v.abandoned, v.before = true, before
	case before != nil && before.stands(now):
		v.selectors, v.err = before.selectors, nil
		v.verified, v.expires = before.verified, before.expires
		v.until = now.Add(unsignedFor)
		if !v.expires.IsZero() && v.expires.Before(v.until) {
			v.until = v.expires
		}
	default:
		v.until = now.Add(unknownFor)
	}
}

// stands tells whether the selectors may be given though the registry cannot
// be asked.
func (v *verdict) stands(now time.Time) bool {
	return now.Before(v.verified.Add(lasting)) && (v.expires.IsZero() || now.Before(v.expires))
}
