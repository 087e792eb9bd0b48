package proxy

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/forwarded"
	"github.com/narthex-id/narthex/proxy/http1"
	"github.com/narthex-id/narthex/proxy/http2"
)

// front is a client's connection of HTTP/2. Each of its streams is a passage
// (passage.go), decided by itself. Its goroutine reads frames, and is parked
// like any other while none come, also in the midst of streams.
type front struct {
	sleeper
	mux
	waits // of the connection: for its first settings or a whole head, and that it takes what is there for it

	down  end
	maker *forwarded.Maker // of what services are told of the client
	told  *forwarded.Rules // by which maker was made

	begun   bool           // something was received; belongs to the reader
	leaving atomic.Bool    // it ends once it has no stream
	goes    atomic.Bool    // it has none: its goroutine is to end it
	work    sync.WaitGroup // passages that are not over
	helpers sync.WaitGroup // goroutines that send for the table

	// The following are guarded by conn.mu.
	live   []*passage // they are asked on every change
	served int        // passages that came to an end
	warned bool       // the client was told to open no more
	last   bool       // and that none is looked at any more
	unsent bool       // it has not taken all that there is for it
	why    closing    // of leaving
}

// serveHTTP2 serves the streams of a connection whose ends are known.
func (c *conn) serveHTTP2(down end) error {
	src := inletOf(down)
	f := newFront(c, down, intake{src: src, flow: flow{&c.in, c.l.meters.bytesIn}})
	if !c.startRequests(f, &f.sleeper, &f.waits) {
		return c.killedBefore()
	}
	f.run()
	return errCarried
}

// continueHTTP2 does so where it turned out that the client speaks HTTP/2.
func (c *conn) continueHTTP2(d *downstream) {
	f := newFront(c, d.out.dst, d.in)
	c.mu.Lock()
	f.expect(clientSends, time.Now().Add(c.began.Timeouts.Head))
	c.http, c.streams[0] = f, &f.sleeper
	f.goes.Store(c.closing != nil) // it was ended in the moment in which its client began to speak
	c.noteDrain()
	c.mu.Unlock()
	f.run()
}

func newFront(c *conn, down end, in intake) *front {
	f := &front{down: down}
	f.sleeper = sleeper{c: c, src: in.src, work: f, bytes: &c.in}
	f.in, f.flow = in, flow{&c.out, c.l.meters.bytesOut}
	f.slow, f.broke = f.noteSlow, f.cannotSend
	f.spoolTo(down)
	f.h2 = http2.NewServer(http2.Settings{MaxStreams: c.began.HTTP.MaxStreams}, f)
	return f
}

// run reads frames until the connection ends or is parked.
func (f *front) run() {
	for {
		var err error
		if len(f.in.b) == 0 || f.begun {
			var parked bool
			if parked, err = f.await(); parked {
				return
			}
		}
		if err == nil {
			f.begun = true
			err = f.receive()
			f.bound()
		}
		if err != nil {
			f.over(err)
			return
		}
	}
}

// bound bounds what is not whole: the client's settings, and a head in several
// frames.
func (f *front) bound() {
	switch {
	case f.h2.Midway() || len(f.in.b) > 0 && f.h2.Open() == 0: // or within a frame, which may be a head
		if f.patience[clientSends].Load() == 0 {
			within := f.c.began.Timeouts.Head
			f.expectOf(clientSends, within)
			f.c.hasten(time.Now().Add(within))
		}
	default:
		f.forget(clientSends)
	}
}

// over ends the connection, for this goroutine and for all: its passages find
// that out, and are waited for.
func (f *front) over(err error) {
	c := f.c
	var broken *http2.Error
	switch {
	case errors.Is(err, errLeaving), isEnd(err):
	case errors.As(err, &broken):
		f.end("client: " + broken.Error())
	default:
		f.end("client: " + explainBroken(err))
	}
	end := &http2.Error{Remote: true} // there is nothing more to be said
	if f.begun && f.late[clientSends].Load() {
		end = &http2.Error{Code: http2.EnhanceYourCalm}
	}
	f.h2.Fail(end) // unless we have failed it and say so
	f.work.Wait()
	f.state.Store(over)
	_ = c.down.SetWriteDeadline(time.Now().Add(lingerHTTP.time)) // fails on a closed socket; a client that takes nothing keeps nobody
	c.mu.Lock()
	f.warned, f.last = true, true // nobody needs help any more
	c.mu.Unlock()
	f.helpers.Wait()
	if c.ended() == nil || errors.As(err, &broken) || !end.Remote {
		f.lastWords()
	}
	f.finish()
	f.in.drop()
	c.finish(&c.record, nil)
}

// lastWords has what the client still sends read for a moment: a reset could
// take the last frames from it.
func (f *front) lastWords() {
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	f.c.unread = true
}

// await waits for frames. It reports whether the connection was parked, which
// this goroutine must not touch then.
func (f *front) await() (parkedNow bool, err error) {
	for {
		f.state.CompareAndSwap(busy, moving)
		if f.goes.Load() { // else who has it go finds it moving
			f.begin()
			return false, errLeaving
		}
		err := f.in.fill()
		switch {
		case err == nil:
			f.begin()
			return false, nil
		case !isInterrupt(err):
			f.begin()
			return false, err
		case f.goes.Load():
		case len(f.in.b) > 0:
			f.begin()
		case f.park():
			if f.goes.Load() { // since it looked
				f.wake()
			}
			return true, nil
		}
	}
}

