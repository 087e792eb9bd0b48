package policy

import (
	"fmt"
	"slices"
	"strings"
)

// rule takes in one entry of rules.
func (l *loader) rule(n *node, path func() string) {
	if n.kind != block {
		l.findings.add(n.at, path(), "must be a block with id, effect and from, not %s", n.describe())
		return
	}
	r := rule{at: bothEnds, place: n.at}
	seen := make([]string, 0, len(ruleKeys))
	var on []node
	var from place
	for i := range n.pairs {
		p := &n.pairs[i]
		keyPath := func() string { return path() + "." + clip(p.key) }
		if slices.Contains(seen, p.key) {
			l.findings.add(p.at, keyPath(), "is here twice")
			continue
		}
		switch p.key {
		case "id":
			l.ruleID(&r, &p.value, keyPath)
		case "effect":
			l.effect(&r, &p.value, keyPath)
		case "at":
			l.end(&r, &p.value, keyPath)
		case "on":
			on = p.value.items
			l.listeners(&r, &p.value, keyPath)
		case "from":
			from = p.value.at
			l.subjects(&r.from, sideFrom, &p.value, keyPath)
		case "to":
			l.subjects(&r.to, sideTo, &p.value, keyPath)
		default:
			l.unknown(p, keyPath(), ruleKeys, laterRuleKeys)
			continue // unknown keys are not remembered: seen stays small
		}
		seen = append(seen, p.key)
	}
	for _, key := range []string{"id", "effect"} {
		if !slices.Contains(seen, key) {
			l.findings.add(n.at, path(), "%s is missing", key)
		}
	}
	if r.allow && !slices.Contains(seen, "from") {
		l.findings.add(n.at, path(), "an allow needs from: the identities it allows")
	}
	if r.allow && r.from.unauthenticated && !r.at.has(Inbound) {
		l.findings.add(from, path()+".from", "unauthenticated is never who an outbound connection comes from: it comes from our own SVID; use at: inbound")
	}
	for _, at := range on {
		if name := at.text; l.mentions[name].Listener == "" {
			l.mentions[name] = Mention{name, r.id, at.at.file, at.at.line, at.at.column}
		}
	}
	slices.Sort(r.on)
	r.on = slices.Compact(r.on)
	l.rules = append(l.rules, r)
}

func (l *loader) ruleID(r *rule, n *node, path func() string) {
	id, ok := l.text(n, path)
	if !ok || !l.name(id, n.at, path) {
		return
	}
	if first, ok := l.ids[id]; ok {
		l.findings.add(n.at, path(), "duplicate id %q; first at %s", id, first)
		return
	}
	l.ids[id] = n.at
	r.id = id
}

func (l *loader) effect(r *rule, n *node, path func() string) {
	switch s, ok := l.text(n, path); {
	case !ok || s == "deny":
	case s == "allow":
		r.allow = true
	default:
		l.findings.add(n.at, path(), "must be allow or deny, not %s%s", n.describe(), didYouMean(s, "allow", "deny"))
	}
}

func (l *loader) end(r *rule, n *node, path func() string) {
	switch s, ok := l.text(n, path); {
	case !ok:
	case s == Inbound.String():
		r.at = 1 << Inbound
	case s == Outbound.String():
		r.at = 1 << Outbound
	default:
		l.findings.add(n.at, path(), "must be inbound or outbound, not %s%s; for both leave it out", n.describe(), didYouMean(s, "inbound", "outbound"))
	}
}

func didYouMean(s string, words ...string) string {
	if meant := nearest(s, words); meant != "" {
		return fmt.Sprintf(" (did you mean %s?)", meant)
	}
	return ""
}

func (l *loader) listeners(r *rule, n *node, path func() string) {
	if n.kind != list || len(n.items) == 0 {
		l.isList(n, path())
		return
	}
	for i := range n.items {
		item := &n.items[i]
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path(), i) }
		if name, ok := l.text(item, itemPath); ok && l.name(name, item.at, itemPath) {
			r.on = append(r.on, name)
		}
	}
}

// subjects takes in from or to.
func (l *loader) subjects(s *subjects, side side, n *node, path func() string) {
	s.given = true
	if n.kind != list || len(n.items) == 0 {
		l.isList(n, path())
		return
	}
	s.patterns = make([]Pattern, 0, len(n.items))
	for i := range n.items {
		item := &n.items[i]
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path(), i) }
		value, ok := l.text(item, itemPath)
		if !ok {
			continue
		}
		if name, ok := strings.CutPrefix(value, groupPrefix); ok {
			l.refs = append(l.refs, groupRef{len(l.rules), side, name, item.at, itemPath()})
			continue
		}
		if value == Unauthenticated {
			if side == sideTo {
				l.findings.add(item.at, itemPath(), "unauthenticated belongs into from: who is spoken to always has an identity")
			}
			s.unauthenticated = true
			continue
		}
		pattern, err := l.pattern(value)
		if err != nil {
			l.findings.add(item.at, itemPath(), "%q: %v%s", clip(value), err, l.subjectHint(value))
			continue
		}
		s.patterns = append(s.patterns, pattern)
	}
}

// subjectHint says what a word that is no SPIFFE ID may stand for.
func (l *loader) subjectHint(s string) string {
	if strings.ContainsAny(s, ":/") {
		return ""
	}
	if _, ok := l.groups[s]; ok {
		return fmt.Sprintf("; did you mean %q?", groupPrefix+s)
	}
	return didYouMean(s, Unauthenticated)
}
