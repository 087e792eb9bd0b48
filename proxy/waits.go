package proxy

import (
	"iter"
	"sync/atomic"
	"time"
)

// This file bounds what a request waits for. Who waits says for how long; the
// table finds what is over and ends it, so that no wait costs a timer.

// wait is what a request can be held up by.
type wait int

const (
	clientSends wait = iota
	clientTakes
	serviceSends
	serviceTakes
	waitKinds
)

// waits are those of one request at a time. Whoever serves it begins and ends
// them, and the table finds those that are over.
type waits struct {
	patience [waitKinds]atomic.Int64 // when each ends, in ns since the epoch; 0: nobody waits
	late     [waitKinds]atomic.Bool  // it has ended
	gone     atomic.Bool             // the client left: nobody waits for the service's answer
}

// expect bounds a wait from now on; forget ends it.
func (p *waits) expect(w wait, until time.Time) {
	p.late[w].Store(false)
	p.patience[w].Store(until.UnixNano())
}

func (p *waits) forget(w wait) { p.patience[w].Store(0) }

// expectOf bounds a wait by a time from now on.
func (p *waits) expectOf(w wait, most time.Duration) { p.expect(w, time.Now().Add(most)) }

// SlowestTaken is the slowest that a client may take what it is sent, in bytes a
// second.
const SlowestTaken = 2 << 10

// expectTaken bounds how long the client may take for n bytes.
func (p *waits) expectTaken(s *settings, n int) {
	p.expectOf(clientTakes, s.Timeouts.Stall+time.Duration(n)*time.Second/SlowestTaken)
}

// stretch gives a wait more time, if there is one.
func (p *waits) stretch(w wait, until time.Time) {
	if was := p.patience[w].Load(); was != 0 {
		p.patience[w].CompareAndSwap(was, until.UnixNano())
	}
}

// overdue yields each wait that is over, once.
func (p *waits) overdue(now time.Time) iter.Seq[wait] {
	return func(yield func(wait) bool) {
		for w := range p.patience {
			until := p.patience[w].Load()
			if until == 0 || now.UnixNano() < until || p.late[w].Swap(true) {
				continue
			}
			if !yield(wait(w)) {
				return
			}
		}
	}
}

// sooner tells of when the waits end that are not over.
func (p *waits) sooner(tell func(time.Time)) {
	for w := range p.patience {
		if until := p.patience[w].Load(); until != 0 && !p.late[w].Load() {
			tell(time.Unix(0, until))
		}
	}
}

// cut reports whether the service's connection was interrupted for a wait, so
// that it is no good for another request, though all may have been well by then.
func (p *waits) cut() bool {
	return p.gone.Load() || p.late[serviceSends].Load() || p.late[serviceTakes].Load()
}
