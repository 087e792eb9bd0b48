package main

import "testing"

func TestWithFIPS(t *testing.T) {
	for have, want := range map[string]string{
		"":                              "fips140=on",
		"fips140=off":                   "fips140=on",
		"madvdontneed=1":                "madvdontneed=1,fips140=on",
		"a=1,fips140=off,b=2,fips140=x": "a=1,b=2,fips140=on",
	} {
		if got := withFIPS(have); got != want {
			t.Errorf("%q: %q, want %q", have, got, want)
		}
	}
}
