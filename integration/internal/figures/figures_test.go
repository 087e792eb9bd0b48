package figures

import (
	"math"
	"slices"
	"testing"
)

func TestSeries(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		name              string
		values            Series
		median, low, high float64
	}{
		{"none", nil, nan, nan, nan},
		{"one", Series{3}, 3, 3, 3},
		{"odd", Series{9, 1, 5}, 5, 1, 9},
		{"even", Series{4, 1, 3, 2}, 2.5, 1, 4},
		{"a round is missing", Series{nan, 1, 3}, 2, 1, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := slices.Clone(c.values)
			low, high := c.values.Spread()
			if got := c.values.Median(); !same(got, c.median) || !same(low, c.low) || !same(high, c.high) {
				t.Errorf("median %v, spread %v–%v; want %v, %v–%v", got, low, high, c.median, c.low, c.high)
			}
			if !slices.EqualFunc(before, c.values, same) {
				t.Errorf("the values were reordered: %v", c.values)
			}
		})
	}
}

func same(a, b float64) bool { return a == b || math.IsNaN(a) && math.IsNaN(b) }

// The ratio is that of each round, not of the medians: the second round here
// was three times as slow for both.
func TestRatioIsByRound(t *testing.T) {
	ours, theirs := Series{1, 3, 1.2}, Series{2, 6, 2.4}
	if got := ours.Over(theirs); !slices.Equal(got, Series{0.5, 0.5, 0.5}) {
		t.Errorf("ratios %v", got)
	}
	if got := (Series{1, 2}).Over(Series{0, 4}); !slices.Equal(got, Series{0.5}) {
		t.Errorf("a zero was not passed over: %v", got)
	}
}

func TestQuantile(t *testing.T) {
	for _, c := range []struct{ q, want float64 }{{0, 1}, {0.5, 3}, {0.99, 5}, {1, 5}} {
		if got := Quantile([]float64{5, 1, 4, 2, 3}, c.q); got != c.want {
			t.Errorf("quantile %v is %v, want %v", c.q, got, c.want)
		}
	}
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		got, want string
	}{
		{Number(0), "0.00"},
		{Number(1.234), "1.23"},
		{Number(12.34), "12.3"},
		{Number(1234), "1234"},
		{Number(12345), "12,345"},
		{Number(123456789), "123,456,789"},
		{Times(0), "0.00×"},
		{Times(2.345), "2.35×"},
		{Times(0.123), "0.12×"},
		{Times(0.0456), "0.046×"},
		{Times(0.00001234), "0.000012×"},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
}
