package policy

import (
	"fmt"
	"strings"
	"testing"
)

func TestLimitListeners(t *testing.T) {
	t.Parallel()
	p, err := parseAll("version: 1\nlimits:\n- {id: b, rps: 1, on: [y, x]}\n- {id: all, rps: 1}\n- {id: a, rps: 1, on: [x]}\n")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range p.LimitListeners() {
		got = append(got, fmt.Sprintf("%s on %s at %d:%d", m.Rule, m.Listener, m.Line, m.Column))
	}
	if want := "a on x at 5:4; b on x at 3:4; b on y at 3:4"; strings.Join(got, "; ") != want {
		t.Errorf("got %s", strings.Join(got, "; "))
	}
	if (*Policy)(nil).LimitListeners() != nil {
		t.Error("no policy has limits")
	}
}
