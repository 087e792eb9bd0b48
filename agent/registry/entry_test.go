package registry

import (
	"testing"

	"github.com/narthex-id/narthex/attestor"
)

func TestSameSelectors(t *testing.T) {
	many := func(n int) []attestor.Selector {
		var s []attestor.Selector
		for i := range n {
			s = append(s, selectors(string(rune('a'+i)))...)
		}
		return s
	}
	reverse := func(s []attestor.Selector) []attestor.Selector {
		var r []attestor.Selector
		for i := range s {
			r = append(r, s[len(s)-1-i])
		}
		return r
	}
	for _, tt := range []struct {
		name      string
		normal, s []attestor.Selector
		want      bool
	}{
		{"none", nil, nil, true},
		{"the same", selectors("a", "b"), selectors("a", "b"), true},
		{"another order", selectors("a", "b", "c"), selectors("c", "a", "b"), true},
		{"one twice", selectors("a", "b"), selectors("b", "a", "b"), true},
		{"one twice for another", selectors("a", "b"), selectors("a", "a"), false},
		{"one less", selectors("a", "b"), selectors("a"), false},
		{"one more", selectors("a"), selectors("a", "b"), false},
		{"another", selectors("a", "b"), selectors("a", "c"), false},
		{"another type", selectors("a"), []attestor.Selector{{Type: "k8s", Value: "a"}}, false},
		{"64", many(64), reverse(many(64)), true},
		{"65", many(65), reverse(many(65)), true},
		{"65, one another", many(65), reverse(append(many(64), selectors("z~")...)), false},
	} {
		if got := sameSelectors(normalise(tt.normal), tt.s); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}
