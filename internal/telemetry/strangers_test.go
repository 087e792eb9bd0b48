package telemetry

import (
	"strings"
	"testing"
	"time"
)

func TestTidy(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"as it is: “words”":        "as it is: “words”",
		"a\nb\x1b[31m\u2028\xff":   "a\uFFFDb\uFFFD[31m\uFFFD\uFFFD",
		strings.Repeat("é", 10000): strings.Repeat("é", MaxReason/2) + "…",
	} {
		if got := Tidy(text); got != want {
			t.Errorf("%.40q: %q, want %q", text, got, want)
		}
	}
}

func TestLogLimit(t *testing.T) {
	t.Parallel()
	var limit LogLimit
	now := time.Now()
	passed := 0
	for range 100 {
		if ok, _ := limit.Allow(now); ok {
			passed++
		}
	}
	if passed != logBurst {
		t.Errorf("%d lines in a burst, want %d", passed, logBurst)
	}
	if ok, missed := limit.Allow(now.Add(time.Second)); !ok || missed != 100-logBurst {
		t.Errorf("a second later: %v, %d left out", ok, missed)
	}
}
