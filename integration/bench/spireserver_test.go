package main

import (
	"strings"
	"testing"
)

func TestSumOf(t *testing.T) {
	for _, c := range []struct {
		text string
		want int
		bad  bool
	}{
		{"", 0, false},
		{"# TYPE signed counter\nsigned 3\n", 3, false},
		{"signed{host=\"a b\",status=\"OK\"} 3\nsigned{host=\"c\"} 1e3\n", 1003, false},
		{"signed_elapsed_time{quantile=\"0.5\"} 7\nunsigned 7\nsigned 1\n", 1, false},
		{"signed{a=\"b\"} many\n", 0, true},
	} {
		got, err := sumOf(strings.NewReader(c.text), "signed")
		if got != c.want || (err != nil) != c.bad {
			t.Errorf("%q: %d, %v; want %d", c.text, got, err, c.want)
		}
	}
}
