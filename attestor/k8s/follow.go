package k8s

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/narthex-id/narthex/attestor"
)

// goneAfter is in how many lists in a row a container must be missing until
// that counts: a kubelet that has just been started does not know all of its
// pods yet.
const goneAfter = 2

// follower is somebody who wants to know when a process's selectors change.
type follower struct {
	q       question
	found   []attestor.Selector // what the process was given, of pod lists
	signed  []attestor.Selector // and of signatures
	last    *record             // that had the same
	missing int                 // lists in a row that do not know it
	changed func()
}

// Run implements attestor.Runner: it makes the requests to the kubelet that
// Attest waits for; while somebody follows a process, one every 10 s; and, at the
// start and after a failure, those that tell whether it can attest.
func (a *Attestor) Run(ctx context.Context) error {
	if err := a.seesNode(); err != nil && a.source.report != nil {
		a.source.report(err)
	}
	var signatures sync.WaitGroup
	defer signatures.Wait()
	if a.signatures != nil {
		signatures.Go(func() { a.watchSignatures(ctx) })
	}
	a.source.run(ctx)
	return nil
}

// signaturesPause is the time between two looks at signatures after one that
// could not be told: the registry is away, and what was found before stands.
const signaturesPause = time.Minute

// watchSignatures lets followers know when the signatures of their image are
// not what they were, until ctx ends: the trusted root was replaced, a
// certificate has ended, a signature was taken back.
func (a *Attestor) watchSignatures(ctx context.Context) {
	timer := time.NewTimer(spread(followPeriod))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		pause := followPeriod
		for _, image := range a.source.signedImages() {
			values, err := a.signatures.Selectors(ctx, image)
			if err != nil && !errors.Is(err, attestor.ErrNotKnown) {
				pause = signaturesPause
				continue
			}
			for _, changed := range a.source.tellSigned(image, signedSelectors(values)) {
				changed()
			}
		}
		timer.Reset(spread(pause))
	}
}

// signedImages returns the images that followed processes run and have selectors
// of. One without has nothing that could be taken back.
func (s *source) signedImages() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	images := map[string]struct{}{}
	for f := range s.followers {
		if image := s.imageOf(f); image != "" && len(f.signed) > 0 {
			images[image] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(images))
}

// tellSigned lets go of those who run the image and were given other selectors of
// its signatures than these, and returns how to tell them.
func (s *source) tellSigned(image string, now []attestor.Selector) []func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var told []func()
	for f := range s.followers {
		if len(f.signed) > 0 && s.imageOf(f) == image && !slices.Equal(f.signed, now) {
			delete(s.followers, f)
			told = append(told, f.changed)
		}
	}
	return told
}

// imageOf returns the image of f's container, empty where it is not known now.
func (s *source) imageOf(f *follower) string {
	if s.newest == nil {
		return ""
	}
	if c := s.newest.containers[f.q.container]; c != nil && c.err == nil {
		return c.image
	}
	return ""
}

// Follow implements attestor.Follower. It takes up to 11 s until a change is
// noticed, and as much again for a container that is gone. That the kubelet has
// not answered for 5 min is one.
func (a *Attestor) Follow(p *attestor.Process, found []attestor.Selector, changed func()) (stop func()) {
	at, err := a.place(p)
	if err != nil { // the process is gone, most likely; whoever asks again will know
		changed()
		return func() {}
	}
	if at == (place{}) {
		return func() {} // no process outside of pods gets into one
	}
	f := &follower{q: a.question(at), found: fromPod(found), changed: changed}
	if a.signatures != nil {
		f.signed = fromSignatures(found)
	}
	if a.podOnly && a.signatures != nil {
		f.q.podOnly = true // what the image gave is no part of found
	}
	return a.source.follow(f)
}

// follow has f told, once, as soon as a list says something else.
func (s *source) follow(f *follower) (stop func()) {
	s.mu.Lock()
	if s.newest != nil && f.differs(s.newest) {
		s.mu.Unlock()
		f.changed()
		return func() {}
	}
	if len(s.followers) == 0 && s.newest != nil {
		s.refresh = s.newest.began.Add(followPeriod)
	}
	s.followers[f] = struct{}{}
	s.mu.Unlock()
	s.poke()
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.followers, f)
	}
}

// tell lets go of those for whom l says something else, and returns how to
// tell them.
func (s *source) tell(l *list) []func() {
	var told []func()
	for f := range s.followers {
		if f.differs(l) {
			delete(s.followers, f)
			told = append(told, f.changed)
		}
	}
	return told
}

// tellAll lets go of everybody, and returns how to tell them.
func (s *source) tellAll() []func() {
	var told []func()
	for f := range s.followers {
		told = append(told, f.changed)
	}
	clear(s.followers)
	return told
}

// differs tells whether a process would not be given the same by l.
func (f *follower) differs(l *list) bool {
	r, err := f.q.in(l)
	switch {
	case err != nil:
		return true
	case r == nil:
		f.missing++
		return f.missing >= goneAfter
	}
	f.missing = 0
	if r == f.last || slices.Equal(r.all(), f.found) {
		f.last = r
		return false
	}
	return true
}
