package proxy

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/http2"
)

// far is a connection of HTTP/2 to an endpoint of a listener's target, which is
// lent to many requests at a time. Its goroutine reads what they are answered.
type far struct {
	backed
	mux
	end  end
	work *sync.WaitGroup // counts its goroutine

	grows   func()        // is told that there may be more places than before
	settled chan struct{} // closed once the service's settings came
	once    sync.Once     // of settled
	leaving atomic.Bool   // no further request is taken
	stalled atomic.Int64  // since when the service takes nothing of what waits for it, in ns since the epoch; 0: it does
}

// newFar begins HTTP/2 on a connection that was made to a service. There is a
// place reserved on it for whom it was made: it may have ended before anybody
// could ask for one.
func newFar(proved backed, e end, work *sync.WaitGroup, grows func()) *far {
	b := &far{backed: proved, end: e, work: work, grows: grows, settled: make(chan struct{})}
	b.in = intake{src: inletOf(e)}
	b.spoolTo(e)
	b.slow, b.broke = b.noteSlow, func(err error) { b.cut(explainBroken(err)) }
	b.h2 = http2.NewClient(http2.Settings{}, b)
	b.h2.Reserve()
	work.Add(1)
	go b.run()
	return b
}

func (b *far) run() {
	defer b.work.Done()
	b.flush()
	for {
		err := b.in.fill()
		if err == nil {
			err = b.receive()
		}
		if err != nil {
			b.cut(explainBroken(cutShort(err)))
			break
		}
	}
	_ = b.raw.SetWriteDeadline(time.Now().Add(lingerHTTP.time)) // fails on a closed socket; a service that takes nothing keeps nobody
	b.finish()
	b.in.drop()
	_ = b.end.Close()
}

// cut ends the connection and what is on it.
func (b *far) cut(why string) {
	b.h2.Cut(why)
	b.part()
}

// part has the goroutine end the connection.
func (b *far) part() {
	b.leaving.Store(true)
	b.once.Do(func() { close(b.settled) })
	_ = b.raw.SetReadDeadline(past) // fails on a closed socket, which its reader finds out
}

func (b *far) noteSlow(n int) {
	if n == 0 {
		b.stalled.Store(0)
		return
	}
	b.stalled.Store(time.Now().UnixNano())
}

// stalls reports whether the service has taken nothing of what waits for it for
// so long.
func (b *far) stalls(most time.Duration, now time.Time) bool {
	since := b.stalled.Load()
	return since != 0 && now.Sub(time.Unix(0, since)) >= most
}

// sooner tells of when it will have taken nothing for so long.
func (b *far) sooner(most time.Duration, tell func(time.Time)) {
	if since := b.stalled.Load(); since != 0 {
		tell(time.Unix(0, since).Add(most))
	}
}

// Opened implements http2.Events; nobody opens streams towards us.
func (b *far) Opened(*http2.Stream, *http1.Parts, bool) {}

// Settled implements http2.Events.
func (b *far) Settled() {
	b.once.Do(func() { close(b.settled) })
	b.grows()
}

// Leaving implements http2.Events.
func (b *far) Leaving() { b.leaving.Store(true) }

// Alive implements upstream.Keeper.
func (b *far) Alive() bool {
	return !b.leaving.Load() && (b.standing == nil || time.Now().Before(b.standing.NotAfter()))
}

// Join implements upstream.Shared.
func (b *far) Join() bool { return b.Alive() && b.h2.Reserve() }

// Idle implements upstream.Shared.
func (b *far) Idle() bool { return b.h2.Held() == 0 }

// Close implements upstream.Keeper: it takes no further request, and ends with
// the last one that it has.
func (b *far) Close() error {
	b.leaving.Store(true)
	b.settle()
	return nil
}

// settle ends the connection where nothing is left to be done on it.
func (b *far) settle() {
	if b.leaving.Load() && b.h2.Held() == 0 {
		b.h2.Fail(&http2.Error{Remote: true}) // there is nobody to tell, and no need to
		b.part()
	}
}

// retire has no further request come to a connection that one was not answered
// on.
func (b *far) retire() { b.leaving.Store(true) }

// connects reports whether the service takes extended CONNECT (RFC 8441), once
// it has said so.
func (b *far) connects(ctx context.Context, within time.Duration) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-b.settled:
	case <-timer.C:
	case <-ctx.Done():
	}
	return b.h2.Connects()
}
