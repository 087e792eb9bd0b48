package proxy

import (
	"net/http"
	"sync/atomic"
	"time"

	"github.com/narthex-id/narthex/proxy/http1"
)

// upload sends the rest of a request's body, of which not all was there with
// its head, while the response is waited for: a service may answer before it
// has read everything, and a client may wait to be asked for it.
type upload struct {
	done     chan struct{} // holds one token when run has returned
	running  bool
	begun    atomic.Bool // the client has sent some of it
	complete bool        // the service was sent all of it
	refused  *refused    // why the client's body is no good
	gone     error       // how the client left within it
	err      error       // why the service could not be sent it
	stopped  bool        // nobody waits for more; guarded by conn.mu
}

func (x *exchange) startUpload() {
	x.upload.running = true
	go x.runUpload()
}

// runUpload ends when all was sent, when either side breaks off, or when
// stopUpload has it.
func (x *exchange) runUpload() {
	d, u := x.d, &x.upload
	defer func() { u.done <- struct{}{} }()
	since, before := time.Now(), x.taken
	within := x.s.responseWithin(x.bound())
	for {
		d.expect(clientSends, bodyDue(x.s, since, x.taken-before))
		if err := d.in.fill(); err != nil {
			if d.interruptedBefore(err, u.isStopped) {
				continue
			}
			x.abortUpload(err)
			return
		}
		d.forget(clientSends)
		u.begun.Store(true)
		n, done, err := x.body.Next(d.in.b)
		if err != nil {
			u.refused = x.badBody(err)
			x.abortUpload(err)
			return
		}
		if x.taken += int64(n); x.tooLarge() {
			u.refused = x.largeBody()
			x.abortUpload(nil)
			return
		}
		d.expectOf(serviceTakes, x.s.Timeouts.Stall)
		_, u.err = x.b.Write(d.in.take(n))
		d.forget(serviceTakes)
		if u.err != nil {
			return // it may answer all the same
		}
		d.stretch(serviceSends, time.Now().Add(within))
		if done {
			u.complete = true
			return
		}
	}
}

func (u *upload) isStopped() bool { return u.stopped }

// The slowest a body may come, in bytes a second, and for how long it may be
// slower at the start: who drips is not to hold a connection to a service.
const (
	slowestBody = 240
	slowStart   = 10 * time.Second
)

// bodyDue is when more of a body has to be there.
func bodyDue(s *settings, since time.Time, n int64) time.Time {
	stalls := time.Now().Add(s.Timeouts.Stall)
	slow := since.Add(max(slowStart, s.Timeouts.Stall) + time.Duration(n/slowestBody)*time.Second)
	if slow.Before(stalls) {
		return slow
	}
	return stalls
}

// abortUpload has the service learn that no more comes, and nobody wait for its
// answer.
func (x *exchange) abortUpload(err error) {
	d, u := x.d, &x.upload
	if u.refused == nil && isInterrupt(err) && d.late[clientSends].Load() {
		u.refused = &refused{status: http.StatusRequestTimeout, why: "the body of the request came too slowly", last: true}
	} else if u.refused == nil && !isInterrupt(err) {
		u.gone = cutShort(err)
	}
	_ = x.b.raw.SetReadDeadline(past) // fails where it is closed, which its reader finds out
}

// awaitUpload gives the end of a body that was answered already a moment to
// come, so that the connection can go on: that of a chunked one may come behind
// all that the service had to know.
func (x *exchange) awaitUpload() {
	u := &x.upload
	if !u.running {
		return
	}
	timer := time.NewTimer(linger.time)
	defer timer.Stop()
	select {
	case <-u.done:
		u.done <- struct{}{} // for stopUpload
	case <-timer.C:
	}
}

// stopUpload ends the upload, if there is one. It reports whether the client
// has sent all of its body, so that what comes next is another request.
func (x *exchange) stopUpload() (read bool) {
	u := &x.upload
	if !u.running {
		return x.whole || x.req.Body == http1.NoBody
	}
	u.running = false
	select {
	case <-u.done:
		return u.complete
	default:
	}
	d := x.d
	d.c.mu.Lock()
	u.stopped = true
	d.src.interrupt()
	_ = x.b.raw.SetWriteDeadline(past)
	d.c.mu.Unlock()
	<-u.done
	d.resume()
	_ = x.b.raw.SetWriteDeadline(time.Time{})
	return u.complete
}
