package policy

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

const (
	groupPrefix = "group:"

	// maxName bounds ids and names, which stand in logs and metrics; in bytes.
	maxName = 128
)

// loader gathers what the files of a policy say.
type loader struct {
	findings findings
	files    []string

	rules    []rule
	limits   []limit
	tests    []question
	revoked  []revocation
	ceilings map[string]*ceiling
	groups   map[string]*group
	ids      map[string]place // of rules
	limitIDs map[string]place
	mentions map[string]Mention
	patterns map[string]*member // by text: each is parsed, and kept, once
	members  []member           // where the last of them are
	refs     []groupRef
	speaking []*speakers
	checks   []func() // of what may be in a file not yet read
	whens    whens
	calls    int // services times methods

	counts map[string]int   // entries seen of each top-level list, in the file being read
	seen   map[string]place // top-level keys of the file being read
}

// groupRef is a group that a rule names; the group may be in a file not yet
// read.
type groupRef struct {
	rule  int // -1: of a limit
	limit int
	side  side
	of    *subjects // where it is neither; the others move while they are read
	name  string
	at    place
	path  string
}

// read takes a file in.
func (l *loader) read(file string, data []byte) {
	if l.groups == nil {
		l.groups, l.ceilings = map[string]*group{}, map[string]*ceiling{}
		// As many rules as the file seems to hold: growing costs as much as reading.
		// A comment may hold the word as often as it likes.
		n := min(bytes.Count(data, []byte("effect")), mostAhead)
		l.rules, l.ids, l.patterns = make([]rule, 0, n), make(map[string]place, n), make(map[string]*member, n)
		l.limitIDs, l.mentions, l.whens = map[string]place{}, map[string]Mention{}, whens{known: map[string]*when{}}
	}
	l.counts, l.seen = map[string]int{}, map[string]place{}
	l.files = append(l.files, file)
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if problem := checkText(file, data); problem != nil {
		l.findings.list = append(l.findings.list, problem)
		return
	}
	pieces, problem := split(file, data)
	if problem != nil {
		l.findings.list = append(l.findings.list, problem)
		return
	}
	if problem := readPieces(file, pieces, l.document); problem != nil {
		l.findings.list = append(l.findings.list, problem)
		return
	}
	if _, ok := l.seen["version"]; !ok {
		l.findings.add(place{file, 1, 1}, "version", "missing; a policy file begins with version: 1")
	}
}

// document takes in the top-level block of a file, or a part of it.
func (l *loader) document(n node) {
	if n.kind == nothing {
		return // the version is missed by read
	}
	if n.kind != block {
		l.findings.add(n.at, "", "a policy file is a block of keys (%s), not %s", strings.Join(keysOf(topKeys), ", "), n.describe())
		return
	}
	for i := range n.pairs {
		p := &n.pairs[i]
		if first, ok := l.seen[p.key]; ok && first != p.at {
			l.findings.add(p.at, clip(p.key), "is here twice; first at line %d", first.line)
			continue
		}
		l.seen[p.key] = p.at
		switch p.key {
		case "version":
			l.version(&p.value)
		case "trust_domains":
			l.eachPair(p, l.ceiling)
		case "groups":
			l.eachPair(p, l.group)
		case "rules":
			l.eachItem(p, l.rule)
		case "limits":
			l.eachItem(p, l.limit)
		case "revoked":
			l.eachItem(p, l.revocation)
		case "tests":
			l.eachItem(p, l.test)
		default:
			l.unknown(p, clip(p.key), keysOf(topKeys))
		}
	}
}

func (l *loader) version(n *node) {
	if n.kind != number || n.text != "1" {
		l.findings.add(n.at, "version", "must be 1, the only version there is; this is %s", n.describe())
	}
}

// unknown refuses a key.
func (l *loader) unknown(p *pair, path string, known []string) {
	if meant := nearest(p.key, known); meant != "" {
		l.findings.add(p.at, path, "unknown key; did you mean %q?", meant)
		return
	}
	if instead := otherWords[p.key]; instead != "" {
		l.findings.add(p.at, path, "unknown key; %s", instead)
		return
	}
	l.findings.add(p.at, path, "unknown key; known here: %s", strings.Join(known, ", "))
}

// eachPair calls f for each entry of a block whose keys are names.
func (l *loader) eachPair(p *pair, f func(*pair, string)) {
	if p.value.kind != block {
		l.findings.add(p.value.at, p.key, "must be a block of names, not %s", p.value.describe())
		return
	}
	for i := range p.value.pairs {
		entry := &p.value.pairs[i]
		f(entry, fmt.Sprintf("%s[%q]", p.key, clip(entry.key)))
	}
}

// eachItem calls f for each entry of a top-level list. The path is a function
// because it is needed only for errors.
func (l *loader) eachItem(p *pair, f func(*node, func() string)) {
	if !l.isList(&p.value, func() string { return p.key }) {
		return
	}
	for i := range p.value.items {
		number := l.counts[p.key]
		l.counts[p.key]++
		f(&p.value.items[i], func() string { return fmt.Sprintf("%s[%d]", p.key, number) })
	}
}

