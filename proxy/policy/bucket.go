package policy

import "strings"

// Rules of one pair that have further conditions stand in a bucket. A few are
// asked one after the other; many that differ in host or path are found by
// these, so that a service with a thousand rules is decided as fast as one with
// ten.

// direct marks a bucket number that is the number of a rule instead: most
// pairs have one.
const direct = 1 << 31

// fewRules is up to how many rules a bucket has no tree.
const fewRules = 6

// bucket is never changed after compile. Its rules are there twice: for
// requests whose HTTP is visible, and for those whose is not.
type bucket struct {
	any  lists // to be asked in any case
	tree *tree // the others; nil: none

	blind outcome // the smallest of those that ask for nothing but HTTP
	rest  lists   // those that ask for something else too
}

// lists are rules by effect, each sorted: the first that matches is the
// smallest.
type lists struct{ deny, allow, shadow []uint32 }

func (l *lists) add(number uint32, r *rule) {
	to := &l.deny
	switch {
	case r.shadow:
		to = &l.shadow
	case r.allow:
		to = &l.allow
	}
	if n := len(*to); n == 0 || (*to)[n-1] != number {
		*to = append(*to, number)
	}
}

// tree finds rules by the host and path of a request.
type tree struct {
	hosts    map[string]*pathTree // by whole hosts, with the port where rules name one
	suffixes map[string]*pathTree // by what follows the star of *.suffix, likewise
	noHost   pathTree             // of rules that name no host
}

// pathTree is a trie over segments of paths.
type pathTree struct {
	root pathNode
	any  lists // of rules without paths
}

type pathNode struct {
	names   []string             // of the first few literal children
	kids    []*pathNode          // by the index of names
	more    map[string]*pathNode // the other literal children
	segment *pathNode            // behind {name}
	here    lists                // of patterns that end here
	below   lists                // of those that go on with "**"
}

// newBucket makes the bucket of rules, sorted by number.
func newBucket(p *Policy, numbers []uint32) bucket {
	b := bucket{blind: emptyOutcome()}
	large := len(numbers) > fewRules
	for _, number := range numbers {
		r := &p.rules[number]
		if large && r.more != nil && r.more.http != nil && r.more.http.indexed() {
			if b.tree == nil {
				b.tree = &tree{}
			}
			b.tree.add(number, r)
		} else {
			b.any.add(number, r)
		}
		if r.more != nil {
			if _, alone := r.more.aboutHTTP(); alone && !r.shadow {
				b.blind.add(number, r)
				continue
			}
		}
		b.rest.add(number, r)
	}
	return b
}

// indexed reports whether a tree helps to find the rule.
func (c *httpCond) indexed() bool { return c.paths != nil || c.hosts != nil }

func (t *tree) add(number uint32, r *rule) {
	if r.more.http.hosts == nil {
		t.noHost.add(number, r)
		return
	}
	if t.hosts == nil {
		t.hosts, t.suffixes = map[string]*pathTree{}, map[string]*pathTree{}
	}
	for _, h := range r.more.http.hosts {
		of, key := t.hosts, h.name
		if h.suffix {
			of = t.suffixes
		}
		if h.port != "" {
			key += ":" + h.port
		}
		if of[key] == nil {
			of[key] = &pathTree{}
		}
		of[key].add(number, r)
	}
}

func (t *pathTree) add(number uint32, r *rule) {
	if r.more.http.paths == nil {
		t.any.add(number, r)
	}
	for i := range r.more.http.paths {
		pattern := &r.more.http.paths[i]
		n := &t.root
		for _, s := range pattern.segments {
			n = n.grow(s)
		}
		if pattern.below {
			n.below.add(number, r)
		} else {
			n.here.add(number, r)
		}
	}
}

func (n *pathNode) child(segment string) *pathNode {
	for i, name := range n.names {
		if name == segment {
			return n.kids[i]
		}
	}
	return n.more[segment]
}

func (n *pathNode) grow(s pathSegment) *pathNode {
	if s.any {
		if n.segment == nil {
			n.segment = &pathNode{}
		}
		return n.segment
	}
	if kid := n.child(s.literal); kid != nil {
		return kid
	}
	kid := &pathNode{}
	if len(n.names) < fewNames {
		n.names, n.kids = append(n.names, s.literal), append(n.kids, kid)
		return kid
	}
	if n.more == nil {
		n.more = map[string]*pathNode{}
	}
	n.more[s.literal] = kid
	return kid
}

// bucket asks the rules of one bucket.
func (s *search) bucket(code uint32) {
	if code&direct != 0 {
		s.try(code&^direct, false)
		return
	}
	b := &s.p.index.buckets[code]
	switch {
	case s.survey:
		s.lists(&b.rest, false, false)
		s.openDeny = s.openDeny || b.blind.deny[s.q.Direction] != none
		s.mayAllow = s.mayAllow || b.blind.allow[s.q.Direction] != none
	case s.q.HTTP == nil:
		s.hit.deny = min(s.hit.deny, b.blind.deny[s.q.Direction])
		if s.q.Direction == Outbound {
			s.hit.allow = min(s.hit.allow, b.blind.allow[Outbound])
		}
		s.lists(&b.rest, false, false)
	default:
		s.lists(&b.any, false, false)
		if b.tree != nil {
			s.tree(b.tree)
		}
	}
}

// lists asks the rules of each effect until one matches: the others are
// larger. Denies come first, and where one matches no allow counts.
func (s *search) lists(l *lists, byPath, denies bool) {
	for _, number := range l.deny {
		if number >= s.hit.deny || s.try(number, byPath) {
			break
		}
	}
	for _, number := range l.shadow {
		if !denies || !s.p.rules[number].allow {
			s.try(number, byPath)
		}
	}
	if denies || s.hit.deny != none && !s.survey {
		return
	}
	for _, number := range l.allow {
		if number >= s.hit.allow || s.try(number, byPath) {
			break
		}
	}
}

func (s *search) tree(t *tree) {
	path := s.q.HTTP.Path
	s.paths(&t.noHost, path)
	if t.hosts == nil {
		return
	}
	s.host(t, s.q.HTTP.Host, path)
	if name, port := splitPort(s.q.HTTP.Host); port != "" {
		s.host(t, name, path)
	}
}

// host asks the rules that name a host, or one of the suffixes that are left
// of it label by label.
func (s *search) host(t *tree, host, path string) {
	if paths := t.hosts[host]; paths != nil {
		s.paths(paths, path)
	}
	if len(t.suffixes) == 0 {
		return
	}
	for i := 1; i < len(host); i++ { // what the star stands for is not empty
		if host[i] != '.' {
			continue
		}
		if paths := t.suffixes[host[i:]]; paths != nil {
			s.paths(paths, path)
		}
	}
}

func (s *search) paths(t *pathTree, path string) {
	s.lists(&t.any, false, false)
	if strings.HasPrefix(path, "/") {
		s.walk(&t.root, path)
	}
}

// walk asks the rules whose patterns match what is left of a path.
func (s *search) walk(n *pathNode, path string) {
	if path == "" {
		s.lists(&n.here, true, false)
		return
	}
	s.lists(&n.below, true, false)
	if path == "/" {
		s.lists(&n.here, true, true)
	}
	segment, rest := cutSegment(path)
	if kid := n.child(segment); kid != nil {
		s.walk(kid, rest)
	}
	if n.segment != nil && segment != "" {
		s.walk(n.segment, rest)
	}
}
