package main

import (
	"math"
	"testing"
)

func TestMaxConnections(t *testing.T) {
	for _, tt := range []struct {
		asked int
		files uint64
		want  int
	}{
		{0, 1024, 448},
		{0, 65536, 32256},
		{0, 256, 96},
		{0, 20, 1},
		{0, 0, 1},
		{0, math.MaxUint64, math.MaxInt32 / 2},
		{5000, 1024, 5000},
	} {
		if got := maxConnections(tt.asked, tt.files); got != tt.want {
			t.Errorf("%d asked, %d files: %d, want %d", tt.asked, tt.files, got, tt.want)
		}
	}
}