// isList refuses what is no list, and an empty one: it says nothing, and
// whoever wrote it meant something.
func (l *loader) isList(n *node, path func() string) bool {
	switch {
	case n.kind != list:
		l.findings.add(n.at, path(), "must be a list, not %s", n.describe())
		return false
	case len(n.items) == 0:
		l.findings.add(n.at, path(), "an empty list; leave the key out")
		return false
	}
	return true
}

// text returns the text of a scalar.
func (l *loader) text(n *node, path func() string) (string, bool) {
	switch n.kind {
	case text:
		return n.text, true
	case number, truth:
		l.findings.add(n.at, path(), "must be text, not %s; write it in quotes", n.describe())
	default:
		l.findings.add(n.at, path(), "must be text, not %s", n.describe())
	}
	return "", false
}

// name checks an id or name: what stands in logs, metrics and other rules.
func (l *loader) name(s string, at place, path func() string) bool {
	switch {
	case s == "":
		l.findings.add(at, path(), "is empty")
	case len(s) > maxName:
		l.findings.add(at, path(), "%d bytes long; at most %d are allowed", len(s), maxName)
	case strings.ContainsFunc(s, func(c rune) bool { return c == ' ' || c == utf8.RuneError || !unicode.IsPrint(c) }):
		l.findings.add(at, path(), "%q holds a space or control character", clip(s))
	default:
		return true
	}
	return false
}

func (l *loader) pattern(s string) (*member, error) {
	if m, ok := l.patterns[s]; ok {
		return m, nil
	}
	p, err := ParsePattern(s)
	if err != nil {
		return nil, err
	}
	if len(l.members) == cap(l.members) {
		l.members = make([]member, 0, membersAtOnce)
	}
	l.members = append(l.members, member{p, uint32(len(l.patterns))})
	m := &l.members[len(l.members)-1]
	l.patterns[s] = m
	return m, nil
}

// mostAhead is for how many rules memory is taken before they are read.
const mostAhead = 1 << 17

// membersAtOnce is for how many patterns memory is taken at a time.
const membersAtOnce = 256

// group takes in one entry of groups.
func (l *loader) group(p *pair, path string) {
	pathOf := func() string { return path }
	if !l.name(p.key, p.at, pathOf) {
		return
	}
	if p.key == Unauthenticated {
		l.findings.add(p.at, path, "unauthenticated is the word for peers that came in plaintext; give the group another name")
		return
	}
	if first, ok := l.groups[p.key]; ok {
		l.findings.add(p.at, path, "group %q is defined twice; first at %s", clip(p.key), first.place)
		return
	}
	g := &group{name: p.key, place: p.at}
	l.groups[p.key] = g
	if !l.isList(&p.value, pathOf) {
		return
	}
	for i := range p.value.items {
		n := &p.value.items[i]
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path, i) }
		s, ok := l.text(n, itemPath)
		if !ok {
			continue
		}
		switch pattern, err := l.pattern(s); {
		case strings.HasPrefix(s, groupPrefix):
			l.findings.add(n.at, itemPath(), "a group holds SPIFFE IDs, not groups; name both groups in the rule")
		case s == Unauthenticated:
			l.findings.add(n.at, itemPath(), "unauthenticated is written into the rule itself, where it is seen")
		case err != nil:
			l.findings.add(n.at, itemPath(), "%q: %v", clip(s), err)
		default:
			g.patterns = append(g.patterns, pattern)
		}
	}
}

// ceiling takes in one entry of trust_domains.
func (l *loader) ceiling(p *pair, path string) {
	if err := checkDomain(p.key); err != nil {
		l.findings.add(p.at, path, "%v", err)
		return
	}
	if first, ok := l.ceilings[p.key]; ok {
		l.findings.add(p.at, path, "the trust domain is here twice; first at %s", first.place)
		return
	}
	c := &ceiling{domain: p.key, place: p.at}
	l.ceilings[p.key] = c
	if p.value.kind != block {
		l.findings.add(p.value.at, path, "must be a block with ids, not %s", p.value.describe())
		return
	}
	seen := map[string]bool{}
	for i := range p.value.pairs {
		entry := &p.value.pairs[i]
		switch {
		case seen[entry.key]:
			l.findings.add(entry.at, path+"."+entry.key, "is here twice")
		case entry.key == "ids":
			l.ceilingIDs(c, &entry.value, path+".ids")
		default:
			l.unknown(entry, path+"."+clip(entry.key), keysOf(ceilingKeys))
		}
		seen[entry.key] = true
	}
	if !seen["ids"] {
		l.findings.add(p.at, path, "ids is missing: the paths that identities of this trust domain may have")
	}
}

