package proxy

import (
	"container/list"
	"sync"
	"time"
)

// gate lets a bounded number through at once, the others in the order in
// which they came, and those who come again before those who are new. Its bound
// can change while they wait.
type gate struct {
	mu      sync.Mutex // guards the following
	most    int
	kept    int // of most, those that somebody else has
	taken   int
	again   list.List // of chan struct{}, closed to let one through
	waiting list.List // likewise
}

// try takes a place if there is one.
func (g *gate) try() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.taken+g.kept >= g.most || g.again.Len()+g.waiting.Len() > 0 {
		return false
	}
	g.taken++
	return true
}

// take waits for a place until stop is closed or late comes; either may be
// nil. Again is for who was through before.
func (g *gate) take(stop <-chan struct{}, late <-chan time.Time, again bool) bool {
	if g.try() {
		return true
	}
	turn, queue := make(chan struct{}), &g.waiting
	if again {
		queue = &g.again
	}
	g.mu.Lock()
	place := queue.PushBack(turn)
	g.admit()
	g.mu.Unlock()
	select {
	case <-turn:
		return true
	case <-stop:
	case <-late:
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-turn: // meanwhile
		return true
	default:
		queue.Remove(place)
		return false
	}
}

// force takes a place beyond the bound.
func (g *gate) force() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken++
}

// give gives a place back.
func (g *gate) give() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken--
	g.admit()
}

// resize changes the bound. Those who are through stay.
func (g *gate) resize(most int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.most = most
	g.admit()
}

// reserve counts n places as taken by somebody else, in place of what was
// counted before.
func (g *gate) reserve(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.kept = n
	g.admit()
}

func (g *gate) admit() { // with g.mu held
	for _, queue := range []*list.List{&g.again, &g.waiting} {
		for g.taken+g.kept < g.most && queue.Len() > 0 {
			g.taken++
			close(queue.Remove(queue.Front()).(chan struct{}))
		}
	}
}
