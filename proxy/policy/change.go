package policy

import (
	"slices"
	"strings"
)

// Changes is what is other in one policy than in another, by id, sorted.
// Limits stand among rules, as limit:ID.
type Changes struct {
	Added, Changed, Removed []string
}

// Compare says which rules and limits of p are not in was, mean something else
// there, or are missing. Either may be nil.
func (p *Policy) Compare(was *Policy) Changes {
	var c Changes
	if p == nil {
		p = &Policy{}
	}
	if was == nil {
		was = &Policy{}
	}
	now, then := newDigester(), newDigester()
	compare(&c, "", p.rules, was.rules,
		func(r *rule) string { return r.id },
		func(a, b *rule) bool {
			now.rule(a)
			then.rule(b)
			return now.sum() == then.sum()
		})
	compare(&c, "limit:", p.limits, was.limits,
		func(l *limit) string { return l.ID },
		func(a, b *limit) bool {
			now.limit(a)
			then.limit(b)
			return now.sum() == then.sum()
		})
	for _, list := range [][]string{c.Added, c.Changed, c.Removed} {
		slices.Sort(list)
	}
	return c
}

// compare walks two lists that are sorted by id.
func compare[T any](c *Changes, prefix string, now, was []T, id func(*T) string, same func(a, b *T) bool) {
	for len(now) > 0 || len(was) > 0 {
		order := -1
		switch {
		case len(now) == 0:
			order = 1
		case len(was) > 0:
			order = strings.Compare(id(&now[0]), id(&was[0]))
		}
		switch {
		case order < 0:
			c.Added = append(c.Added, prefix+id(&now[0]))
			now = now[1:]
		case order > 0:
			c.Removed = append(c.Removed, prefix+id(&was[0]))
			was = was[1:]
		default:
			if !same(&now[0], &was[0]) {
				c.Changed = append(c.Changed, prefix+id(&now[0]))
			}
			now, was = now[1:], was[1:]
		}
	}
}

// TimeDependent reports whether an answer may change by the passing of time
// alone, so that live connections are to be asked again each minute.
func (p *Policy) TimeDependent() bool {
	return p != nil && slices.ContainsFunc(p.rules, func(r rule) bool { return r.more != nil && r.more.when != nil && r.more.when.usesTime })
}
