package policy

import (
	"cmp"
	"slices"
)

// DomainMention is the first place at which a rule names a trust domain.
type DomainMention struct {
	TrustDomain  string
	Rule         string
	File         string
	Line, Column int // from 1
}

// TrustDomains returns the trust domains of whom rules allow in `from` and `to`,
// sorted by name, each with the first rule that names it. Rules in shadow, and
// those on none of these listeners, are left out.
func (p *Policy) TrustDomains(listeners []string) []DomainMention {
	if p == nil {
		return nil
	}
	var mentions []DomainMention
	seen := map[string]bool{}
	for i := range p.rules {
		r := &p.rules[i]
		if !r.allow || r.shadow || len(r.on) > 0 && !slices.ContainsFunc(r.on, func(on string) bool { return slices.Contains(listeners, on) }) {
			continue
		}
		for _, side := range []*subjects{&r.from, &r.to} {
			side.each(func(m *member) {
				if domain := m.TrustDomain(); !seen[domain] {
					seen[domain] = true
					mentions = append(mentions, DomainMention{domain, r.id, r.place.file, r.place.line, r.place.column})
				}
			})
		}
	}
	slices.SortFunc(mentions, func(a, b DomainMention) int { return cmp.Compare(a.TrustDomain, b.TrustDomain) })
	return mentions
}

// each calls f with each pattern that stands there or in a group.
func (s *subjects) each(f func(*member)) {
	for _, m := range s.patterns {
		f(m)
	}
	for _, g := range s.groups {
		for _, m := range g.patterns {
			f(m)
		}
	}
}