// end notes why the connection ends. What was noted first counts.
func (f *front) end(why string) {
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	if f.c.closing == nil {
		f.c.closing = &closing{"peer", why}
		f.c.orderly = true
	}
}

// cannotSend ends the connection whose client takes nothing any more.
func (f *front) cannotSend(err error) {
	f.end("client: " + explainBroken(err))
	f.goes.Store(true)
	f.rouse()
}

// rouse has the goroutine look why.
func (f *front) rouse() {
	f.wake()
	if f.state.CompareAndSwap(moving, kicked) {
		f.src.interrupt()
	}
}

func (f *front) noteSlow(n int) {
	c := f.c
	if n > 0 {
		f.expectTaken(c.began, n)
		c.hasten(time.Unix(0, f.patience[clientTakes].Load()))
	} else {
		f.forget(clientTakes)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f.unsent = n > 0
	f.leaveIfDone()
}

// Opened implements http2.Events.
func (f *front) Opened(s *http2.Stream, p *http1.Parts, large bool) {
	pass := newPassage(f, s)
	s.Attend(pass)
	pass.begin(p, large)
}

// Settled implements http2.Events.
func (f *front) Settled() {}

// Leaving implements http2.Events: the client opens no more streams.
func (f *front) Leaving() {
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	if !f.leaving.Swap(true) {
		f.why = closing{reason: "peer", why: "ended by the client"}
	}
	f.leaveIfDone()
}

// add has a passage asked on every change, as a request between the ends of the
// connection, unless that was ended.
func (f *front) add(p *passage) bool {
	c := f.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing != nil {
		return false
	}
	p.matter.request, p.matter.own, p.matter.standing = c.request, c.own, c.standing
	f.live = append(f.live, p)
	f.work.Add(1)
	return true
}

// remove takes it out, with c.mu held.
func (f *front) remove(p *passage) {
	if at := slices.Index(f.live, p); at >= 0 {
		f.live[at] = f.live[len(f.live)-1]
		f.live[len(f.live)-1] = nil
		f.live = f.live[:len(f.live)-1]
	}
	f.served++
	f.c.moved = time.Now()
	f.leaveIfDone()
}

// leaveIfDone ends a connection that is to end, has no stream and nothing to
// send, with c.mu held.
func (f *front) leaveIfDone() {
	if !f.leaving.Load() || len(f.live) > 0 || f.unsent || f.goes.Swap(true) {
		return
	}
	if f.c.closing == nil { // no stream is added any more
		f.c.closing, f.c.orderly = &f.why, true
	}
	f.rouse()
}

// leave has the connection end once it has no stream, with c.mu held.
func (f *front) leave(why closing) {
	if f.leaving.Swap(true) {
		return
	}
	f.why = why
	f.refuseFurther(true)
	f.leaveIfDone()
}

// refuseFurther tells the client that no more streams are taken, with c.mu held:
// at first of those that it has not opened yet, and then of all.
func (f *front) refuseFurther(all bool) {
	if all && f.last || f.warned && !all {
		return
	}
	f.warned, f.last = true, f.last || all
	f.h2.Leave(all)
	f.helpers.Go(f.flush) // not here: streams may go on by it, which lock what is locked
}

// The following are the requests of conn: what the table does with it, with
// c.mu held.

func (f *front) questions(yield func(*question) bool) {
	for _, p := range f.live {
		if !yield(&p.matter) {
			return
		}
	}
}

func (f *front) check(now time.Time, s *settings) {
	c := f.c
	for w := range f.overdue(now) {
		switch w {
		case clientSends:
			if c.closing == nil {
				c.closing = &closing{"peer", fmt.Sprintf("the client sent no whole head, or no settings, within %s", c.began.Timeouts.Head)}
				c.orderly = true
			}
			f.goes.Store(true)
			f.rouse()
		case clientTakes:
			c.kill(closing{"peer", "the client takes nothing of what it asked for"})
			return
		}
	}
	for _, p := range slices.Clone(f.live) {
		p.check(now, s)
	}
	if len(f.live) > 0 {
		c.moved = now
	}
	if sum := c.in.Load(); sum != c.movedSum {
		c.movedSum, c.moved = sum, now
	}
	if why, ok := c.drains(); ok {
		if now.Sub(c.drainedAt) >= lameDuck(s) {
			f.leave(why)
		}
	} else if quiet := now.Sub(c.moved); s.Timeouts.Idle > 0 && quiet >= s.Timeouts.Idle {
		f.leave(closing{"peer", fmt.Sprintf("idle for %s", s.Timeouts.Idle)})
	}
}

func (f *front) sooner(s *settings, tell func(time.Time)) {
	f.waits.sooner(tell)
	for _, p := range f.live {
		p.sooner(s, tell)
	}
	if c := f.c; !c.drainedAt.IsZero() && !f.leaving.Load() {
		tell(c.drainedAt.Add(lameDuck(s)))
	}
}

func (f *front) drain(drains bool) {
	if drains {
		f.refuseFurther(false)
	}
}

func (f *front) answered() int { return f.served }

func (f *front) says() end { return f.down }

// makerFor implements caller. It belongs to the reader.
func (f *front) makerFor(s *settings) *forwarded.Maker {
	if f.told != s.told {
		f.maker, f.told = f.c.makerOf(f.down, s), s.told
	}
	return f.maker
}

func (f *front) version() int { return 2 }
