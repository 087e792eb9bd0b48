package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Comparison asks two policies the same and keeps where they differ.
type Comparison struct {
	was, is *Policy
	seen    map[string]bool
	changes map[changeKey]*Change

	Asked      int // requests
	Redecided  int // of those, how many another rule decides, with the same answer
	Incomplete bool
}

type changeKey struct {
	allow    bool // by now
	was, now string
}

// Change is a group of requests that one policy allows and the other denies,
// by the same rules.
type Change struct {
	Allow    bool   // by now; before, it was the other way round
	Was, Is  string // rule, or where none decided the reason
	Count    int
	Examples []string // the first few requests
}

// maxExamples is how many requests a Change names.
const maxExamples = 5

// NewComparison compares what was with what is; either may be nil.
func NewComparison(was, is *Policy) *Comparison {
	return &Comparison{was: was, is: is, changes: map[changeKey]*Change{}}
}

// Ask asks both, and says whether the answers differ.
func (c *Comparison) Ask(q *Request) bool {
	var was, is Decision
	c.was.Decide(q, &was)
	c.is.Decide(q, &is)
	c.Asked++
	if was.Allow == is.Allow {
		if was.Rule != is.Rule || was.Reason != is.Reason {
			c.Redecided++
		}
		return false
	}
	key := changeKey{is.Allow, by(&was), by(&is)}
	change := c.changes[key]
	if change == nil {
		change = &Change{Allow: is.Allow, Was: key.was, Is: key.now}
		c.changes[key] = change
	}
	change.Count++
	if text := q.describe(); len(change.Examples) < maxExamples && !slices.Contains(change.Examples, text) {
		change.Examples = append(change.Examples, text)
	}
	return true
}

func by(d *Decision) string {
	if d.Rule != "" {
		return "rule " + d.Rule
	}
	return d.Reason.String()
}

// Changes returns what differs: first what is allowed by now, and the most
// frequent first.
func (c *Comparison) Changes() []Change {
	out := make([]Change, 0, len(c.changes))
	for _, change := range c.changes {
		out = append(out, *change)
	}
	slices.SortFunc(out, func(a, b Change) int {
		if a.Allow != b.Allow {
			return map[bool]int{true: -1, false: 1}[a.Allow]
		}
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Was, b.Was), cmp.Compare(a.Is, b.Is))
	})
	return out
}

// Bounds of what AskAround makes up.
const (
	maxOverlaps  = 500    // rules beside one that changed
	maxMadeUp    = 40_000 // requests in all
	maxSideNames = 30     // identities of one side
)

// AskAround asks requests made from the rules, revocations and ceilings that
// differ, and from the rules that overlap them: for each wildcard somebody whom
// nothing else names. It finds what people mean by a difference, and is no
// proof that there is none: Incomplete says that not all were asked that could
// be made.
func (c *Comparison) AskAround() {
	c.seen = map[string]bool{}
	focus := c.different()
	all := slices.Concat(c.was.enforced(), c.is.enforced())
	http := slices.ContainsFunc(all, func(r *rule) bool {
		return r.more != nil && (r.more.http != nil || r.more.when != nil && r.more.when.usesHTTP)
	})
	for _, r := range focus {
		c.askAbout(r, r, http)
		overlaps := 0
		for _, s := range all {
			if s == r || !r.from.overlaps(&s.from) || !r.to.overlaps(&s.to) {
				continue
			}
			if overlaps++; overlaps > maxOverlaps {
				c.Incomplete = true
				break
			}
			c.askAbout(r, s, http)
		}
	}
}

func (p *Policy) enforced() []*rule {
	var out []*rule
	if p != nil {
		for i := range p.rules {
			if !p.rules[i].shadow {
				out = append(out, &p.rules[i])
			}
		}
	}
	return out
}

// different returns the rules that one of the policies alone has, and what
// else differs in the form of rules.
func (c *Comparison) different() []*rule {
	var out []*rule
	changed := c.is.Compare(c.was)
	ids := slices.Concat(changed.Added, changed.Changed, changed.Removed)
	slices.Sort(ids)
	for _, p := range []*Policy{c.was, c.is} {
		for _, r := range p.enforced() {
			if _, ok := slices.BinarySearch(ids, r.id); ok {
				out = append(out, r)
			}
		}
	}
	return append(out, c.differentBars()...)
}

