package policy

import (
	"fmt"
	"strings"
)

// Explanation is a decision and how it came about.
type Explanation struct {
	Decision Decision
	Detail   string     // one sentence: what decided, with the values it saw
	Rules    []RuleNote // every rule, by id
}

// RuleNote says of one rule whether it matched.
type RuleNote struct {
	ID           string
	Allow        bool // its effect
	File         string
	Line, Column int
	Matched      bool
	Condition    string // the first key that did not match: on, at, from or to
	Why          string // what it wants and what the request has
}

// Explain decides the request and says why, rule by rule. It asks each rule in
// turn, so it takes time in proportion to their number; it is for people and
// tests.
func (p *Policy) Explain(r *Request) Explanation {
	var e Explanation
	p.Decide(r, &e.Decision)
	if p == nil {
		e.Detail = e.Decision.Reason.String()
		return e
	}
	e.Rules = make([]RuleNote, len(p.rules))
	for i := range p.rules {
		e.Rules[i] = p.rules[i].note(r)
	}
	e.Detail = p.detail(r, &e.Decision)
	return e
}

func (p *Policy) detail(r *Request, d *Decision) string {
	switch d.Reason {
	case RevokedFrom:
		return p.revokedDetail("from", &r.From)
	case RevokedTo:
		return p.revokedDetail("to", &r.To)
	case Ceiling:
		return p.ceilingDetail(r)
	case DenyRule, AllowRule:
		for i := range p.rules {
			if p.rules[i].id == d.Rule {
				return fmt.Sprintf("%s %q (%s)", d.Reason, d.Rule, p.rules[i].place)
			}
		}
	}
	return fmt.Sprintf("%s: from %s to %s, %s on %q", d.Reason, r.From.describe(), r.To.describe(), r.Direction, r.Listener)
}

func (p *Policy) revokedDetail(key string, peer *Peer) string {
	for i := range p.revoked {
		if v := &p.revoked[i]; v.serial == "" && v.pattern.Match(peer.ID) {
			return fmt.Sprintf("%s %s is revoked by %s (%s)", key, peer.describe(), v.pattern, v.place)
		}
	}
	if v := p.index.serials.find(peer); v != nil {
		return fmt.Sprintf("%s %s: its certificate %s of authority %s is revoked (%s)", key, peer.describe(), v.serial, v.issuer, v.place)
	}
	return fmt.Sprintf("%s %s is revoked", key, peer.describe())
}

func (p *Policy) ceilingDetail(r *Request) string {
	key, peer := "from", &r.From
	for {
		c := p.ceilings[peer.ID.TrustDomain().Name()]
		if c != nil && !matchAny(c.patterns, peer) {
			paths := make([]string, len(c.patterns))
			for i, pattern := range c.patterns {
				paths[i] = pattern.text[pattern.path:]
			}
			return fmt.Sprintf("%s %s is outside the ceiling of %s: %s (%s)", key, peer.describe(), c.domain, some(paths), c.place)
		}
		if key == "to" {
			return Ceiling.String()
		}
		key, peer = "to", &r.To
	}
}

func (p *Peer) describe() string {
	switch {
	case p.Unauthenticated:
		return Unauthenticated
	case p.ID.IsZero():
		return "nobody"
	}
	return p.ID.String()
}

func (r *rule) note(q *Request) RuleNote {
	n := RuleNote{ID: r.id, Allow: r.allow, File: r.place.file, Line: r.place.line, Column: r.place.column}
	missed := r.misses(q)
	n.Matched, n.Condition = missed == met, conditionKeys[missed]
	switch missed {
	case condOn:
		n.Why = fmt.Sprintf("wants listener %s, not %q", some(r.on), q.Listener)
	case condAt:
		n.Why = fmt.Sprintf("is for the other end, not %s", q.Direction)
	case condFrom:
		n.Why = fmt.Sprintf("wants %s, not %s", r.from.describe(), q.From.describe())
	case condTo:
		n.Why = fmt.Sprintf("wants %s, not %s", r.to.describe(), q.To.describe())
	}
	return n
}

func (s *subjects) describe() string {
	var words []string
	if s.unauthenticated {
		words = append(words, Unauthenticated)
	}
	for _, p := range s.patterns {
		words = append(words, p.text)
	}
	for _, g := range s.groups {
		words = append(words, groupPrefix+g.name)
	}
	return some(words)
}

// some lists the first few words.
func some(words []string) string {
	const most = 5
	if len(words) > most {
		return fmt.Sprintf("%s or %d more", strings.Join(words[:most], ", "), len(words)-most)
	}
	return strings.Join(words, " or ")
}
