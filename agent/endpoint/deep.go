package endpoint

import (
	"sync"
	"time"
)

// stackKept is for how long a goroutine that has nothing to do is kept, once
// or twice as long.
const stackKept = time.Second

// deep runs functions on other goroutines than that of the caller. A
// goroutine's stack grows to what it needed once and, at the depth at which
// gRPC calls us, does not shrink again, so a stream that may stay for months
// has done elsewhere whatever needs a deep one: 4 KiB less for each. Growing a
// stack copies it, which was a tenth of the CPU time of a call: so who comes
// soon after is given a goroutine that has grown.
type deep struct {
	jobs    chan func()
	over    chan struct{} // closed by close
	workers sync.WaitGroup
}

func newDeep() *deep { return &deep{jobs: make(chan func()), over: make(chan struct{})} }

// do runs f and returns what f does.
func (d *deep) do(f func() error) error {
	done := make(chan error, 1)
	d.start(func() { done <- f() })
	return <-done
}

// start has a job done and does not wait for it.
func (d *deep) start(job func()) {
	select {
	case d.jobs <- job: // somebody waits for one
	default:
		d.workers.Go(func() { d.work(job) })
	}
}

// work does one job after the other, until there are none for a while.
func (d *deep) work(job func()) {
	job()
	tick := time.NewTimer(stackKept)
	defer tick.Stop()
	for used := false; ; {
		select {
		case job := <-d.jobs:
			job()
			used = true
		case <-tick.C:
			if !used {
				return
			}
			used = false
			tick.Reset(stackKept)
		case <-d.over:
			return
		}
	}
}

// close ends all goroutines once they have done what they do, and waits for
// them. Nothing may be started any more.
func (d *deep) close() {
	close(d.over)
	d.workers.Wait()
}
