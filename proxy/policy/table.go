package policy

import (
	"hash/maphash"
	"math/bits"
)

// Two hash tables that are filled once and then only read. With a hundred
// thousand rules a decision takes as long as the lines of memory it waits for,
// so the tables keep what is read together in one line, and half of their
// slots empty.

// names finds what is known of an identity by its SPIFFE ID.
type names struct {
	seed  maphash.Seed
	slots []nameSlot
	refs  []ref // of all identities
}

// nameSlot is half a line of memory.
type nameSlot struct {
	id   string    // empty: free
	tag  uint32    // upper bits of the hash, and flags
	refs [3]uint32 // where those of from begin, those of to, and where they end
}

const (
	flagRevoked uint32 = 1 << iota
	flagOutside
	flagOverflow
	flagBits = 1<<iota - 1
)

func newNames(n int) names {
	return names{seed: maphash.MakeSeed(), slots: make([]nameSlot, tableSize(n))}
}

// tableSize is a power of two, at least twice n.
func tableSize(n int) int { return 1 << bits.Len(uint(max(2*n-1, 1))) }

// add stores an ID that is not stored yet.
func (t *names) add(id string, flags uint32, refs [2][]ref) {
	h := maphash.String(t.seed, id)
	i := h & uint64(len(t.slots)-1)
	for t.slots[i].id != "" {
		i = (i + 1) & uint64(len(t.slots)-1)
	}
	s := &t.slots[i]
	s.id, s.tag = id, uint32(h>>32)&^flagBits|flags
	for side := range refs {
		s.refs[side] = uint32(len(t.refs))
		t.refs = append(t.refs, refs[side]...)
	}
	s.refs[2] = uint32(len(t.refs))
}

// find returns nil for an ID that is not stored.
func (t *names) find(id string) *nameSlot {
	h := maphash.String(t.seed, id)
	tag := uint32(h>>32) &^ flagBits
	for i := h; ; i++ {
		s := &t.slots[i&uint64(len(t.slots)-1)]
		if s.id == "" {
			return nil
		}
		if s.tag&^flagBits == tag && s.id == id {
			return s
		}
	}
}

// of returns the refs of a slot on one side.
func (t *names) of(s *nameSlot, where side) []ref {
	return t.refs[s.refs[where]:s.refs[where+1]]
}

// pairKey is a pair of atoms at a listener; 0 stands for any listener.
type pairKey struct{ from, to, listener uint32 }

func (k pairKey) hash() uint64 {
	h := (uint64(k.from)<<32 | uint64(k.to)) * 0x9e3779b97f4a7c15
	h ^= h>>29 ^ uint64(k.listener)*0xbf58476d1ce4e5b9
	return h * 0x94d049bb133111eb >> 20
}

// outcome is what becomes of a pair: the smallest deny and allow, by Direction,
// of rules without further conditions, and where the others are.
type outcome struct {
	deny, allow [2]uint32
	bucket      uint32 // 0: there are none
}

func emptyOutcome() outcome {
	return outcome{deny: [2]uint32{none, none}, allow: [2]uint32{none, none}}
}

func (o *outcome) add(number uint32, r *rule) {
	smallest := &o.deny
	if r.allow {
		smallest = &o.allow
	}
	for _, d := range [2]Direction{Inbound, Outbound} {
		if r.at.has(d) {
			smallest[d] = min(smallest[d], number)
		}
	}
}

// pairs finds the outcome of a pair.
type pairs struct{ slots []pairSlot }

type pairSlot struct {
	key     pairKey // from is 0 where the slot is free
	outcome outcome
}

func newPairs(m map[pairKey]outcome) pairs {
	t := pairs{make([]pairSlot, tableSize(len(m)))}
	for key, o := range m {
		i := key.hash() & uint64(len(t.slots)-1)
		for t.slots[i].key.from != 0 {
			i = (i + 1) & uint64(len(t.slots)-1)
		}
		t.slots[i] = pairSlot{key, o}
	}
	return t
}

// find returns nil for a pair that is not stored.
func (t *pairs) find(key pairKey) *outcome {
	for i := key.hash(); ; i++ {
		s := &t.slots[i&uint64(len(t.slots)-1)]
		if s.key == key {
			return &s.outcome
		}
		if s.key.from == 0 {
			return nil
		}
	}
}
