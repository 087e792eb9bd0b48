package k8s

import (
	"context"
	"slices"

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
	a.source.run(ctx)
	return nil
}

// Follow implements attestor.Follower. It takes up to 11 s until a change is
// noticed, and as much again for a container that is gone.
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