// differentBars are revocations and ceilings.
func (c *Comparison) differentBars() []*rule {
	bars := func(p *Policy) map[string][]*member {
		out := map[string][]*member{}
		if p == nil {
			return out
		}
		for i := range p.revoked {
			if r := &p.revoked[i]; r.pattern != nil {
				out["revoked "+r.pattern.text] = []*member{r.pattern}
			}
		}
		for _, ceiling := range p.ceilings {
			everybody, _ := ParsePattern(scheme + ceiling.domain + "/" + many)
			out["ceiling "+strings.Join(patternTexts(ceiling.patterns), " ")] = append(slices.Clone(ceiling.patterns), &member{Pattern: everybody})
		}
		return out
	}
	var out []*rule
	was, is := bars(c.was), bars(c.is)
	for _, pair := range [][2]map[string][]*member{{was, is}, {is, was}} {
		for key, patterns := range pair[0] {
			if _, ok := pair[1][key]; !ok {
				side := subjects{given: true, patterns: patterns}
				out = append(out, &rule{at: bothEnds, from: side}, &rule{at: bothEnds, to: side})
			}
		}
	}
	return out
}

// overlaps reports whether there is somebody whom both match.
func (s *subjects) overlaps(o *subjects) bool {
	if !s.given || !o.given || s.unauthenticated && o.unauthenticated {
		return true
	}
	for p := range s.all() {
		for q := range o.all() {
			if p.meets(q) {
				return true
			}
		}
	}
	return false
}

// askAbout asks requests that both rules are about, as far as can be.
func (c *Comparison) askAbout(r, s *rule, http bool) {
	for _, from := range somebody(&r.from, &s.from) {
		for _, to := range somebody(&r.to, &s.to) {
			if to.Unauthenticated {
				continue
			}
			for _, on := range commonNames(r.on, s.on) {
				for _, d := range []Direction{Inbound, Outbound} {
					if r.at.has(d) && s.at.has(d) && !(d == Outbound && from.Unauthenticated) {
						c.askVariants(Request{Listener: on, Direction: d, From: from, To: to, Time: DefaultTime}, r, s, http)
					}
				}
			}
		}
	}
}

func (c *Comparison) askVariants(q Request, r, s *rule, http bool) {
	for _, of := range []*rule{s, r} { // what the focus asks for comes last, and counts
		if of.more == nil {
			continue
		}
		if of.more.networks != nil {
			q.Source = sourceIn(of.more.networks[0])
		}
		if of.more.ports != nil {
			q.Port = of.more.ports[0].low
		}
		if of.more.sni != nil {
			q.SNI = of.more.sni[0].instance()
		}
	}
	c.askOnce(&q)
	if !http {
		return
	}
	for _, h := range requestsOf(r, s) {
		q.HTTP = h
		c.askOnce(&q)
	}
}

// askOnce asks, unless the same was asked or there were too many.
func (c *Comparison) askOnce(q *Request) {
	key := q.describe() + q.Source.String() + q.SNI
	if q.HTTP != nil {
		for _, h := range q.HTTP.Headers {
			key += " " + h.Name + "=" + h.Value
		}
	}
	if c.seen[key] {
		return
	}
	if len(c.seen) >= maxMadeUp {
		c.Incomplete = true
		return
	}
	c.seen[key] = true
	asked := *q
	c.Ask(&asked)
}

// somebody returns peers whom both sides match: those they name, and for each
// pattern one.
func somebody(a, b *subjects) []Peer {
	var out []Peer
	add := func(id string) {
		if parsed, err := spiffeid.FromString(id); err == nil && len(out) < maxSideNames && !slices.ContainsFunc(out, func(p Peer) bool { return p.ID == parsed }) {
			out = append(out, Peer{ID: parsed})
		}
	}
	switch {
	case !a.given && !b.given:
		return []Peer{{}}
	case !a.given:
		a = b
	case !b.given:
		b = a
	}
	if a.unauthenticated && b.unauthenticated {
		out = append(out, Peer{Unauthenticated: true})
	}
	for p := range a.all() {
		for q := range b.all() {
			if len(out) >= maxSideNames {
				return out
			}
			if p.meets(q) {
				add(idOf(p, q))
			}
		}
	}
	return out
}

// somewhere stands for a segment that nothing names.
const somewhere = "any"

// idOf returns an ID that both patterns match, which meet.
func idOf(p, q Pattern) string {
	mine, its := p.text[p.path:], q.text[q.path:]
	id := p.text[:p.path]
	for mine != "" || its != "" {
		a, b := somewhere, somewhere
		if mine != "" {
			a, mine = cutSegment(mine)
		}
		if its != "" {
			b, its = cutSegment(its)
		}
		switch {
		case a == many && b == many:
			return id + "/" + somewhere
		case a == many:
			a, mine = b, "/"+many
			if its == "" {
				mine = ""
			}
		case b == many:
			b, its = a, "/"+many
			if mine == "" {
				its = ""
			}
		}
		if a == one {
			a = b
		}
		if a == one {
			a = somewhere
		}
		id += "/" + a
	}
	return id
}

// commonNames are the listeners that both name; the empty name is one that no
// rule has.
func commonNames(a, b []string) []string {
	switch {
	case len(a) == 0 && len(b) == 0:
		return []string{""}
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	return slices.DeleteFunc(slices.Clone(a), func(name string) bool { return !slices.Contains(b, name) })
}
