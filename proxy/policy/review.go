package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Remark is something in a policy that loads, and that its author hardly
// meant.
type Remark struct {
	Kind         string // one of RemarkKinds
	Rule         string // or group
	File         string
	Line, Column int
	Msg          string

	// Other is the rule, revocation or ceiling that it is about too; its File is
	// empty where there is none.
	Other struct {
		What         string
		File         string
		Line, Column int
	}
}

// RemarkKinds are the kinds of remarks, each with what it means.
var RemarkKinds = map[string]string{
	"unreachable-rule": "an allow that can never decide: a deny, a revocation or a ceiling covers all of it",
	"duplicate-rule":   "two rules that say the same",
	"unused-group":     "a group that no rule and no limit names",
	"test-listener":    "a test asks at a listener that no rule and no limit names",
	"unusual-method":   "a method that HTTP does not have",
	"incomplete":       "a policy too large to compare all of its rules",
}

// maxComparisons bounds how many pairs of patterns are compared: a few seconds.
const maxComparisons = 100_000_000

// Review looks for rules that contradict each other or can never decide, for
// duplicates, and for groups that nobody names. Remarks come by file, line and
// column.
func (p *Policy) Review() []Remark {
	if p == nil {
		return nil
	}
	v := reviewer{p: p, left: maxComparisons}
	v.groups()
	v.tests()
	v.methods()
	v.duplicates()
	v.unreachable()
	slices.SortStableFunc(v.remarks, func(a, b Remark) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return v.remarks
}

type reviewer struct {
	p       *Policy
	left    int
	remarks []Remark
}

func (v *reviewer) add(kind, name string, at place, what string, other place, format string, args ...any) {
	r := Remark{Kind: kind, Rule: name, File: at.file, Line: at.line, Column: at.column, Msg: fmt.Sprintf(format, args...)}
	r.Other.What, r.Other.File, r.Other.Line, r.Other.Column = what, other.file, other.line, other.column
	v.remarks = append(v.remarks, r)
}

func (v *reviewer) groups() {
	for _, g := range v.p.groups {
		if g.uses == 0 {
			v.add("unused-group", g.name, g.place, "", place{}, "group %q: no rule and no limit names it", g.name)
		}
	}
}

// tests finds those that ask at a listener nobody speaks of: a slip, for which
// every denial is right.
func (v *reviewer) tests() {
	names := map[string]bool{"": true}
	for i := range v.p.rules {
		for _, on := range v.p.rules[i].on {
			names[on] = true
		}
	}
	for i := range v.p.limits {
		for _, on := range v.p.limits[i].on {
			names[on] = true
		}
	}
	if len(names) == 1 {
		return
	}
	for i := range v.p.tests {
		if t := &v.p.tests[i]; !names[t.ask.On] {
			v.add("test-listener", "", t.place, "", place{}, "this test asks at listener %q, which no rule and no limit names", clip(t.ask.On))
		}
	}
}

func (v *reviewer) methods() {
	for i := range v.p.rules {
		r := &v.p.rules[i]
		if r.more == nil || r.more.http == nil {
			continue
		}
		for _, m := range r.more.http.methods {
			if methodBit(m) == otherMethod {
				v.add("unusual-method", r.id, r.place, "", place{}, "rule %q: HTTP has no method %s%s", r.id, clip(m), didYouMean(m, methods...))
			}
		}
	}
}

// duplicates finds rules of the same effect and conditions.
func (v *reviewer) duplicates() {
	d := newDigester()
	seen := make(map[[32]byte]*rule, len(v.p.rules))
	for i := range v.p.rules {
		r := &v.p.rules[i]
		nameless := *r
		nameless.id = ""
		d.rule(&nameless)
		sum := d.sum()
		if first, ok := seen[sum]; ok {
			v.add("duplicate-rule", r.id, r.place, fmt.Sprintf("rule %q", first.id), first.place, "rule %q says what rule %q says", r.id, first.id)
			continue
		}
		seen[sum] = r
	}
}

// unreachable finds allows that something covers wholly.
func (v *reviewer) unreachable() {
	denies := v.denies()
	for i := range v.p.rules {
		r := &v.p.rules[i]
		if !r.allow || r.shadow {
			continue
		}
		if v.spend((r.from.size() + r.to.size()) * len(v.p.revoked)) {
			return
		}
		if what, at, ok := v.barred(r); ok {
			v.add("unreachable-rule", r.id, r.place, what, at, "rule %q never allows anything: %s covers all that it is about", r.id, what)
			continue
		}
		for _, d := range denies.candidates(r) {
			if v.spend(1 + r.from.size()*d.from.size() + r.to.size()*d.to.size()) {
				return
			}
			if covers(d, r) {
				v.add("unreachable-rule", r.id, r.place, fmt.Sprintf("rule %q", d.id), d.place, "rule %q never allows anything: deny %q covers all that it is about", r.id, d.id)
				break
			}
		}
	}
}

// spend takes comparisons from those that are left. It reports, with a remark,
// that there are not as many.
func (v *reviewer) spend(n int) bool {
	if v.left -= n; v.left >= 0 {
		return false
	}
	v.add("incomplete", "", place{file: v.p.files[0], line: 1, column: 1}, "", place{}, "too many rules to compare each with each: some that never decide may not be named")
	return true
}

// barred says what keeps all of an allow's callers, or all whom it lets them
// speak to, or for, from anything.
func (v *reviewer) barred(r *rule) (what string, at place, ok bool) {
	sides := []*subjects{&r.from, &r.to}
	if r.at == 1<<Inbound && r.more != nil && r.more.http != nil && r.more.http.subjects != nil {
		sides = append(sides, &r.more.http.subjects.subjects)
	}
	for _, side := range sides {
		if !side.given || side.unauthenticated {
			continue
		}
		ok = true
		for p := range side.all() {
			w, a, barred := v.bars(p)
			if ok = ok && barred; !ok {
				break
			}
			what, at = w, a
		}
		if ok {
			return what, at, true
		}
	}
	return "", place{}, false
}

func (v *reviewer) bars(p Pattern) (what string, at place, barred bool) {
	for i := range v.p.revoked {
		if r := &v.p.revoked[i]; r.pattern != nil && r.pattern.covers(p) {
			return "the revocation of " + r.pattern.text, r.place, true
		}
	}
	c := v.p.ceilings[p.TrustDomain()]
	if c == nil || slices.ContainsFunc(c.patterns, func(inside *member) bool { return inside.meets(p) }) {
		return "", place{}, false
	}
	return "the ceiling of " + c.domain, c.place, true
}

// all yields the patterns of one side of a rule.
func (s *subjects) all() func(func(Pattern) bool) {
	return func(yield func(Pattern) bool) {
		for _, p := range s.patterns {
			if !yield(p.Pattern) {
				return
			}
		}
		for _, g := range s.groups {
			for _, p := range g.patterns {
				if !yield(p.Pattern) {
					return
				}
			}
		}
	}
}

// size is how many patterns all yields.
func (s *subjects) size() int {
	n := len(s.patterns)
	for _, g := range s.groups {
		n += len(g.patterns)
	}
	return n
}

// denySet finds the denies that may cover an allow.
type denySet struct {
	exact map[Pattern][]*rule // by each whole ID that they name as from
	broad map[string][]*rule  // by trust domain: those with wildcards there
	all   []*rule             // those without from
}

// denies gathers the enforced denies without further conditions.
func (v *reviewer) denies() denySet {
	s := denySet{exact: map[Pattern][]*rule{}, broad: map[string][]*rule{}}
	for i := range v.p.rules {
		r := &v.p.rules[i]
		if r.allow || r.shadow || r.more != nil {
			continue
		}
		if !r.from.given {
			s.all = append(s.all, r)
			continue
		}
		for p := range r.from.all() {
			if p.wild {
				s.broad[p.TrustDomain()] = append(s.broad[p.TrustDomain()], r)
			} else {
				s.exact[p] = append(s.exact[p], r)
			}
		}
	}
	return s
}

// candidates returns those that cover what the allow names first, or may.
func (s *denySet) candidates(r *rule) []*rule {
	out := s.all
	for p := range r.from.all() {
		return slices.Concat(out, s.exact[p], s.broad[p.TrustDomain()])
	}
	return out
}

// covers reports whether a deny without further conditions matches whatever an
// allow matches.
func covers(d, a *rule) bool {
	return d.at&a.at == a.at && coversNames(d.on, a.on) && d.from.covers(&a.from) && d.to.covers(&a.to)
}

func coversNames(d, a []string) bool {
	if len(d) == 0 {
		return true
	}
	return len(a) > 0 && !slices.ContainsFunc(a, func(name string) bool { return !slices.Contains(d, name) })
}

func (s *subjects) covers(a *subjects) bool {
	switch {
	case !s.given:
		return true
	case !a.given, a.unauthenticated && !s.unauthenticated:
		return false
	}
	for p := range a.all() {
		covered := false
		for q := range s.all() {
			if covered = q.covers(p); covered {
				break
			}
		}
		if !covered {
			return false
		}
	}
	return true
}

// covers reports whether p matches every ID that q matches.
func (p Pattern) covers(q Pattern) bool {
	if p.text == "" || q.text == "" || p.TrustDomain() != q.TrustDomain() {
		return false
	}
	mine, its := p.text[p.path:], q.text[q.path:]
	for top := true; ; top = false {
		if mine == "" || its == "" {
			return mine == its
		}
		var have, want string
		have, mine = cutSegment(mine)
		want, its = cutSegment(its)
		switch {
		case have == many:
			return !top || want != reserved && want != one
		case want == many, have != one && have != want:
			return false
		}
	}
}

// meets reports whether there is an ID that both match.
func (p Pattern) meets(q Pattern) bool {
	if p.TrustDomain() != q.TrustDomain() {
		return false
	}
	mine, its := p.text[p.path:], q.text[q.path:]
	for top := true; mine != "" && its != ""; top = false {
		var a, b string
		a, mine = cutSegment(mine)
		b, its = cutSegment(its)
		switch {
		case a == many:
			return !top || b != reserved
		case b == many:
			return !top || a != reserved
		case a != one && b != one && a != b:
			return false
		}
	}
	return mine == its
}

// Blind returns the enforced rules that ask for HTTP and may apply at a
// listener where it is not visible, by id: there a deny matches without what it
// asks of HTTP, and an inbound allow never matches. A zero own is an identity of
// the listener not known yet. Inbound, where it is known, rules whose `to` does
// not cover it are left out. An allow is named only where `on` names the
// listener or `to` its identity: others are meant for whom they suit.
func (p *Policy) Blind(listener string, d Direction, own spiffeid.ID) []RuleNote {
	return p.blind(listener, d, own, func(c *conditions) bool { asks, _ := c.aboutHTTP(); return asks })
}

// AllowingGRPC returns the enforced rules that allow gRPC calls at a listener,
// as far as they name it or, inbound, its identity own: for one that takes no
// HTTP/2, without which there are none. What denies them is not among them: it
// denies such a request in whatever version of HTTP it comes.
func (p *Policy) AllowingGRPC(listener string, d Direction, own spiffeid.ID) []RuleNote {
	return p.notes(listener, d, own, func(r *rule, named bool) bool {
		return r.allow && named && r.more.http != nil && r.more.http.grpc
	})
}

// BlindToSubjects is Blind for a listener that sees HTTP and looks for no
// JWT-SVID, as every outbound one, and of rules that ask whom one speaks for.
func (p *Policy) BlindToSubjects(listener string, d Direction, own spiffeid.ID) []RuleNote {
	return p.blind(listener, d, own, (*conditions).asksSubject)
}

func (p *Policy) blind(listener string, d Direction, own spiffeid.ID, asks func(*conditions) bool) []RuleNote {
	return p.notes(listener, d, own, func(r *rule, named bool) bool {
		return asks(r.more) && (!r.allow || d == Inbound && named)
	})
}

// notes returns the enforced rules with conditions that may apply at a listener
// and that about picks, told whether they name the listener or its identity.
func (p *Policy) notes(listener string, d Direction, own spiffeid.ID, about func(r *rule, named bool) bool) []RuleNote {
	if p == nil {
		return nil
	}
	known := d == Inbound && !own.IsZero()
	to := Peer{ID: own}
	var out []RuleNote
	for i := range p.rules {
		r := &p.rules[i]
		if r.shadow || r.more == nil || !r.at.has(d) || len(r.on) > 0 && !slices.Contains(r.on, listener) || known && !r.to.match(&to) {
			continue
		}
		if !about(r, len(r.on) > 0 || known && r.to.given) {
			continue
		}
		out = append(out, RuleNote{ID: r.id, Allow: r.allow, File: r.place.file, Line: r.place.line, Column: r.place.column})
	}
	return out
}
