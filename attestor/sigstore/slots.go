package sigstore

import (
	"context"
	"sync"
)

// slots bounds how many verifications run at the same time for one registry,
// and for all of them.
type slots struct {
	perRegistry int
	all         chan struct{} // one in it for each slot taken

	mu         sync.Mutex // guards the following
	registries map[string]*registrySlots
}

// registrySlots are those of one registry, known while somebody holds one or
// waits.
type registrySlots struct {
	taken chan struct{} // one in it for each
	known int           // holders and waiters, guarded by slots.mu
}

func newSlots(perRegistry, all int) *slots {
	return &slots{perRegistry: perRegistry, all: make(chan struct{}, all), registries: map[string]*registrySlots{}}
}

// acquire waits for a slot, or for the end of ctx, whose cause is its error
// then. Each one that succeeds is followed by one release.
func (s *slots) acquire(ctx context.Context, registry string) error {
	s.mu.Lock()
	r := s.registries[registry]
	if r == nil {
		r = &registrySlots{taken: make(chan struct{}, s.perRegistry)}
		s.registries[registry] = r
	}
	r.known++
	s.mu.Unlock()
	select {
	case r.taken <- struct{}{}:
		select {
		case s.all <- struct{}{}:
			return nil
		case <-ctx.Done():
			<-r.taken
		}
	case <-ctx.Done():
	}
	s.leave(registry)
	return context.Cause(ctx)
}

func (s *slots) release(registry string) {
	<-s.all
	s.mu.Lock()
	r := s.registries[registry]
	s.mu.Unlock()
	<-r.taken
	s.leave(registry)
}

func (s *slots) leave(registry string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.registries[registry]
	if r.known--; r.known == 0 {
		delete(s.registries, registry)
	}
}
