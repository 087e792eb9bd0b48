package attestor

import (
	"context"
	"sync"
)

// slots bounds how many things are done at the same time on behalf of one
// user, and of all of them.
type slots struct {
	perUser int
	all     chan struct{} // one in it for each slot taken

	mu    sync.Mutex // guards the following
	users map[uint32]*userSlots
}

// userSlots are those of one user, known while somebody holds one or waits.
type userSlots struct {
	taken chan struct{} // one in it for each
	known int           // holders and waiters, guarded by slots.mu
}

func newSlots(perUser, all int) *slots {
	return &slots{perUser: perUser, all: make(chan struct{}, all), users: map[uint32]*userSlots{}}
}

// acquire waits for a slot, or for the end of ctx, which is its error then.
// Each one that succeeds is followed by one release.
func (s *slots) acquire(ctx context.Context, uid uint32) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	u := s.users[uid]
	if u == nil {
		u = &userSlots{taken: make(chan struct{}, s.perUser)}
		s.users[uid] = u
	}
	u.known++
	s.mu.Unlock()
	select {
	case u.taken <- struct{}{}:
		select {
		case s.all <- struct{}{}:
			return nil
		case <-ctx.Done():
			<-u.taken
		}
	case <-ctx.Done():
	}
	s.leave(uid)
	return ctx.Err()
}

func (s *slots) release(uid uint32) {
	<-s.all
	s.mu.Lock()
	u := s.users[uid]
	s.mu.Unlock()
	<-u.taken
	s.leave(uid)
}

func (s *slots) leave(uid uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.users[uid]
	if u.known--; u.known == 0 {
		delete(s.users, uid)
	}
}

// do runs f, which may hang, in a slot and on a goroutine of its own. It
// returns what f does or, when ctx ends first, the error of ctx: f is left to
// itself then, and its slot stays taken until f returns. So nobody waits here
// for a program on a file system that does not answer, and only so many such
// waits pile up as there are slots.
func (s *slots) do(ctx context.Context, uid uint32, f func() error) error {
	if err := s.acquire(ctx, uid); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer s.release(uid)
		done <- f()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
