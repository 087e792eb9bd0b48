package spire

import (
	"hash/maphash"

	"github.com/narthex-id/narthex/agent/registry"
)

// knownEntries finds entries by id, in a table that is made once for as long as
// they stay the same: an agent with thousands of entries is told the revision
// of each every few seconds, and mostly nothing has changed. It is never
// modified.
type knownEntries struct {
	list []registry.Entry
	seed maphash.Seed
	// slots has the places in list, counted from one, at the hash of their ids
	// or behind it. Zero is free; at least half of them are.
	slots []uint32
}

func newKnownEntries(list []registry.Entry) *knownEntries {
	size := 2
	for size < 2*len(list) {
		size *= 2
	}
	k := &knownEntries{list: list, seed: maphash.MakeSeed(), slots: make([]uint32, size)}
	for i := range list {
		if slot, at := k.look(list[i].ID); at < 0 { // of two with one id the first counts
			k.slots[slot] = uint32(i + 1)
		}
	}
	return k
}

// isOf reports whether these are the entries of list, the same memory.
func (k *knownEntries) isOf(list []registry.Entry) bool {
	return k != nil && len(k.list) == len(list) && (len(list) == 0 || &k.list[0] == &list[0])
}

// find returns the place of the entry with this id, or -1.
func (k *knownEntries) find(id string) int {
	_, at := k.look(id)
	return at
}

// look returns as well the slot in which the id is, or would be.
func (k *knownEntries) look(id string) (slot uint64, at int) {
	mask := uint64(len(k.slots) - 1)
	for slot = maphash.String(k.seed, id) & mask; k.slots[slot] > 0; slot = (slot + 1) & mask {
		if at = int(k.slots[slot]) - 1; k.list[at].ID == id {
			return slot, at
		}
	}
	return slot, -1
}
