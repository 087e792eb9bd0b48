package policy

import (
	"encoding/binary"
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
	long  []string // IDs that a slot has no room for
	refs  []ref    // the same of refs
}

// nameSlot is two lines of memory, which hold the ID itself and what it stands
// for: nothing else has to be waited for.
type nameSlot struct {
	tag  uint32 // upper bits of the hash, and flags; 0: free
	size uint16 // of the ID, without its scheme
	n    [2]uint8
	id   [slotID]byte // or, of a longer one, its number in names.long
	refs [slotRefs]ref
}

const (
	slotID   = 56
	slotRefs = 4
)

const (
	flagTaken uint32 = 1 << iota
	flagRevoked
	flagOutside
	flagOverflow
	flagSpilled // refs[0] says where in names.refs they begin, and those of to
	flagBits    = 1<<iota - 1
)

func newNames(n int) names {
	return names{seed: maphash.MakeSeed(), slots: make([]nameSlot, tableSize(n))}
}

// tableSize is a power of two, at least twice n.
func tableSize(n int) int { return 1 << bits.Len(uint(max(2*n-1, 1))) }

// add stores an ID that is not stored yet.
func (t *names) add(id string, flags uint32, refs [2][]ref) {
	id = id[len(scheme):]
	h := maphash.String(t.seed, id)
	i := h & uint64(len(t.slots)-1)
	for t.slots[i].tag != 0 {
		i = (i + 1) & uint64(len(t.slots)-1)
	}
	s := &t.slots[i]
	s.tag, s.size = uint32(h>>32)&^flagBits|flags|flagTaken, uint16(len(id))
	if copy(s.id[:], id) < len(id) {
		binary.NativeEndian.PutUint32(s.id[:], uint32(len(t.long)))
		t.long = append(t.long, id)
	}
	if len(refs[0])+len(refs[1]) <= slotRefs {
		s.n = [2]uint8{uint8(len(refs[0])), uint8(len(refs[1]))}
		copy(s.refs[copy(s.refs[:], refs[0]):], refs[1])
		return
	}
	s.tag |= flagSpilled
	begin := len(t.refs)
	t.refs = append(append(t.refs, refs[0]...), refs[1]...)
	s.refs[0] = ref{uint64(begin), uint32(begin + len(refs[0]))}
	s.refs[1] = ref{uint64(len(t.refs)), 0}
}

// wanted is an ID that is to be found. The search for two of them begins with
// both, so that their lines of memory are waited for at once.
type wanted struct {
	id   string // without its scheme; empty: nobody
	hash uint64
	tag  uint32 // of the first slot
}

func (t *names) want(p *Peer) wanted {
	id := p.ID.String()
	if p.Unauthenticated || len(id) < len(scheme) {
		return wanted{}
	}
	w := wanted{id: id[len(scheme):]}
	w.hash = maphash.String(t.seed, w.id)
	w.tag = t.slots[w.hash&uint64(len(t.slots)-1)].tag
	return w
}

// find returns nil for an ID that is not stored.
func (t *names) find(w *wanted) *nameSlot {
	tag := uint32(w.hash>>32) &^ flagBits
	for i, have := w.hash, w.tag; have != 0; {
		if have&^flagBits == tag {
			if s := &t.slots[i&uint64(len(t.slots)-1)]; t.holds(s, w.id) {
				return s
			}
		}
		i++
		have = t.slots[i&uint64(len(t.slots)-1)].tag
	}
	return nil
}

// holds reports whether a slot is that of an ID, without its scheme.
func (t *names) holds(s *nameSlot, id string) bool {
	if s.size <= slotID {
		return string(s.id[:s.size]) == id
	}
	return t.long[binary.NativeEndian.Uint32(s.id[:])] == id
}

// of returns the refs of a slot on one side.
func (t *names) of(s *nameSlot, where side) []ref {
	switch {
	case s.tag&flagSpilled == 0 && where == sideFrom:
		return s.refs[:s.n[0]]
	case s.tag&flagSpilled == 0:
		return s.refs[s.n[0] : s.n[0]+s.n[1]]
	case where == sideFrom:
		return t.refs[s.refs[0].mask:s.refs[0].atom]
	}
	return t.refs[s.refs[0].atom:s.refs[1].mask]
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
