package main

import (
	"math"
	"slices"
)

// series are the values of one side in one row, one for each round. A round
// in which a side was not measured holds NaN.
type series []float64

// median returns the middle value, the mean of both where there are two. It
// is NaN for no values.
func (s series) median() float64 {
	v := s.sorted()
	if len(v) == 0 {
		return math.NaN()
	}
	if len(v)%2 == 1 {
		return v[len(v)/2]
	}
	return (v[len(v)/2-1] + v[len(v)/2]) / 2
}

// spread returns the smallest and the largest value.
func (s series) spread() (low, high float64) {
	v := s.sorted()
	if len(v) == 0 {
		return math.NaN(), math.NaN()
	}
	return v[0], v[len(v)-1]
}

func (s series) sorted() []float64 {
	v := slices.DeleteFunc(slices.Clone(s), math.IsNaN)
	slices.Sort(v)
	return v
}

// over divides two series round by round. What slows the machine for a while
// slows both sides of a round, so the ratios scatter less than the values.
func (s series) over(other series) series {
	ratios := make(series, 0, len(s))
	for i := range min(len(s), len(other)) {
		if other[i] != 0 {
			ratios = append(ratios, s[i]/other[i])
		}
	}
	return ratios
}

// quantile returns the value below which the part q of v lies, 0 ≤ q ≤ 1. It
// sorts v.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return v[min(len(v)-1, int(q*float64(len(v))))]
}
