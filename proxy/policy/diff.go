package policy

import (
	"cmp"
	"slices"
	"strings"
)

// Comparison asks two policies the same and keeps where they differ.
type Comparison struct {
	was, is *Policy
	changes map[changeKey]*Change

	Asked      int // requests
	Redecided  int // of those, how many something else decides, with the same answer
	Incomplete bool
	Conditions []string // rules that differ and have `when`: AskAround cannot make what it asks for
}

// Change is a group of requests that one policy allows and the other denies,
// by the same rules.
type Change struct {
	Was, Is  Decision // the answers, without what shadow rules say
	Count    int
	Examples []Request // the first few that differ in more than ports of clients and times
}

type changeKey struct{ was, is step }

// step is what decided.
type step struct {
	rule   string
	reason Reason
}

// maxExamples is how many requests a Change names.
const maxExamples = 5

// NewComparison compares what was with what is; either may be nil.
func NewComparison(was, is *Policy) *Comparison {
	return &Comparison{was: was, is: is, changes: map[changeKey]*Change{}}
}

// Ask asks both, and returns what was and what is answered.
func (c *Comparison) Ask(q *Request) (was, is Decision) {
	c.was.Decide(q, &was)
	c.is.Decide(q, &is)
	c.note(q, &was, &is)
	return was, is
}

// note takes in two answers.
func (c *Comparison) note(q *Request, was, is *Decision) {
	c.Asked++
	key := changeKey{step{was.Rule, was.Reason}, step{is.Rule, is.Reason}}
	if was.Allow == is.Allow {
		if key.was != key.is {
			c.Redecided++
		}
		return
	}
	change := c.changes[key]
	if change == nil {
		change = &Change{
			Was: Decision{Allow: was.Allow, Rule: was.Rule, Reason: was.Reason},
			Is:  Decision{Allow: is.Allow, Rule: is.Rule, Reason: is.Reason},
		}
		c.changes[key] = change
	}
	change.Count++
	if len(change.Examples) < maxExamples && !slices.ContainsFunc(change.Examples, func(e Request) bool { return e.resembles(q) }) {
		change.Examples = append(change.Examples, *q)
	}
}

// resembles reports whether a person would take two requests for the same.
func (r *Request) resembles(o *Request) bool {
	return r.describe() == o.describe() && r.Source.Addr() == o.Source.Addr() && r.Port == o.Port && r.SNI == o.SNI
}

// Changes returns what differs: first what is allowed by now, and the most
// frequent first.
func (c *Comparison) Changes() []Change {
	out := make([]Change, 0, len(c.changes))
	for _, change := range c.changes {
		out = append(out, *change)
	}
	slices.SortFunc(out, func(a, b Change) int {
		if a.Is.Allow != b.Is.Allow {
			return map[bool]int{true: -1, false: 1}[a.Is.Allow]
		}
		return cmp.Or(
			cmp.Compare(b.Count, a.Count),
			cmp.Compare(a.Was.Rule, b.Was.Rule), cmp.Compare(a.Was.Reason, b.Was.Reason),
			cmp.Compare(a.Is.Rule, b.Is.Rule), cmp.Compare(a.Is.Reason, b.Is.Reason),
		)
	})
	return out
}

// Differences is what Compare says, and revocations and ceilings among it: as
// revoked:ID, revoked:SERIAL@ISSUER and trust_domain:NAME.
func (c *Comparison) Differences() Changes {
	out := c.is.Compare(c.was)
	was, is := c.was.bars(), c.is.bars()
	for name, b := range is {
		if old, ok := was[name]; !ok {
			out.Added = append(out.Added, name)
		} else if old.text != b.text {
			out.Changed = append(out.Changed, name)
		}
	}
	for name := range was {
		if _, ok := is[name]; !ok {
			out.Removed = append(out.Removed, name)
		}
	}
	for _, list := range [][]string{out.Added, out.Changed, out.Removed} {
		slices.Sort(list)
	}
	return out
}

// LimitChange is a limit that differs: nil where a policy has none of that id.
// Both may bound the same, for others.
type LimitChange struct {
	ID      string
	Was, Is *Limit
}

// Limits returns the limits that differ, by id. No request asks for them: a
// limit allows and denies by what came before.
func (c *Comparison) Limits() []LimitChange {
	var out []LimitChange
	differ := c.Differences()
	names := slices.Concat(differ.Added, differ.Changed, differ.Removed)
	slices.Sort(names)
	for _, name := range names {
		if id, ok := strings.CutPrefix(name, "limit:"); ok {
			out = append(out, LimitChange{ID: id, Was: c.was.limitOf(id), Is: c.is.limitOf(id)})
		}
	}
	return out
}

func (p *Policy) limitOf(id string) *Limit {
	if p != nil {
		for i := range p.limits {
			if p.limits[i].ID == id {
				return &p.limits[i].Limit
			}
		}
	}
	return nil
}

// Reported returns the rules among Differences that are in shadow in each
// policy that has them, by id: they decide nothing, and are told of.
func (c *Comparison) Reported() []string {
	shadow, decides := map[string]bool{}, map[string]bool{}
	for _, p := range []*Policy{c.was, c.is} {
		if p == nil {
			continue
		}
		for i := range p.rules {
			to := decides
			if p.rules[i].shadow {
				to = shadow
			}
			to[p.rules[i].id] = true
		}
	}
	differ := c.Differences()
	names := slices.Concat(differ.Added, differ.Changed, differ.Removed)
	names = slices.DeleteFunc(names, func(name string) bool { return !shadow[name] || decides[name] })
	slices.Sort(names)
	return names
}

// bar is a revocation or a ceiling.
type bar struct {
	text        string    // the same for two that mean the same
	patterns    []*member // whom it is about
	certificate *revocation
}

// bars returns them by the names that Differences gives them.
func (p *Policy) bars() map[string]bar {
	out := map[string]bar{}
	if p == nil {
		return out
	}
	for i := range p.revoked {
		r := &p.revoked[i]
		if r.serial != "" {
			out["revoked:"+r.serial+"@"+r.issuer] = bar{certificate: r}
		} else {
			out["revoked:"+r.pattern.text] = bar{patterns: []*member{r.pattern}}
		}
	}
	for _, ceiling := range p.ceilings {
		texts := patternTexts(ceiling.patterns)
		slices.Sort(texts)
		everybody, _ := ParsePattern(scheme + ceiling.domain + "/" + many)
		out["trust_domain:"+ceiling.domain] = bar{
			text:     strings.Join(slices.Compact(texts), " "),
			patterns: append(slices.Clone(ceiling.patterns), &member{Pattern: everybody}),
		}
	}
	return out
}

// HeaderRules returns the enforced rules that ask for headers or for subjects,
// or whose `when` may, by id. An access log has neither, so that what these
// rules say of its records cannot be known: an allow of gRPC calls is one of
// them, as it asks for the content type.
func (p *Policy) HeaderRules() []string {
	var ids []string
	for _, r := range p.enforced() {
		if r.more == nil {
			continue
		}
		if h := r.more.http; h != nil && (len(h.headers) > 0 || h.grpc && r.allow) || r.more.when != nil && r.more.when.usesHeaders || r.more.asksSubject() {
			ids = append(ids, r.id)
		}
	}
	return ids
}

// RevokesCertificates reports whether single certificates are revoked. An
// access log has their serial numbers, and not by whom they were issued.
func (p *Policy) RevokesCertificates() bool {
	return p != nil && slices.ContainsFunc(p.revoked, func(r revocation) bool { return r.serial != "" })
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
