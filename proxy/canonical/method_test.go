package canonical

import (
	"strings"
	"testing"
)

func TestMethod(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in  string
		why Reason
	}{
		{"GET", none},
		{"M-SEARCH", none},
		{strings.Repeat("A", MaxMethod), none},
		{strings.Repeat("A", MaxMethod+1), TooLong},
		{"", Empty},
		{"get", LowerCase},
		{"GEt", LowerCase},
		{"G T", NotToken},
		{"GET\x00", NotToken},
		{"GET:", NotToken},
		{"GÉT", NotToken},
	} {
		got, err := Method(c.in)
		if want := c.in; reasonOf(t, err) != c.why || err == nil && got != want {
			t.Errorf("%q: %q, %v; want %v", c.in, got, err, c.why)
		}
	}
}
