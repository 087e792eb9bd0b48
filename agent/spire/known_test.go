package spire

import (
	"bytes"
	"testing"

	"github.com/narthex-id/narthex/agent/registry"
)

func TestKnownEntries(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 2, 3, 1000} {
		list := knownOf(t, n)
		k := newKnownEntries(list)
		seen := make([]bool, len(k.slots))
		for i := range list {
			record := encode(t, revisionOf(&list[i]))
			slot, again := k.find(record, seen)
			if slot < 0 || again || seen[slot] {
				t.Fatalf("of %d: entry %d is at %d, again: %t", n, i, slot, again)
			}
			seen[slot] = true
			if at, again := k.find(record, seen); at != slot || !again {
				t.Errorf("of %d: entry %d is at %d the second time, want %d", n, i, at, slot)
			}
		}
		other := revisionOf(&knownOf(t, n+1)[n])
		for what, record := range map[string][]byte{"nothing": nil, "another entry": encode(t, other)} {
			if slot, _ := k.find(record, seen); slot >= 0 {
				t.Errorf("of %d: %s is at %d", n, what, slot)
			}
		}
		if !k.isOf(list) || k.isOf(make([]registry.Entry, n+1)) || n > 0 && k.isOf(make([]registry.Entry, n)) {
			t.Errorf("of %d: it does not know whose it is", n)
		}
	}
	if (*knownEntries)(nil).isOf(nil) {
		t.Error("none is of something")
	}
}

func TestAppendRevision(t *testing.T) {
	t.Parallel()
	e := knownOf(t, 1)[0]
	for _, change := range []func(){
		func() {},
		func() { e.Revision = 1 << 40 },
		func() { e.Revision = 0 },
		func() { e.CreatedAt, _ = fromUnix(0) },
		func() { e.CreatedAt, _ = fromUnix(maxUnixTime) },
	} {
		change()
		if got, want := appendRevision(nil, &e), encode(t, revisionOf(&e)); !bytes.Equal(got, want) {
			t.Errorf("%v: got %x, want %x", revisionOf(&e), got, want)
		}
	}
}
