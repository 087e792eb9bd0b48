package spire

import (
	"hash/maphash"
	"math/bits"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/narthex-id/narthex/agent/registry"
)

// knownEntries recognizes the revisions of entries by the bytes in which a
// server writes them, in a table that is made once for as long as the entries
// stay the same: an agent with thousands of them is told the revision of each
// every few seconds, and mostly nothing has changed. To look at the entries
// themselves, which lie all over the memory, would take most of that time.
// It is never modified.
type knownEntries struct {
	list []registry.Entry
	seed maphash.Seed
	// slots has the hash of each entry's revision at the place that the hash
	// says, or behind it. Zero is free; a third of them are. With 64 bits, of
	// which nobody outside knows how they come about, the chance that a changed
	// entry is taken for one that has not is less than one in 2⁴⁰ even in a
	// table of 250,000.
	slots []uint64
}

func newKnownEntries(list []registry.Entry) *knownEntries {
	k := &knownEntries{list: list, seed: maphash.MakeSeed(), slots: make([]uint64, len(list)+len(list)/2+1)}
	var record []byte
	for i := range list {
		record = appendRevision(record[:0], &list[i])
		h := k.hash(record)
		at := k.place(h)
		for k.slots[at] != 0 {
			at = k.after(at)
		}
		k.slots[at] = h
	}
	return k
}

// appendRevision appends e's EntryRevision as protobuf encodes it: the fields
// by number, without those that are zero.
func appendRevision(b []byte, e *registry.Entry) []byte {
	b = protowire.AppendTag(b, fieldID, protowire.BytesType)
	b = protowire.AppendString(b, e.ID)
	if e.Revision != 0 {
		b = protowire.AppendTag(b, fieldRevisionNumber, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(e.Revision))
	}
	if created := toUnix(e.CreatedAt); created != 0 {
		b = protowire.AppendTag(b, fieldCreatedAt, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(created))
	}
	return b
}

// isOf reports whether these are the entries of list, the same memory.
func (k *knownEntries) isOf(list []registry.Entry) bool {
	return k != nil && len(k.list) == len(list) && (len(list) == 0 || &k.list[0] == &list[0])
}

// find returns the slot of an EntryRevision, or -1 if it is of no known entry or
// of another version of it. Seen has which slots were found before, and again
// says that this one was.
func (k *knownEntries) find(record []byte, seen []bool) (slot int, again bool) {
	h := k.hash(record)
	slot = -1
	for at := k.place(h); k.slots[at] != 0; at = k.after(at) {
		if k.slots[at] != h {
			continue
		}
		slot = at
		if !seen[at] {
			return slot, false
		}
	}
	return slot, slot >= 0
}

// hash is never zero.
func (k *knownEntries) hash(record []byte) uint64 { return max(1, maphash.Bytes(k.seed, record)) }

func (k *knownEntries) place(hash uint64) int {
	at, _ := bits.Mul64(hash, uint64(len(k.slots)))
	return int(at)
}

func (k *knownEntries) after(slot int) int {
	if slot++; slot == len(k.slots) {
		return 0
	}
	return slot
}
