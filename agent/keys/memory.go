package keys

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// Memory returns a Store that ends with the process: after a restart the
// agent attests anew.
func Memory() Store { return &memory{keys: map[string]*key{}} }

type memory struct {
	mu   sync.Mutex // guards the following
	keys map[string]*key
}

func (m *memory) New(ctx context.Context) (Key, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	signer, err := NewWorkloadKey("ec-p256")
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	k := &key{id: newID(), signer: signer}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keys[k.id] = k
	return k, nil
}

func (m *memory) Load(_ context.Context, id string) (Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if k, ok := m.keys[id]; ok {
		return k, nil
	}
	return nil, fmt.Errorf("load key %.40q from memory: %w", id, ErrNotFound)
}

func (m *memory) Keep(_ context.Context, ids ...string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.keys, func(id string, _ *key) bool { return !slices.Contains(ids, id) })
	return nil
}
