package spire

import (
	"fmt"
	"testing"

	"github.com/narthex-id/narthex/agent/registry"
)

func TestKnownEntries(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 2, 3, 1000} {
		list := make([]registry.Entry, n)
		for i := range list {
			list[i].ID = fmt.Sprint("entry-", i)
		}
		k := newKnownEntries(list)
		for i := range list {
			if at := k.find(list[i].ID); at != i {
				t.Errorf("of %d: %q is at %d, want %d", n, list[i].ID, at, i)
			}
		}
		for _, id := range []string{"", "entry", fmt.Sprint("entry-", n)} {
			if at := k.find(id); at != -1 {
				t.Errorf("of %d: %q is at %d", n, id, at)
			}
		}
		if !k.isOf(list) || k.isOf(make([]registry.Entry, n+1)) || n > 0 && k.isOf(make([]registry.Entry, n)) {
			t.Errorf("of %d: it does not know whose it is", n)
		}
	}
	if (*knownEntries)(nil).isOf(nil) {
		t.Error("none is of something")
	}
	if at := newKnownEntries([]registry.Entry{{ID: "a"}, {ID: "a"}}).find("a"); at != 0 {
		t.Errorf("of two with one id there is %d", at)
	}
}
