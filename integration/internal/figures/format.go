package figures

import (
	"fmt"
	"math"
	"strconv"
)

// Times prints a ratio with two digits that mean something.
func Times(ratio float64) string {
	if ratio > 0 && ratio < 0.1 {
		return strconv.FormatFloat(ratio, 'f', 1-int(math.Floor(math.Log10(ratio))), 64) + "×"
	}
	return fmt.Sprintf("%.2f×", ratio)
}

// Number prints a value with three digits that mean something.
func Number(v float64) string {
	switch {
	case math.IsNaN(v):
		return "–"
	case v >= 10_000:
		return thousands(fmt.Sprintf("%.0f", v))
	case math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// thousands parts the digits of a whole number.
func thousands(digits string) string {
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// Missed by no more than this part, a target counts as nearly met.
const nearly = 0.2

// Verdict says whether a value reaches its bound, which it is not to exceed
// or, where more is better, to fall short of.
func Verdict(got, bound float64, higher bool) string {
	excess := got / bound
	if higher {
		excess = bound / got
	}
	switch {
	case math.IsNaN(excess):
		return "not measured"
	case excess <= 1:
		return "met"
	case excess <= 1+nearly:
		return "nearly"
	}
	return "missed"
}
