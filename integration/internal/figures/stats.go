// Package figures is what the benchmarks agree on: what becomes of the values
// that were measured, how they are printed, and on what machine it was.
package figures

import (
	"math"
	"slices"
)

// Series are the values of one side in one row, one for each round. A round
// in which a side was not measured holds NaN.
type Series []float64

// Median returns the middle value, the mean of both where there are two. It
// is NaN for no values.
func (s Series) Median() float64 {
	v := s.sorted()
	if len(v) == 0 {
		return math.NaN()
	}
	if len(v)%2 == 1 {
		return v[len(v)/2]
	}
	return (v[len(v)/2-1] + v[len(v)/2]) / 2
}

// Spread returns the smallest and the largest value.
func (s Series) Spread() (low, high float64) {
	v := s.sorted()
	if len(v) == 0 {
		return math.NaN(), math.NaN()
	}
	return v[0], v[len(v)-1]
}

func (s Series) sorted() []float64 {
	v := slices.DeleteFunc(slices.Clone(s), math.IsNaN)
	slices.Sort(v)
	return v
}

// Over divides two series round by round. What slows the machine for a while
// slows both sides of a round, so the ratios scatter less than the values.
func (s Series) Over(other Series) Series {
	ratios := make(Series, 0, len(s))
	for i := range min(len(s), len(other)) {
		if other[i] != 0 {
			ratios = append(ratios, s[i]/other[i])
		}
	}
	return ratios
}

// Quantile returns the value below which the part q of v lies, 0 ≤ q ≤ 1. It
// sorts v.
func Quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return v[min(len(v)-1, int(q*float64(len(v))))]
}
