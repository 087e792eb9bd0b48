package policy

import "slices"

// rule is one rule as it was read, in the form the plain evaluator asks.
type rule struct {
	id       string
	allow    bool
	shadow   bool
	at       directions
	on       []string // sorted; none: every listener
	from, to subjects
	more     *conditions // nil: none
	place    place
}

// directions is a set of Directions.
type directions uint8

const bothEnds = directions(1<<Inbound | 1<<Outbound)

func (d directions) has(one Direction) bool { return one <= Outbound && d&(1<<one) != 0 }

// member is a pattern that stands in a policy, once however often it is named.
type member struct {
	Pattern
	number uint32 // among those of the policy
}

// group is a named list of patterns.
type group struct {
	name     string
	patterns []*member
	place    place

	uses   int     // sides of rules that name it, and lists of subjects
	lookup *lookup // where a list of subjects names it
}

// subjects is one side of a rule.
type subjects struct {
	given           bool // the key is there; without it any peer matches
	unauthenticated bool
	patterns        []*member
	groups          []*group
}

func (s *subjects) match(p *Peer) bool {
	if !s.given {
		return true
	}
	if !p.Authenticated() {
		return p.Unauthenticated && s.unauthenticated
	}
	if matchAny(s.patterns, p) {
		return true
	}
	for _, g := range s.groups {
		if matchAny(g.patterns, p) {
			return true
		}
	}
	return false
}

func matchAny(patterns []*member, p *Peer) bool {
	for i := range patterns {
		if patterns[i].Match(p.ID) {
			return true
		}
	}
	return false
}

// condition names the conditions of a rule, in the order they are asked.
type condition uint8

const (
	met condition = iota
	condOn
	condAt
	condFrom
	condTo
)

// missesEnds returns the first condition on listener and identities that the
// request does not meet; met if there is none. It allocates nothing.
func (r *rule) missesEnds(q *Request) condition {
	switch {
	case len(r.on) > 0 && !slices.Contains(r.on, q.Listener):
		return condOn
	case !r.at.has(q.Direction):
		return condAt
	case !r.from.match(&q.From):
		return condFrom
	case !r.to.match(&q.To):
		return condTo
	}
	return met
}

// meets reports whether the conditions beside on, at, from and to hold: yes, no,
// or unproven. Where HTTP is not visible, or whom a request speaks for, a deny
// takes what it asks of it for granted, and so does an allow at the outbound end:
// the inbound end asks again, and sees it.
func (r *rule) meets(q *Request, byPath bool) answer {
	if r.more == nil {
		return certain(!r.allow || q.proof(q.HTTP) != proofOfAnother)
	}
	a := r.more.ask(q, q.HTTP, r.allow, byPath)
	if a == open {
		a = certain(r.grants(q.Direction))
	}
	return a
}

// grants reports whether the rule takes for granted what it asks of HTTP that
// is not visible, and of a subject that is not.
func (r *rule) grants(d Direction) bool { return !r.allow || d == Outbound }

// revocation takes an identity, or one certificate, out of use.
type revocation struct {
	pattern        *member // nil: a certificate
	issuer, serial string  // normalised
	place          place
}

// ceiling bounds the IDs of one trust domain.
type ceiling struct {
	domain   string
	patterns []*member
	place    place
}

// hit is the smallest rule of either effect that matched, as an index into the
// rules, which are sorted by id.
type hit struct{ deny, allow uint32 }

// none is the index of no rule.
const none = ^uint32(0)

// scan asks every rule. It is the way out for a request that more patterns
// match than the index keeps room for. A group is asked once, however many
// rules name it: so the time grows with the text of a policy, not with its
// square.
func (s *search) scan() {
	from, to := scanned{peer: &s.q.From}, scanned{peer: &s.q.To}
	for i := range s.p.rules {
		r := &s.p.rules[i]
		switch {
		case !r.shadow && !s.survey && !s.wants(r.allow, uint32(i)),
			len(r.on) > 0 && !slices.Contains(r.on, s.q.Listener),
			!from.match(&r.from), !to.match(&r.to):
		case r.more != nil || r.shadow:
			s.try(uint32(i), false)
		case r.allow && s.another:
		case r.at.has(s.q.Direction): // the only one that has no check, where no other rule has
			s.found(uint32(i), r)
		}
	}
}

// fewPatterns is up to how many patterns of a group are asked again and again.
const fewPatterns = 16

// scanned is one peer of a scan, and which of the larger groups it is in.
type scanned struct {
	peer   *Peer
	groups map[*group]bool
}

func (p *scanned) match(s *subjects) bool {
	if len(s.groups) == 0 || !p.peer.Authenticated() {
		return s.match(p.peer)
	}
	if matchAny(s.patterns, p.peer) {
		return true
	}
	for _, g := range s.groups {
		if p.in(g) {
			return true
		}
	}
	return false
}

func (p *scanned) in(g *group) bool {
	if len(g.patterns) <= fewPatterns {
		return matchAny(g.patterns, p.peer)
	}
	in, known := p.groups[g]
	if !known {
		in = matchAny(g.patterns, p.peer)
		if p.groups == nil {
			p.groups = map[*group]bool{}
		}
		p.groups[g] = in
	}
	return in
}
