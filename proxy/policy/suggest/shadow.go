package suggest

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/narthex-id/narthex/internal/telemetry"
)

// ShadowRule is what a shadow rule would have done to the records that name
// it. A record names eight at most.
type ShadowRule struct {
	ID      string
	Allowed int // records of what was refused, or would be if its listener did more than audit
	Denied  int // of what was allowed
	Last    time.Time
}

// ShadowRules returns the shadow rules that records name, those that would have
// decided most first; false if there were more than are kept.
func (s *Sightings) ShadowRules() (rules []ShadowRule, complete bool) {
	for _, id := range slices.Sorted(maps.Keys(s.shadows)) {
		rules = append(rules, *s.shadows[id])
	}
	slices.SortStableFunc(rules, func(a, b ShadowRule) int {
		return cmp.Or(cmp.Compare(b.Allowed+b.Denied, a.Allowed+a.Denied), strings.Compare(a.ID, b.ID))
	})
	return rules, len(rules) < maxShadows
}

func (s *Sightings) addShadows(a *telemetry.Access) {
	for _, id := range a.Shadow {
		r := s.shadows[id]
		if r == nil {
			if len(s.shadows) == maxShadows {
				continue
			}
			r = &ShadowRule{ID: id}
			s.shadows[id] = r
		}
		if a.Decision == allowed {
			r.Denied++
		} else {
			r.Allowed++
		}
		if a.Time.After(r.Last) {
			r.Last = a.Time
		}
	}
}
