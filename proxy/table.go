package proxy

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// table holds every accepted connection, ordered by when it next needs
// attention: its handshake deadline, its idle check, its peer's expiry, the
// end of its drain. One goroutine looks after all of them, so a connection
// costs no timer. It sleeps until the first one is due, and most are gone
// before their date comes, so that it is woken for a date that is sooner than
// all it has slept for, and else finds out when it wakes by itself.
//
// Lock order: a connection's mutex may be held when the table's is taken,
// never the other way round.
type table struct {
	wake  chan struct{}      // a connection is due before the sleep ends
	asked chan chan struct{} // closes what it receives: the loop goes round

	mu    sync.Mutex // guards the following, and conn.due, conn.index
	conns byDue
	until time.Time // when the sleep ends; zero while there is none
}

func newTable() *table { return &table{wake: make(chan struct{}, 1), asked: make(chan chan struct{})} }

// add puts c into the table.
func (t *table) add(c *conn, due time.Time) {
	t.mu.Lock()
	c.due = due
	heap.Push(&t.conns, c)
	wakes := t.wakes(due)
	t.mu.Unlock()
	if wakes {
		t.kick()
	}
}

// remove takes c out.
func (t *table) remove(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	heap.Remove(&t.conns, c.index)
}

// schedule sets when c next needs attention; zero is never.
func (t *table) schedule(c *conn, due time.Time) {
	t.mu.Lock()
	if c.index < 0 || c.due.Equal(due) {
		t.mu.Unlock()
		return
	}
	c.due = due
	heap.Fix(&t.conns, c.index)
	wakes := t.wakes(due)
	t.mu.Unlock()
	if wakes {
		t.kick()
	}
}

// hasten has c looked after by then, if it is not sooner.
func (t *table) hasten(c *conn, by time.Time) {
	t.mu.Lock()
	if c.index < 0 || !c.due.IsZero() && !by.Before(c.due) {
		t.mu.Unlock()
		return
	}
	c.due = by
	heap.Fix(&t.conns, c.index)
	wakes := t.wakes(by)
	t.mu.Unlock()
	if wakes {
		t.kick()
	}
}

// wakes reports whether the sleep has to end sooner because of due, with t.mu
// held.
func (t *table) wakes(due time.Time) bool {
	return !due.IsZero() && due.Before(t.until)
}

func (t *table) kick() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// of returns the connections of a listener, or all of them for nil.
func (t *table) of(l *listener) []*conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	conns := make([]*conn, 0, len(t.conns))
	for _, c := range t.conns {
		if l == nil || c.l == l {
			conns = append(conns, c)
		}
	}
	return conns
}

// run looks after the connections that are due until ctx ends.
func (t *table) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		now := time.Now()
		due, next := t.takeDue(now)
		for _, c := range due {
			c.tick(now)
		}
		if len(due) > 0 {
			continue
		}
		timer.Reset(next)
		select {
		case <-timer.C:
		case <-t.wake:
		case round := <-t.asked:
			close(round)
		case <-ctx.Done():
			return
		}
	}
}

// takeDue returns the connections that are due, which stay in the table
// without a date until they are scheduled again, or how long to sleep where
// there are none.
func (t *table) takeDue(now time.Time) ([]*conn, time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var due []*conn
	t.until = time.Time{}
	wait := time.Hour
	for len(t.conns) > 0 {
		first := t.conns[0]
		if first.due.IsZero() {
			break
		}
		if left := first.due.Sub(now); left > 0 {
			wait = min(wait, left)
			break
		}
		due = append(due, first)
		first.due = time.Time{}
		heap.Fix(&t.conns, 0)
	}
	if len(due) == 0 {
		t.until = now.Add(wait)
	}
	return due, wait
}

// byDue is a heap of connections; those without a date come last.
type byDue []*conn

func (h byDue) Len() int { return len(h) }

func (h byDue) Less(i, j int) bool {
	a, b := h[i].due, h[j].due
	if a.IsZero() || b.IsZero() {
		return !a.IsZero() && b.IsZero()
	}
	return a.Before(b)
}

func (h byDue) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *byDue) Push(x any) {
	c := x.(*conn)
	c.index = len(*h)
	*h = append(*h, c)
}

// Pop implements heap.Interface.
func (h *byDue) Pop() any {
	old := *h
	c := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	c.index = -1
	return c
}
