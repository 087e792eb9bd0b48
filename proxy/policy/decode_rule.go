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
	var room [8]string
	seen := room[:0]
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
			r.id = l.id(&p.value, keyPath, l.ids)
		case "effect":
			l.effect(&r, &p.value, keyPath)
		case "at":
			l.end(&r, &p.value, keyPath)
		case "on":
			on = p.value.items
			r.on = l.listeners(&p.value, keyPath)
		case "from":
			from = p.value.at
			l.subjects(&r.from, groupRef{rule: len(l.rules), side: sideFrom}, &p.value, keyPath)
		case "to":
			l.subjects(&r.to, groupRef{rule: len(l.rules), side: sideTo}, &p.value, keyPath)
		case "shadow":
			r.shadow = l.truth(&p.value, keyPath)
		case "description":
			l.description(&p.value, keyPath)
		default:
			if !l.condition(&r, p, keyPath) {
				l.unknown(p, keyPath(), keysOf(ruleKeys))
				continue // unknown keys are not remembered: seen stays small
			}
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
	l.inboundOnly(&r, n, path)
	l.mention(r.id, on)
	slices.Sort(r.on)
	r.on = slices.Compact(r.on)
	l.rules = append(l.rules, r)
}

// mention keeps where a listener is first named.
func (l *loader) mention(rule string, on []node) {
	for _, at := range on {
		if name := at.text; l.mentions[name].Listener == "" {
			l.mentions[name] = Mention{name, rule, at.at.file, at.at.line, at.at.column}
		}
	}
}

// inboundOnly is for a rule about where clients come from, which only the end
// that accepts them knows.
func (l *loader) inboundOnly(r *rule, n *node, path func() string) {
	if r.more == nil || r.more.networks == nil && r.more.notNetworks == nil {
		return
	}
	if !r.at.has(Inbound) {
		l.findings.add(n.at, path(), "source_ip and not_source_ip are known at the inbound end only; use at: inbound, or leave at out")
	}
	r.at = 1 << Inbound
}

func (l *loader) truth(n *node, path func() string) bool {
	if n.kind != truth {
		l.findings.add(n.at, path(), "must be true or false, not %s", n.describe())
	}
	return n.text == "true" || n.text == "True" || n.text == "TRUE"
}

func (l *loader) description(n *node, path func() string) {
	if s, ok := l.text(n, path); ok && len(s) > maxDescription {
		l.findings.add(n.at, path(), "%d bytes long; at most %d are allowed; a comment may be as long as you like", len(s), maxDescription)
	}
}

// id reads a name that must be the only one of its kind, or returns "".
func (l *loader) id(n *node, path func() string, taken map[string]place) string {
	id, ok := l.text(n, path)
	if !ok || !l.name(id, n.at, path) {
		return ""
	}
	if first, ok := taken[id]; ok {
		l.findings.add(n.at, path(), "duplicate id %q; first at %s", id, first)
		return ""
	}
	taken[id] = n.at
	return id
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

func (l *loader) listeners(n *node, path func() string) []string {
	var on []string
	if !l.isList(n, path) {
		return nil
	}
	for i := range n.items {
		item := &n.items[i]
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path(), i) }
		if name, ok := l.text(item, itemPath); ok && l.name(name, item.at, itemPath) {
			on = append(on, name)
		}
	}
	return on
}

// subjects takes in from, to or subjects of what ref says.
func (l *loader) subjects(s *subjects, ref groupRef, n *node, path func() string) {
	s.given = true
	if !l.isList(n, path) {
		return
	}
	s.patterns = make([]*member, 0, len(n.items))
	for i := range n.items {
		item := &n.items[i]
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path(), i) }
		value, ok := l.text(item, itemPath)
		if !ok {
			continue
		}
		if name, ok := strings.CutPrefix(value, groupPrefix); ok {
			ref.name, ref.at, ref.path = name, item.at, itemPath()
			l.refs = append(l.refs, ref)
			continue
		}
		if value == Unauthenticated {
			if ref.side == sideTo {
				l.findings.add(item.at, itemPath(), "unauthenticated belongs into from: who is spoken to, or for, always has an identity")
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
	if s == "" || strings.ContainsAny(s, ":/") {
		return ""
	}
	if _, ok := l.groups[s]; ok {
		return fmt.Sprintf("; did you mean %q?", groupPrefix+s)
	}
	if s == "authenticated" || s == "*" || s == "**" { // edits apart from its opposite
		return "; whoever has an identity of a trust domain is spiffe://example.org/**"
	}
	if meant := didYouMean(s, Unauthenticated); meant != "" {
		return meant
	}
	return fmt.Sprintf("; a group is written %q", groupPrefix+clip(s))
}
