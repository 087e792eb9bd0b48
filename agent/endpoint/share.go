package endpoint

import "sync"

// shared holds what was made from each key, once, for as long as somebody uses
// it.
type shared[K comparable, V any] struct {
	mu   sync.Mutex // guards the following, and sharing.uses
	live map[K]*sharing[V]
}

type sharing[V any] struct {
	once  sync.Once // makes value
	value V
	uses  int
}

func newShared[K comparable, V any]() shared[K, V] {
	return shared[K, V]{live: map[K]*sharing[V]{}}
}

// acquire returns what make made, now or for somebody who uses it already. It
// is followed by one release.
func (s *shared[K, V]) acquire(key K, make func() V) V {
	s.mu.Lock()
	e := s.live[key]
	if e == nil {
		e = &sharing[V]{}
		s.live[key] = e
	}
	e.uses++
	s.mu.Unlock()
	e.once.Do(func() { e.value = make() })
	return e.value
}

// release gives back what acquire returned for the key, and tells whether
// nobody uses it any more.
func (s *shared[K, V]) release(key K) (last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.live[key]
	if e.uses--; e.uses == 0 {
		delete(s.live, key)
	}
	return e.uses == 0
}
