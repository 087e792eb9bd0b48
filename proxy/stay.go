package proxy

import (
	"sync"
	"time"
)

// This file is goroutines that stay with a connection to a service of HTTP/1.1
// while that lies idle. Whose request it is lent for next only sends it, and the
// answer wakes who is there already: a goroutine that is made for it, or woken by
// another one, would have a second thread woken too, which costs more than all
// else that there is to do about a small request.

// stay is who stays with a connection.
type stay struct {
	mu    sync.Mutex    // guards the following
	with  bool          // a goroutine does
	asked *courier      // with whom the next request was sent; it is for that goroutine to answer
	left  chan struct{} // closed by it once it was sent away
	gone  bool          // it has found out that the connection is of no use any more
}

// begin notes that the goroutine which answers the request stays. It is called
// before anybody else may borrow the connection; await ends it.
func (s *stay) begin(hosts *sync.WaitGroup) {
	hosts.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.with = true
}

// is reports whether a goroutine stays.
func (s *stay) is() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.with
}

// await waits until a request was sent, and returns it; what came of the answer,
// or why there is none, is in the intake or the courier. It returns nil where the
// goroutine is not to stay, or the far end did not.
func (b *backend) await(hosts *sync.WaitGroup) *courier {
	defer hosts.Done() // from then on the request's connection is waited for
	err := b.in.fill()
	s := &b.stay
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.asked
	s.with, s.asked = false, nil
	if c != nil {
		if c.err == nil && err != nil {
			c.err = cutShort(err)
		}
		return c
	}
	if s.gone = s.left == nil || !isInterrupt(err); s.gone {
		_ = b.raw.Close()
		b.in.drop()
	}
	if s.left != nil {
		close(s.left)
		s.left = nil
	}
	return nil
}

// ask sends a request that who stays with the connection answers. It reports
// false where nobody does: because the connection is gone, or never did.
func (b *backend) ask(c *courier) (asked, gone bool) {
	s := &b.stay
	s.mu.Lock() // until all is sent that is to be: the answer may come before that
	defer s.mu.Unlock()
	if !s.with {
		return false, s.gone
	}
	c.p.tries++
	c.p.used = true
	s.asked = c
	if c.err = c.sendHead(); c.err != nil {
		_ = b.raw.SetReadDeadline(past) // fails on a closed socket, which who reads it finds out
	}
	return true, false
}

// dismiss has nobody stay with the connection, for who reads the answer itself or
// ends it. It reports false where the connection is gone.
func (b *backend) dismiss() bool {
	s := &b.stay
	s.mu.Lock()
	if !s.with {
		defer s.mu.Unlock()
		return !s.gone
	}
	left := make(chan struct{})
	s.left = left
	_ = b.raw.SetReadDeadline(past) // fails on a closed socket, as above
	s.mu.Unlock()
	<-left
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.gone && b.raw.SetReadDeadline(time.Time{}) == nil
}