func (l *loader) ceilingIDs(c *ceiling, n *node, path string) {
	if !l.isList(n, func() string { return path }) {
		return
	}
	for i := range n.items {
		itemPath := func() string { return fmt.Sprintf("%s[%d]", path, i) }
		s, ok := l.text(&n.items[i], itemPath)
		if !ok {
			continue
		}
		if !strings.HasPrefix(s, "/") {
			l.findings.add(n.items[i].at, itemPath(), "%q: write the path alone, like /exports/**", clip(s))
			continue
		}
		pattern, err := l.pattern(scheme + c.domain + s)
		if err != nil {
			l.findings.add(n.items[i].at, itemPath(), "%q: %v", clip(s), err)
			continue
		}
		c.patterns = append(c.patterns, pattern)
	}
}

// revocation takes in one entry of revoked.
func (l *loader) revocation(n *node, path func() string) {
	if n.kind == block {
		l.revokedCertificate(n, path)
		return
	}
	if n.kind != text {
		l.findings.add(n.at, path(), "must be a SPIFFE ID or {issuer, serial}, not %s", n.describe())
		return
	}
	pattern, err := l.pattern(n.text)
	if err != nil {
		l.findings.add(n.at, path(), "%q: %v", clip(n.text), err)
		return
	}
	l.revoked = append(l.revoked, revocation{pattern: pattern, place: n.at})
}

func (l *loader) revokedCertificate(n *node, path func() string) {
	out := revocation{place: n.at}
	seen := map[string]bool{}
	for i := range n.pairs {
		p := &n.pairs[i]
		field, example := &out.serial, "openssl x509 -noout -serial"
		switch {
		case !slices.Contains(keysOf(revokedKeys), p.key):
			l.unknown(p, path()+"."+clip(p.key), keysOf(revokedKeys))
			continue
		case seen[p.key]:
			l.findings.add(p.at, path()+"."+p.key, "is here twice")
			continue
		case p.key == "issuer":
			field, example = &out.issuer, "openssl x509 -noout -ext authorityKeyIdentifier"
		}
		seen[p.key] = true
		// A serial of digits alone reads as a number to YAML; its text counts.
		value, ok := normalHex(p.value.text)
		if (p.value.kind != text && p.value.kind != number) || !ok {
			l.findings.add(p.value.at, path()+"."+p.key, "must be hexadecimal, as %s prints it, not %s", example, p.value.describe())
			continue
		}
		*field = value
	}
	for _, key := range keysOf(revokedKeys) {
		if !seen[key] {
			l.findings.add(n.at, path(), "%s is missing: a certificate is named by issuer (authority key identifier) and serial", key)
		}
	}
	l.revoked = append(l.revoked, out)
}

// policy ends the load.
func (l *loader) policy() (*Policy, error) {
	l.resolve()
	for _, check := range l.checks {
		check()
	}
	if err := l.findings.err(); err != nil {
		return nil, err
	}
	slices.Sort(l.files)
	slices.SortFunc(l.rules, func(a, b rule) int { return strings.Compare(a.id, b.id) })
	slices.SortFunc(l.limits, func(a, b limit) int { return strings.Compare(a.ID, b.ID) })
	p := &Policy{files: l.files, rules: l.rules, limits: l.limits, revoked: l.revoked, ceilings: l.ceilings, groups: l.groups, tests: l.tests, members: len(l.patterns)}
	for _, m := range l.mentions {
		p.listeners = append(p.listeners, m)
	}
	slices.SortFunc(p.listeners, func(a, b Mention) int { return cmp.Compare(a.Listener, b.Listener) })
	var digesting sync.WaitGroup
	digesting.Go(func() { p.hash = p.digest() })
	p.index = compile(p)
	digesting.Wait()
	return p, nil
}

// resolve puts the groups into the rules that name them.
func (l *loader) resolve() {
	var names []string
	for i := range l.refs {
		ref := &l.refs[i]
		g, ok := l.groups[ref.name]
		if !ok {
			if names == nil {
				names = slices.Sorted(maps.Keys(l.groups))
				names = names[:min(len(names), maxHints)]
			}
			hint := "" // looking for one takes time, which many unknown groups would add up
			if !l.findings.full() {
				hint = groupHint(ref.name, names)
			}
			l.findings.add(ref.at, ref.path, "unknown group %q%s", clip(ref.name), hint)
			continue
		}
		s := l.side(ref)
		s.groups = append(s.groups, g)
		g.uses++
	}
	for _, s := range l.speaking {
		s.index()
	}
}

// maxHints is among how many groups one is looked for that may have been meant.
const maxHints = 1000

func groupHint(name string, known []string) string {
	if meant := nearest(name, known); meant != "" {
		return fmt.Sprintf("; did you mean %q?", groupPrefix+meant)
	}
	if len(known) > 0 {
		return "; known: " + clip(strings.Join(known, ", "))
	}
	return "; no group is defined"
}

// side returns the side, or the list of subjects, that names a group.
func (l *loader) side(ref *groupRef) *subjects {
	switch {
	case ref.of != nil:
		return ref.of
	case ref.rule >= 0 && ref.side == sideFrom:
		return &l.rules[ref.rule].from
	case ref.rule >= 0:
		return &l.rules[ref.rule].to
	case ref.side == sideFrom:
		return &l.limits[ref.limit].from
	}
	return &l.limits[ref.limit].to
}
