package upstream

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// line is the borrowers of a group that wait for room, first come first
// served: the first alone looks for room, and nobody looks past the line.
type line struct {
	most    int          // that may wait
	waiting atomic.Int32 // len(queue), for those who only look

	mu    sync.Mutex // guards the following
	queue []chan struct{}
}

// join puts one more at the end, and returns where it is called when it is the
// first and should look; nil when too many wait.
func (l *line) join() chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) >= l.most {
		return nil
	}
	w := make(chan struct{}, 1)
	l.queue = append(l.queue, w)
	l.waiting.Store(int32(len(l.queue)))
	return w
}

// quit takes one out. Who is the first now may find room, too.
func (l *line) quit(w chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := slices.Index(l.queue, w)
	l.queue = slices.Delete(l.queue, n, n+1)
	l.waiting.Store(int32(len(l.queue)))
	l.callLocked()
}

// first reports whether w is.
func (l *line) first(w chan struct{}) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queue[0] == w
}

// call has the first one look.
func (l *line) call() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.callLocked()
}

func (l *line) callLocked() {
	if len(l.queue) == 0 {
		return
	}
	select {
	case l.queue[0] <- struct{}{}:
	default: // it was called and has not looked yet
	}
}

// wait waits until it is this call's turn and an endpoint has room.
func (s *search) wait(past *Tried) (choice, error) {
	g := s.group
	w := g.line.join()
	if w == nil {
		return choice{}, &kindError{ErrFull, fmt.Errorf("%s: no endpoint has room for another request, and %d wait already", g.targets[0].key.address, max(g.line.most, 0))}
	}
	defer g.line.quit(w)
	for _, t := range g.targets {
		t.count(g, 1)
		defer t.count(g, -1)
	}
	timer := time.NewTimer(time.Until(s.deadline()))
	defer timer.Stop()
	for {
		if g.line.first(w) {
			if c, full := s.choose(past); !full {
				return c, nil
			}
		}
		select {
		case <-w:
		case <-timer.C:
			return choice{}, &kindError{ErrFull, fmt.Errorf("%s: no endpoint had room for another request within %s", g.targets[0].key.address, s.timeout)}
		case <-s.ctx.Done():
			return choice{}, s.ctx.Err()
		}
	}
}

// count counts how many of a group's borrowers wait for room here.
func (t *target) count(g *Group, by int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.crowd == nil {
		t.crowd = map[*Group]int{}
	}
	if t.crowd[g] += by; t.crowd[g] == 0 {
		delete(t.crowd, g)
	}
	t.waiting.Add(int32(by))
}

// wake has those look who are first to get room here. There may be some: a loan
// ended, or what is healthy changed.
func (t *target) wake() {
	if t.waiting.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for g := range t.crowd {
		g.line.call()
	}
}
