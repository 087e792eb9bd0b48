package attestor

// Fact is what is so of a process for as long as it is pinned. It is found
// once for each process, and known to whoever asks after that.
type Fact[T any] struct {
	find func(*Process) (T, error)
}

// NewFact returns the fact that find finds. What find reads of the process
// counts only if Process.Alive returns nil afterwards, as with ProcPath.
func NewFact[T any](find func(*Process) (T, error)) *Fact[T] {
	return &Fact[T]{find: find}
}

// Of returns what is so of p. An error is not remembered.
func (f *Fact[T]) Of(p *Process) (T, error) {
	if known, ok := p.fact(f); ok {
		return known.(T), nil
	}
	found, err := f.find(p) // those who ask at the same time find the same
	if err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.facts = append(p.facts, finding{f, found})
	}
	return found, err
}

// finding is what was found of a process.
type finding struct{ fact, value any }

// fact returns what was found first. There are as many as attestors, so a few.
func (p *Process) fact(key any) (value any, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.facts {
		if f.fact == key {
			return f.value, true
		}
	}
	return nil, false
}
