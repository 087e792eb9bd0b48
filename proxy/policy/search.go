package policy

import "slices"

// search is one request on its way through the index.
type search struct {
	p   *Policy
	q   *Request
	hit hit

	method   uint32     // its bit; 0: not looked at yet
	shadows  [2]shadows // denies, allows
	survey   bool       // for Admit: nothing is known of HTTP
	openDeny bool       // of a survey: a deny that depends on HTTP
	mayAllow bool       // and an allow
	another  bool       // it speaks for another: allows that do not name whom are out
	unproven bool       // an allow that a JWT-SVID could make match
}

// mostPairs is how many pairs of atoms are looked at, and one more for each
// rule, before all rules are asked instead: two identities may each be in
// thousands of groups.
const mostPairs = 1 << 16

// maxShadows is how many shadow rules of either effect an answer names.
const maxShadows = 8

// shadows are the smallest shadow rules that matched, sorted.
type shadows struct {
	n     int
	rules [maxShadows]uint32
}

func (s *shadows) add(number uint32) {
	list := s.rules[:s.n]
	at, dup := slices.BinarySearch(list, number)
	if dup || at == maxShadows {
		return
	}
	if s.n < maxShadows {
		s.n++
	}
	copy(s.rules[at+1:s.n], s.rules[at:])
	s.rules[at] = number
}

// wants reports whether the answer could become another one by a rule.
func (s *search) wants(allow bool, number uint32) bool {
	if allow {
		return number < s.hit.allow
	}
	return number < s.hit.deny
}

// found takes in a rule that matched.
func (s *search) found(number uint32, r *rule) {
	switch {
	case r.shadow && r.allow:
		s.shadows[1].add(number)
	case r.shadow:
		s.shadows[0].add(number)
	default:
		s.hits(number, r.allow)
	}
}

func (s *search) hits(number uint32, allow bool) {
	if allow {
		s.hit.allow = min(s.hit.allow, number)
	} else {
		s.hit.deny = min(s.hit.deny, number)
	}
}

// try asks the conditions of one rule whose identities and listener are met.
func (s *search) try(number uint32, byPath bool) bool {
	c := &s.p.index.checks[number]
	if !c.at.has(s.q.Direction) {
		return false
	}
	if c.kind == knowsHTTP && s.q.HTTP != nil && !s.survey {
		if s.method == 0 {
			s.method = methodBit(s.q.HTTP.Method)
		}
		if c.allow && s.another || !c.match(s.method, s.q.HTTP.Path, byPath) {
			return false
		}
		s.hits(number, c.allow)
		return true
	}
	r := &s.p.rules[number]
	if s.survey {
		s.surveyRule(number, r)
		return false
	}
	switch r.meets(s.q, byPath) {
	case yes:
		s.found(number, r)
		return true
	case unproven:
		s.unproven = s.unproven || !r.shadow
	}
	return false
}

// surveyRule takes in what a rule may mean for requests that are to come.
func (s *search) surveyRule(number uint32, r *rule) {
	if r.shadow {
		return
	}
	a := yes
	if r.more != nil {
		a = r.more.ask(s.q, nil, r.allow, false)
	}
	switch {
	case a == yes:
		s.found(number, r)
	case a == open && r.allow:
		s.mayAllow = true
	case a == open:
		s.openDeny = true
	}
}

// run finds all that matches: rules without further conditions by the index
// alone, the others in the buckets it leads to.
func (s *search) run(from, to *identity) {
	s.hit = hit{none, none}
	switch {
	case s.q.Direction > Outbound:
	case from.overflow || to.overflow, from.refCount(sideFrom)*to.refCount(sideTo) > mostPairs+len(s.p.rules):
		s.scan()
	default:
		s.p.index.search(s, from, to)
	}
}

// name copies the ids of the shadow rules that would have decided otherwise.
func (s *search) name(d *Decision) {
	var would *shadows
	switch d.Reason {
	case AllowRule:
		would = &s.shadows[0]
	case NoRule:
		would = &s.shadows[1]
	default:
		return
	}
	for _, number := range would.rules[:would.n] {
		d.Shadow = append(d.Shadow, s.p.index.ids[number])
	}
}
